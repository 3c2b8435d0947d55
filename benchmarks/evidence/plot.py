"""The chart: differences to the arm of comparison, and KL over tokens of separate training and of the family."""

from __future__ import annotations

import json
import statistics

from benchmarks.evidence.intervals import Estimate
from benchmarks.evidence.tables import EqualQuality, Group
from tasks.reporting import vega

SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
KL = "kl_to_parent"


def draw(
    groups: list[Group], differences: list[tuple[Group, dict[str, Estimate]]], quality: list[EqualQuality]
) -> str | None:
    """The chart as SVG; None if there is nothing to compare."""
    charts = []
    if differences:
        charts.append(difference_chart(differences))
    if quality:
        charts.append(curve_chart(groups, shown_of(groups, quality)))
    if not charts:
        return None
    return vega.to_svg(json.dumps({"$schema": SCHEMA, "background": "white", "hconcat": charts}))


def difference_chart(differences: list[tuple[Group, dict[str, Estimate]]]) -> dict:
    """A point with its interval for each arm and member."""
    rows = []
    for group, found in differences:
        value, name = found[KL], f"{group.arm.name} − {group.arm.against}"
        half = value.half or 0.0
        ends = {"value": value.mean, "low": value.mean - half, "high": value.mean + half}
        rows.append({"arm": name, "member": group.member, **ends})
    x = {"title": "difference of KL to the parent, nats per token", "type": "quantitative"}
    shared = {
        "y": {"field": "arm", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 300}},
        "yOffset": {"field": "member", "type": "nominal", "sort": None},
        "color": {"field": "member", "type": "nominal", "sort": None, "title": None},
    }
    zero = {"x": {"datum": 0}, "y": None, "yOffset": None, "color": None}
    return {
        "title": "Differences, 95 % intervals",
        "data": {"values": rows},
        "width": 320,
        "height": {"step": 12},
        "encoding": shared,
        "layer": [
            {"mark": {"type": "rule", "color": "#9ca3af"}, "encoding": zero},
            {"mark": "rule", "encoding": {"x": {"field": "low", **x}, "x2": {"field": "high"}}},
            {"mark": {"type": "point", "filled": True}, "encoding": {"x": {"field": "value", **x}}},
        ],
    }  # fmt: skip


def shown_of(groups: list[Group], quality: list[EqualQuality]) -> EqualQuality:
    """The comparison that is drawn: with separate training by the parameters of the profile, or else the first one."""
    changed = {group.arm.name for group in groups if group.arm.overrides}
    return next((row for row in quality if changed.isdisjoint(row.against)), quality[0])


def curve_chart(groups: list[Group], shown: EqualQuality) -> dict:
    """KL over the tokens of a job: lines for separate training, and the family's level, each by member."""
    alone = [
        {"tokens": statistics.mean(g.total.values()), "kl": g.mean(KL), "member": g.member}
        for g in groups
        if g.arm.name in shown.against
    ]
    members = {row["member"] for row in alone}
    together = [
        {"kl": g.mean(KL), "member": g.member} for g in groups if g.arm.name == shown.arm and g.member in members
    ]
    y = {"field": "kl", "type": "quantitative", "title": "KL to the parent, nats per token", "scale": {"zero": False}}
    x = {
        "field": "tokens",
        "type": "quantitative",
        "title": "tokens of one separate training",
        "scale": {"type": "log"},
    }
    shared = {"y": y, "color": {"field": "member", "type": "nominal", "title": None}}
    return {
        "title": "Separate training (lines) and the family (dashed)",
        "width": 320,
        "height": 240,
        "layer": [
            {"data": {"values": alone}, "mark": {"type": "line", "point": True}, "encoding": {"x": x, **shared}},
            {"data": {"values": together}, "mark": {"type": "rule", "strokeDash": [4, 3]}, "encoding": shared},
        ],
    }  # fmt: skip
