"""`elastic inspect`: describes a model directory as plain values. Of the weights, it reads headers only."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedConfig

from elastic_core.cost.latency import Timed, as_latency
from elastic_core.cost.memory import Memory
from elastic_core.cost.metrics import exact_cost, num_active_parameters, num_parameters, read_metric
from elastic_core.errors import UserError, named
from elastic_core.export import elastic_checkpoint
from elastic_core.io.json_files import check_shape
from elastic_core.io.provenance_file import read_provenance
from elastic_core.model import architectures, hf, norm_gains
from elastic_core.model.axes import EXPERTS, PER_LAYER, WIDTHS
from elastic_core.model.dims import layer_of
from elastic_core.model.norm_gains import BudgetGains, NormRatios
from elastic_core.model.submodel import Submodel, keys_of
from tasks.settings.yaml_files import read_mapping

DROPPED = "·"  # in a pattern: a layer of the parent that the member does not have


def inspect_checkpoint(directory: Path) -> dict:
    """Describe a model directory: its architecture, sizes, files, budgets and origin.

    `bytes` is the size of all weight files. `memory`, `time` and `budgets` are None for a plain model. `norm_gains` is
    "budgets", if budgets have trained gains of the norms; "ratios", if gains of submodels follow from measured ratios;
    or None. `provenance` has a record for each stage that the weights come from; `written_by` is what the workspace's
    dvc.lock says.
    Raises UserError if the tensors do not match config.json.
    """
    config, own, reader = open_model(directory)
    files, names = reader.all_files, architectures.parameter_layout(config)
    is_elastic = (directory / elastic_checkpoint.FILE).is_file()
    return {
        "directory": str(directory),
        "model_type": config.model_type,
        "kind": "elastic" if is_elastic else "plain",
        "vocab_size": config.vocab_size,
        "context": config.max_position_embeddings,
        **describe_member(config, own),
        "bytes": sum((directory / file).stat().st_size for file in files),
        "files": files,
        "dtypes": sorted({str(reader.read(name, slice(0, 0)).dtype).removeprefix("torch.") for name in names}),
        "norm_gains": read_norm_gains(directory, config),
        "tokenizer": any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json")),
        "memory": read_memory(directory, config) if is_elastic else None,
        "time": read_time(directory, config) if is_elastic else None,
        "budgets": read_budgets(directory, config) if is_elastic else None,
        "provenance": read_provenance(directory),
        "written_by": find_writer(directory),
    }


def read_norm_gains(directory: Path, config) -> str | None:
    """Which gains of the norms submodels have (norm_gains.py): "budgets", "ratios" or None. Reads their small file."""
    gains = norm_gains.read(directory, config)
    return {NormRatios: "ratios", BudgetGains: "budgets", type(None): None}[type(gains)]


def open_model(directory: Path) -> tuple[PreTrainedConfig, Submodel, hf.TensorReader]:
    """The configuration, the sizes (see `read_sizes`) and the tensors of a directory, after a check of its headers.

    Raises UserError if the files are not whole or do not match config.json.
    """
    config, own = read_sizes(directory)
    sizes, reader = own.sizes(config), hf.TensorReader(directory)
    layout = architectures.parameter_layout(config)
    reader.check({name: tuple(dim.count(sizes) for dim in dims) for name, dims in layout.items()})
    return config, own, reader


def read_sizes(directory: Path) -> tuple[PreTrainedConfig, Submodel]:
    """The configuration and the sizes of a directory.

    A heterogeneous model is described as a submodel of the uniform model with its largest widths.
    """
    values = hf.read_values(directory, str(directory))
    widths = {field: values[field] for field in PER_LAYER if isinstance(values.get(field), list)}
    if not widths or values.get("model_type") not in architectures.ARCHITECTURES:
        return hf.read_config(directory), Submodel()
    with named(f"{directory}/config.json"):
        submodel = Submodel(**widths)
    if not all(getattr(submodel, field) for field in widths):
        raise UserError(f"{directory}/config.json: got {widths}; allowed: a width for every layer of its kind")
    largest = {field: max(getattr(submodel, field)) for field in widths}

    def build(config_class: type) -> PreTrainedConfig:
        values, _ = PreTrainedConfig.get_config_dict(directory, local_files_only=True)
        values.pop("auto_map", None)
        return config_class.from_dict(values | largest)

    config = hf.build_config(values | largest, str(directory), build)
    with named(f"{directory}/config.json"):
        return config, submodel.resolve(config)


def describe_member(config, submodel: Submodel) -> dict:
    """Parameters, layers and widths of a submodel.

    A heterogeneous width is a list with one entry per kept layer of its kind. A width is None if no kept layer has it.
    Widths of experts are included only if the parent has experts. `active_parameters` is the number of parameters that
    one token uses, or None if it uses all.
    """
    submodel = submodel.resolve(config)
    kept, units, widths = submodel.kept_layers, architectures.units(config), {}
    for field, axis in WIDTHS.items():
        value, layers = getattr(submodel, field), [layer_of(key) for key in keys_of(units, axis)]
        if field in EXPERTS and not layers:
            continue
        if isinstance(value, tuple):
            value = [size for layer, size in zip(layers, value, strict=True) if layer in kept]
        widths[field] = value if layers == [None] or set(layers) & set(kept) else None
    return {
        "parameters": num_parameters(config, submodel),
        "active_parameters": num_active_parameters(config, submodel),
        "pattern": "".join(c if i in kept else DROPPED for i, c in enumerate(architectures.pattern(config))),
        "kept_layers": list(kept),
        "widths": widths,
    }


def read_budgets(directory: Path, config) -> dict[str, dict]:
    """The trained budgets (`target`) and the costs of their members (`share`), both as shares of the parent's cost.

    The costs are in the family's metric. For memory and time, `target_cost` and `cost` give the same in bytes or in
    milliseconds per token.
    """
    content = elastic_checkpoint.read(directory)
    metric, budgets = as_latency(read_metric(content["cost"])), {}
    full = exact_cost(metric, config)
    for name, entry in content["budgets"].items():
        submodel, target = Submodel(**entry["submodel"]), entry["target"]
        cost = exact_cost(metric, config, submodel)
        costs = {"cost": cost, "target_cost": target * full} if isinstance(metric, Memory | Timed) else {}
        budgets[name] = {"target": target, "share": cost / full, **costs, **describe_member(config, submodel)}
    return budgets


def read_memory(directory: Path, config) -> dict | None:
    """The setting of a family that counts memory, and the parent's bytes in that setting. None for other families."""
    metric = read_metric(elastic_checkpoint.read(directory)["cost"])
    if not isinstance(metric, Memory):
        return None
    return {**dataclasses.asdict(metric), "setting": metric.setting, "parent": exact_cost(metric, config)}


def read_time(directory: Path, config) -> dict | None:
    """The setting of a family that counts time, and the parent's milliseconds per token. None for other families."""
    metric = read_metric(elastic_checkpoint.read(directory)["cost"])
    if not isinstance(metric, Timed):
        return None
    values = {"metric": metric.name, "context": metric.context, "batch": metric.table.batch, "setting": metric.setting}
    return values | {"parent": exact_cost(as_latency(metric), config)}


def find_writer(directory: Path) -> dict | None:
    """The stage and the seed that wrote the directory, read from the dvc.lock of its workspace. None without one."""
    directory = directory.resolve()
    for workspace in directory.parents:
        lock = workspace / "dvc.lock"
        if lock.is_file():
            return _find_writer(_read_stages(lock), directory.relative_to(workspace), workspace)
    return None


def _read_stages(lock: Path) -> Mapping:
    """The stages in a dvc.lock. Empty for a damaged file: the model can be described without it."""
    try:
        content = read_mapping(lock, str(lock))
        check_shape(content, {"stages": {str: {"outs?": [{"path": str}], "params?": {str: dict}}}}, lock)
    except UserError:
        return {}
    return content["stages"]


def _find_writer(stages: Mapping, path: Path, workspace: Path) -> dict | None:
    for name, stage in stages.items():
        for out in stage.get("outs", ()):
            if path.is_relative_to(out["path"]):
                parameters = {
                    key: value for values in stage.get("params", {}).values() for key, value in values.items()
                }
                return {
                    "workspace": str(workspace),
                    "stage": name,
                    "output": out["path"],
                    "md5": out.get("md5"),
                    "seed": parameters.get("seed"),
                }
    return None
