"""What `elastic inspect` prints."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tasks.progress.durations import duration

UNBOUND = 400  # columns, where nobody looks: a file's lines are not wrapped
HEADINGS = {
    "hidden_size": "hidden",
    "intermediate_size": "MLP",
    "mamba_num_heads": "Mamba\nheads",
    "mamba_head_dim": "head\ndim",
    "num_attention_heads": "attention\nheads",
}
EXPERTS = {
    "num_experts": "experts",
    "moe_intermediate_size": "expert",
    "moe_shared_expert_intermediate_size": "shared\nexpert",
}

NORMS = {
    "budgets": "every budget has gains of its own",
    "ratios": "gains of submodels follow from measured ratios, without training",
}


def show(description: dict) -> None:
    """Print the values of tasks.commands.inspect as tables."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=UNBOUND)
    budgets = description["budgets"]
    kind = "one model" if budgets is None else f"an elastic checkpoint of {len(budgets)} budgets"
    console.print(f"{description['directory']}: {kind}", style="bold", soft_wrap=True)
    console.print(facts(description))
    console.print()
    console.print(members(description))
    if description["provenance"]:
        console.print()
        console.print(stages(description["provenance"]))


def facts(description: dict) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    files, layers = description["files"], len(description["kept_layers"])
    weights = files[0] if len(files) == 1 else f"{len(files)} files"
    dtypes, tokenizer = " and ".join(description["dtypes"]), "with" if description["tokenizer"] else "without a"
    table.add_row("model", f"{description['model_type']}, {layers} layers, {description['parameters']:,} parameters")
    table.add_row("text", f"vocabulary {description['vocab_size']:,}, context {description['context']:,} tokens")
    if (memory := description["memory"]) is not None:
        table.add_row(
            "memory", f"{mebibytes(memory['parent'])} MiB for {memory['setting']}, which budgets are shares of"
        )
    if (time := description["time"]) is not None:
        table.add_row("time", f"{digits(time['parent'])} ms/token for {time['setting']}, which budgets are shares of")
    if description["norm_gains"] is not None:
        table.add_row("norms", NORMS[description["norm_gains"]])
    table.add_row("disk", f"{size(description['bytes'])} in {weights}, {dtypes}, {tokenizer} tokenizer")
    table.add_row("written by", writer(description["written_by"]))
    return table


def stages(records: list[dict]) -> Table:
    """A row for each stage that the weights come from."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("stage", "run", "started (UTC)", "took"):
        table.add_column(heading, no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("commit", no_wrap=True)
    table.add_column("device", overflow="fold")
    for record in records:
        commit = (record["commit"] or "–")[:12] + ("" if record["clean"] else " with changes")
        tokens = f"{record['tokens']:,}" if "tokens" in record else "–"
        begun = record["started"][:16].replace("T", " ")
        took = duration(record["seconds"])
        table.add_row(record["stage"], record["key"], begun, took, tokens, commit, record["device"])
        if "continues" in record:
            table.add_row("", f"goes on from {record['continues']['run']}, although this has changed:")
            for change in record["continues"]["changed"]:
                table.add_row("", f"  {change}")
    return table


def writer(source: dict | None) -> str:
    if source is None:
        return "unknown (no dvc.lock around it names it)"
    seed = "" if source["seed"] is None else f", seed {source['seed']}"
    return f"stage {source['stage']} in {source['workspace']}{seed}; dvc.lock: {source['output']} {source['md5']}"


def members(description: dict) -> Table:
    """A row for the model itself, and one per budget."""
    budgets, memory, time = description["budgets"], description["memory"], description["time"]
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    if budgets is not None:
        table.add_column("budget", no_wrap=True)
        for heading in ("target", "share"):
            table.add_column(heading, justify="right", no_wrap=True)
    for heading in () if memory is None else ("memory\nbudget, MiB", "memory,\nMiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in () if time is None else ("latency\nbudget, ms", "latency,\nms", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    has_experts = description["active_parameters"] is not None
    fields, active = headings(has_experts), ["active"] if has_experts else []
    for heading in ("parameters", *active, "layers", *fields.values()):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("pattern", overflow="fold")
    own = {"target": 1.0, "share": 1.0, **description}
    if memory is not None:
        own |= {"cost": memory["parent"], "target_cost": memory["parent"]}
    if time is not None:
        own |= {"cost": time["parent"], "target_cost": time["parent"]}
    for name, values in [("(parent)", own), *(budgets or {}).items()]:
        head = [] if budgets is None else [name, f"{values['target']:g}", f"{values['share']:.4f}"]
        head += [] if memory is None else [mebibytes(values[key]) for key in ("target_cost", "cost")]
        if time is not None:
            rate = 1000 * time["batch"] / values["cost"]
            head += map(digits, (values["target_cost"], values["cost"], rate))
        counts = [f"{values[f'{kind}parameters']:,}" for kind in (("", "active_") if has_experts else ("",))]
        layers = f"{len(values['kept_layers'])}/{len(own['kept_layers'])}"
        widths = (width(values["widths"][field]) for field in fields)
        table.add_row(*head, *counts, layers, *widths, values["pattern"])
    return table


def headings(has_experts: bool) -> dict[str, str]:
    """Fields of a submodel and their headings; those of experts where there are any."""
    return HEADINGS | (EXPERTS if has_experts else {})


def width(value: int | list[int] | None) -> str:
    """One width, or those of the layers in order."""
    if value is None:
        return "–"
    return " ".join(map(str, value)) if isinstance(value, list) else f"{value:,}"


def digits(value: float) -> str:
    """Four digits, and all of those before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.4g}"


def mebibytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.3f}"


def size(num_bytes: int) -> str:
    for unit, factor in {"GB": 10**9, "MB": 10**6, "kB": 10**3}.items():
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.1f} {unit}"
    return f"{num_bytes} bytes"
