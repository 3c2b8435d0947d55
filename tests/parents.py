"""Random `nemotron_h` parents: every parameter random, so that no zero bias or unit norm hides a mistake."""

import random

import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from elastic_core import ElasticModel, Submodel
from elastic_core.families.nemotron_h import layers_of


def random_config(seed: int) -> NemotronHConfig:
    """A small hybrid of odd sizes with several group counts."""
    rng = random.Random(seed)
    groups, kv_heads = rng.choice([1, 2, 3]), rng.choice([1, 2])
    pattern = ["M", "-", "*", *rng.choices("M-*", k=rng.randint(1, 4))]
    rng.shuffle(pattern)
    return NemotronHConfig(
        vocab_size=rng.choice([37, 64]),
        hidden_size=rng.choice([17, 24, 32]),
        layers_block_type=NemotronHConfig._pattern_to_list("".join(pattern)),
        num_attention_heads=kv_heads * rng.choice([2, 3]),
        num_key_value_heads=kv_heads,
        head_dim=rng.choice([5, 8]),
        intermediate_size=rng.choice([19, 40]),
        ssm_state_size=rng.choice([7, 16]),
        mamba_num_heads=groups * rng.choice([2, 3]),
        mamba_head_dim=rng.choice([6, 9]),
        n_groups=groups,
        conv_kernel=rng.choice([2, 4]),
        chunk_size=rng.choice([8, 128]),
        use_bias=rng.random() < 0.5,
        mlp_bias=rng.random() < 0.5,
        use_conv_bias=rng.random() < 0.7,
        time_step_min=rng.choice([0.001, 0.05]),
    )


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draw every parameter anew, at scales that keep all of them visible in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight") or name.endswith("norm_f.weight") or name.endswith(".D"):
                parameter.copy_(1 + 0.5 * noise)
            elif name.endswith("A_log"):
                parameter.copy_(noise)
            elif name.endswith("dt_bias"):
                parameter.copy_(3 * noise - 2)  # far below zero too, where the lower limit of dt shows
            elif parameter.dim() == 1:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model


def save_random_parent(directory, seed: int, config: NemotronHConfig | None = None) -> NemotronHForCausalLM:
    """A random transformers model, saved to `directory`."""
    model = randomise(NemotronHForCausalLM(config or random_config(seed)), seed).eval()
    model.save_pretrained(directory)
    return model


def random_elastic(seed: int, config: NemotronHConfig | None = None) -> ElasticModel:
    return randomise(ElasticModel(config or random_config(seed)), seed).eval()


def random_submodel(config, seed: int, heterogeneous: tuple[str, ...] = (), all_layers: bool = False) -> Submodel:
    """Random sizes; the fields named in `heterogeneous` differ by layer."""
    rng = random.Random(seed)
    groups = {"mamba_num_heads": config.n_groups, "num_attention_heads": config.num_key_value_heads}
    characters = {"intermediate_size": "-", "mamba_num_heads": "M", "num_attention_heads": "*"}

    def size(field):
        step = groups.get(field, 1)
        return rng.randint(1, getattr(config, field) // step) * step

    widths = {field: size(field) for field in ("hidden_size", "mamba_head_dim", *characters)}
    for field in heterogeneous:
        widths[field] = tuple(size(field) for _ in layers_of(config, characters[field]))
    num_layers = len(config.layers_block_type)
    kept = range(num_layers) if all_layers else sorted(rng.sample(range(num_layers), rng.randint(1, num_layers)))
    return Submodel(kept_layers=tuple(kept), **widths)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest deviation over the largest reference value."""
    return ((value - reference).abs().max() / reference.abs().max().clamp(min=1e-30)).item()


def random_ids(config, seed: int, shape=(2, 21)) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
