"""The results' columns for people: what each is called, its unit, how it was measured, and how it is written."""

from dataclasses import dataclass

from elastic_core.cost.latency import Throughput, Timed
from elastic_core.cost.memory import Memory
from tasks.parents.targets import metric_of_family
from tasks.reporting import predictions
from tasks.reporting.tables import Scores

TASKS = {
    "chains": "sums mod 10 of {n} steps, the steps worked out before the answer",
    "chains_direct": "sums mod 10 of {n} steps, answered at once: the control",
    "recall": "the value of a key among {n} pairs",
}


@dataclass(frozen=True)
class Column:
    """One column: its name, unit ("" where it has none), how it was measured, and the format of its numbers."""

    name: str
    unit: str
    how: str
    form: str = ".4f"

    @property
    def title(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def write(self, value) -> str:
        """A number as text; a dash where the column does not apply."""
        return "–" if value is None or value != value else format(value, self.form)

    def round(self, value) -> int | float | None:
        """A number as the table has it."""
        if value is None or isinstance(value, int):
            return value
        return float(format(value, self.form.replace(",", "")))  # which stands between thousands


def describe(settings, scores: Scores) -> dict[str, Column]:
    """Every numeric column of `tables.results` that is shown, in the order in which it is."""
    parent = scores["parent"]["parent"]
    metric, predicted = metric_of_family(settings), {}
    if isinstance(metric, Memory):
        predicted = _memory(metric, parent)
    elif isinstance(metric, Timed):
        predicted = _time(metric, parent)
    scored = _tasks(settings, parent) | _benchmarks(parent)
    return _size(parent) | predicted | _text(settings, parent) | _cost(parent) | scored


def _size(parent: dict) -> dict[str, Column]:
    text = "Of these, what one token uses: of routed experts those that it is sent to."
    active = {"active_parameters": Column("active", "", text, ",.0f")} if "num_active_parameters" in parent else {}
    return {
        "parameters": Column("parameters", "", "Counted in the extracted directory as transformers loads it.", ",.0f"),
        **active,
        "share": Column("share", "of parent", "Parameters, over the parent's.", ".4f"),
    }


def _memory(metric: Memory, parent: dict) -> dict[str, Column]:
    measured = parent["memory"]
    return {
        "budget_mib": Column("memory budget", "MiB", f"What was asked for, at {metric.setting}.", ",.3f"),
        "serving_mib": Column(
            "memory",
            "MiB",
            f"Predicted for serving at {metric.setting}: weights, keys and values, states of the Mamba layers, and the "
            "activations of the widest layer; the engine's own memory is not counted.",
            ",.3f",
        ),
        "predicted_mib": Column(
            "weights and cache, predicted",
            "MiB",
            f"By the same count for {measured['cache_tokens']:,} tokens in {measured['element_type']} without "
            "activations: to compare with weights and cache as they were counted.",
            ",.3f",
        ),
    }


def _time(metric: Timed, parent: dict) -> dict[str, Column]:
    unit = "tokens/s" if isinstance(metric, Throughput) else "ms"
    how = f"Predicted for serving at {metric.setting}: the sum of what each kept layer takes, as `elastic profile` "
    found = {
        "budget_time": Column(f"{metric.name} budget", unit, f"What was asked for, at {metric.setting}.", ",.3f"),
        "serving_ms": Column("latency", "ms", f"{how}measured it, and of the rest of a step.", ",.3f"),
        "serving_rate": Column("throughput", "tokens/s", "The same, of all sequences together.", ",.1f"),
    }
    if predictions.evaluated_time(metric.table, parent["latency"], parent["memory"]["element_type"]) is None:
        return found
    place = metric.table.environment.get("device", "a CPU")
    tokens = f"By the same table, of {place}, behind {parent['latency']['prompt_tokens']} tokens"
    return found | {
        "predicted_ms": Column(
            "time per token, predicted", "ms", f"{tokens}: to compare with time per token as it was measured.", ".2f"
        ),
        "predicted_ratio": Column("time per token, predicted", "× parent", f"{tokens}, over the parent's.", ".2f"),
    }


def _text(settings, parent: dict) -> dict[str, Column]:
    section = settings.evaluate
    tokens = ", ".join(f"{parent[f'tokens_{source}']:,} of {source}" for source in section.held_out)
    where = f"Held-out text, {parent['tokens']:,} predicted tokens ({tokens}), in windows of {section.sequence_length}."
    columns = {
        "loss": Column("loss", "nats/token", f"Cross-entropy with the next token, mean over tokens. {where}"),
        "kl_to_parent": Column(
            "KL to parent", "nats/token", "KL(parent ‖ model) of the next token's distribution, on the same tokens."
        ),
        "gap_closed": Column(
            "gap closed",
            "share",
            "What training won back of the loss between the zero-shot slice and the parent.",
            ".3f",
        ),
        "bits_per_byte": Column(
            "bpb", "bits/byte", "The same cross-entropy in bits, over the bytes of the text: all sources together."
        ),
    }
    for source in section.held_out:
        columns[f"bits_per_byte_{source}"] = Column(f"bpb {source}", "bits/byte", f"The same, on {source} alone.")
    return columns


def _cost(parent: dict) -> dict[str, Column]:
    latency, memory, place = parent["latency"], parent["memory"], parent["environment"]
    device = f"{place['device']}, {latency['threads']} thread{'s' * (latency['threads'] != 1)}"
    ratio = (
        "Over the parent's in the same process, the two in turns at every step: the median of the steps' ratios. "
        "Compare this between models and runs; milliseconds depend on what else the machine does."
    )
    return {
        "ms_per_token": Column(
            "time per token",
            "ms",
            f"One sequence, greedy, {latency['new_tokens']} tokens after a prompt of {latency['prompt_tokens']}, with "
            f"transformers' cache: the median of {latency['repeats'] * latency['new_tokens']} steps in "
            f"{latency['repeats']} repeats; {device}, {memory['element_type']}.",
            ".2f",
        ),
        "latency_ratio": Column("time per token", "× parent", ratio, ".2f"),
        "prefill_ms": Column(
            "prompt",
            "ms",
            f"The prompt of {latency['prompt_tokens']} tokens read at once, up to its last logits: the median of "
            f"{latency['repeats']}; {device}, {memory['element_type']}.",
            ".2f",
        ),
        "prefill_ratio": Column(
            "prompt", "× parent", "Over the parent's in the same process: the median of the repeats' ratios.", ".2f"
        ),
        "weight_mib": Column(
            "weights",
            "MiB",
            f"Bytes of all parameters in {memory['element_type']}, as evaluated; 1 MiB = 2²⁰ bytes.",
            ".3f",
        ),
        "cache_mib": Column(
            "cache",
            "MiB",
            f"Bytes of keys, values, SSM states and convolution states in transformers' cache for one sequence of "
            f"{memory['cache_tokens']:,} tokens; counted, not estimated.",
            ".3f",
        ),
    }


def _tasks(settings, parent: dict) -> dict[str, Column]:
    columns = {}
    for task in settings.evaluate.tasks:
        kind, _, length = task.rpartition("_")
        result = parent["tasks"][task]
        columns[task] = Column(
            task,
            "exact match",
            f"{TASKS[kind].format(n=length).capitalize()}. Share of {result['items']} items answered exactly, "
            f"greedy, through lm-eval; ± is the standard error √(p(1−p)/n). Guessing scores {result['chance']:.3f}.",
            ".3f",
        )
    return columns


def _benchmarks(parent: dict) -> dict[str, Column]:
    columns = {}
    for task, result in parent["benchmarks"].items():
        how = f"Mean over {result['items']} items, by lm-eval's task of this name; ± is the standard error."
        columns[task] = Column(task, result["metric"].replace("_", " "), how, ".3f")
    return columns
