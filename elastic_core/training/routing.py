"""The part of stage 1 in which the router learns: what each microbatch computes with, and when the choice is final."""

from __future__ import annotations

from torch import Tensor

from elastic_core.model.norm_gains import NormRatios
from elastic_core.search.router import anneal, noise_generator
from elastic_core.training.candidates import choose_family
from elastic_core.training.losses import resource_loss
from elastic_core.training.run import Run, members_of, take_norms
from elastic_core.training.stage import MAX_ENTROPY, MIN_ANNEALED


def choose_slice(run: Run, microbatch: int, budget: str):
    """(the part of the model to compute with, resource loss (), expected cost ()) of a microbatch.

    Once the family is settled, this is the slice of the budget's submodel, and the other two are None. While the router
    learns, it is the full model with soft gates; or, with routing.mode 'hard', the slice of the most probable choice
    with straight-through gates.
    """
    if run.members is not None:
        return run.slice_of_budget(budget), None, None
    index, space = list(run.budgets).index(budget), run.router.space
    tau, scale = anneal(annealed(run), run.routing.temperatures, run.routing.scales)
    probs = run.router.probs(index, tau, scale, noise_generator(run.seed, run.step, microbatch))
    cost = space.cost(probs)
    loss = resource_loss(cost, run.budgets[budget] * run.parent_cost, run.routing.dead_zone)
    if run.routing.mode == "soft":
        sliced = run.model.slice(gates=space.soft_gates(probs))
        return sliced.with_norm_gains(soft_gains(run, probs)), loss, cost.detach()
    indices = [int(prob.argmax()) for prob in probs]
    return run.model.slice(space.submodel(indices), space.hard_gates(probs, indices)), loss, cost.detach()


def kept_layers(run: Run, assigned: list[str]) -> list[tuple[int, ...]]:
    """The layers that each microbatch of a step runs, or may run, for its budget in `assigned`.

    While the router learns with soft gates, all of them. With hard gates the choice is drawn in every microbatch.
    """
    if run.members is None and run.routing.mode == "soft":
        return [run.model.full.kept_layers] * len(assigned)
    if run.members is None:
        return [choose_slice(run, microbatch, budget)[0].kept_layers for microbatch, budget in enumerate(assigned)]
    return [run.members[budget].submodel.resolve(run.model.config).kept_layers for budget in assigned]


def soft_gains(run: Run, probs: list[Tensor]) -> dict[str, Tensor]:
    """The norm gains while the router mixes sizes: with norm ratios, the model's gains times the expected ratio."""
    if not isinstance(run.model.norm_gains, NormRatios):
        return {}
    slots = run.router.space.slots
    number = next(i for i, slot in enumerate(slots) if slot.axis == "hidden")
    factors = run.model.norm_gains.expected(slots[number].sizes, probs[number]).to(run.ranks.device)
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
