"""The charts of the report: their sections, titles and captions."""

from collections.abc import Mapping

from elastic_core.cost.metrics import Metric
from tasks.parents.targets import metric_of_family
from tasks.reporting import charts, tables
from tasks.reporting.charts import Figure
from tasks.settings.schema import Params

SIZES_OF_LAYERS = {  # axis of single layers → what its sizes count
    "intermediate_size": "neurons of an MLP",
    "mamba_num_heads": "heads of a Mamba layer",
    "num_attention_heads": "query heads of an attention layer",
    "num_experts": "routed experts of a layer",
    "moe_intermediate_size": "neurons of a routed expert",
    "moe_shared_expert_intermediate_size": "neurons of the shared expert",
}
STAGE_NAMES = {"parent": "Parent", "train_short": "Stage 1", "train_extended": "Stage 2"}


def sections(settings: Params, scores: tables.Scores, frame) -> dict[str, list[Figure]]:
    """Section heading → its charts. Sections without charts are left out."""
    budgets, config = list(scores), tables.parent_config()
    curves, settled = tables.training(), tables.settled()
    found = {
        "Quality against cost": _cost_figures(scores, frame, budgets),
        "Reasoning tasks": _task_figures(settings, scores, frame, budgets),
        "Training": [
            *training_figures(settings, curves, settled, budgets),
            Figure(
                "Loss by version",
                "Held-out loss of the untrained slice, after stage 1 and after stage 2. Dashed: the parent.",
                charts.loss_by_version(frame, budgets),
            ),
        ],
        "What the router chose": _router_figures(
            metric_of_family(settings), tables.router(scores, config), curves, settled, budgets
        ),
        "Importance": _importance_figures(settings, config),
    }
    return {name: figures for name, figures in found.items() if figures}


def _cost_figures(scores: tables.Scores, frame, budgets: list[str]) -> list[Figure]:
    front = "Dashed: the Pareto front. No model is cheaper and better than one on it. Zero-shot slices are not shown."
    cache = scores["parent"]["parent"]["memory"]["cache_tokens"]
    return [
        Figure(
            "Loss against parameters", front, charts.loss_against_cost(frame, "parameters", "parameters", budgets, "~s")
        ),
        Figure(
            "Loss against weights + cache",
            f"The measured bytes of the weights and of the cache of one sequence of {cache:,} tokens. {front}",
            charts.loss_against_cost(frame, "memory_mib", "weights + cache, MiB", budgets, ".3~f"),
        ),
        Figure(
            "Loss against time per token",
            f"Decode time per token divided by the parent's, measured alternately, once per budget. Bars: quartiles of "
            f"the ratios. {front}",
            charts.loss_against_cost(frame, "latency_ratio", "decode time per token, × parent", budgets, ".2~f"),
        ),
    ]


def _task_figures(settings: Params, scores: tables.Scores, frame, budgets: list[str]) -> list[Figure]:
    caption = "Bars: one standard error on each side. Dotted: the score of guessing."
    guesses = tables.chance(scores)
    return [
        Figure(task, caption, charts.task_scores(frame, task, guesses[task], budgets))
        for task in settings.evaluate.tasks
    ]


def training_figures(settings: Params, curves, settled: int | None, budgets: list[str]) -> list[Figure]:
    """Cross-entropy and KL of every stage. A measure that is always zero or missing gets no chart."""
    measures = {
        "ce": ("cross-entropy with the text", "Cross-entropy with the next token", "nats per token"),
        "kl": ("KL to the teacher", "KL(teacher ‖ member)", "nats per token"),
        "state": ("distance of the states", "Squared distance of normalised states from the teacher's", "per channel"),
    }
    found = []
    for stage, label in STAGE_NAMES.items():
        section = settings.parent.training if stage == "parent" else getattr(settings, stage)
        for measure, (title, words, unit) in measures.items():
            if measure not in curves:  # the loss does not match states
                continue
            part = curves[(curves["stage"] == stage) & curves[measure].notna()]
            if not part[measure].any():  # a parent has no teacher
                continue
            caption = f"{words}, on the training batches."
            if section is not None:
                caption += f" {loss_caption(section.loss, section.loss_by_budget)}"
            mark = settled if stage == "train_short" else None
            draw = charts.training_curve(part, measure, unit, budgets, mark)
            found.append(Figure(f"{label}: {title}", caption, draw))
    return found


def loss_caption(loss, loss_by_budget: Mapping) -> str:
    """A sentence with the terms of a stage's loss (`Loss`), and of those of budgets with a loss of their own."""
    own = (f"; of {name}: {_terms(other)}" for name, other in loss_by_budget.items())
    return f"The loss is {_terms(loss)}{''.join(own)}."


def _terms(loss) -> str:
    weights = {"cross-entropy": loss.ce_weight, "KL": loss.kl_weight, "states": loss.state_weight}
    return " + ".join(f"{weight:g} × {name}" for name, weight in weights.items() if weight)


def _router_figures(metric: Metric, kept, curves, settled: int | None, budgets: list[str]) -> list[Figure]:
    short = curves[curves["stage"] == "train_short"]
    return [
        Figure(
            "Kept sizes by budget and layer",
            kept_caption(kept),
            charts.kept_sizes(kept),
            wide=True,
        ),
        Figure(
            "Stage 1: distance from the budget",
            f"Before the router settles: the expected {metric.name}. After that: the {metric.name} of its choice.",
            charts.training_curve(short, "budget_error", f"|{metric.name} ÷ budget − 1|", budgets, settled),
        ),
    ]


def kept_caption(kept) -> str:
    """The caption of the chart of kept sizes. It names the axes that the parent has, and the types of their layers."""
    types: dict[str, set[str]] = {}
    for axis, layer in zip(kept["axis"], kept["layer"], strict=True):
        types.setdefault(axis, set()).add(layer.split()[-1])
    whole = "hidden channels" + (" and channels per Mamba head" if "mamba_head_dim" in types else "")
    own = [f"{words} ({', '.join(sorted(types[axis]))})" for axis, words in SIZES_OF_LAYERS.items() if axis in types]
    panels = "a panel per axis and a column per layer: " if len(charts.panels_of(kept)) > 1 else ""
    return (
        f"Numbers are kept sizes (not shown for more than {charts.FEW_COLUMNS} layers). Left: {whole} of the whole "
        f"model. Right: {panels}{', '.join(own)}. × is a dropped layer."
    )


def _importance_figures(settings: Params, config) -> list[Figure]:
    method = settings.rank.depth_method
    is_error = "nmse" in method
    title = "normalised squared error of the logits" if is_error else "cross-entropy without the layer, nats/token"
    return [
        Figure(
            "Units, by axis and layer",
            f"Importance on the calibration set ({settings.rank.measure}, {settings.rank.aggregation}). Each row is "
            "sorted from the most to the least important unit. The least important units are removed first.",
            charts.unit_importance(tables.importance(config)),
        ),
        Figure(
            "Layers",
            f"The error that removing a layer causes, by {method}, in the order in which layers are removed. "
            "Layers that no choice of depth can drop are not scored.",
            charts.depth_scores(tables.depth(config), title),
        ),
    ]
