"""Random parents of all architectures: every parameter random, so that no zero bias or unit norm hides a mistake."""

import random

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, NemotronHConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from elastic_core import ElasticModel, Submodel
from elastic_core.model import architectures
from elastic_core.model.architectures.nemotron_h import layers_of
from elastic_core.model.architectures.nemotron_h_ffn import fewest_experts
from elastic_core.model.norm_gains import NormRatios


def random_config(seed: int) -> NemotronHConfig:
    """A small hybrid of odd sizes with several group counts."""
    rng = random.Random(seed)
    groups, kv_heads = rng.choice([1, 2, 3]), rng.choice([1, 2])
    pattern = ["M", "-", "*", *rng.choices("M-*", k=rng.randint(1, 4))]
    rng.shuffle(pattern)
    config = NemotronHConfig(
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
    return architectures.with_clamped_time_step(config)  # so that transformers, which always clamps, computes the same


def random_moe_config(seed: int) -> NemotronHConfig:
    """The same with mixtures of experts, in groups or not, in a latent space or not."""
    rng, config = random.Random(1000 + seed), random_config(seed)
    groups, per_token = rng.choice([1, 1, 2, 3]), rng.choice([1, 2, 3])
    config.n_group, config.topk_group = groups, rng.randint(1, groups)
    config.num_experts_per_tok = per_token
    config.n_routed_experts = fewest_experts(config) + groups * rng.randint(1, 2)
    config.moe_intermediate_size = rng.choice([11, 16])
    config.moe_shared_expert_intermediate_size = rng.choice([9, 20])
    config.moe_latent_size = rng.choice([None, 7, 16])
    config.norm_topk_prob = rng.random() < 0.5
    config.routed_scaling_factor = rng.choice([1.0, 2.5])
    types = ["moe" if kind == "mlp" else kind for kind in config.layers_block_type]
    config.layers_block_type = types + rng.choice([["moe"], ["mlp"]])
    config._experts_implementation = "eager"  # transformers' grouped products take no rows of odd sizes
    return config


def random_llama_config(seed: int):
    """A small Llama, Qwen2 or Qwen3 of odd sizes, with and without biases, tied heads and scaled rotary positions."""
    rng = random.Random(seed)
    kv_heads, scaled = rng.choice([1, 2, 3]), {"original_max_position_embeddings": 16}
    num_heads = kv_heads * rng.choice([1, 2, 3])
    values = {
        "vocab_size": rng.choice([37, 64]),
        "hidden_size": num_heads * rng.choice([3, 5, 8]),  # transformers' Llama takes no others
        "num_hidden_layers": rng.randint(2, 4),
        "num_attention_heads": num_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": rng.choice([4, 6, 10]),
        "intermediate_size": rng.choice([19, 40]),
        "hidden_act": rng.choice(["silu", "silu", "gelu"]),
        "tie_word_embeddings": rng.random() < 0.5,
        "max_position_embeddings": 64,
        "eos_token_id": None,
        "bos_token_id": None,
        "rope_parameters": rng.choice(
            [
                {"rope_type": "default", "rope_theta": 1e4},
                {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0},
                {"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, **scaled},
                {
                    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, **scaled},
                    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
                },
            ]
        ),
    }
    biases = {"attention_bias": rng.random() < 0.5, "mlp_bias": rng.random() < 0.5}
    kind = rng.choice([LlamaConfig, LlamaConfig, Qwen2Config, Qwen3Config])
    if kind is Qwen2Config:
        values["hidden_size"] = num_heads * values["head_dim"]  # readers take no other
    else:  # its biases are not for the configuration to say
        values["attention_bias"] = biases["attention_bias"]
    return kind(**values, mlp_bias=biases["mlp_bias"]) if kind is LlamaConfig else kind(**values)


CONFIGS = {"nemotron_h": random_config, "llama": random_llama_config}


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
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model


def random_reference(seed: int, config=None) -> PreTrainedModel:
    """A random transformers model."""
    config = config or random_config(seed)
    model_class = architectures.model_class(config)
    return randomise(model_class(config), seed).eval()


def save_random_parent(directory, seed: int, config=None) -> PreTrainedModel:
    """A random transformers model, saved to `directory`."""
    model = random_reference(seed, config)
    model.save_pretrained(directory)
    return model


def write_tokenizer(directory) -> None:
    """A tokenizer of one token, where a test needs a directory that has one."""
    Tokenizer(WordLevel({"a": 0}, "a")).save(str(directory / "tokenizer.json"))


def random_elastic(seed: int, config=None) -> ElasticModel:
    return randomise(ElasticModel(config or random_config(seed)), seed).eval()


def random_ratios(config) -> NormRatios:
    """Norm ratios that differ from norm to norm and from size to size; 1 for all channels."""
    generator, names = torch.Generator().manual_seed(5), architectures.norm_names(config)
    ratios = 0.7 + 0.6 * torch.rand(len(names), config.hidden_size, generator=generator)
    ratios[:, -1] = 1
    return NormRatios(dict(zip(names, ratios, strict=True)))


def random_submodel(config, seed: int, heterogeneous: tuple[str, ...] = (), all_layers: bool = False) -> Submodel:
    """Random sizes; the fields named in `heterogeneous` differ by layer."""
    rng = random.Random(seed)
    if config.model_type != "nemotron_h":
        return _random_llama_submodel(config, rng, heterogeneous, all_layers)
    groups = {"mamba_num_heads": config.n_groups, "num_attention_heads": config.num_key_value_heads}
    characters = {"intermediate_size": "-", "mamba_num_heads": "M", "num_attention_heads": "*"}

    def size(field):
        step = groups.get(field, 1)
        return rng.randint(1, getattr(config, field) // step) * step

    widths = {field: size(field) for field in ("hidden_size", "mamba_head_dim", *characters)}
    if layers_of(config, "E"):
        widths |= {field: size(field) for field in ("moe_intermediate_size", "moe_shared_expert_intermediate_size")}
        groups, least = config.n_group, fewest_experts(config)
        widths["num_experts"] = rng.randrange(least, config.n_routed_experts + 1, groups)
    for field in heterogeneous:
        widths[field] = tuple(size(field) for _ in layers_of(config, characters[field]))
    num_layers = len(config.layers_block_type)
    kept = range(num_layers) if all_layers else sorted(rng.sample(range(num_layers), rng.randint(1, num_layers)))
    return Submodel(kept_layers=tuple(kept), **widths)


def _random_llama_submodel(config, rng: random.Random, heterogeneous, all_layers: bool) -> Submodel:
    """Sizes that transformers' Llama takes, where no head count differs: hidden channels in multiples of the heads."""
    num_layers, groups = config.num_hidden_layers, config.num_key_value_heads

    def num_heads():
        return rng.randint(1, config.num_attention_heads // groups) * groups

    def ffn():
        return rng.randint(1, config.intermediate_size)

    heads = num_heads()
    hidden_size = rng.randint(1, config.hidden_size // heads) * heads
    if config.model_type == "qwen2":
        hidden_size = heads * config.head_dim
    return Submodel(
        hidden_size=hidden_size,
        kept_layers=range(num_layers)
        if all_layers
        else sorted(rng.sample(range(num_layers), rng.randint(1, num_layers))),
        intermediate_size=tuple(ffn() for _ in range(num_layers)) if "intermediate_size" in heterogeneous else ffn(),
        num_attention_heads=tuple(num_heads() for _ in range(num_layers))
        if "num_attention_heads" in heterogeneous
        else heads,
    )


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest deviation over the largest reference value."""
    return ((value - reference).abs().max() / reference.abs().max().clamp(min=1e-30)).item()


def random_ids(config, seed: int, shape=(2, 21)) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
