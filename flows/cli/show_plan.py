"""What `elastic plan` prints."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from flows.cli.show_inspect import UNBOUND, digits, headings, mebibytes, size, width

KINDS = {
    "weights": "weights, float32",
    "optimizer": "two moments",
    "gradients": "gradients",
    "teacher": "frozen teacher",
    "gathered": "gathered weights, and gradients on their way",
    "activations": "activations, and a layer at work",
    "loss": "loss",
}
WORK = {"student": "forward and backward", "recomputed": "forward again (checkpointing)", "teacher": "teacher, forward"}


def show(plan: dict) -> None:
    """Print the values of tasks.commands.plan as tables."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=UNBOUND)
    parent, hardware = plan["parent"], plan["hardware"]
    active = f", {parent['active_parameters']:,} of them active" if parent["active_parameters"] else ""
    console.print(f"{parent['config']}: {parent['parameters']:,} parameters{active}", style="bold", soft_wrap=True)
    console.print(parent["pattern"], soft_wrap=True)
    for table in (family(plan), memory(plan), work(plan)):
        console.print()
        console.print(table)
    console.print()
    for line in notes(plan):
        console.print(line, soft_wrap=True)
    for line in changes(plan):
        console.print(line, soft_wrap=True, style="bold")
    if not changes(plan):
        console.print(f"fits {size(hardware['memory'])} per worker", style="bold")


def new_table(*headings: str) -> Table:
    """A table whose first column are names, and all others numbers."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="left" if heading == headings[0] else "right", no_wrap=True)
    return table


def family(plan: dict) -> Table:
    """A row per budget: the nearest combination of the choices; memory or time too where budgets are counted in it."""
    counted = plan["memory"] or plan["time"]
    has_experts = plan["parent"]["active_parameters"] is not None
    heading = [] if not counted else ["memory,\nMiB" if plan["memory"] else "latency,\nms"]
    active, fields = ["active"] if has_experts else [], headings(has_experts)
    table = new_table("budget", "target", "parameters", *active, *heading, "off by", "layers", *fields.values())
    num_layers = len(plan["parent"]["kept_layers"])
    for name, values in plan["budgets"].items():
        widths = (width(values["widths"][field]) for field in fields)
        given = values["given"]
        table.add_row(
            name,
            given if isinstance(given, str) else f"{given:g}",
            f"{values['parameters']:,}",
            *([f"{values['active_parameters']:,}"] if has_experts else []),
            *([amount(plan, values["cost"])] if counted else []),
            f"{values['deviation']:+.2%}",
            f"{len(values['kept_layers'])}/{num_layers}",
            *widths,
        )
    return table


def amount(plan: dict, cost: float) -> str:
    """A cost in the unit of the plan's budgets."""
    if plan["memory"] is not None:
        return mebibytes(cost)
    return f"{cost:,.0f}" if plan["time"] is None else digits(cost)


def memory(plan: dict) -> Table:
    """A row per kind of bytes, a column per stage."""
    stages = plan["stages"]
    table = new_table("memory of a worker", *stages)
    table.add_row("workers, sharing one copy", *(f"{s['workers']}, {s['shards']}" for s in stages.values()))
    if any(s["sharing"] > 1 for s in stages.values()):
        table.add_row("workers per sequence", *(str(s["sharing"]) for s in stages.values()))
    loads = (f"{s['sequences']} × {s['sequence_length']:,}" for s in stages.values())
    table.add_row("sequences × tokens at a time", *loads)
    table.add_row("precision", *(s["precision"] for s in stages.values()), end_section=True)
    for kind, text in KINDS.items():
        if any(s["memory"][kind] for s in stages.values()):
            table.add_row(text, *(size(round(s["memory"][kind])) for s in stages.values()))
    table.add_row("together", *(size(round(s["total"])) for s in stages.values()), style="bold")
    if any(s["host_memory"] for s in stages.values()):
        table.add_row("beside it, in CPU memory", *(size(round(s["host_memory"])) for s in stages.values()))
    if any(s["cache"] for s in stages.values()):
        table.add_row("teacher's logits on disk, at most", *(size(round(s["cache"])) for s in stages.values()))
    found = [s["total_with_kernels"] for s in stages.values()]
    if any(found):
        table.add_row("with mamba_ssm, causal_conv1d", *(size(round(total)) if total else "" for total in found))
    table.add_row("at most in", *(s["moment"] for s in stages.values()), style="dim")
    return table


def work(plan: dict) -> Table:
    """A row per kind of operations, a column per stage."""
    stages = plan["stages"]
    table = new_table("work", *stages)
    table.add_row("tokens", *(f"{s['tokens']:,}" for s in stages.values()))
    table.add_row("steps", *(f"{s['steps']:,}" for s in stages.values()))
    for kind, text in WORK.items():
        if any(s["flops"][kind] for s in stages.values()):
            table.add_row(f"FLOPs, {text}", *(f"{s['flops'][kind]:.2e}" for s in stages.values()))
    if all(s["gpu_hours"] is not None for s in stages.values()):
        table.add_row("GPU-hours", *(f"{s['gpu_hours']:,.1f}" for s in stages.values()))
        table.add_row("hours", *(f"{s['hours']:,.1f}" for s in stages.values()))
    if all(s["cost"] is not None for s in stages.values()):
        price = f"cost, at {plan['hardware']['price']:g} per GPU-hour"
        table.add_row(price, *(f"{s['cost']:,.0f}" for s in stages.values()))
    return table


def notes(plan: dict) -> list[str]:
    """What was assumed, in sentences."""
    hardware, lines = plan["hardware"], []
    unit = "MiB" if plan["memory"] else "ms/token" if plan["time"] else plan["counted"].replace("_", " ")
    if "profile" in plan:
        written = "as `elastic init` would write it for plenty of text; change it with --set"
        lines.append(f"profile: {plan['profile'] or written}")
    ranges = [(name, *values["range"]) for name, values in plan["budgets"].items()]
    lines.append(f"layers: dropped {plan['assumption']['dropped']}, for their ranking is not known yet")
    for name, low, high in ranges:
        if low < high:
            costs = f"{amount(plan, low)} to {amount(plan, high)} {unit}"
            lines.append(f"        {name} of these sizes: {costs}, by which layers go")
    if missed := plan["assumption"]["missed"]:
        lines.append(f"        budgets could not be met with layers dropped {' or '.join(missed)}")
    if not plan["assumption"]["uniform"]:
        lines.append("sizes:  differ between layers, because no sizes that all layers share meet the budgets")
    peaks = {values["peak"] for values in plan["stages"].values()} - {None}
    if peaks:
        text = " and ".join(f"{peak / 1e12:,.0f}" for peak in sorted(peaks))
        lines.append(f"hours:  {hardware['utilisation']:.0%} of {text} TFLOP/s per GPU, recomputation counted as work")
    if (counted := plan["memory"] or plan["time"]) is not None:
        lines.append(f"budgets: shares of {amount(plan, plan['parent']['cost'])} {unit}, for {counted['setting']}")
    lines += documents(plan)
    if plan["parent"]["active_parameters"]:
        lines.append("experts: memory as if tokens asked all of a layer's experts alike, operations of those they ask")
    lines.append(f"memory: {size(round(hardware['usable']))} of {size(round(hardware['memory']))} are there to be used")
    lines.append(f"rank:   {size(round(plan['rank']['total']))} per worker, at most in {plan['rank']['moment']}")
    return lines


def documents(plan: dict) -> list[str]:
    """How long documents are: attention does not cross their ends."""
    if (reason := plan["documents"]["unknown_because"]) is not None:
        return [f"documents: one per row, because {reason}; attention costs at most this"]
    stages = plan["stages"]
    lengths = ", ".join(f"{stage['document_length']:,.0f} in {name}" for name, stage in stages.items())
    lines = [f"documents: mean length in tokens, over tokens: {lengths}, in {plan['documents']['data']}"]
    masked = [
        name
        for name, stage in stages.items()
        if stage["attention_pairs"] > stage["document_length"] * stage["sequence_length"]
    ]
    if masked:
        lines.append(f"        rows are short in {', '.join(masked)}: there attention scores all pairs, with a mask")
    return lines


def changes(plan: dict) -> list[str]:
    """What to change, a line for each; none where everything fits."""
    lines, usable = [], size(round(plan["hardware"]["usable"]))
    for name, stage in plan["stages"].items():
        if stage["fits"]:
            continue
        lines.append(f"{name} does not fit: {size(round(stage['total']))} of {usable}")
        for change in stage["changes"]:
            lines.append(f"  {'fits' if change['fits'] else 'then'} with {described(change)}")
        if stage["shorter"]:
            lines.append(f"  or   with {described(stage['shorter'])}")
        elif not any(change["fits"] for change in stage["changes"]):
            lines.append("  and nothing more helps: take GPUs with more memory, or a smaller parent")
    if not plan["rank"]["fits"]:
        lines.append(
            f"rank does not fit: {size(round(plan['rank']['total']))} of {usable}; set rank.precision: bfloat16, or a "
            "smaller rank.batch_size with more rank.batches, or take more workers"
        )
    return lines


def described(change: dict) -> str:
    """Parameters as options of `elastic run` and `elastic plan`, and what is held with them."""
    settings = " ".join(f"--set {key}={spelled(value)}" for key, value in change["set"].items())
    return f"{settings}: {size(round(change['total']))}"


def spelled(value: int | bool | None) -> str:
    """A value as YAML has it."""
    return "null" if value is None else str(value).lower()
