"""The elastic forward against transformers, against slices, and against a naive model written from the equations."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, NemotronHForCausalLM

from elastic_core import ElasticModel, Submodel, extract
from elastic_core.model import architectures
from elastic_core.model.submodel import full_sizes
from tests.support.models.parents import (
    random_config,
    random_elastic,
    random_ids,
    random_reference,
    random_submodel,
    randomise,
    relative_error,
    save_random_parent,
)
from tests.support.oracles.index_sets import in_groups, index_sets

PER_LAYER = ("intermediate_size", "mamba_num_heads", "num_attention_heads")


def as_elastic(reference: NemotronHForCausalLM, config=None) -> ElasticModel:
    model = ElasticModel(config or reference.config)
    model.load_state_dict(reference.state_dict())
    return model.eval()


def masks_of(config, submodel) -> dict[str, torch.Tensor]:
    """One-hot gates of a submodel: 0/1 per unit at full size, made unit by unit."""
    submodel, masks, seen = submodel.resolve(config), {}, {}

    def mask(key, size, kept, groups=1):
        masks[key] = torch.zeros(size, dtype=torch.float64)
        masks[key][in_groups(size, kept, groups)] = 1

    mask("hidden", config.hidden_size, submodel.hidden_size)
    for i, kind in enumerate(config.layers_block_type):
        ordinal = seen[kind] = seen.get(kind, -1) + 1
        values = [getattr(submodel, field) for field in PER_LAYER]
        ffn, mamba, heads = (value[ordinal] if isinstance(value, tuple) else value for value in pad(values, ordinal))
        if kind == "mlp":
            mask(f"ffn.{i}", config.intermediate_size, ffn)
        elif kind == "full_attention":
            mask(f"attention_heads.{i}", config.num_attention_heads, heads, config.num_key_value_heads)
        else:
            mask(f"mamba_heads.{i}", config.mamba_num_heads, mamba, config.n_groups)
            mask(f"mamba_channels.{i}", config.mamba_head_dim, submodel.mamba_head_dim)
    masks["depth"] = torch.tensor([float(i in submodel.kept_layers) for i in range(i + 1)], dtype=torch.float64)
    return masks


def pad(values, ordinal):
    """Tuples of other layer types may be shorter than `ordinal`; their entries are not asked for."""
    return [v if not isinstance(v, tuple) else v + (None,) * (ordinal + 1) for v in values]


def naive_logits(model: ElasticModel, ids, gates) -> torch.Tensor:
    """The soft forward (eqs. 21–35) head by head and position by position, with torch's own convolution."""
    config, p = model.config, dict(model.named_parameters())
    g = gates["hidden"]

    def norm(x, weight):
        return weight * x / torch.sqrt((x**2).sum(-1, keepdim=True) / g.sum() + config.layer_norm_epsilon)

    def mlp(x, name, i):
        h = torch.relu(F.linear(x, p[name + "up_proj.weight"], p.get(name + "up_proj.bias"))) ** 2
        return F.linear(h * gates[f"ffn.{i}"], p[name + "down_proj.weight"], p.get(name + "down_proj.bias"))

    def attention(x, name, i):
        length, size = x.shape[1], config.head_dim
        per_group = config.num_attention_heads // config.num_key_value_heads
        causal = torch.ones(length, length).tril().bool()
        outputs = []
        for h in range(config.num_attention_heads):
            kv = slice(h // per_group * size, (h // per_group + 1) * size)
            q = x @ p[name + "q_proj.weight"][h * size : (h + 1) * size].T
            k, v = x @ p[name + "k_proj.weight"][kv].T, x @ p[name + "v_proj.weight"][kv].T
            scores = (q @ k.transpose(1, 2) / size**0.5).masked_fill(~causal, -torch.inf)
            outputs.append(scores.softmax(-1) @ v * gates[f"attention_heads.{i}"][h])
        return torch.cat(outputs, -1) @ p[name + "o_proj.weight"].T

    def mamba(x, name, i):
        H, P, G, N = config.mamba_num_heads, config.mamba_head_dim, config.n_groups, config.ssm_state_size
        head_gate, channel_gate = gates[f"mamba_heads.{i}"], gates[f"mamba_channels.{i}"]
        rows = F.linear(x, p[name + "in_proj.weight"], p.get(name + "in_proj.bias"))
        z, conv, dt = rows[..., : H * P], rows[..., H * P : 2 * H * P + 2 * G * N], rows[..., 2 * H * P + 2 * G * N :]
        conv = F.conv1d(
            F.pad(conv.transpose(1, 2), (config.conv_kernel - 1, 0)),
            p[name + "conv1d.weight"],
            p.get(name + "conv1d.bias"),
            groups=conv.shape[-1],
        )
        conv = F.silu(conv).transpose(1, 2)
        dt = torch.clamp(F.softplus(dt + p[name + "dt_bias"]), *config.time_step_limit)
        groups = []
        for j in range(G):
            B = conv[..., H * P + j * N : H * P + (j + 1) * N]
            C = conv[..., H * P + (G + j) * N : H * P + (G + j + 1) * N]
            heads = []
            for h in range(j * H // G, (j + 1) * H // G):
                state, ys = torch.zeros(x.shape[0], P, N, dtype=x.dtype), []
                for t in range(x.shape[1]):
                    u = conv[:, t, h * P : (h + 1) * P]
                    decay = torch.exp(-torch.exp(p[name + "A_log"][h]) * dt[:, t, h])[:, None, None]
                    state = decay * state + dt[:, t, h, None, None] * u[:, :, None] * B[:, t, None, :]
                    ys.append((state * C[:, t, None, :]).sum(-1) + p[name + "D"][h] * u)
                y = torch.stack(ys, 1) * F.silu(z[..., h * P : (h + 1) * P])
                heads.append(y * head_gate[h] * channel_gate)
            y = torch.cat(heads, -1)
            live = head_gate.sum() * channel_gate.sum() / G
            groups.append(y / torch.sqrt((y**2).sum(-1, keepdim=True) / live + config.layer_norm_epsilon))
        y = torch.cat(groups, -1) * p[name + "norm.weight"]
        return F.linear(y, p[name + "out_proj.weight"], p.get(name + "out_proj.bias"))

    mixers = {"mlp": mlp, "full_attention": attention, "linear_attention": mamba}
    x = p["model.embeddings.weight"][ids] * g
    for i, kind in enumerate(config.layers_block_type):
        y = mixers[kind](norm(x, p[f"model.layers.{i}.norm.weight"]), f"model.layers.{i}.mixer.", i)
        x = x + y * g * gates["depth"][i]
    return norm(x, p["model.norm_f.weight"]) @ p["lm_head.weight"].T


# The full model


@pytest.mark.parametrize("seed", range(16))
def test_full_logits_are_those_of_transformers(seed):
    reference = randomise(NemotronHForCausalLM(random_config(seed)), seed).eval()
    model = as_elastic(reference)
    for length in (1, 2, 7, 8, 9, 33, 64) if seed % 4 else (1, 130, 257):  # chunks are 8 or 128 there, ours differ
        ids = random_ids(reference.config, seed, (2, length))
        with torch.no_grad():
            assert relative_error(model(ids), reference(ids, use_cache=False).logits) < 1e-5, length


@pytest.mark.parametrize("seed", range(6))
def test_full_logits_in_bfloat16(seed):
    """Both round differently: neither may be further from float32 than a few bfloat16 steps allow."""
    reference = randomise(NemotronHForCausalLM(random_config(seed)), seed).eval()
    model, ids = as_elastic(reference), random_ids(reference.config, seed)
    with torch.no_grad():
        exact = reference(ids, use_cache=False).logits
        ours, theirs = model.to(torch.bfloat16)(ids), reference.to(torch.bfloat16)(ids).logits
    assert ours.dtype == torch.bfloat16
    error, reference_error = ((t.float() - exact).pow(2).mean().sqrt() / exact.std() for t in (ours, theirs))
    assert error < max(0.03, 1.5 * reference_error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_float32_gates_keep_the_models_element_type(dtype):
    model = random_elastic(2).to(dtype)
    ids, submodel = random_ids(model.config, 2), random_submodel(model.config, 2)
    gates = {key: mask.float() for key, mask in masks_of(model.config, submodel).items()}
    with torch.no_grad():
        soft, hard = model(ids, gates=gates), model(ids, submodel)
    assert soft.dtype == dtype
    assert relative_error(soft.float(), hard.float()) < (0.05 if dtype == torch.bfloat16 else 1e-5)


# Soft = slice = extracted


@pytest.mark.parametrize("heterogeneous", [(), PER_LAYER])
@pytest.mark.parametrize("seed", range(10))
def test_soft_at_one_hot_is_the_slice(seed, heterogeneous):
    model = random_elastic(seed).double()
    ids = random_ids(model.config, seed, (2, 13))
    for number in range(3):
        submodel = random_submodel(model.config, 100 * seed + number, heterogeneous)
        with torch.no_grad():
            hard = model(ids, submodel)
            soft = model(ids, gates=masks_of(model.config, submodel))
            naive = naive_logits(model, ids, masks_of(model.config, submodel))
        assert relative_error(soft, hard) < 1e-12
        assert relative_error(naive, hard) < 1e-12


def test_the_time_step_keeps_to_the_checkpoints_limits():
    """Against the recurrence. Limits change the result here, so that a limit that is not applied is seen."""
    config, found = random_config(1), []
    for limit in ((0.0, math.inf), (0.05, math.inf), (0.0, 0.1), [0.01, 0.1]):
        config.time_step_min, config.time_step_limit = 0.02, limit
        model, ids = random_elastic(1, config).double(), random_ids(config, 1, (2, 13))
        with torch.no_grad():
            found.append(model(ids))
            naive = naive_logits(model, ids, masks_of(config, model.full))
        assert relative_error(naive, found[-1]) < 1e-12
    assert all(relative_error(one, other) > 1e-3 for one, other in itertools.combinations(found, 2))
    config.time_step_limit = (0.0, math.inf)
    clamped = architectures.with_clamped_time_step(config)
    assert clamped.time_step_limit == (0.02, math.inf) and config.time_step_limit == (0.0, math.inf)
    reference = random_reference(1, config)  # transformers, which has a lower limit for all checkpoints
    ours = as_elastic(reference, clamped)
    with torch.no_grad():
        assert relative_error(ours(ids), reference(ids, use_cache=False).logits) < 1e-5
        assert relative_error(as_elastic(reference)(ids), reference(ids, use_cache=False).logits) > 1e-3


@pytest.mark.parametrize("heterogeneous", [(), ("intermediate_size",), PER_LAYER])
@pytest.mark.parametrize("seed", range(5))
def test_slice_and_its_gradients_are_the_extracted_models(tmp_path, seed, heterogeneous):
    save_random_parent(tmp_path / "parent", seed)
    model = ElasticModel.from_pretrained(tmp_path / "parent")
    config, ids = model.config, random_ids(model.config, seed)
    # Not seed + 50: its seed 2 normalises one channel in which the scan's output nearly cancels D·x, so that
    # transformers is 2e-5 from float64 there.
    submodel = extract(tmp_path / "parent", random_submodel(config, seed + 80, heterogeneous), tmp_path / "submodel")
    extracted = AutoModelForCausalLM.from_pretrained(
        tmp_path / "submodel", trust_remote_code=not submodel.is_homogeneous
    )
    theirs, ours = extracted(ids, use_cache=False).logits, model(ids, submodel)
    assert relative_error(ours, theirs) < 1e-5
    soft = model(ids, gates={key: mask.float() for key, mask in masks_of(config, submodel).items()})
    assert relative_error(soft, theirs) < 1e-5

    for logits in (theirs, ours):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in extracted.named_parameters()}
    largest = max(gradient.abs().max() for gradient in gradients.values())
    sets = index_sets(config, submodel)
    number = {layer: i for i, layer in enumerate(submodel.kept_layers)}
    for name, parameter in model.named_parameters():
        if name not in sets:
            assert parameter.grad is None, name  # a dropped layer
            continue
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(number[int(parts[2])])
        kept = torch.zeros(parameter.shape, dtype=torch.bool)
        kept[torch.meshgrid(*(torch.tensor(rows) for rows in sets[name]), indexing="ij")] = True
        gradient = gradients.pop(".".join(parts))
        # A gradient that nearly vanishes, as A_log's where decay is fast, is judged by the rounding of the others.
        scale = torch.maximum(gradient.abs().max(), 1e-2 * largest)
        # Both round in their own way: over many parents, either is up to 2.5e-5 from float64.
        assert (parameter.grad[kept].view(gradient.shape) - gradient).abs().max() / scale < 5e-5, name
        assert not parameter.grad[~kept].any(), name
    assert not gradients


# Gates


@pytest.mark.parametrize("seed", range(6))
def test_fractional_gates_and_all_gradients_equal_the_naive_model(seed):
    model = random_elastic(seed).double()
    ids, generator = random_ids(model.config, seed, (2, 9)), torch.Generator().manual_seed(seed)
    sizes = full_sizes(model.config) | {"depth": len(model.config.layers_block_type)}
    gates = {key: torch.rand(n, generator=generator, dtype=torch.float64) + 0.05 for key, n in sizes.items()}
    results = []
    for function in (lambda: model(ids, gates=gates), lambda: naive_logits(model, ids, gates)):
        leaves = {**dict(model.named_parameters()), **{k: g.requires_grad_() for k, g in gates.items()}}
        logits = function()
        results.append([logits.detach(), *torch.autograd.grad(logits.log_softmax(-1)[..., 3].sum(), leaves.values())])
    for name, ours, naive in zip(["logits", *leaves], *results, strict=True):
        assert relative_error(ours, naive) < 1e-9, name


@pytest.mark.parametrize("seed", range(4))
def test_hard_gates_of_one_only_carry_a_gradient(seed):
    """A scalar gate per axis: value one changes nothing; its gradient is the finite difference of the loss."""
    model = random_elastic(seed).double()
    config, ids = model.config, random_ids(model.config, seed, (2, 9))
    submodel = random_submodel(config, seed, PER_LAYER, all_layers=True).resolve(config)
    num_layers = len(config.layers_block_type)

    def loss(gates):
        return model(ids, submodel, gates).log_softmax(-1)[..., 3].mean()

    gates = {key: torch.ones((), dtype=torch.float64, requires_grad=True) for key in full_sizes(config)}
    gates["depth"] = torch.ones(num_layers, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        # To rounding: a gated matrix is a copy, a narrowed one a view, which may be multiplied in another order.
        assert relative_error(model(ids, submodel, gates), model(ids, submodel)) < 1e-13
    gradients = dict(zip(gates, torch.autograd.grad(loss(gates), list(gates.values())), strict=True))
    masks, step = masks_of(config, submodel), 1e-5
    for key in gates:
        for entry in range(num_layers) if key == "depth" else [None]:
            values = []
            for sign in (1, -1):
                moved = {k: g.detach().clone() for k, g in gates.items()}
                moved[key] += sign * step * (1 if entry is None else F.one_hot(torch.tensor(entry), num_layers))
                with torch.no_grad():
                    values.append(loss(moved).item())
                    # ... and a scalar gate on the slice means that multiple of the mask on the whole.
                    scaled = {k: masks[k] * moved[k] for k in masks}
                    assert relative_error(naive_logits(model, ids, scaled), model(ids, submodel, moved)) < 1e-10
            slope = (values[0] - values[1]) / (2 * step)
            gradient = gradients[key] if entry is None else gradients[key][entry]
            assert abs(gradient.item() - slope) < 1e-7 + 1e-5 * abs(slope), key


def test_a_dropped_layer_is_not_computed_with():
    model = random_elastic(0)
    calls = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, i=i: calls.append(i))
    model(random_ids(model.config, 0), Submodel(kept_layers=(0, 2)))
    assert calls == [0, 2]


@pytest.mark.thorough
def test_a_compiled_slice_is_one_graph():
    """The slice is an argument: its rows are looked up outside, so nothing in the forward depends on data."""
    config = random_config(5)
    config.layers_block_type = ["linear_attention", "mlp", "full_attention"]  # one of each kind compiles faster
    assert config.n_groups > 1 or config.num_key_value_heads > 1  # gathers, not views alone
    model, ids = random_elastic(5, config), random_ids(config, 5)
    compiled = torch.compile(model.hidden_states, fullgraph=True, backend="eager")
    for number in range(2):
        sliced = model.slice(random_submodel(config, number, PER_LAYER, all_layers=True))
        assert relative_error(compiled(ids, sliced), model.hidden_states(ids, sliced)) < 1e-6
