"""What a reader wants to know first of every member of the family, and what has to be said of the table."""

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
    """Of every member its share of the parent, and what it loses and saves beside the parent."""
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
    """A finding in words."""
    text = f"{finding['budget']}: {finding['share']:.0%} of the parameters, {finding['loss']:+.3f} nats from the parent"
    text += f", {finding['latency_ratio']:.2f} × its time per token, {finding['memory']:.0%} of its memory"
    if finding["gap_closed"] is not None:
        text += f"; training recovered {finding['gap_closed']:.0%} of the loss of the zero-shot slice"
    return text


def note(settings: Params, scores: tables.Scores, metric: Metric) -> str:
    """How to read the table, and what holds for this run alone."""
    text = NOTE
    if settings.untrained:
        text += f" Served without having been trained: {', '.join(settings.untrained)}."
    text += predictions.note(metric)
    return " ".join([text, *heterogeneous_gains(scores)])


def heterogeneous_gains(scores: tables.Scores) -> list[str]:
    """What widths that differ between layers gain over uniform widths of the same cost, in words."""
    found = []
    for budget, versions in scores.items():
        zero_shot = versions.get("zero_shot", {})
        if uniform := zero_shot.get("uniform"):
            gain = uniform["loss"] - zero_shot["loss"]
            found.append(
                f"{budget}: before training, {zero_shot['loss']:.4f} nats/token with widths that differ between "
                f"layers, {uniform['loss']:.4f} with uniform widths of the same cost: "
                f"{'a gain' if gain > 0 else 'a loss'} of {abs(gain):.4f}."
            )
    return found
