"""Gradients of a cost compared with finite differences."""

import torch

from elastic_core.search.space import ElasticSpace


def check_gradient(space: ElasticSpace, seed: int) -> None:
    """The expected cost's gradient is that of finite differences, and every axis has one."""
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(len(slot.sizes), generator=generator, dtype=torch.float64) for slot in space.slots]

    def cost(*logits):
        return space.cost([z.softmax(-1) for z in logits]) / space.exact_cost([0] * len(space.slots))

    assert torch.autograd.gradcheck(cost, [z.requires_grad_() for z in logits], eps=1e-6, atol=1e-7)
    gradients = torch.autograd.grad(cost(*logits), logits)
    assert all(gradient.abs().max() > 0 for gradient, z in zip(gradients, logits, strict=True) if len(z) > 1)
