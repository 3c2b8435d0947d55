"""Operations counted from the layout: exactly those that torch's counter sees."""

import pytest
import torch

from elastic_core.model.ops.flops import scan_flops
from elastic_core.model.ops.ssd import CHUNK_ON_GPU, ssd
from elastic_core.training.estimate.flops import pass_flops
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
