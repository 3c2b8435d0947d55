"""`elastic plan PARENT`: a plan for a parent without writing a profile. Needs only its config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from elastic_core.cost.budgets import Spelling
from elastic_core.cost.budgets import parse as parse_budget
from elastic_core.model import hf
from tasks.commands import plan
from tasks.commands.init import BUDGETS, CHARACTERS_PER_TOKEN, TOKENS_ON_GPU, lengths, new_profile, with_choices
from tasks.commands.init_profile import Source
from tasks.commands.plan_stages import Hardware
from tasks.parents.config import read_config
from tasks.parents.hub import HubModel
from tasks.settings import merging
from tasks.settings.load import read
from tasks.settings.local_checks import check_parent
from tasks.settings.paths import is_hub_name, locate_parent
from tasks.settings.schema import Params
from tasks.settings.yaml_files import parse

# Stands for the user's text, as much as training on a GPU reads at most. Its length decides steps; it is not opened.
TEXT = {"text": Source("corpus/*.jsonl", "text", 0.01)}
CHARACTERS = int(CHARACTERS_PER_TOKEN * TOKENS_ON_GPU)


def plan_parent(
    parent: str, overrides: Iterable[str], gpus: int | None, hardware: Hardware, config: Path | None = None
) -> dict:
    """The plan for a directory, or for a name on the hub. For the other arguments see `plan.plan_profile`.

    It is the plan of the profile that names this parent, if there is one. Otherwise it is that of the profile which
    `elastic init` would write for plenty of text, on one GPU or on `gpus`. The result has `profile`, which says so.
    Raises ConfigError or UserError for what the user has to change.
    """
    for profile in merging.profile_names():
        if _names(merging.read_profile(profile), parent):
            return plan.plan_profile(profile, overrides, gpus, hardware, config) | {"profile": profile}
    if not is_hub_name(parent):
        check_parent(parent, "PROFILE")
    found = _read(parent, config)
    settings = settings_of(locate_parent(parent), found, overrides, gpus or 1)
    return plan.make_plan(settings, *plan.read_parent(settings, config), hardware, None) | {"profile": None}


def _names(profile: Mapping, parent: str) -> bool:
    """Whether a profile is for this parent. A name on the hub without a revision means any revision."""
    section = profile.get("parent")
    path = section.get("path") if isinstance(section, Mapping) else None
    return path is not None and parent in (path, HubModel.parse(path).name if is_hub_name(path) else None)


def _read(parent: str, config: Path | None):
    """The parent's configuration."""
    if config is not None:
        return hf.read_config(config.parent if config.name == "config.json" else config)
    ready = plan.ready_directory(parent)
    return read_config(parent) if ready is None else hf.read_config(ready)


def settings_of(parent: str, config, overrides: Iterable[str], gpus: int) -> Params:
    """The parameters of the profile that `elastic init` would write, with `overrides`, on `gpus` GPUs."""
    changes = [merging.read_override(text) for text in overrides]
    budgets = changed_budgets(changes)
    sizes = lengths(config, TEXT, CHARACTERS, len(budgets), gpus)
    profile = new_profile(parent, config, budgets, sources=TEXT, **sizes, gpus=gpus)
    text = with_choices(profile, config, merging.ROOT, check=lambda values: None, changes=changes)
    return read(merging.merged(parse(text, "profile"), changes=changes), "profile")


def changed_budgets(changes: Iterable[tuple[list[str], object]]) -> Mapping[str, Spelling]:
    """The budgets of `elastic init` with the changes (path, value) of section `budgets`.

    A section that is not a mapping with entries is left out: the check of all parameters tells what is wrong with it.
    """
    budgets = BUDGETS
    for path, value in changes:
        if path == ["budgets"] and isinstance(value, Mapping) and value:
            budgets = value
        elif path[0] == "budgets" and len(path) == 2:
            budgets = {**budgets, path[1]: value}
    for name, given in budgets.items():
        parse_budget(given, f"budgets.{name}")
    return budgets
