"""params.yaml, read strictly: `python -m tasks.settings.params` checks it and says what is wrong before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from elastic_core.config import ConfigError, require
from elastic_core.config import load as load_section
from elastic_core.cost.budgets import Cost, Spelling, family_metric, parse
from elastic_core.cost.metrics import Metric
from elastic_core.io import storage
from elastic_core.search.depth_ranking import METHODS
from elastic_core.search.importance import AGGREGATIONS, MEASURES
from elastic_core.search.space import Choices
from elastic_core.training.stage import Routing, Stage
from tasks.evaluation.latency_and_memory import Latency
from tasks.evaluation.lm_eval_tasks import Benchmarks
from tasks.parents import gguf
from tasks.parents.targets import check_budgets, check_family
from tasks.prepare_data import PrepareData
from tasks.progress.tracking import Tracking
from tasks.runtime.exit_status import errors_as_text
from tasks.runtime.launch import Compute

FILE = "params.yaml"
STAGES = (
    "prepare_data",
    "parent",
    "rank",
    "train_short",
    "train_extended",
    "extract",
    "extract_untrained",
    "evaluate_parent",
    "evaluate",
    "evaluate_untrained",
    "report",
)
TOKENIZERS = ("tokenizer.json", "vocab.json")  # either of them makes a fast tokenizer


@dataclass(frozen=True)
class ParentModel:
    """Architecture of a parent that is trained here, in transformers' names; `pattern` has M, * and -."""

    pattern: str
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    n_groups: int
    ssm_state_size: int
    conv_kernel: int = 4
    initializer_range: float = 0.02

    def check(self) -> None:
        known = bool(self.pattern) and set(self.pattern) <= set("M*-")
        require(known, "pattern", self.pattern, "characters M, * and -")
        for name, size in vars(self).items():
            require(name == "pattern" or size > 0, name, size, "above 0")
        for heads, groups in (("mamba_num_heads", "n_groups"), ("num_attention_heads", "num_key_value_heads")):
            divides = getattr(self, heads) % getattr(self, groups) == 0
            require(divides, heads, getattr(self, heads), f"a multiple of {groups} ({getattr(self, groups)})")


@dataclass(frozen=True)
class Parent:
    """The parent: a Hugging Face directory, its URL (see tasks.settings.remote_checks) or a package, or (path null) trained here."""

    path: str | None = None
    model: ParentModel | None = None
    training: Stage | None = None

    def check(self) -> None:
        if self.path is None:
            for name in ("model", "training"):
                require(getattr(self, name) is not None, name, None, "a section, as long as parent.path is null")
            weights = self.training.loss
            require(weights.kl_weight == 0, "training.loss.kl_weight", weights.kl_weight, "0: a parent has no teacher")
        elif gguf.is_package(self.path):
            try:
                gguf.find_file(self.path)
            except ConfigError as error:
                raise ConfigError(str(error).removeprefix("parent.")) from None  # which whoever reads the section says

    def check_is_here(self, where: str) -> None:
        """Raise ConfigError for a directory on this machine that is no parent's; packages and URLs are none."""
        if self.path is not None and not (storage.is_url(self.path) or gguf.is_package(self.path)):
            key = f"{where}.path"
            there = (Path(self.path) / "config.json").is_file()
            require(there, key, self.path, "a Hugging Face directory with a config.json, or null")
            there = any((Path(self.path) / name).is_file() for name in TOKENIZERS)
            require(there, key, self.path, f"a directory with its tokenizer too ({' or '.join(TOKENIZERS)})")


@dataclass(frozen=True)
class Rank:
    """Calibration: how much data, and how importance is aggregated."""

    mixture: dict[str, float]
    batches: int = 16
    batch_size: int = 16
    sequence_length: int = 256
    aggregation: str = "l1"
    measure: str = "projection"
    depth_method: str = "iterative_nmse"
    depth_batches: int = 4
    top_channels: int | None = None

    def check(self) -> None:
        for name in ("batches", "batch_size", "sequence_length"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(1 <= self.depth_batches <= self.batches, "depth_batches", self.depth_batches, f"1 to {self.batches}")
        require(self.aggregation in AGGREGATIONS, "aggregation", self.aggregation, ", ".join(AGGREGATIONS))
        require(self.measure in MEASURES, "measure", self.measure, ", ".join(MEASURES))
        require(self.depth_method in METHODS, "depth_method", self.depth_method, ", ".join(METHODS))


@dataclass(frozen=True)
class Extract:
    """How submodels are exported."""

    heterogeneous: Literal["remote_code", "pad"] = "remote_code"
    dtype: Literal["float32", "bfloat16"] = "float32"
    destination: str | None = None  # where the models are copied to, as <destination>/<budget>/<version>

    def check(self) -> None:
        require(self.destination != "", "destination", self.destination, "a URL such as s3://bucket/exports, or null")


@dataclass(frozen=True)
class Evaluate:
    """What the extracted models are measured on."""

    held_out: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    max_tokens: int = 16384
    sequence_length: int = 256
    batch_size: int = 16
    limit: int = 200
    task_batch_size: int = 64
    cache_tokens: int = 1024
    latency: Latency = field(default_factory=Latency)
    benchmarks: Benchmarks | None = None

    def check(self) -> None:
        for name in ("max_tokens", "sequence_length", "batch_size", "limit", "task_batch_size", "cache_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")


@dataclass(frozen=True)
class Report:
    """The report's wording."""

    title: str = "A family of nested language models"


@dataclass(frozen=True)
class Params:
    """The whole of params.yaml."""

    budgets: dict[str, Spelling]  # trained; tasks.parents.targets says what they come to
    prepare_data: PrepareData
    parent: Parent
    rank: Rank
    train_short: Stage
    train_extended: Stage
    evaluate: Evaluate
    untrained: dict[str, Spelling] = field(default_factory=dict)  # cut from the submodels in between
    cost: Cost = field(default_factory=Cost)
    choices: Choices = field(default_factory=Choices)
    routing: Routing = field(default_factory=Routing)
    extract: Extract = field(default_factory=Extract)
    report: Report = field(default_factory=Report)
    compute: Compute = field(default_factory=Compute)
    tracking: Tracking = field(default_factory=Tracking)
    time_limits: dict[str, float] = field(default_factory=dict)  # of stages, in hours
    seed: int = 0

    @property
    def metric(self) -> Metric:
        """What budgets are counted in."""
        return family_metric(self.cost, self.budgets)

    @property
    def served(self) -> dict[str, Spelling]:
        """All budgets that are extracted and evaluated, trained or not."""
        return {**self.budgets, **self.untrained}

    def check(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        for name, hours in self.time_limits.items():
            require(name in STAGES, "time_limits", name, ", ".join(STAGES))
            require(hours > 0, f"time_limits.{name}", hours, "hours, above 0")
        check_budgets(self)
        stages = {"train_short": self.train_short, "train_extended": self.train_extended}
        for name, stage in stages.items():
            self._check_shares(name, stage)
            if stage.teacher != "frozen":
                self._check_teacher(name, stage)
        if self.parent.training is not None:
            stages["parent.training"] = self.parent.training
        for name, section in {**stages, "rank": self.rank}.items():
            size, workers = section.batch_size // getattr(section, "microbatches", 1), max(1, self.compute.workers)
            allowed = f"as many sequences in a batch (or microbatch) as divide by compute.workers ({workers})"
            require(size % workers == 0, f"{name}.batch_size", section.batch_size, allowed)
            self._check_sources(f"{name}.mixture", section.mixture)
        self._check_sources("evaluate.held_out", self.evaluate.held_out)
        written = task_names(self.prepare_data)
        for task in self.evaluate.tasks:
            require(task in written, "evaluate.tasks", task, ", ".join(written))

    def _check_sources(self, key: str, names) -> None:
        for name in names:
            require(name in self.prepare_data.sources, key, name, ", ".join(self.prepare_data.sources))

    def _check_shares(self, name: str, stage: Stage) -> None:
        for field_name in ("budget_shares", "loss_by_budget"):
            for key in getattr(stage, field_name):
                require(key in self.budgets, f"{name}.{field_name}", key, ", ".join(self.budgets))
        if stage.budget_shares:  # left out, a budget would silently never be trained
            missing = [budget for budget in self.budgets if budget not in stage.budget_shares]
            require(not missing, f"{name}.budget_shares", stage.budget_shares, f"{', '.join(missing)} as well")

    def _check_teacher(self, name: str, stage: Stage) -> None:
        """A teacher that is trained along is the full budget, which then has to learn something else than itself."""
        full = [budget for budget, given in self.budgets.items() if parse(given).is_full]
        require(bool(full), f"{name}.teacher", stage.teacher, "frozen, as long as no budget is 1.0")
        allowed = f"above 0: a {stage.teacher} teacher must itself learn from text"
        weight, share = stage.loss_of(full[0]).ce_weight, stage.budget_shares.get(full[0], 1.0)
        require(weight > 0, f"{name}.loss_by_budget.{full[0]}.ce_weight", weight, allowed)
        require(share > 0, f"{name}.budget_shares.{full[0]}", share, allowed)


def task_names(section: PrepareData) -> list[str]:
    """The lm-eval tasks that prepare_data writes."""
    lengths = section.evaluation
    kinds = {"chains": lengths.chains, "chains_direct": lengths.chains_direct, "recall": lengths.recall}
    return [f"{kind}_{length}" for kind, values in kinds.items() for length in values]


def read(values: Mapping, where: str) -> Params:
    """Check the values of a parameter file, wherever they are to be used: places are not looked at."""
    return load_section(Params, values, where)


def load(path: str | Path = FILE) -> Params:
    """Read and check a parameter file; raises ConfigError naming what to change and where.

    What lies behind URLs is left to tasks.settings.remote_checks: reading params.yaml asks no server.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path.resolve()}: not there; run from the top of a checkout or of a workspace")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    params = read(values, str(path))
    params.parent.check_is_here(f"{path}.parent")
    if params.evaluate.benchmarks is not None:
        params.evaluate.benchmarks.check_is_here(f"{path}.evaluate.benchmarks")
    if not storage.is_url(params.parent.path):
        check_family(params, str(path))
    return params


@errors_as_text()
def main() -> None:
    from tasks.settings import remote_checks

    settings = load()
    remote_checks.check(settings)
    table, allowed = settings.cost.table, "a file that is there, whatever the metric is, for dvc.yaml names it"
    require(table is not None and Path(table).is_file(), f"{FILE}: cost.table", table, allowed)
    print(f"{FILE} is valid")


if __name__ == "__main__":
    main()
