"""The columns of the results: name, unit, an explanation of how each was measured, and number format."""

from dataclasses import dataclass

from elastic_core.cost.latency import Throughput, Timed
from elastic_core.cost.memory import Memory
from tasks.parents.targets import metric_of_family
from tasks.reporting import predictions
from tasks.reporting.tables import Scores, conversations

TASKS = {
    "chains": "sums modulo 10 of {n} steps, with worked steps before the answer",
    "chains_direct": "sums modulo 10 of {n} steps without worked steps, as a control",
    "recall": "the value of one key out of {n} pairs",
}


@dataclass(frozen=True)
class Column:
    """A column: its name, its unit ("" if it has none), how it was measured, and the format of its numbers.

    `spread` names the columns of the lower and the upper quartile. `shown` False: only in results.json. `once`: all
    versions of a budget share the number, so it stands in the row of the last one.
    """

    name: str
    unit: str
    how: str
    form: str = ".4f"
    spread: tuple[str, str] | None = None
    shown: bool = True
    once: bool = False

    @property
    def title(self) -> str:
        """Name and unit. It is also the key in results.json, so it must not change."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def write(self, value) -> str:
        """A number as text; a dash for a missing value (None or NaN)."""
        return "–" if value is None or value != value else format(value, self.form)

    def round(self, value) -> int | float | None:
        """A number with the digits that `write` shows."""
        if value is None or isinstance(value, int):
            return value
        return float(format(value, self.form.replace(",", "")))  # float() does not read commas


def describe(settings, scores: Scores) -> dict[str, Column]:
    """Name in `tables.results` → column, for every numeric column that is shown, in the order of the table."""
    parent = scores["parent"]["parent"]
    metric, predicted = metric_of_family(settings), {}
    if isinstance(metric, Memory):
        predicted = _memory(metric, parent)
    elif isinstance(metric, Timed):
        predicted = _time(metric, parent)
    scored = _tasks(settings, parent) | _benchmarks(settings, parent)
    return _size(parent) | predicted | _text(settings, parent) | _cost(parent) | scored


def _size(parent: dict) -> dict[str, Column]:
    text = "The parameters that one token uses. Of the routed experts, only the selected ones count."
    active = {"active_parameters": Column("active", "", text, ",.0f")} if "num_active_parameters" in parent else {}
    return {
        "parameters": Column("parameters", "", "Counted in the extracted directory, loaded by transformers.", ",.0f"),
        **active,
        "share": Column("share", "of parent", "Parameters divided by the parent's.", ".4f"),
    }


def _memory(metric: Memory, parent: dict) -> dict[str, Column]:
    measured = parent["memory"]
    return {
        "budget_mib": Column("serving memory budget", "MiB", f"The budget, for {metric.setting}.", ",.3f"),
        "serving_mib": Column(
            "serving memory, predicted",
            "MiB",
            f"Predicted for serving with {metric.setting}: the sum of weights, keys and values, states of the Mamba "
            "layers, and activations of the widest layer. The engine's own memory is not included.",
            ",.3f",
        ),
        "predicted_mib": Column(
            "weights + cache, predicted",
            "MiB",
            f"The same prediction for {measured['cache_tokens']:,} tokens in {measured['element_type']}, without "
            "activations. Compare it with the measured weights and cache.",
            ",.3f",
        ),
    }


def _time(metric: Timed, parent: dict) -> dict[str, Column]:
    unit = "tokens/s" if isinstance(metric, Throughput) else "ms"
    how = (
        f"Predicted for serving with {metric.setting}: the sum of the times of all kept layers and of the rest of a "
        "step, as measured by `elastic measure`."
    )
    found = {
        "budget_time": Column(f"{metric.name} budget", unit, f"The budget, for {metric.setting}.", ",.3f"),
        "serving_ms": Column("latency", "ms", how, ",.3f"),
        "serving_rate": Column(
            "throughput", "tokens/s", "The same prediction as tokens per second of all sequences together.", ",.1f"
        ),
    }
    if predictions.evaluated_time(metric.table, parent["latency"], parent["memory"]["element_type"]) is None:
        return found
    device = metric.table.environment.get("device", "a CPU")
    how = f"Predicted by the same table (measured on {device}) after {parent['latency']['prompt_tokens']} tokens"
    return found | {
        "predicted_ms": Column("time per token, predicted", "ms", f"{how}.", ".2f", shown=False),
        "predicted_ratio": Column("time per token, predicted", "× parent", f"{how}, divided by the parent's.", ".2f"),
    }


def _text(settings, parent: dict) -> dict[str, Column]:
    section = settings.evaluate
    tokens = ", ".join(f"{parent[f'tokens_{source}']:,} of {source}" for source in section.held_out)
    chats = conversations(parent)
    where = f"On {parent['tokens']:,} held-out tokens ({tokens}), in sequences of {section.sequence_length} tokens."
    if chats:
        where += f" Of {' and '.join(chats)}, only the trained tokens count, such as the assistant's."
    columns = {
        "loss": Column("loss", "nats/token", f"Cross-entropy with the next token, averaged over tokens. {where}"),
        "kl_to_parent": Column(
            "KL to parent",
            "nats/token",
            "KL(parent ‖ model) of the distributions of the next token, on the same tokens.",
        ),
        "gap_closed": Column(
            "gap closed",
            "share",
            "The share of the loss between the zero-shot slice and the parent that training recovered.",
            ".3f",
        ),
    }
    if "bits_per_byte" in parent:
        all_of = "all sources of text" if chats else "all sources"
        how = f"The same cross-entropy in bits, divided by the bytes of the text, for {all_of} together."
        columns["bits_per_byte"] = Column("bpb", "bits/byte", how)
    for source in section.held_out:
        if source in chats:
            how = f"Cross-entropy as in loss, for {source} only: the trained tokens of held-out conversations."
            columns[f"loss_{source}"] = Column(f"loss {source}", "nats/token", how)
        else:
            columns[f"bits_per_byte_{source}"] = Column(f"bpb {source}", "bits/byte", f"The same, for {source} only.")
    for length, found in parent.get("lengths", {}).items():
        how = f"Cross-entropy as in loss, on {found['tokens']:,} tokens in sequences of {int(length):,} tokens."
        columns[f"loss_at_{length}"] = Column(f"loss at {int(length):,}", "nats/token", how)
    return columns


def _cost(parent: dict) -> dict[str, Column]:
    memory = parent["memory"]
    return {
        **_speed(parent),
        "weight_mib": Column(
            "weights",
            "MiB",
            f"Bytes of all parameters in {memory['element_type']}; 1 MiB = 2²⁰ bytes.",
            ".3f",
        ),
        "cache_mib": Column(
            "cache",
            "MiB",
            f"Measured bytes of keys, values, SSM states and convolution states in transformers' cache, for one "
            f"sequence of {memory['cache_tokens']:,} tokens.",
            ".3f",
        ),
        "memory_mib": Column(
            "weights + cache",
            "MiB",
            "The sum of both: measured, in the setting of this evaluation.",
            ".3f",
        ),
    }


def _speed(parent: dict) -> dict[str, Column]:
    """Ratios to the parent with their quartiles. Milliseconds depend on device and moment: only in results.json."""
    latency, memory, environment = parent["latency"], parent["memory"], parent["environment"]
    steps = latency["repeats"] * latency["new_tokens"]
    device = f"{environment['device']}, {latency['threads']} thread{'s' * (latency['threads'] != 1)}"
    setting = f"with transformers' cache; {device}, {memory['element_type']}"
    shape = "Measured once per budget, with its last version: all its versions have the same shape."
    found = {}
    for column, name, ratios, how in (
        (
            "latency_ratio",
            "time per token",
            f"{steps} steps",
            f"Decode time per token of one sequence: {latency['new_tokens']} tokens after a prompt of "
            f"{latency['prompt_tokens']} tokens, greedy, {setting}",
        ),
        (
            "prefill_ratio",
            "prompt",
            f"{latency['repeats']} repeats",
            f"The time to process the prompt of {latency['prompt_tokens']} tokens in one pass, {setting}",
        ),
    ):
        text = (
            f"{how}. Divided by the parent's time, measured alternately in the same process: the median of the ratios "
            f"of {ratios}, and their quartiles. {shape}"
        )
        spread = (f"{column}_low", f"{column}_high")
        found[column] = Column(name, "× parent", text, ".2f", spread, once=True)
        for key, side in zip(spread, ("lower", "upper"), strict=True):
            unit, how = f"× parent, {side} quartile", f"The {side} quartile of the ratios."
            found[key] = Column(name, unit, how, ".3f", shown=False, once=True)
    for key, name in (("ms_per_token", "time per token"), ("parent_ms_per_token", "the parent's time per token")):
        how = f"Median in milliseconds on {device}, in the same minutes as the other of the two."
        found[key] = Column(f"{name} on {environment['device']}", "ms", how, ".2f", shown=False, once=True)
    return found


def _tasks(settings, parent: dict) -> dict[str, Column]:
    columns = {}
    for task in settings.evaluate.tasks:
        kind, _, length = task.rpartition("_")
        result = parent["tasks"][task]
        columns[task] = Column(
            task,
            "exact match",
            f"{TASKS[kind].format(n=length).capitalize()}. The share of {result['items']} items that were answered "
            "exactly, with greedy decoding, measured by lm-eval. ± is the standard error √(p(1−p)/n). Guessing scores "
            f"{result['chance']:.3f}.",
            ".3f",
        )
    return columns


def _benchmarks(settings, parent: dict) -> dict[str, Column]:
    columns, section = {}, settings.evaluate.benchmarks
    chat = (
        " Prompts were written with the chat template." if section is not None and section.apply_chat_template else ""
    )
    for task, result in parent["benchmarks"].items():
        how = f"The mean over {result['items']} items of lm-eval's task of this name. ± is the standard error.{chat}"
        columns[task] = Column(task, result["metric"].replace("_", " "), how, ".3f")
    return columns
