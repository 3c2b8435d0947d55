"""Draws the report's charts from its tables. A chart is as wide as a phone and has a light and a dark theme.

Functions with a nested `draw` return a function that draws the chart in a given theme.
"""

from collections.abc import Callable
from dataclasses import dataclass

import altair as alt

from elastic_core.model.axes import TITLES
from tasks.reporting import tables

MODELS = ["parent", *tables.LABELS.values()]
SHAPES = ["diamond", "triangle-down", "square", "circle"]  # in the order of MODELS
WIDTH, HEIGHT = 288, 200  # pixels; 288 has many divisors, so the cells of a heat map have no gaps
FONT = "system-ui, Helvetica, Arial, sans-serif"
WHOLE_MODEL = {"hidden_size": "hidden", "mamba_head_dim": "head dim"}  # axes with one size for all layers → column
FEW_COLUMNS = 14  # with at most so many columns, the cells of a heat map have room for numbers


@dataclass(frozen=True)
class Theme:
    """Colours. `series` has one per budget, the parent first. `ramp` goes from the lowest to the highest value."""

    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]
    ramp: tuple[str, str]
    on_ramp: tuple[str, str]  # text on the lower half and on the upper half of the ramp
    ground: str | None = None  # None: transparent


LIGHT = Theme(
    ink="#1f2937",
    muted="#6b7280",
    grid="#e5e7eb",
    series=("#4b5563", "#1d4ed8", "#c2410c", "#047857", "#a21caf", "#b91c1c", "#0e7490", "#6d28d9", "#4d7c0f"),
    ramp=("#eaf1fd", "#1e40af"),
    on_ramp=("#1f2937", "#ffffff"),
)
DARK = Theme(
    ink="#e5e7eb",
    muted="#9ca3af",
    grid="#374151",
    series=("#d1d5db", "#60a5fa", "#fb923c", "#34d399", "#e879f9", "#f87171", "#22d3ee", "#a78bfa", "#a3e635"),
    ramp=("#172033", "#7db4fb"),
    on_ramp=("#e5e7eb", "#0b1220"),
)
PAPER = Theme(**{**vars(LIGHT), "ground": "#ffffff"})  # white ground, for readers with an unknown background


@dataclass(frozen=True)
class Figure:
    """A chart: title, caption, and a function that draws it in a theme. A wide chart may scroll on a phone."""

    title: str
    caption: str
    draw: Callable[[Theme], alt.TopLevelMixin]
    wide: bool = False

    def spec(self, theme: Theme) -> str:
        """The chart in a theme, as Vega-Lite JSON."""
        axis = {"domainColor": theme.muted, "tickColor": theme.muted, "gridColor": theme.grid, "titleFontWeight": 500}
        text = {"labelColor": theme.ink, "titleColor": theme.ink, "labelFontSize": 11, "titleFontSize": 11}
        config = alt.Config(
            background=theme.ground or "transparent",
            font=FONT,
            axis=alt.AxisConfig(**axis, **text),
            legend=alt.LegendConfig(**text, orient="top", symbolSize=70, columns=4),
            header=alt.HeaderConfig(**text),
            title=alt.TitleConfig(color=theme.ink, fontSize=11, fontWeight=500, anchor="start", offset=4),
            view=alt.ViewConfig(stroke=None),
        )
        return self.draw(theme).properties(config=config, padding=6).to_json()


def budget_colour(theme: Theme, budgets: list[str], legend: alt.Legend | None) -> alt.Color:
    """A colour per budget, the same in all charts. `budgets` has the order of the results, the parent first."""
    colours = [theme.series[0]] + [theme.series[1 + i % (len(theme.series) - 1)] for i in range(len(budgets) - 1)]
    return alt.Color("budget:N", sort=budgets, scale=alt.Scale(domain=budgets, range=colours), legend=legend)


def version_shape(theme: Theme, frame) -> alt.Shape:
    """A shape per version (zero-shot, after stage 1, after stage 2), the same in all charts."""
    present = [model for model in MODELS if model in set(frame["model"])]
    fill = {"symbolFillColor": theme.muted, "symbolStrokeColor": theme.muted}
    legend = alt.Legend(title=None, values=present, columns=2 if len(present) > 3 else 3, **fill)
    return alt.Shape("model:N", sort=present, scale=alt.Scale(domain=MODELS, range=SHAPES), legend=legend)


def training_curve(frame, measure: str, title: str, budgets: list[str], settled: int | None = None):
    """A measure of training over the tokens of one stage. A vertical line marks the token `settled` of the router."""

    def draw(theme: Theme) -> alt.TopLevelMixin:
        present = [budget for budget in budgets if budget in set(frame["budget"])]
        legend = alt.Legend(title=None, values=present, symbolType="stroke", symbolStrokeWidth=2)
        form = {"format": ".0%"} if measure == "budget_error" else {}
        lines = (
            alt.Chart(frame[["tokens", "budget", measure]].dropna())
            .mark_line(strokeWidth=1.6)
            .encode(
                x=alt.X("tokens:Q", title="tokens of the stage", axis=alt.Axis(format="~s", tickCount=5, grid=False)),
                y=alt.Y(f"{measure}:Q", title=title, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5, **form)),
                color=budget_colour(theme, budgets, legend),
            )
        )
        if settled is None:
            return lines.properties(width=WIDTH, height=HEIGHT)
        point = alt.Chart(alt.Data(values=[{"tokens": settled, "text": "router settled"}]))
        rule = point.mark_rule(color=theme.muted, strokeDash=[3, 3]).encode(x="tokens:Q")
        text = point.mark_text(color=theme.muted, align="left", dx=4, fontSize=10).encode(
            x="tokens:Q", y=alt.value(6), text="text:N"
        )
        return alt.layer(lines, rule, text).properties(width=WIDTH, height=HEIGHT)

    return draw


def loss_by_version(frame, budgets: list[str]):
    """The loss of the versions, one line per budget, and the parent's loss as a horizontal line."""

    def draw(theme: Theme) -> alt.TopLevelMixin:
        members = frame[frame["budget"] != "parent"]
        legend = alt.Legend(title=None, values=budgets[1:])
        lines = (
            alt.Chart(members)
            .mark_line(strokeWidth=1.6, point=alt.OverlayMarkDef(size=55, filled=True))
            .encode(
                x=alt.X("model:N", sort=MODELS[1:], title=None, axis=alt.Axis(labelAngle=0)),
                y=alt.Y("loss:Q", title="held-out loss, nats per token", scale=alt.Scale(zero=False)),
                color=budget_colour(theme, budgets, legend),
            )
        )
        parent = alt.Chart(frame[frame["budget"] == "parent"])
        rule = parent.mark_rule(color=theme.series[0], strokeDash=[4, 3]).encode(y="loss:Q")
        text = parent.mark_text(color=theme.series[0], align="left", dy=-7, fontSize=10).encode(
            x=alt.value(4), y="loss:Q", text=alt.value("parent")
        )
        return alt.layer(rule, lines, text).properties(width=WIDTH, height=HEIGHT)

    return draw


def loss_against_cost(frame, cost: str, title: str, budgets: list[str], form: str):
    """Held-out loss against the column `cost`, with the Pareto front, and with the quartiles of costs that have them.

    Zero-shot slices are left out. Their loss is so high that all other points would be squeezed together.
    """

    def draw(theme: Theme) -> alt.TopLevelMixin:
        trained = frame[frame["model"] != tables.LABELS["zero_shot"]]
        x = alt.X(
            f"{cost}:Q",
            title=title,
            scale=alt.Scale(zero=False, padding=24),
            axis=alt.Axis(format=form, tickCount=5, grid=False),
        )
        y = alt.Y("loss:Q", title="held-out loss, nats per token", scale=alt.Scale(zero=False, padding=14))
        front = (
            alt.Chart(tables.pareto(trained, cost))
            .mark_line(color=theme.muted, strokeDash=[4, 3], interpolate="step-after")
            .encode(x=x, y=y)
        )
        points = (
            alt.Chart(trained)
            .mark_point(filled=True, size=70, opacity=0.9)
            .encode(x=x, y=y, color=budget_colour(theme, budgets, None), shape=version_shape(theme, trained))
        )
        names = (
            alt.Chart(tables.finals(trained))
            .mark_text(align="left", dx=8, dy=-7, fontSize=11)
            .encode(x=x, y=y, text="budget:N", color=budget_colour(theme, budgets, None))
        )
        layers = [front, points, names]
        if f"{cost}_low" in trained:
            spread = alt.Chart(tables.finals(trained)).mark_rule(strokeWidth=1.6)
            ends = {"x": alt.X(f"{cost}_low:Q", title=title), "x2": f"{cost}_high:Q"}
            layers.insert(1, spread.encode(**ends, y=y, color=budget_colour(theme, budgets, None)))
        return alt.layer(*layers).properties(width=WIDTH, height=HEIGHT)

    return draw


def task_scores(frame, task: str, chance: float, budgets: list[str]):
    """The exact match of a task, one mark per model, with one standard error on each side."""
    error = frame[f"{task}_error"]
    low, high = (frame[task] - error).clip(lower=0), (frame[task] + error).clip(upper=1)
    frame = frame.assign(value=frame[task], low=low, high=high)[["budget", "model", "value", "low", "high"]]

    def draw(theme: Theme) -> alt.TopLevelMixin:
        scale = alt.Scale(domain=[0, 1])
        x = alt.X("value:Q", title="exact match", scale=scale, axis=alt.Axis(tickCount=5, format=".1f"))
        y = alt.Y("budget:N", sort=budgets, title=None, axis=alt.Axis(ticks=False, domain=False, labelPadding=9))
        colour = budget_colour(theme, budgets, None)
        base = alt.Chart(frame).encode(y=y, yOffset=alt.YOffset("model:N", sort=MODELS), color=colour)
        errors = base.mark_rule(strokeWidth=1.6).encode(x=alt.X("low:Q", scale=scale), x2="high:Q")
        points = base.mark_point(filled=True, size=34, opacity=1).encode(x=x, shape=version_shape(theme, frame))
        guessing = alt.Chart(alt.Data(values=[{"chance": chance}]))
        rule = guessing.mark_rule(color=theme.muted, strokeDash=[2, 2]).encode(x=alt.X("chance:Q", scale=scale))
        return alt.layer(rule, errors, points).properties(width=WIDTH, height=34 * len(budgets))

    return draw


def kept_sizes_map(
    theme: Theme, rows: list[dict], columns: list[str], budgets: list[str], is_first: bool, title: str = ""
):
    """A heat map of kept shares with a row per budget. Dropped layers are crossed out.

    The budgets are named in the first map of a row, and in maps with a title, which are below each other.
    """
    step, has_text = (36, True) if len(columns) <= FEW_COLUMNS else (17, False)
    if is_first:  # its columns have words as names and need more room
        step = 56
    x = alt.X(
        "column:N",
        sort=columns,
        title=None,
        axis=alt.Axis(orient="top", labelAngle=0 if has_text else -90, ticks=False, domain=False, labelLimit=90),
    )
    axis = alt.Axis(ticks=False, domain=False, labelPadding=6) if is_first or title else None
    y = alt.Y("budget:N", sort=budgets, title=None, axis=axis)
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, y=y)
    legend = alt.Legend(
        title="kept share of the parent's size", format=".0%", values=[0, 0.5, 1], orient="bottom", titleLimit=0
    )
    scale = alt.Scale(domain=[0, 1], range=list(theme.ramp))
    kept = base.transform_filter("isValid(datum.kept)")
    dropped = base.transform_filter("!isValid(datum.kept)")
    text = alt.condition("datum.kept > 0.55", alt.value(theme.on_ramp[1]), alt.value(theme.on_ramp[0]))
    marks = [
        kept.mark_rect(cornerRadius=3, stroke=theme.grid).encode(color=alt.Color("kept:Q", scale=scale, legend=legend)),
        dropped.mark_rect(cornerRadius=3, fillOpacity=0, stroke=theme.muted, strokeDash=[2, 2]),
        dropped.mark_text(color=theme.muted, fontSize=14, text="×"),
    ]
    if has_text:
        marks.append(kept.mark_text(fontSize=11).encode(text="size:Q", color=text))
    drawn = alt.layer(*marks).properties(width=alt.Step(step), height=alt.Step(30))
    return drawn.properties(title=title) if title else drawn


def panels_of(frame) -> dict:
    """Title → a table as that of `tables.router`, with one row per budget and layer, without axes of the whole model.

    All layers are in one panel without a title, unless some layer has several axes: then each axis has its own panel.
    """
    own = frame[~frame["axis"].isin(WHOLE_MODEL)]
    if not own.duplicated(["budget", "layer"]).any():
        return {"": own}
    return {TITLES[axis]: rows for axis, rows in own.groupby("axis", sort=False)}


def kept_sizes(frame):
    """What every budget keeps: sizes of the whole model on the left, a column per layer on the right."""
    budgets, whole = list(dict.fromkeys(frame["budget"])), {}
    for row in tables.records(frame[frame["axis"].isin(WHOLE_MODEL)]):
        column = WHOLE_MODEL[row["axis"]]
        if whole.get((row["budget"], column), {}).get("kept") is None:  # take the size from a layer that is kept
            whole[row["budget"], column] = row | {"column": column}
    names = [name for name in WHOLE_MODEL.values() if any(column == name for _, column in whole)]

    def draw(theme: Theme) -> alt.TopLevelMixin:
        left, panels = kept_sizes_map(theme, list(whole.values()), names, budgets, is_first=True), []
        for title, rows in panels_of(frame).items():
            columns = sorted(set(rows["layer"]), key=lambda name: int(name.split()[0]))
            cells = tables.records(rows.assign(column=rows["layer"]))
            panels.append(kept_sizes_map(theme, cells, columns, budgets, is_first=False, title=title))
        return alt.hconcat(left, alt.vconcat(*panels) if len(panels) > 1 else panels[0], spacing=14)

    return draw


def unit_importance(frame):
    """The importance of the units in the order of their rank: a panel per axis, with a row per layer."""
    count = frame.groupby(["axis", "layer"])["rank"].transform("size")
    position = (frame["rank"] * (count - 1)).round()
    frame = frame.assign(start=position / count, end=(position + 1) / count)

    def draw(theme: Theme) -> alt.TopLevelMixin:
        panels, axes = [], list(dict.fromkeys(frame["axis"]))
        for axis in axes:
            part = frame[frame["axis"] == axis]
            last = axis == axes[-1]
            x_axis = alt.Axis(format=".0%", tickCount=5, grid=False, labels=last, ticks=last, domain=False)
            legend = alt.Legend(title="relative importance", values=[0, 0.5, 1], orient="bottom")
            panels.append(
                alt.Chart(part)
                .mark_rect()
                .encode(
                    x=alt.X("start:Q", title="units, best to worst" if last else None, axis=x_axis),
                    x2="end:Q",
                    y=alt.Y("layer:N", sort=None, title=None, axis=alt.Axis(ticks=False, domain=False)),
                    color=alt.Color(
                        "importance:Q", scale=alt.Scale(domain=[0, 1], range=list(theme.ramp)), legend=legend
                    ),
                )
                .properties(width=WIDTH, height=alt.Step(15), title=axis)
            )
        return alt.vconcat(*panels, spacing=6)

    return draw


def depth_scores(frame, title: str):
    """The score of every layer in the depth ranking."""

    def draw(theme: Theme) -> alt.TopLevelMixin:
        return (
            alt.Chart(frame)
            .mark_bar(color=theme.series[1], cornerRadiusEnd=2)
            .encode(
                x=alt.X("score:Q", title=title, axis=alt.Axis(tickCount=4)),
                y=alt.Y("layer:N", sort=None, title=None, axis=alt.Axis(ticks=False)),
            )
            .properties(width=WIDTH, height=alt.Step(20))
        )

    return draw
