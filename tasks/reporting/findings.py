"""The summary of the report: one line per member, and the note below the table."""

from elastic_core.cost.budgets import parse
from elastic_core.cost.metrics import Metric, exact_cost
from elastic_core.cost.targets import target_of
from elastic_core.model.submodel import Submodel
from tasks.reporting import predictions, tables
from tasks.settings.schema import Params

NOTE = (
    "Every row is an extracted directory, loaded by transformers. Gap closed: the share of the loss between the "
    "zero-shot slice and the parent that training recovered. Time × parent: decode time per token divided by the "
    "parent's, measured alternately in one process, once per budget, with the quartiles of the ratios. Weights + cache "
    "are measured bytes. Tasks: the number counts steps or pairs; chains_direct answers without worked steps, as a "
    "control."
)


def targets(settings: Params, scores: tables.Scores, config, metric: Metric) -> dict[str, dict]:
    """Budget → its text in params.yaml, its metric, its target and what was reached (shares of the parent's cost).

    `metric` is that of the family. An untrained budget may be in another.
    """
    found = {}
    for budget, spelling in settings.served.items():
        own, target, full = target_of(parse(spelling), metric, config, budget)
        submodel = Submodel(**scores[budget][tables.FINAL]["submodel"])
        shares = {"target": target / full, "reached": exact_cost(own, config, submodel) / full}
        found[budget] = {"given": str(spelling), "metric": own.name.replace("_", " "), **shares}
    return found


def find(frame, targets: dict[str, dict]) -> list[dict]:
    """One entry per member: its target, its share of the parent's parameters, its extra loss, and its time and memory.

    `frame` holds the results, `targets` is from the function of that name. `loss` is in nats per token above the
    parent. `latency_ratio` (with `latency_spread`) and `weights_and_cache` are divided by the parent's.
    """
    rows = tables.records(tables.finals(frame))
    parent = rows[0]
    return [
        {
            "budget": row["budget"],
            **targets[row["budget"]],
            "share": row["share"],
            "parameters": row["parameters"],
            "loss": row["loss"] - parent["loss"],
            "gap_closed": row["gap_closed"],
            "latency_ratio": row["latency_ratio"],
            "latency_spread": (row["latency_ratio_low"], row["latency_ratio_high"]),
            "weights_and_cache": row["memory_mib"] / parent["memory_mib"],
        }
        for row in rows[1:]
    ]


def target_text(finding: dict) -> str:
    """The target of an entry of `find`, as given, and as a share where it was not given as one."""
    share = f"{finding['target']:.1%} of {finding['metric']}"
    return share if parse(finding["given"]).kind == "share" else f"{finding['given']}, {share}"


def sentence(finding: dict) -> str:
    """An entry of `find` in words. All numbers compare the member with the parent."""
    low, high = finding["latency_spread"]
    text = f"{finding['budget']}: {finding['share']:.0%} of the parent's parameters "
    text += (
        f"(target {target_text(finding)}; reached {finding['reached']:.1%}), loss {finding['loss']:+.3f} nats/token, "
    )
    text += f"{finding['latency_ratio']:.2f} × the parent's time per token (quartiles {low:.2f} to {high:.2f}), "
    text += f"{finding['weights_and_cache']:.0%} of its weights + cache"
    if finding["gap_closed"] is not None:
        text += f"; training recovered {finding['gap_closed']:.0%} of the loss of the zero-shot slice"
    return text


def note(settings: Params, scores: tables.Scores, metric: Metric) -> str:
    """How to read the table, and facts about this run."""
    text = NOTE
    if settings.untrained:
        text += f" Extracted, but not trained: {', '.join(settings.untrained)}."
    text += predictions.note(metric)
    return " ".join([text, *heterogeneous_gains(scores)])


def heterogeneous_gains(scores: tables.Scores) -> list[str]:
    """The gain of heterogeneous widths over uniform widths of the same cost, one sentence per budget that has them."""
    found = []
    for budget, versions in scores.items():
        zero_shot = versions.get("zero_shot", {})
        if uniform := zero_shot.get("uniform"):
            gain = uniform["loss"] - zero_shot["loss"]
            found.append(
                f"{budget}: before training, {zero_shot['loss']:.4f} nats/token with heterogeneous widths, "
                f"{uniform['loss']:.4f} with uniform widths of the same cost: "
                f"{'a gain' if gain > 0 else 'a loss'} of {abs(gain):.4f}."
            )
    return found
