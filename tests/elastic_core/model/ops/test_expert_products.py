"""Three ways to multiply tokens with their experts, with one result: what a GPU does, here on the CPU."""

import itertools

import pytest
import torch

from elastic_core import ElasticModel
from elastic_core.model.ops.expert_products import ExpertProducts, grouped, in_blocks, in_turn
from elastic_core.training.estimate.live_bytes import TrainingSetting
from elastic_core.training.estimate.piece_memory import Pieces
from elastic_core.training.estimate.rank_memory import ForwardPasses, RankWorkload
from tests.support.cuda.runs import fitting_moe
from tests.support.models.parents import (
    random_ids,
    random_moe_config,
    random_submodel,
    relative_error,
    save_random_parent,
)

OWNERS = {
    "one expert without pairs": [0] * 3 + [1] * 2 + [3] * 5 + [4],
    "one expert with all": [2] * 70,
    "blocks that are full": [0] * 16 + [1] * 32 + [2] * 32,
    "more than a block": [0] * 17 + [1] * 40 + [4] * 33,
    "one pair": [3],
}


def results(function, owners, narrowed: bool, dtype) -> list[torch.Tensor]:
    """Inner values, outputs and the gradients of pairs, both stacks of matrices, and gate."""
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(5, 32, 16, generator=generator), torch.randn(5, 16, 32, generator=generator)
    pairs, gate = torch.randn(len(owners), 16, generator=generator), torch.rand(32, generator=generator)
    if narrowed:
        up, down, gate = up[:, :24], down[:, :, :24], gate[:24]
    tensors = [t.to(dtype).detach().requires_grad_() for t in (pairs, up, down, gate)]
    inner, y = function(tensors[0], torch.tensor(owners), tensors[1], tensors[2], torch.relu, tensors[3])
    (y * torch.linspace(-1, 1, 16, dtype=y.dtype)).sum().backward()
    return [inner.detach(), y.detach(), *(t.grad for t in tensors)]


@pytest.mark.parametrize("narrowed", [False, True])
def test_one_product_for_all_experts_equals_one_for_each(narrowed):
    owners = OWNERS["one expert without pairs"]
    together, single = (results(function, owners, narrowed, torch.bfloat16) for function in (grouped, in_turn))
    for left, right in zip(together[:-1], single[:-1], strict=True):
        assert torch.equal(left, right)
    assert relative_error(together[-1], single[-1]) < 2**-7  # the gate's gradient is summed in another order


@pytest.mark.parametrize("narrowed", [False, True])
@pytest.mark.parametrize("owners", OWNERS.values(), ids=OWNERS)
def test_blocks_equal_one_product_for_each(owners, narrowed):
    blocks, single = (results(function, owners, narrowed, torch.float64) for function in (in_blocks, in_turn))
    for left, right in zip(blocks, single, strict=True):
        assert left.shape == right.shape
        assert (left - right).abs().max() < 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_a_model_computes_in_blocks_what_it_computes_in_turn(tmp_path, seed):
    config = random_moe_config(seed)
    save_random_parent(tmp_path, seed, config)
    model, ids = ElasticModel.from_pretrained(tmp_path).double().eval(), random_ids(config, seed)
    submodel, logits, gradients = random_submodel(config, seed).resolve(config), [], []
    for on_gpu in (False, True):
        for module in model.modules():
            if isinstance(module, ExpertProducts):
                module.on_gpu = on_gpu
        model.zero_grad()
        logits.append(model(ids, submodel))
        logits[-1].square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert relative_error(logits[1], logits[0]) < 1e-12
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max() <= 1e-9 * max(1, gradient.abs().max()), name


def test_copies_of_matrices_are_fewer_than_two_per_expert(monkeypatch):
    """With many tokens; with few, there is one block per pair at most."""
    seen = []

    def product(blocks, weight, owners):
        seen.append(tuple(blocks.shape[:2]))
        return blocks @ weight[owners].mT

    monkeypatch.setattr("elastic_core.model.ops.expert_products._block_product", product)
    up, down = torch.randn(8, 4, 2), torch.randn(8, 2, 4)
    for number in (3, 1000):
        owners = torch.randint(8, (number,), generator=torch.Generator().manual_seed(0)).sort().values
        in_blocks(torch.randn(number, 2), owners, up, down, torch.relu, None)
    (few, _), (many, size) = seen[0], seen[2]
    assert few == 3
    assert many < 2 * 8 and many * size < 2 * 1000


@pytest.mark.parametrize("gates", [False, True])
def test_the_plan_counts_blocks_where_a_gpu_computes_in_them(gates):
    config, kept = fitting_moe(), {}
    for gpu, precision in itertools.product((False, True), ("float32", "bfloat16")):
        setting = TrainingSetting(precision, gpu=gpu, distributed=True)
        kept[gpu, precision] = Pieces.of(config, setting, gates).layer("E", 1, 512).kept
    assert kept[True, "float32"] > 1.2 * kept[False, "float32"]
    assert kept[True, "bfloat16"] == pytest.approx(kept[False, "bfloat16"], rel=0.01)


@pytest.mark.parametrize("what", ["widths", "depth"])
def test_the_plan_of_ranking_counts_blocks_too(what):
    config, load, peaks = fitting_moe(), RankWorkload(1, 512, 1, 1, torch.float32), {}
    for gpu, precision in itertools.product((False, True), ("float32", "bfloat16")):
        passes = ForwardPasses.of(config, TrainingSetting(precision, gpu=gpu, distributed=True))
        peaks[gpu, precision] = passes.layer("E", load, what)
    assert peaks[True, "float32"] > 1.1 * peaks[False, "float32"]
    assert peaks[True, "bfloat16"] == pytest.approx(peaks[False, "bfloat16"], rel=0.01)
