"""The documents of a packed row do not see each other: outputs and gradients are those of each document alone."""

import random

import pytest
import torch

from elastic_core.errors import UserError
from elastic_core.model import architectures, layers
from elastic_core.model.dims import elastic_units
from elastic_core.model.documents import documents_of
from elastic_core.model.ops import kernels
from elastic_core.model.ops.conv import causal_conv_silu
from elastic_core.model.ops.ssd import ssd
from tests.support.models.parents import (
    random_config,
    random_elastic,
    random_llama_config,
    random_moe_config,
    random_submodel,
    relative_error,
)

KINDS = {"nemotron_h": random_config, "experts": random_moe_config, "llama": random_llama_config}


def random_documents(seed: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and document ids of two rows. Some documents have one token; ids of documents leave out numbers."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    length = rng.choice([11, 37, 150])
    rows = []
    for _ in range(2):
        number, row = rng.randrange(3), []
        while len(row) < length:
            row += [number] * rng.choice([1, 1, 2, 3, rng.randint(1, length)])
            number += rng.randint(1, 3)
        rows.append(row[:length])
    return torch.randint(0, vocab_size, (2, length), generator=generator), torch.tensor(rows)


def alone(ids: torch.Tensor, document_ids: torch.Tensor, function) -> torch.Tensor:
    """`function` of every document as a row of its own, put together again."""
    rows = []
    for row, numbers in zip(ids, document_ids, strict=True):
        lengths = torch.unique_consecutive(numbers, return_counts=True)[1].tolist()
        rows.append(torch.cat([function(part[None])[0] for part in row.split(lengths)]))
    return torch.stack(rows)


@pytest.mark.parametrize("mode", ["full", "hard", "soft"])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_each_document_alone(kind, seed, mode, monkeypatch):
    if seed % 2:  # as in long rows
        monkeypatch.setattr(layers, "LONGEST_MASK", 4)
    model = random_elastic(seed, KINDS[kind](seed)).double()
    ids, document_ids = random_documents(seed, model.config.vocab_size)
    submodel = random_submodel(model.config, seed, all_layers=seed < 4) if mode == "hard" else None
    gates, leaves = None, {name: p for name, p in model.named_parameters() if p.requires_grad}
    if mode == "soft":
        generator = torch.Generator().manual_seed(seed)
        sizes = {key: unit.size for key, unit in elastic_units(model.layout).items()}
        sizes["depth"] = architectures.num_layers(model.config)
        gates = {
            key: (0.2 + torch.rand(size, generator=generator).double()).requires_grad_() for key, size in sizes.items()
        }
        leaves |= gates
    found = []
    for logits in (
        model(ids, submodel, gates, document_ids),
        alone(ids, document_ids, lambda part: model(part, submodel, gates)),
    ):
        loss = logits.log_softmax(-1)[..., 3].sum()
        found.append((logits.detach(), torch.autograd.grad(loss, leaves.values(), allow_unused=True)))
    assert relative_error(found[0][0], found[1][0]) < 1e-10
    largest = max(gradient.norm() for gradient in found[1][1] if gradient is not None)
    for name, packed, single in zip(leaves, found[0][1], found[1][1], strict=True):
        if packed is not None:  # an axis or a layer that is not kept has no gradient
            scale = single.norm().clamp(min=1e-3 * largest)  # a gradient that vanishes is rounding
            assert (packed - single).norm() / scale < 1e-10, name


def test_documents_in_low_precision():
    """Masks take the type of the queries, which autocast lowers."""
    model = random_elastic(0, random_llama_config(0))
    ids, document_ids = random_documents(3, model.config.vocab_size)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        packed = model(ids, document_ids=document_ids)
        assert relative_error(packed, alone(ids, document_ids, model)) < 0.05


def ids_of(lengths: list[int], length: int) -> torch.Tensor:
    """Document ids (B, length) of documents that fill the rows."""
    return torch.repeat_interleave(torch.tensor(lengths)).view(-1, length)


@pytest.mark.parametrize(("kind", "longest_mask"), [("nemotron_h", 4), ("llama", 256)])
def test_batches_with_other_documents_make_no_new_graphs(kind, longest_mask, monkeypatch):
    """Layers that are compiled as in training. With a graph for every batch, a run would compile to its end."""
    monkeypatch.setattr(layers, "LONGEST_MASK", longest_mask)
    config, graphs = KINDS[kind](0), []
    if kind == "nemotron_h":
        config.layers_block_type = ["linear_attention", "full_attention"]  # those that mix positions
    else:
        config.num_hidden_layers = 1
    model, plain = random_elastic(0, config), random_elastic(0, config)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):
        for block in model.model.layers:
            for part in block.children():
                part.compile(dynamic=False, backend=backend)
        made = []
        for seed, lengths in enumerate(([5, 3, 8], [1, 7, 2, 6], [8, 1, 1, 1, 1, 4])):
            ids = torch.randint(0, model.config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(seed))
            logits, expected = (each(ids, document_ids=ids_of(lengths, 8)) for each in (model, plain))
            logits.square().mean().backward()
            assert relative_error(logits, expected) < 1e-5
            made.append(len(graphs))
    assert 0 < made[0] == made[-1], made


def test_rows_of_one_document_need_no_masks():
    ids = torch.zeros(2, 5, dtype=torch.int64)
    assert documents_of(torch.tensor([[4] * 5, [7] * 5]), ids) is None
    assert documents_of(None, ids) is None
    assert documents_of(torch.tensor([[4] * 5, [7] * 4 + [8]]), ids).lengths == [5, 4, 1]


@pytest.mark.parametrize(
    ("document_ids", "words"),
    [
        (torch.tensor([[0, 1, 0]]), "smaller than the one before"),
        (torch.tensor([[0, 1]]), r"got torch.int64 \(1, 2\); allowed: int64 \(1, 3\)"),
        (torch.tensor([[0.0, 0, 0]]), "torch.float32"),
    ],
)
def test_wrong_ids_are_refused(document_ids, words):
    model = random_elastic(0)
    with pytest.raises(UserError, match=words):
        model(torch.tensor([[1, 2, 3]]), document_ids=document_ids)


def starts_of(ids: torch.Tensor) -> torch.Tensor:
    """The first positions of documents, from the ids that a kernel of a GPU gets (B, L)."""
    starts = torch.zeros(ids.shape, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return starts


def varlen_oracle(query, key, value, ends, ends_of_keys, longest, longest_key, *, window_size, enable_gqa):
    """Flash attention's variable-length function, with its arguments: one call per document."""
    lengths = ends.diff().tolist()
    assert ends.dtype == torch.int32 and ends is ends_of_keys and longest == longest_key == max(lengths)
    assert window_size == (-1, 0) and enable_gqa and query.dim() == 3  # causal, (positions, heads, channels)
    parts = zip(*(t.split(lengths) for t in (query, key, value)), strict=True)
    return torch.cat([layers._attention(*(t[None] for t in part), is_causal=True)[0] for part in parts])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_of_a_gpu_are_told_the_documents(kind, seed, monkeypatch):
    """Functions with the kernels' arguments, computed by torch: each gets the documents in its own form."""
    kernel_of = {
        kernels._causal_conv1d: lambda x, weight, bias, ids: causal_conv_silu(
            x.transpose(1, 2), weight.unsqueeze(1), bias, starts_of(ids).flatten().nonzero().flatten()
        ).transpose(1, 2),
        kernels._mamba_scan: lambda *tensors: ssd(*tensors[:6], starts=starts_of(tensors[6])),
        kernels._mamba_norm: None,
    }
    monkeypatch.setattr(kernels, "_kernel", lambda find, *_: kernel_of[find])
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_oracle)
    monkeypatch.setattr(layers, "_attention_by_document", layers._variable_length_attention)
    monkeypatch.setattr(layers, "LONGEST_MASK", 0)
    model = random_elastic(seed, KINDS[kind](seed))
    ids, document_ids = random_documents(seed, model.config.vocab_size)
    with torch.no_grad():
        packed = model(ids, document_ids=document_ids)
        monkeypatch.undo()
        assert relative_error(packed, alone(ids, document_ids, model)) < 1e-5
