"""Which pictures the report shows, under which headings, and what is said of each."""

from tasks import charts, params, tables
from tasks.charts import Figure

STAGE_NAMES = {"parent": "Parent", "train_short": "Stage 1", "train_extended": "Stage 2"}


def sections(settings: "params.Params", scores: tables.Scores, frame) -> dict[str, list[Figure]]:
    """The pictures by section."""
    budgets, config = list(scores), tables.parent_config()
    found = {
        "Quality against cost": _cost_figures(scores, frame, budgets),
        "What training won back": _recovery_figures(settings, scores, frame, budgets),
        "Training": _training_figures(settings, budgets),
        "What the router chose": [
            Figure(
                "Kept sizes by budget and layer",
                "The number is the kept size: hidden channels and channels of a Mamba head for the whole model; heads "
                "of a Mamba (M) or attention (*) layer, neurons of an MLP (-). × marks a layer that is dropped.",
                charts.choices(tables.router(scores, config)),
                wide=True,
            )
        ],
        "Importance": _importance_figures(settings, config),
    }
    return found


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


def _recovery_figures(settings: "params.Params", scores: tables.Scores, frame, budgets: list[str]) -> list[Figure]:
    found = [
        Figure(
            "Loss by version",
            "From the slice that was never trained to the end of stage 2; dashed, the parent.",
            charts.won_back(frame, budgets),
        )
    ]
    if tasks := list(settings.evaluate.tasks):
        caption = "Bars: one standard error to either side. Dotted: what guessing scores."
        draw = charts.reasoning(frame, tasks, tables.chance(scores), budgets)
        found.append(Figure("Reasoning: exact match by task", caption, draw))
    return found


def _training_figures(settings: "params.Params", budgets: list[str]) -> list[Figure]:
    curves, settled, found = tables.training(), tables.settled(), []
    measures = {
        "ce": ("Cross-entropy with the text", "nats per token"),
        "kl": ("KL to the teacher", "nats per token"),
        "budget_error": ("Distance from the budget", "|parameters ÷ budget − 1|"),
    }
    captions = {
        "ce": "Training batches.",
        "kl": "KL(teacher ‖ member) on training batches.",
        "budget_error": "Of the number of parameters that the router expects.",
    }
    wanted = [("parent", "ce"), *((stage, name) for stage in tables.STAGES[1:] for name in ("ce", "kl"))]
    for stage, measure in [*wanted, ("train_short", "budget_error")]:
        part = curves[(curves["stage"] == stage) & curves[measure].notna()]
        if part.empty or not part[measure].any():  # nothing learnt by it
            continue
        title, unit = measures[measure]
        mark = settled if stage == "train_short" else None
        section = settings.parent.training if stage == "parent" else getattr(settings, stage)
        caption = captions[measure]
        if section is not None and measure != "budget_error":
            weights = section.loss
            caption += f" Minimised: {weights.ce_weight:g} × cross-entropy + {weights.kl_weight:g} × KL."
        draw = charts.curve(part, measure, unit, budgets, mark)
        found.append(
            Figure(
                f"{STAGE_NAMES[stage]}: {title[0].lower()}{title[1:]}"
                if measure != "kl"
                else f"{STAGE_NAMES[stage]}: {title}",
                caption,
                draw,
            )
        )
    return found


def _importance_figures(settings: "params.Params", config) -> list[Figure]:
    method = settings.rank.depth_method
    error = "normalised squared error of the logits" if "nmse" in method else "cross-entropy without it, nats/token"
    return [
        Figure(
            "Units, by axis and layer",
            "Activations on calibration text, each row sorted from the best unit to the worst. What is pale can go.",
            charts.importance(tables.importance(config)),
        ),
        Figure(
            "Layers",
            f"What removing a layer does, by {method}, in the order of judgement. "
            "Layers that no choice of depth can drop are not judged.",
            charts.depth(tables.depth(config), error),
        ),
    ]
