"""The parameters of a profile: params.yaml, then the values of profiles/PROFILE.yaml, of a family and of overrides.

Values are merged key by key. Mappings of names are replaced as a whole. Values of params.yaml that are made for other
sources, other budgets or the default parent are left out, so that no profile takes them over by accident.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from elastic_core.config import ConfigError
from elastic_core.errors import UserError
from tasks.settings.yaml_files import parse, read_mapping

ROOT = Path(__file__).resolve().parents[2]
OVERRIDE = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*=.+"  # the syntax of `dvc exp run -S`: train_short.steps=100
OVERRIDE_FORM = "section.key=value, such as train_short.learning_rate=1e-3"
# Sections with keys that the user chooses. Merging would mix two lists of names.
REPLACED = {"budgets", "untrained", "budget_shares", "mixture", "sources", "loss_by_budget", "path"}
STEPS_AND_RATES = ("sequence_length", "batch_size", "steps", "learning_rate", "final_learning_rate", "mixture")
# Parameters that params.yaml sets for its own small parent. A profile with a parent of its own does not inherit them.
FOR_THE_DEFAULT_PARENT = {
    "rank": ("batches", "batch_size", "sequence_length", "mixture", "depth_batches"),
    "routing": (
        *("learning_rate", "weight", "share", "temperatures", "scales", "dead_zone", "settle_steps", "candidates"),
    ),
    "train_short": STEPS_AND_RATES,
    "train_extended": STEPS_AND_RATES,
}


def profile_names(root: Path = ROOT) -> list[str]:
    """Names of all profiles: `default`, then the files in profiles/ in alphabetical order."""
    return ["default", *sorted(path.stem for path in (root / "profiles").glob("*.yaml") if path.stem != "default")]


def check_profile(profile: str, root: Path = ROOT) -> None:
    """Raise UserError for a profile that does not exist."""
    names = profile_names(root)
    if profile not in names:
        raise UserError(f"profile: got {profile!r}; allowed: {', '.join(names)} (files in profiles/)")


def file_of(profile: str) -> str:
    """The name of a profile's file, for error messages."""
    return "params.yaml" if profile == "default" else f"profiles/{profile}.yaml"


def read_profile(profile: str, root: Path = ROOT) -> Mapping:
    """The content of a profile's file; empty for `default`. Raises UserError."""
    check_profile(profile, root)
    return {} if profile == "default" else read_mapping(root / file_of(profile), file_of(profile), keep_comments=True)


def parameters(
    profile: str = "default",
    root: Path = ROOT,
    budgets: Mapping[str, float | str] | None = None,
    overrides: Iterable[str] = (),
):
    """The content of params.yaml with the values of a profile, of `budgets` and of `overrides`; comments are kept.

    budgets: name → budget; replaces the family. If the names differ from the profile's, the new members share the
        training equally.
    overrides: ``section.key=value`` with the value in YAML.

    Raises UserError for an unknown profile, for a file that cannot be read, and for an override that cannot be parsed.
    Whether a parameter exists and allows the value is checked by `tasks.settings.load`.
    """
    changes = [read_override(text) for text in overrides]
    return merged(read_profile(profile, root), root, budgets, changes)


def merged(
    own: Mapping,
    root: Path = ROOT,
    budgets: Mapping[str, float | str] | None = None,
    changes: Iterable[tuple[list[str], object]] = (),
):
    """The content of params.yaml with the content `own` of a profile, and `budgets` and `changes` (path, value)."""
    if not (root / "params.yaml").is_file():
        raise UserError(f"{root}: no params.yaml; run in a checkout")
    values = read_mapping(root / "params.yaml", "params.yaml", keep_comments=True)
    leave_out(values, own)
    merge(values, own)
    if budgets:
        _replace_budgets(values, budgets)
    changes = list(changes)
    for path, value in changes:  # in any order: what other changes set stays
        if path in (["prepare_data", "sources"], ["budgets"]):
            leave_out(values, {path[0]: {path[1]: value} if path[1:] else value})
    for path, value in changes:
        _set_value(values, path, value)
    return values


def leave_out(values, own: Mapping) -> None:
    """Remove from the values of params.yaml what does not fit a profile with the content `own`, in place."""
    if replaces_names(values, own, "prepare_data", "sources"):
        parent = values.get("parent")
        trained = parent.get("training") if isinstance(parent, Mapping) else None
        for section in (*map(values.get, ("rank", "train_short", "train_extended")), trained):
            _remove(section, "mixture")
        _remove(values.get("evaluate"), "held_out", "tasks")
    if replaces_names(values, own, "budgets"):
        _remove_names_of_budgets(values, own["budgets"])
    if has_own_parent(own):
        for section, names in FOR_THE_DEFAULT_PARENT.items():
            _remove(values.get(section), *names)
        choices = values.get("choices")
        for name in choices if isinstance(choices, Mapping) else ():
            # The keys stay, because dvc.yaml names one of them.
            choices[name] = [] if name == "heterogeneous" else None
        _remove(values.get("parent"), "model", "training")


def has_own_parent(own: Mapping) -> bool:
    """Whether a profile names a parent."""
    parent = own.get("parent")
    return isinstance(parent, Mapping) and parent.get("path") is not None


def replaces_names(values: Mapping, own: Mapping, *path: str) -> bool:
    """Whether the profile `own` has other names than `values` in the mapping at `path`."""
    found = []
    for content in (values, own):
        for key in path:
            content = content.get(key) if isinstance(content, Mapping) else None
        found.append(set(content) if isinstance(content, Mapping) else None)
    return None not in found and found[0] != found[1]


def inherited(profile: str, root: Path = ROOT) -> list[str]:
    """Notes about steps and rates of params.yaml that a profile with other sources takes over."""
    own, values = read_profile(profile, root), read_mapping(root / "params.yaml", "params.yaml")
    if not replaces_names(values, own, "prepare_data", "sources"):
        return []
    found = []
    for section in ("train_short", "train_extended"):
        given, base = (content.get(section) or {} for content in (own, values))
        names = [name for name in ("steps", "learning_rate") if name not in given and name in base]
        found += [f"{section}.{name} {base[name]}" for name in names]
    text = "replaces prepare_data.sources and takes over from params.yaml, which sets them for its own sources:"
    return [f"note: {file_of(profile)} {text} {', '.join(found)}"] if found else []


def merge(values, own: Mapping) -> None:
    """Override nested values in place. Unknown keys are kept; `tasks.settings.load` refuses them later."""
    for key, value in own.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), Mapping) and key not in REPLACED:
            merge(values[key], value)
        else:
            values[key] = value


def read_override(text: str) -> tuple[list[str], object]:
    """The path of keys, and the value, of ``section.key=value``. Raises UserError."""
    if not re.fullmatch(OVERRIDE, text, re.DOTALL):
        raise UserError(f"override: got {text!r}; allowed: {OVERRIDE_FORM}")
    name, _, value = text.partition("=")
    try:
        return name.split("."), parse(value, "value")
    except ConfigError as error:
        reason = str(error).partition(": ")[2].removeprefix("not valid YAML: ")
        raise UserError(f"override: got {text!r}; the value is not valid YAML: {reason}") from None


def _set_value(values, path: list[str], value) -> None:
    """Set the value at a path of keys, in place; missing sections are created."""
    for key in path[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[path[-1]] = value


def _replace_budgets(values, budgets: Mapping[str, float | str]) -> None:
    """Replace the family, and remove options of stages that name budgets which no longer exist."""
    values["budgets"] = dict(budgets)
    _remove_names_of_budgets(values, budgets)


def _remove_names_of_budgets(values, budgets: Mapping) -> None:
    for section in filter(lambda section: isinstance(section, Mapping), values.values()):
        shares, losses = section.get("budget_shares"), section.get("loss_by_budget")
        if isinstance(shares, Mapping) and set(shares) != set(budgets):
            del section["budget_shares"]
        if isinstance(losses, Mapping) and not set(losses) <= set(budgets):
            del section["loss_by_budget"]


def _remove(section, *names: str) -> None:
    for name in names:
        if isinstance(section, Mapping):
            section.pop(name, None)
