"""Arms: the ways of training that are compared, and the parameters of each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from elastic_core.config import ConfigError, Require, load, require
from elastic_core.errors import UserError, named
from tasks.settings.load import read
from tasks.settings.merging import ROOT, merged, read_profile
from tasks.settings.yaml_files import read_mapping

DEFAULTS = Path(__file__).with_name("arms.yaml")
BASE = "family"  # the arm that others are compared with, unless they say otherwise
FIXED, ROUTED = "fixed", "routed"
STAGES = ("train_short", "train_extended")


@dataclass(frozen=True)
class Arm:
    """One way of training.

    - `overrides`: parameter of params.yaml, such as ``rank.basis``, → value.
    - `members`: ``fixed``, the given sizes; ``routed``, sizes that the router chooses in stage 1; or the name of a
      routed arm: the uniform counterparts of the sizes that the router chose there with the same seed.
    - `separate`: every member below the parent's cost is trained alone, from the sorted parent.
    - `tokens`: the share of the profile's training tokens; ``equal``: one part per member below the parent's cost.
    - `stages`: the training stages. One stage alone gets the tokens of both.
    - `against`: the arm with which results are compared.
    """

    name: str
    overrides: dict = field(default_factory=dict)
    members: str = FIXED
    separate: bool = False
    tokens: float | Literal["equal"] = 1.0
    stages: tuple[str, ...] = STAGES
    against: str = BASE

    def check(self, require: Require = require) -> None:
        require(re.fullmatch(r"[\w.-]+", self.name), "name", self.name, "letters, digits, _, . and -")
        require(self.tokens == "equal" or self.tokens > 0, "tokens", self.tokens, "a share above 0, or equal")
        valid = bool(self.stages) and set(self.stages) <= set(STAGES) and len(set(self.stages)) == len(self.stages)
        require(valid, "stages", self.stages, f"one or both of {', '.join(STAGES)}")
        require(not self.separate or self.members == FIXED, "members", self.members, "fixed, with separate: true")
        require(self.tokens != "equal" or self.separate, "tokens", self.tokens, "a share, without separate: true")
        has_router = self.members != ROUTED or "train_short" in self.stages
        require(has_router, "stages", self.stages, "with train_short, in which the router learns")


def read_arms(files: Iterable[Path] = (DEFAULTS,)) -> dict[str, Arm]:
    """All arms of YAML files by name; a later file replaces arms of an earlier one. Raises ConfigError.

    Whether a parameter exists is checked when an arm is used (`values_of`).
    """
    arms: dict[str, Arm] = {}
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}: does not exist; allowed: a YAML file as {DEFAULTS.relative_to(ROOT)}")
        for name, content in read_mapping(path, str(path)).items():
            arms[str(name)] = _read_arm(str(name), content, f"{path}: {name}")
    return arms


def _read_arm(name: str, content, where: str) -> Arm:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: got {content!r}; allowed: a section with parameters, or {{}}")
    overrides = {key: value for key, value in content.items() if "." in str(key)}
    own = {key: value for key, value in content.items() if key not in overrides}
    if wrong := sorted({"name", "overrides"} & own.keys()):
        allowed = ", ".join(f.name for f in fields(Arm) if f.name not in ("name", "overrides"))
        raise ConfigError(f"{where}.{wrong[0]}: unknown field; allowed: {allowed}, and parameters such as rank.measure")
    return load(Arm, {**own, "name": name, "overrides": json.loads(json.dumps(overrides))}, where)


def choose(arms: Mapping[str, Arm], names: Iterable[str] | None) -> list[Arm]:
    """The arms with these names (None: all), and before each routed-arm user the arm whose sizes it needs.

    Raises UserError for an unknown name.
    """
    chosen: dict[str, Arm] = {}
    for name in arms if names is None else names:
        arm = _find(arms, name, "arms")
        if arm.members not in (FIXED, ROUTED):
            source = _find(arms, arm.members, f"arm {name}: members")
            if source.members != ROUTED:
                raise UserError(f"arm {name}: members: got {arm.members!r}; allowed: an arm with members: routed")
            chosen.setdefault(source.name, source)
        chosen.setdefault(name, arm)
    return list(chosen.values())


def _find(arms: Mapping[str, Arm], name: str, where: str) -> Arm:
    if name not in arms:
        raise UserError(f"{where}: got {name!r}; allowed: {', '.join(arms)}")
    return arms[name]


def read_own(profile: str) -> Mapping:
    """The content of a profile, given by its name or as a YAML file. Raises UserError."""
    if profile.endswith((".yaml", ".yml")):
        return read_mapping(Path(profile), profile)
    return read_profile(profile)


def values_of(profile: str, arm: Arm, root: Path = ROOT) -> dict:
    """The parameters of a profile with the arm's overrides, as JSON values. Raises ConfigError for wrong ones.

    What does not decide the results is left out: trackers, workers, benchmarks, untrained budgets and time limits. A
    relative `cost.table` becomes absolute, because a job runs in a directory of its own.
    """
    changes = [(str(key).split("."), value) for key, value in arm.overrides.items()]
    values = json.loads(json.dumps(merged(read_own(profile), root, changes=changes)))
    with named(f"arm {arm.name}"):
        read(values, "params.yaml")
    for name in ("tracking", "time_limits", "untrained"):
        values.pop(name, None)
    execution = (values.get("compute") or {}).get("execution")
    values["compute"] = {} if execution is None else {"execution": execution}
    values["evaluate"]["benchmarks"] = None
    table = (values.get("cost") or {}).get("table")
    if table is not None and (root / table).is_file():
        values["cost"]["table"] = str(root / table)
    return values
