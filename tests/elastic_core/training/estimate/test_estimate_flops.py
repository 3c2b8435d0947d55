"""Operations counted from the layout: exactly those that torch's counter sees."""

import pytest
import torch

from elastic_core.model import layers
from elastic_core.model.documents import documents_of
from elastic_core.model.ops.flops import Flops, scan_flops
from elastic_core.model.ops.ssd import CHUNK_ON_GPU, ssd
from elastic_core.training.estimate.flops import attention_pairs, pass_flops
from elastic_core.training.losses import distillation_loss
from tests.support.models.parents import CONFIGS, random_elastic, random_ids, random_submodel
from tests.support.oracles.flop_counter import counted


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("length", [21, 64, 150])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_step_of_any_submodel_is_counted_exactly(architecture, seed, length):
    config = CONFIGS[architecture](seed)
    model, ids = random_elastic(seed, config), random_ids(config, seed, (2, length))
    fields = ("intermediate_size", "mamba_num_heads" if architecture == "nemotron_h" else "num_attention_heads")
    submodel = random_submodel(config, seed, heterogeneous=fields)
    sliced = model.slice(submodel)
    hidden, trunk = counted(lambda: model.hidden_states(ids, sliced))
    loss, head = counted(lambda: distillation_loss(hidden, model.head(sliced), ids, None, 1.0, 0.0)[0])
    _, backward = counted(loss.backward)
    flops = pass_flops(config, length, submodel) * 2
    gradients_of_head = 2 * head // 3  # formed in the loss's forward pass, as the logits are there
    assert flops.forward == trunk + head - gradients_of_head
    assert flops.backward == backward + gradients_of_head


ROWS = ([5, 40, 1, 18], [64])  # lengths of documents


@pytest.mark.parametrize("way", ["call per document", "mask"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_step_of_packed_documents_is_counted_exactly(architecture, seed, way, monkeypatch):
    """Attention costs the sum of the squares of the lengths where no mask is made."""
    monkeypatch.setattr(layers, "LONGEST_MASK", {"call per document": 63, "mask": 64}[way])
    config = CONFIGS[architecture](seed)
    model, ids = random_elastic(seed, config), random_ids(config, seed, (2, 64))
    numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in ROWS]
    documents, sliced = documents_of(torch.stack(numbers), ids), model.slice()
    hidden, trunk = counted(lambda: model.hidden_states(ids, sliced, documents))
    loss, head = counted(lambda: distillation_loss(hidden, model.head(sliced), ids, None, 1.0, 0.0)[0])
    _, backward = counted(loss.backward)
    squares = [sum(length**2 for length in row) for row in ROWS]
    total = sum((pass_flops(config, 64, pairs=64**2 if way == "mask" else count) for count in squares), Flops())
    gradients_of_head = 2 * head // 3
    assert total.forward == trunk + head - gradients_of_head
    assert total.backward == backward + gradients_of_head
    for count in squares:  # by their mean length
        pairs = attention_pairs(64, count / 64, torch.float32, on_gpu=False)
        assert pairs == (64**2 if way == "mask" else count)


def test_a_gpu_needs_no_mask_in_low_precision():
    assert attention_pairs(64, 10.5, torch.bfloat16, on_gpu=True) == 64 * 10.5
    assert attention_pairs(64, 10.5, torch.float32, on_gpu=True) == 64**2


@pytest.mark.parametrize("length", [100, 300])
def test_the_scan_of_a_gpu_has_longer_chunks(length):
    heads, channels, groups, states = 6, 5, 3, 7
    x = torch.randn(1, length, heads, channels, requires_grad=True)
    B, C = torch.randn(2, 1, length, groups, states).unbind()
    dt, A, D = torch.rand(1, length, heads), -torch.rand(heads), torch.rand(heads)
    y, forward = counted(lambda: ssd(x, dt, A, B, C, D, chunk=CHUNK_ON_GPU))
    _, backward = counted(y.sum().backward)
    flops = scan_flops(length, heads, channels, groups, states, on_gpu=True)
    assert (flops.forward, flops.backward) == (forward, backward)
