"""What params.yaml may hold: a frozen dataclass per section. Needs no torch, and looks at nothing outside the values.

Sections that belong to the library are dataclasses of elastic_core: `Cost`, `Choices`, `Stage`, `Routing`.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from elastic_core.config import require
from elastic_core.cost.budgets import Cost, Spelling, parse
from elastic_core.search.choices import Choices
from elastic_core.search.ranking_methods import AGGREGATIONS, DEPTH_METHODS, MEASURES
from elastic_core.training.distributed.execution import Execution
from elastic_core.training.stage import Routing, Stage
from tasks.corpora.reasoning import Evaluation
from tasks.corpora.sources import Source, parse_source
from tasks.settings.budgets import check_budgets

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
SMALLEST_VOCABULARY = 256 + 2  # every byte, and two special tokens
INSTALL_TRACKING = "pip install --editable '.[tracking]'"


@dataclass(frozen=True)
class PrepareData:
    """Section `prepare_data`: the text sources, the tokenizer that is trained on them, and the test tasks."""

    sources: dict[str, Any]  # name → a section of one kind; its other keys are the fields of that kind's dataclass
    vocab_size: int = 1024  # at most; of the tokenizer trained here, unused with a parent's own
    tokenizer_characters: int = 4_000_000  # how much training text the tokenizer sees, over all sources
    evaluation: Evaluation = field(default_factory=Evaluation)

    def check(self) -> None:
        smallest = SMALLEST_VOCABULARY
        require(self.vocab_size >= smallest, "vocab_size", self.vocab_size, f"{smallest} or more")
        require(self.tokenizer_characters > 0, "tokenizer_characters", self.tokenizer_characters, "1 or more")
        require(len(self.sources) > 0, "sources", self.sources, "one source or more")
        for name in self.sources:
            fits = re.fullmatch(r"\w[\w-]*", name)
            require(fits is not None, "sources", name, "names of letters, digits, _ and -: files are named after them")
        self.parsed_sources()

    def parsed_sources(self) -> dict[str, Source]:
        """The sources as the dataclasses of their kinds."""
        return {name: parse_source(values, f"sources.{name}") for name, values in self.sources.items()}

    def task_names(self) -> list[str]:
        """The lm-eval tasks that the stage writes."""
        lengths = self.evaluation
        kinds = {"chains": lengths.chains, "chains_direct": lengths.chains_direct, "recall": lengths.recall}
        return [f"{kind}_{length}" for kind, values in kinds.items() for length in values]


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
    """Section `parent`: a Hugging Face directory, its URL or a package; or, where `path` is null, a model to train."""

    path: str | None = None
    model: ParentModel | None = None
    training: Stage | None = None

    def check(self) -> None:
        if self.path is None:
            for name in ("model", "training"):
                require(getattr(self, name) is not None, name, None, "a section, as long as parent.path is null")
            weights = self.training.loss
            require(weights.kl_weight == 0, "training.loss.kl_weight", weights.kl_weight, "0: a parent has no teacher")


@dataclass(frozen=True)
class Rank:
    """Section `rank`: how much calibration data, and how units and layers are scored on it."""

    mixture: dict[str, float]
    batches: int = 16
    batch_size: int = 16
    sequence_length: int = 256
    measure: str = MEASURES[0]
    aggregation: str = AGGREGATIONS[0]
    depth_method: str = DEPTH_METHODS[0]
    depth_batches: int = 4

    def check(self) -> None:
        for name in ("batches", "batch_size", "sequence_length"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(1 <= self.depth_batches <= self.batches, "depth_batches", self.depth_batches, f"1 to {self.batches}")
        require(self.aggregation in AGGREGATIONS, "aggregation", self.aggregation, ", ".join(AGGREGATIONS))
        require(self.measure in MEASURES, "measure", self.measure, ", ".join(MEASURES))
        require(self.depth_method in DEPTH_METHODS, "depth_method", self.depth_method, ", ".join(DEPTH_METHODS))


@dataclass(frozen=True)
class Extract:
    """Section `extract`: how submodels are exported."""

    heterogeneous: Literal["remote_code", "pad"] = "remote_code"
    dtype: Literal["float32", "bfloat16"] = "float32"
    destination: str | None = None  # where each model is copied to, as <destination>/<budget>/<version>

    def check(self) -> None:
        require(self.destination != "", "destination", self.destination, "a URL such as s3://bucket/exports, or null")


@dataclass(frozen=True)
class LatencyOptions:
    """Section `evaluate.latency`: how speed is measured, on one sequence, greedy, with a cache."""

    prompt_tokens: int = 128
    new_tokens: int = 16
    repeats: int = 8  # after one that warms up
    threads: int = 1

    def check(self) -> None:
        for name, value in vars(self).items():
            require(value >= 1, name, value, "1 or more")


@dataclass(frozen=True)
class Benchmarks:
    """Section `evaluate.benchmarks`: tasks of lm-eval, and the first `limit` items of each (null: all)."""

    tasks: tuple[str, ...]
    include: str | None = None  # a directory of task files; null: the tasks that come with lm-eval, data from the hub
    data_root: str = "."  # where relative paths inside those files start
    limit: int | None = None
    num_fewshot: int | None = None  # null: as the task has it
    batch_size: int = 8

    def check(self) -> None:
        require(bool(self.tasks), "tasks", self.tasks, "one or more; or benchmarks: null")
        require(len(set(self.tasks)) == len(self.tasks), "tasks", self.tasks, "every task once")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "1 or more, or null")
        require(self.num_fewshot is None or self.num_fewshot >= 0, "num_fewshot", self.num_fewshot, "0 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")


@dataclass(frozen=True)
class Evaluate:
    """Section `evaluate`: what the extracted models are measured on."""

    held_out: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    max_tokens: int = 16384
    sequence_length: int = 256
    batch_size: int = 16
    limit: int = 200
    task_batch_size: int = 64
    cache_tokens: int = 1024
    latency: LatencyOptions = field(default_factory=LatencyOptions)
    benchmarks: Benchmarks | None = None

    def check(self) -> None:
        for name in ("max_tokens", "sequence_length", "batch_size", "limit", "task_batch_size", "cache_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")


@dataclass(frozen=True)
class Compute:
    """Section `compute`: where training and calibration run. Results change by rounding only, and no stage runs again.

    `workers` 0 works in the stage's own process. `retries`: how often all workers are started again after one was lost.
    `storage`: where checkpoints go, a directory or a URL that every worker reaches.
    """

    workers: int = 0
    cpus_per_worker: int = 1
    gpus_per_worker: int = 0
    retries: int = 2
    storage: str = "checkpoints"
    execution: Execution = field(default_factory=Execution)

    def check(self) -> None:
        require(self.workers >= 0, "workers", self.workers, "0 (in this process), or more")
        require(self.cpus_per_worker >= 1, "cpus_per_worker", self.cpus_per_worker, "1 or more")
        require(self.gpus_per_worker in (0, 1), "gpus_per_worker", self.gpus_per_worker, "0 or 1: a worker has one GPU")
        require(self.retries >= 0, "retries", self.retries, "0 or more")
        # Under torchrun this process is one of the workers.
        shards, workers = self.execution.shard_over, self.workers or int(os.environ.get("WORLD_SIZE", 1))
        divides = shards is None or workers % shards == 0
        require(divides, "execution.shard_over", shards, f"null, or a divisor of the number of workers ({workers})")


@dataclass(frozen=True)
class Tracking:
    """Section `tracking`: where training is shown besides the terminal; off by default.

    `tensorboard` is a directory, in which every run gets one of its own; `wandb` a project of Weights & Biases.
    """

    tensorboard: str | None = None
    wandb: str | None = None
    wandb_mode: Literal["online", "offline"] = "online"

    def check(self) -> None:
        for name in ("tensorboard", "wandb"):
            if (value := getattr(self, name)) is not None:
                require(value.strip() != "", name, value, "a directory" if name == "tensorboard" else "a project name")
                allowed = f"null, as long as the package {name} is not installed (to install it: {INSTALL_TRACKING})"
                require(is_installed(name), name, value, allowed)
        if self.tensorboard is not None:
            require(not Path(self.tensorboard).is_file(), "tensorboard", self.tensorboard, "a directory, not a file")
        if self.wandb is not None:
            valid = len(self.wandb) <= 128 and not set(self.wandb) & set("/\\#?%:")
            require(valid, "wandb", self.wandb, "a project name of up to 128 characters without / \\ # ? % :")


def is_installed(package: str) -> bool:
    """Whether a package can be imported; a mere directory of that name, such as one of logs, does not count."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


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
    compute: Compute = field(default_factory=Compute)
    tracking: Tracking = field(default_factory=Tracking)
    time_limits: dict[str, float] = field(default_factory=dict)  # of stages, in hours
    seed: int = 0

    @property
    def served(self) -> dict[str, Spelling]:
        """All budgets that are extracted and evaluated, trained or not."""
        return {**self.budgets, **self.untrained}

    def check(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        for name, hours in self.time_limits.items():
            require(name in STAGES, "time_limits", name, ", ".join(STAGES))
            require(hours > 0, f"time_limits.{name}", hours, "hours, above 0")
        check_budgets(self.cost, self.budgets, self.untrained)
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
        written = self.prepare_data.task_names()
        for task in self.evaluate.tasks:
            require(task in written, "evaluate.tasks", task, ", ".join(written))

    def _check_sources(self, key: str, names: Iterable[str]) -> None:
        for name in names:
            require(name in self.prepare_data.sources, key, name, ", ".join(self.prepare_data.sources))

    def _check_shares(self, name: str, stage: Stage) -> None:
        for field_name in ("budget_shares", "loss_by_budget"):
            for key in getattr(stage, field_name):
                require(key in self.budgets, f"{name}.{field_name}", key, ", ".join(self.budgets))
        if stage.budget_shares:  # a budget that is left out would never be trained
            missing = [budget for budget in self.budgets if budget not in stage.budget_shares]
            require(not missing, f"{name}.budget_shares", stage.budget_shares, f"{', '.join(missing)} as well")

    def _check_teacher(self, name: str, stage: Stage) -> None:
        """A trainable teacher is the full budget itself, which then has to learn from text."""
        full = [budget for budget, given in self.budgets.items() if parse(given).is_full]
        require(bool(full), f"{name}.teacher", stage.teacher, "frozen, as long as no budget is 1.0")
        allowed = f"above 0: a {stage.teacher} teacher must itself learn from text"
        weight, share = stage.loss_of(full[0]).ce_weight, stage.budget_shares.get(full[0], 1.0)
        require(weight > 0, f"{name}.loss_by_budget.{full[0]}.ce_weight", weight, allowed)
        require(share > 0, f"{name}.budget_shares.{full[0]}", share, allowed)
