"""Error texts for a loss or gradient that is not finite: in which budget, layer and data it appeared."""

from __future__ import annotations

from torch import Tensor

from elastic_core.data.loader import Batch
from elastic_core.model import architectures
from elastic_core.model.dims import layer_index
from elastic_core.training.distributed.gradients import local
from elastic_core.training.run import Run, named_parameters

ADVICE = "lower learning_rate, or start from the last checkpoint with other data"


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite. None of these steps changed the weights."""


def explain_loss(run: Run, microbatch: int, row: dict, sliced, batch: Batch) -> str:
    """The text for a loss that is not finite: run the microbatch again and name the first layer with a bad output.

    `row`: the numbers of the microbatch; `sliced`: the part of the model that it computes with; `batch`: its sequences.
    All ranks have to call this together.
    """
    statistics = layer_statistics(run, sliced, batch)
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
        f"step {run.step}, budget {row['budget']}: the loss is {row['total']}, {where}. {_data_text(run, microbatch)} "
        f"{_skipped_text(run)}; {ADVICE}"
    )


def explain_gradient(run: Run, microbatches: list[dict]) -> str:
    """The text for a gradient that is not finite although every loss is finite: name its first parameter.

    All ranks have to call this together.
    """
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
    data = " ".join(_data_text(run, microbatch) for microbatch in range(len(microbatches)))
    first = f"first in {bad[0].split('.', 1)[1]}" if bad else "though every parameter's is: the norm of all overflows"
    return (
        f"step {run.step}, budgets {budgets}: the gradient is not finite, {first}; its norm by layer: {layers}. "
        f"{data} {_skipped_text(run)}; {ADVICE}"
    )


def layer_statistics(run: Run, sliced, batch: Batch) -> list[tuple[str, float, float]]:
    """For every layer and the final norm: (name, largest finite magnitude, share of numbers that are not finite)."""
    lines: list[tuple[str, float, float]] = []
    pattern = architectures.pattern(run.model.config)

    def recorder(name: str):
        """A forward hook that adds the statistics of a module's output to `lines`."""

        def hook(module, inputs, output: Tensor) -> None:
            finite = output.isfinite()
            largest = output.float().abs().where(finite, 0).max().item()
            lines.append((name, largest, 1 - finite.float().mean().item()))

        return hook

    decoder = run.model.model
    handles = [
        layer.register_forward_hook(recorder(f"layer {i} ({pattern[i]})")) for i, layer in enumerate(decoder.layers)
    ]
    handles.append(decoder.final_norm.register_forward_hook(recorder("the final norm")))
    try:
        input_ids = batch.input_ids.to(run.ranks.device)
        run.model.hidden_states(input_ids, sliced, run.documents(batch, input_ids))
    finally:
        for handle in handles:
            handle.remove()
    return lines


def describe(line: tuple[str, float, float]) -> str:
    """The text for one entry of `layer_statistics`."""
    name, largest, bad = line
    return f"{name}: largest magnitude {largest:.3g}" + (f", {bad:.1%} not finite" if bad else "")


def _data_text(run: Run, microbatch: int) -> str:
    """The text that names the data of a microbatch of this step, over all ranks."""
    size = run.stage.batch_size // run.stage.microbatches
    first = run.stage.first_sample(run.step, microbatch)
    sources = sorted({run.data.sources[i] for i in run.data.source_indices(first, size)})
    return f"Data: samples {first} to {first + size - 1} ({', '.join(sources)})."


def _skipped_text(run: Run) -> str:
    """The text that says how many steps were skipped."""
    return f"Skipped {run.skipped_in_a_row} steps in a row, {run.skipped} of {run.step + 1} in all"
