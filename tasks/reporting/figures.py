"""Which pictures the report shows, under which headings, and what is said of each."""

from elastic_core.cost.metrics import Metric
from tasks.parents.targets import metric_of_family
from tasks.reporting import charts, tables
from tasks.reporting.charts import Figure
from tasks.settings.schema import Params

STAGE_NAMES = {"parent": "Parent", "train_short": "Stage 1", "train_extended": "Stage 2"}


def sections(settings: Params, scores: tables.Scores, frame) -> dict[str, list[Figure]]:
    """The pictures by section."""
    budgets, config = list(scores), tables.parent_config()
    curves, settled = tables.training(), tables.settled()
    found = {
        "Quality against cost": _cost_figures(scores, frame, budgets),
        "Reasoning tasks": _task_figures(settings, scores, frame, budgets),
        "Training": [
            *_training_figures(settings, curves, settled, budgets),
            Figure(
                "Loss by version",
                "Held-out: from the slice that was never trained to the end of stage 2; dashed, the parent.",
                charts.won_back(frame, budgets),
            ),
        ],
        "What the router chose": _router_figures(
            metric_of_family(settings), tables.router(scores, config), curves, settled, budgets
        ),
        "Importance": _importance_figures(settings, config),
    }
    return {name: figures for name, figures in found.items() if figures}


def _cost_figures(scores: tables.Scores, frame, budgets: list[str]) -> list[Figure]:
    front = "Dashed: the Pareto front, below and left of which is nothing. Without the zero-shot slices."
    cache = scores["parent"]["parent"]["memory"]["cache_tokens"]
    return [
        Figure("Loss against parameters", front, charts.quality(frame, "parameters", "parameters", budgets, "~s")),
        Figure(
            "Loss against memory",
            f"Weights, and the cache of one sequence of {cache:,} tokens. {front}",
            charts.quality(frame, "memory_mib", "weights and cache, MiB", budgets, ".3~f"),
        ),
        Figure(
            "Loss against time per token",
            f"Measured turn by turn with the parent, which is 1. {front}",
            charts.quality(frame, "latency_ratio", "time per generated token, × parent", budgets, ".2~f"),
        ),
    ]


def _task_figures(settings: Params, scores: tables.Scores, frame, budgets: list[str]) -> list[Figure]:
    caption = "Bars: one standard error to either side. Dotted: what guessing scores."
    guesses = tables.chance(scores)
    return [
        Figure(task, caption, charts.reasoning(frame, task, guesses[task], budgets)) for task in settings.evaluate.tasks
    ]


def _training_figures(settings: Params, curves, settled: int | None, budgets: list[str]) -> list[Figure]:
    """Cross-entropy and KL of every stage, where they say anything."""
    measures = {
        "ce": ("cross-entropy with the text", "Cross-entropy with the next token"),
        "kl": ("KL to the teacher", "KL(teacher ‖ member)"),
    }
    found = []
    for stage, label in STAGE_NAMES.items():
        section = settings.parent.training if stage == "parent" else getattr(settings, stage)
        for measure, (title, words) in measures.items():
            part = curves[(curves["stage"] == stage) & curves[measure].notna()]
            if not part[measure].any():  # a parent has no teacher
                continue
            caption = f"{words} on the batches that are trained on."
            if section is not None:
                weights = {"cross-entropy": section.loss.ce_weight, "KL": section.loss.kl_weight}
                terms = [f"{weight:g} × {name}" for name, weight in weights.items() if weight]
                caption += f" Minimised: {' + '.join(terms)}."
            mark = settled if stage == "train_short" else None
            draw = charts.curve(part, measure, "nats per token", budgets, mark)
            found.append(Figure(f"{label}: {title}", caption, draw))
    return found


def _router_figures(metric: Metric, kept, curves, settled: int | None, budgets: list[str]) -> list[Figure]:
    short = curves[curves["stage"] == "train_short"]
    return [
        Figure(
            "Kept sizes by budget and layer",
            "Kept sizes, where there is room for a number: hidden channels and channels of a Mamba head for the whole "
            "model; heads of a Mamba (M) or attention (*) layer, neurons of an MLP (-). × is a dropped layer.",
            charts.choices(kept),
            wide=True,
        ),
        Figure(
            "Stage 1: distance from the budget",
            f"Of the {metric.name} that the router expects, then of what it chose.",
            charts.curve(short, "budget_error", f"|{metric.name} ÷ budget − 1|", budgets, settled),
        ),
    ]


def _importance_figures(settings: Params, config) -> list[Figure]:
    method = settings.rank.depth_method
    error = "normalised squared error of the logits" if "nmse" in method else "cross-entropy without it, nats/token"
    return [
        Figure(
            "Units, by axis and layer",
            f"Importance on calibration text ({settings.rank.measure}, {settings.rank.aggregation}), each row sorted "
            "from the best unit to the worst. Low ones go first.",
            charts.importance(tables.importance(config)),
        ),
        Figure(
            "Layers",
            f"What removing a layer does, by {method}, in the order of judgement. "
            "Layers that no choice of depth can drop are not judged.",
            charts.depth(tables.depth(config), error),
        ),
    ]
