"""The summary of the report: one line per member, and the note below the table."""

from elastic_core.cost.metrics import Metric
from tasks.reporting import predictions, tables
from tasks.settings.schema import Params

NOTE = (
    "Every row is an extracted directory, loaded by transformers. Gap closed: the share of the loss between the "
    "zero-shot slice and the parent that training recovered. Time × parent: decode time per token divided by the "
    "parent's, measured alternately in one process. Tasks: the number counts steps or pairs; chains_direct answers "
    "without worked steps, as a control."
)


def find(frame) -> list[dict]:
    """One entry per member: its share of the parent's parameters, its extra loss, and its time and memory.

    `frame` holds the results. `loss` is in nats per token above the parent. `latency_ratio` and `memory` are divided by
    the parent's.
    """
    rows = tables.records(tables.finals(frame))
    parent = rows[0]
    return [
        {
            "budget": row["budget"],
            "share": row["share"],
            "parameters": row["parameters"],
            "loss": row["loss"] - parent["loss"],
            "gap_closed": row["gap_closed"],
            "latency_ratio": row["latency_ratio"],
            "memory": row["memory_mib"] / parent["memory_mib"],
        }
        for row in rows[1:]
    ]


def sentence(finding: dict) -> str:
    """An entry of `find` in words. All numbers compare the member with the parent."""
    text = f"{finding['budget']}: {finding['share']:.0%} of the parent's parameters, "
    text += f"loss {finding['loss']:+.3f} nats/token, {finding['latency_ratio']:.2f} × the parent's time per token, "
    text += f"{finding['memory']:.0%} of its memory"
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
