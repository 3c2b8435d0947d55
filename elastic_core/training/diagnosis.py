"""What is known about a loss or gradient that is not finite: which budget, which layer, which data."""

from __future__ import annotations

from torch import Tensor

from elastic_core.model import architectures
from elastic_core.model.dims import layer_index
from elastic_core.training.distributed.gradients import local
from elastic_core.training.run import Run, named_parameters

ADVICE = "lower learning_rate, or start from the last checkpoint with other data"


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not a finite number; none of them reached the weights."""


def explain_loss(run: Run, microbatch: int, row: dict, sliced, input_ids: Tensor) -> str:
    """Run a microbatch whose loss is not finite once more, looking at every layer's output."""
    statistics = layer_statistics(run, sliced, input_ids)
    found = [lines for lines in run.ranks.gather(statistics) if any(bad for _, _, bad in lines)]
    if found:
        lines = found[0]
        first = next(i for i, (_, _, bad) in enumerate(lines) if bad)
        where = f"first in {describe(lines[first])}"
        if first:
            where += f"; before it {describe(lines[first - 1])}"
            largest = max(lines[:first], key=lambda line: line[1])
            where += f"; largest so far {describe(largest)}"
    else:
        where = "every layer's output is finite; the logits or the teacher's are not: " + describe(statistics[-1])
    return (
        f"step {run.step}, budget {row['budget']}: the loss is {row['total']}, {where}. {_data(run, microbatch)} "
        f"{_count(run)}; {ADVICE}"
    )


def explain_gradient(run: Run, microbatches: list[dict]) -> str:
    """Name the parameters whose gradient is not finite, where every loss is."""
    bad, norms = [], {}
    for name, parameter in named_parameters(run):
        if parameter.grad is None:
            continue
        gradient = local(parameter.grad)
        if not gradient.isfinite().all():
            bad.append(name)
        layer = layer_index(name.removeprefix("model.")) if name.startswith("model.") else None
        if layer is not None:
            norms[layer] = norms.get(layer, 0.0) + gradient.double().square().sum().item()
    bad = [name for names in run.ranks.gather(bad) for name in names]
    layers = ", ".join(f"{layer}: {value**0.5:.3g}" for layer, value in sorted(norms.items()))
    budgets = ", ".join(sorted({row["budget"] for row in microbatches}))
    data = " ".join(_data(run, microbatch) for microbatch in range(len(microbatches)))
    first = f"first in {bad[0].split('.', 1)[1]}" if bad else "though every parameter's is: their norm overflows"
    return (
        f"step {run.step}, budgets {budgets}: the gradient is not finite, {first}; its norm by layer: {layers}. "
        f"{data} {_count(run)}; {ADVICE}"
    )


def layer_statistics(run: Run, sliced, input_ids: Tensor) -> list[tuple[str, float, float]]:
    """Per step of the forward pass its name, the largest finite magnitude and the share of numbers not finite."""
    lines: list[tuple[str, float, float]] = []
    pattern = architectures.pattern(run.model.config)

    def watch(name: str):
        def look(module, inputs, output: Tensor) -> None:
            finite = output.isfinite()
            largest = output.float().abs().where(finite, 0).max().item()
            lines.append((name, largest, 1 - finite.float().mean().item()))

        return look

    trunk = run.model.model
    handles = [layer.register_forward_hook(watch(f"layer {i} ({pattern[i]})")) for i, layer in enumerate(trunk.layers)]
    handles.append(trunk.final_norm.register_forward_hook(watch("the final norm")))
    try:
        run.model.hidden_states(input_ids.to(run.ranks.device), sliced)
    finally:
        for handle in handles:
            handle.remove()
    return lines


def describe(line: tuple[str, float, float]) -> str:
    """A layer's statistics in words."""
    name, largest, bad = line
    return f"{name}: largest magnitude {largest:.3g}" + (f", {bad:.1%} not finite" if bad else "")


def _data(run: Run, microbatch: int) -> str:
    """Which data a microbatch of this step read, over all ranks."""
    size = run.stage.batch_size // run.stage.microbatches
    first = run.stage.first_sample(run.step, microbatch)
    sources = sorted({run.data.sources[i] for i in run.data.source_indices(first, size)})
    return f"Data: samples {first} to {first + size - 1} ({', '.join(sources)})."


def _count(run: Run) -> str:
    return f"Skipped {run.skipped_in_a_row} steps in a row, {run.skipped} of {run.step + 1} in all"
