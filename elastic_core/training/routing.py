"""The part of stage 1 in which the router learns: what each microbatch computes with, and when the choice is final."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from elastic_core.model.norm_gains import NormRatios
from elastic_core.model.ops.device_copy import all_to_device
from elastic_core.model.slicing import Slice
from elastic_core.search.router import anneal, noise_generator
from elastic_core.training.candidates import choose_family
from elastic_core.training.losses import resource_loss
from elastic_core.training.run import Run, members_of, take_norms
from elastic_core.training.stage import MAX_ENTROPY, MIN_ANNEALED


class DeviceGates:
    """What the router, in CPU memory, gives a model on a GPU: one copy there, and one back with all gradients.

    In the backward pass of the model, autograd would copy the gradient of every gate, and wait for the GPU each time.
    Here the graph ends at `leaf`, which is on the GPU. Read its gradient when the step waits for the GPU anyway, and
    give it to `backward`, with the weight of `loss`, the router's own loss.
    """

    def __init__(self, tensors: list[Tensor], device: torch.device, loss: Tensor):
        self.loss = loss
        self.packed = torch.cat([tensor.flatten() for tensor in tensors])  # in CPU memory
        (self.leaf,) = all_to_device([self.packed.detach()], device)
        self.leaf.requires_grad_(self.packed.requires_grad)
        parts = self.leaf.split([tensor.numel() for tensor in tensors])
        self.tensors = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def backward(self, grad: Tensor, weight: float) -> None:
        """Backward pass of the router. `grad`: that of the leaf, in CPU memory; `weight`: that of the router's loss."""
        torch.autograd.backward([weight * self.loss, self.packed], [None, grad.to(self.packed.dtype)])


class Choice(NamedTuple):
    """What a microbatch computes with. The last three are None once the family is settled.

    - `sliced`: the part of the model. `router_loss` () and `cost` (): the resource loss and the expected cost.
    - `gates`: on a GPU, the gates that `sliced` has there; their gradients have to be brought back to the router.
    """

    sliced: Slice
    router_loss: Tensor | None = None
    cost: Tensor | None = None
    gates: DeviceGates | None = None


def choose_slice(run: Run, microbatch: int, budget: str) -> Choice:
    """The part of the model that a microbatch computes with.

    Once the family is settled, this is the slice of the budget's submodel. While the router learns, it is the full
    model with soft gates; or, with routing.mode 'hard', the slice of the most probable choice with straight-through
    gates.
    """
    if run.members is not None:
        return Choice(run.slice_of_budget(budget))
    space, probs = run.router.space, draw_probs(run, microbatch, budget)
    cost = space.cost(probs)
    loss = resource_loss(cost, run.budgets[budget] * run.parent_cost, run.routing.dead_zone)
    if run.routing.mode == "soft":
        gates, factors, on_device = gates_on_device(run, space.soft_gates(probs), norm_factors(run, probs), loss)
        sliced = run.model.slice(gates=gates).with_norm_gains(soft_gains(run, factors))
        return Choice(sliced, loss, cost.detach(), on_device)
    indices = most_probable(probs)
    gates, _, on_device = gates_on_device(run, space.hard_gates(probs, indices), None, loss)
    return Choice(run.model.slice(space.submodel(indices), gates), loss, cost.detach(), on_device)


def draw_probs(run: Run, microbatch: int, budget: str) -> list[Tensor]:
    """The router's probabilities for a microbatch of this step, one per slot: the same in every call."""
    tau, scale = anneal(annealed(run), run.routing.temperatures, run.routing.scales)
    noise = noise_generator(run.seed, run.step, microbatch)
    return run.router.probs(list(run.budgets).index(budget), tau, scale, noise)


def most_probable(probs: list[Tensor]) -> list[int]:
    """The number of the most probable choice of every slot."""
    return [int(prob.argmax()) for prob in probs]


@torch.no_grad()
def kept_layers(run: Run, assigned: list[str]) -> list[tuple[int, ...]]:
    """The layers that each microbatch of a step runs, or may run, for its budget in `assigned`.

    While the router learns with soft gates, all of them. With hard gates the choice is drawn for every microbatch.
    """
    if run.members is not None:
        submodels = [run.members[budget].submodel for budget in assigned]
    elif run.routing.mode == "soft":
        submodels = [run.model.full] * len(assigned)
    else:
        drawn = (draw_probs(run, microbatch, budget) for microbatch, budget in enumerate(assigned))
        submodels = [run.router.space.submodel(most_probable(probs)) for probs in drawn]
    return [submodel.resolve(run.model.config).kept_layers for submodel in submodels]


def gates_on_device(
    run: Run, gates: Mapping[str, Tensor], factors: Tensor | None, loss: Tensor
) -> tuple[Mapping[str, Tensor], Tensor | None, DeviceGates | None]:
    """Gates and norm factors on the device of the run, and what holds them there; the same tensors without a GPU.

    Gates that need no gradient, as those of a budget with only one choice, have no `DeviceGates`.
    """
    if is_host(run.ranks.device):
        return gates, factors, None
    different = {id(tensor): tensor for tensor in [*gates.values(), *([] if factors is None else [factors])]}
    on_device = DeviceGates(list(different.values()), run.ranks.device, loss)
    found = dict(zip(different, on_device.tensors, strict=True))
    moved = {key: found[id(gate)] for key, gate in gates.items()}
    kept = on_device if on_device.leaf.requires_grad else None
    return moved, None if factors is None else found[id(factors)], kept


def is_host(device: torch.device) -> bool:
    """Whether tensors of this device are in CPU memory, as the router is."""
    return device.type == "cpu"


def norm_factors(run: Run, probs: list[Tensor]) -> Tensor | None:
    """The expected ratio of every norm's gains to the model's, (norms, hidden); None without norm ratios."""
    if not isinstance(run.model.norm_gains, NormRatios):
        return None
    slots = run.router.space.slots
    number = next(i for i, slot in enumerate(slots) if slot.axis == "hidden")
    return run.model.norm_gains.expected(slots[number].sizes, probs[number])


def soft_gains(run: Run, factors: Tensor | None) -> dict[str, Tensor]:
    """The norm gains while the router mixes sizes: with norm ratios, the model's gains times the expected ratio."""
    if factors is None:
        return {}
    names = run.model.norm_gains.ratios
    return {name: run.model.get_parameter(name) * factor for name, factor in zip(names, factors.unbind(), strict=True)}


def annealed(run: Run) -> float:
    """How much of the router's annealing is done, from 0 to 1."""
    return min(1.0, run.step / (run.routing.share * run.stage.steps))


def router_entropy(run: Run) -> dict[str, dict[str, float]]:
    """For each axis, the `mean` and `max` entropy of its slots over all budgets below 1.0, without noise.

    An entropy is a share of that of equal probabilities: 1 if all choices are equally probable, 0 if one is certain.
    """
    tau, scale = anneal(annealed(run), run.routing.temperatures, run.routing.scales)
    entropies = run.router.entropies(tau, scale)
    return {axis: {"mean": sum(found) / len(found), "max": max(found)} for axis, found in entropies.items()}


def settle(run: Run, entropy: dict[str, dict[str, float]]) -> None:
    """Set the final members of the family, if the router's choice has settled or if its share of the stage is over.

    The choice has settled when it has been the same for `routing.settle_steps` steps, with all costs within the dead
    zone (at least 0.1 %) of their targets, MIN_ANNEALED of the annealing is done, and no slot has an entropy above
    MAX_ENTROPY. `entropy` is that of `router_entropy`.
    """
    routing, choices = run.routing, run.router.choices()
    within = all(
        abs(run.router.space.exact_cost(choice) / (target * run.parent_cost) - 1) <= max(routing.dead_zone, 1e-3)
        for choice, target in zip(choices, run.router.targets, strict=True)
    )
    run.settled_for = run.settled_for + 1 if within and choices == run.last_choices else 0
    run.last_choices = choices
    is_certain = all(axis["max"] <= MAX_ENTROPY for axis in entropy.values())
    has_settled = run.settled_for >= routing.settle_steps and annealed(run) >= MIN_ANNEALED and is_certain
    if has_settled or run.step >= routing.share * run.stage.steps:
        run.indices, run.comparison = choose_family(run)
        run.members = members_of(run)
        take_norms(run, start=True)
