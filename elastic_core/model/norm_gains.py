"""Gains of the norms in submodels (ours).

A norm over the first k of D channels divides by another root mean square than the parent's norm does. So the gain that
is right for the whole model is too large or too small for a submodel. A submodel gets gains of its own, one vector for
each norm of the residual stream, in one of two forms:

- `NormRatios`, without training: the model's gain times the mean ratio of the two root mean squares.
- `BudgetGains`, after training: every budget has trained its own gains. Sizes between two budgets interpolate them.

They are in files beside the weights, in the folder ``norm_gains`` of a model directory. Serving engines that load all
safetensors files of a directory do not look there. Extraction writes the gains into the norms of the extracted model.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from elastic_core.config import load
from elastic_core.errors import UserError, named
from elastic_core.io import tensor_files
from elastic_core.io.json_files import parse_json
from elastic_core.io.tensor_files import open_checked, read_header
from elastic_core.model import architectures
from elastic_core.model.dims import count
from elastic_core.model.submodel import Submodel, full_submodel

FOLDER = "norm_gains"
RATIOS, BUDGETS = f"{FOLDER}/ratios.safetensors", f"{FOLDER}/budgets.safetensors"
Gains = dict[str, Tensor]  # name of a norm → gain (hidden,), in full length


@dataclass(frozen=True)
class NormRatios:
    """For each norm, the mean of rms_k / rms_D over calibration text, for every number k of channels.

    `ratios[name]`: (hidden,) float32; entry k − 1 is the ratio for the first k channels. The last entry is 1.
    """

    ratios: dict[str, Tensor]

    def of(self, config, submodel: Submodel, gain: Callable[[str], Tensor]) -> Gains:
        """The gains of a resolved submodel. `gain(name)`: the gain of the whole model (hidden,)."""
        last = submodel.hidden_size - 1
        return {name: gain(name) * ratio[last].item() for name, ratio in self.ratios.items()}

    def expected(self, sizes: Sequence[int], probs: Tensor) -> Tensor:
        """For each norm, the expected ratio (norms,), if the hidden size is sizes[i] with probability probs[i]."""
        table = torch.stack([ratio[[size - 1 for size in sizes]] for ratio in self.ratios.values()])  # (norms, sizes)
        return table.to(probs) @ probs

    def write(self, directory: str | os.PathLike) -> None:
        """Write the file `RATIOS` of a model directory."""
        _write(Path(directory) / RATIOS, self.ratios, {})


@dataclass(frozen=True)
class BudgetGains:
    """The trained gains of every budget that is smaller than the whole model, largest budget first.

    `submodels` has the resolved submodel of each budget, nested in the one before it (see `check_nested`). `gains` has
    its gains. If two budgets have the same submodel, the gains of the first count. Channels that a budget does not keep
    have gains too: the initial ones. Interpolation needs them.
    """

    submodels: dict[str, Submodel]
    gains: dict[str, Gains]

    def of(self, config, submodel: Submodel, gain: Callable[[str], Tensor]) -> Gains:
        """The gains of a resolved submodel; `gain(name)` is that of the whole model (hidden,).

        A submodel between two budgets gets a mixture of their gains, by its hidden size. If both budgets have the same
        hidden size, it is by its number of parameters. A submodel below the smallest budget gets the gains of that one.
        """
        whole = full_submodel(config)
        known = [(whole, {name: gain(name) for name in architectures.norm_names(config)})]
        known += [(self.submodels[name], self.gains[name]) for name in self.submodels]
        size = _num_parameters(config, submodel)
        for (larger, upper), (smaller, lower) in itertools.pairwise(known):
            if submodel == smaller:
                return lower
            if size > _num_parameters(config, smaller):
                weight = _position(config, submodel, smaller, larger)
                return {name: torch.lerp(lower[name].to(upper[name]), upper[name], weight) for name in lower}
        return known[-1][1]

    def write(self, directory: str | os.PathLike) -> None:
        """Write the file `BUDGETS` of a model directory."""
        tensors = {f"{budget}.{name}": gain for budget, gains in self.gains.items() for name, gain in gains.items()}
        submodels = {name: submodel.to_dict() for name, submodel in self.submodels.items()}
        _write(Path(directory) / BUDGETS, tensors, {"budgets": json.dumps(submodels)})


def _position(config, submodel: Submodel, smaller: Submodel, larger: Submodel) -> float:
    """Where a submodel lies between a smaller (0) and a larger one (1)."""
    sizes = [each.hidden_size for each in (smaller, submodel, larger)]
    if sizes[0] == sizes[2]:
        sizes = [_num_parameters(config, each) for each in (smaller, submodel, larger)]
    low, here, high = sizes
    return min(max((here - low) / (high - low), 0.0), 1.0)


def _num_parameters(config, submodel: Submodel) -> int:
    kept = set(submodel.kept_layers)
    return count(architectures.parameter_layout(config), submodel.sizes(config), lambda layer: int(layer in kept))


def gains_of(
    gains: NormRatios | BudgetGains | None, config, submodel: Submodel, gain: Callable[[str], Tensor]
) -> Gains:
    """The gains of a resolved submodel; empty where they are those of the whole model. `gain`: see `NormRatios.of`."""
    if gains is None or submodel == full_submodel(config):
        return {}
    return gains.of(config, submodel, gain)


def read(directory: str | os.PathLike, config) -> NormRatios | BudgetGains | None:
    """The gains of submodels in a model directory, or None if it has none. Raises UserError for a damaged file."""
    file = Path(directory) / BUDGETS
    if file.is_file():
        with open_checked(file) as handle:
            metadata = handle.metadata() or {}
        content = parse_json(metadata.get("budgets", "").encode(), f"{file}: budgets in its metadata", {str: dict})
        with named(file):
            submodels = {name: load(Submodel, values, name).resolve(config) for name, values in content.items()}
            check_nested(config, submodels)
        return BudgetGains(submodels, {budget: _read(file, config, f"{budget}.") for budget in submodels})
    file = Path(directory) / RATIOS
    return NormRatios(_read(file, config)) if file.is_file() else None


def check_nested(config, submodels: Mapping[str, Submodel]) -> None:
    """Raise UserError unless each of the budgets' resolved submodels is nested in the one before it."""
    for (larger, outer), (smaller, inner) in itertools.pairwise(submodels.items()):
        if not inner.is_within(outer, config):
            raise UserError(
                f"budget {smaller} ({inner}) is not nested in {larger} ({outer}); gains of norms need nested budgets, "
                "largest first"
            )


def _read(file: Path, config, prefix: str = "") -> Gains:
    """The tensors of a file that are named `prefix` and a norm, one for each norm. Raises UserError."""
    stored, gains, size = read_header(file), {}, config.hidden_size
    with open_checked(file) as handle:
        for name in architectures.norm_names(config):
            if f"{prefix}{name}" not in stored:
                raise UserError(f"{file}: lacks {prefix}{name}; copy the model again")
            gains[name] = handle.get_tensor(f"{prefix}{name}").float()
            if gains[name].shape != (size,) or not gains[name].isfinite().all():
                raise UserError(f"{file}: {prefix}{name} is not {size} finite numbers; copy the model again")
    return gains


def _write(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    file.parent.mkdir(exist_ok=True)
    contiguous = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    assert len(metadata) <= 1  # the library writes several entries in an order that differs from process to process
    tensor_files.save(contiguous, file, metadata)
