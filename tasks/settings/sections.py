"""The dataclasses of params.yaml's sections that belong to the stages. Needs no torch.

The other sections belong to the library, and so do their dataclasses: `Cost`, `Choices`, `Stage`, `Routing`.
Every `check` raises ConfigError, which says what was given and what is allowed.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from elastic_core.config import Problems, Require, check_shares, require
from elastic_core.search.importance.methods import AGGREGATIONS, BASES, DEPTH_METHODS, MEASURES
from elastic_core.training.distributed.execution import Execution
from tasks.corpora.benchmark_files import check_answer_options
from tasks.corpora.reasoning import Evaluation
from tasks.corpora.sources import Source, located, parse_source
from tasks.settings.parts.evaluation import BatchSize, Vllm, check_backend, check_batch_size
from tasks.settings.paths import locate

SMALLEST_VOCABULARY = 256 + 2 + 5  # one token per byte, two special tokens, and those of the chat template
INSTALL_TRACKING = "pip install --editable '.[tracking]'"


@dataclass(frozen=True)
class PrepareData:
    """Section `prepare_data`: the sources, the tokenizer that is trained on them, and the reasoning tasks."""

    sources: dict[str, Any]  # name → a section with `kind` and the fields of that kind's dataclass
    vocab_size: int = 1024  # the most tokens of the new tokenizer; unused if the parent brings its tokenizer
    tokenizer_characters: int = 4_000_000  # how much training text the tokenizer is trained on, over all sources
    evaluation: Evaluation = field(default_factory=Evaluation)

    def check(self, require: Require = require) -> None:
        smallest = SMALLEST_VOCABULARY
        require(self.vocab_size >= smallest, "vocab_size", self.vocab_size, f"{smallest} or more")
        require(self.tokenizer_characters > 0, "tokenizer_characters", self.tokenizer_characters, "1 or more")
        require(len(self.sources) > 0, "sources", self.sources, "one source or more")
        for name in self.sources:
            fits = re.fullmatch(r"\w[\w-]*", name)
            require(fits is not None, "sources", name, "names of letters, digits, _ and -: files are named after them")
        self.parsed_sources()

    def parsed_sources(self) -> dict[str, Source]:
        """The sources, each as the dataclass of its kind, with absolute paths (paths.py). Raises ConfigError."""
        problems, parsed = Problems(), {}
        for name, values in self.sources.items():
            with problems.collecting():
                parsed[name] = parse_source(values, f"sources.{name}")
        problems.raise_all()
        return {name: located(source, locate, os.path.isdir) for name, source in parsed.items()}

    def not_generated_names(self) -> list[str]:
        """Names of the sources that are not generated; of all sources, if all are generated."""
        names = [name for name, source in self.parsed_sources().items() if not source.is_generated]
        return names or list(self.sources)

    def task_names(self) -> list[str]:
        """Names of the lm-eval tasks that the stage writes, such as ``chains_3``."""
        return [name for names in self._tasks_by_kind().values() for name in names]

    def practised_task_names(self) -> list[str]:
        """Names of the tasks for which there is a source of the same kind, so that a model can have learnt them."""
        kinds = {source.kind for source in self.parsed_sources().values()}
        return [name for kind, names in self._tasks_by_kind().items() if kind in kinds for name in names]

    def _tasks_by_kind(self) -> dict[str, list[str]]:
        """Kind of source → the tasks of that kind."""
        lengths = self.evaluation
        tasks = {"chains": {"chains": lengths.chains, "chains_direct": lengths.chains_direct}}
        tasks["recall"] = {"recall": lengths.recall}
        return {
            kind: [f"{name}_{length}" for name, values in groups.items() for length in values]
            for kind, groups in tasks.items()
        }


@dataclass(frozen=True)
class Rank:
    """Section `rank`: the size of the calibration set, and how units and layers are scored on it.

    One batch has `batch_size` sequences of `sequence_length` tokens. Layers compute in `precision`; sums over positions
    are in float64.
    """

    mixture: dict[str, float] = field(default_factory=dict)  # empty: equal shares of all sources
    batches: int = 16
    batch_size: int = 16
    sequence_length: int = 256
    basis: str = BASES[0]
    private_norms: bool = True
    measure: str = MEASURES[0]
    aggregation: str = AGGREGATIONS[0]
    depth_method: str = DEPTH_METHODS[0]
    depth_batches: int = 4  # of `batches`, for the depth ranking
    precision: Literal["float32", "bfloat16"] = "float32"

    def check(self, require: Require = require) -> None:
        for name in ("batches", "batch_size", "sequence_length"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        check_shares("mixture", self.mixture, require)
        require(1 <= self.depth_batches <= self.batches, "depth_batches", self.depth_batches, f"1 to {self.batches}")
        require(self.basis in BASES, "basis", self.basis, ", ".join(BASES))
        require(self.aggregation in AGGREGATIONS, "aggregation", self.aggregation, ", ".join(AGGREGATIONS))
        require(self.measure in MEASURES, "measure", self.measure, ", ".join(MEASURES))
        require(self.depth_method in DEPTH_METHODS, "depth_method", self.depth_method, ", ".join(DEPTH_METHODS))


@dataclass(frozen=True)
class Extract:
    """Section `extract`: how submodels are exported."""

    heterogeneous: Literal["remote_code", "pad"] = "remote_code"
    dtype: Literal["float32", "bfloat16"] | None = None  # None: that of the parent's files
    destination: str | None = None  # each model is copied to <destination>/<budget>/<version>

    def check(self, require: Require = require) -> None:
        require(self.destination != "", "destination", self.destination, "a URL such as s3://bucket/exports, or null")


@dataclass(frozen=True)
class LatencyOptions:
    """Section `evaluate.latency`: how speed is measured. One sequence is decoded greedily with a cache."""

    prompt_tokens: int = 128
    new_tokens: int = 16
    repeats: int = 8  # after one repeat that is not counted
    threads: int = 1

    def check(self, require: Require = require) -> None:
        for name, value in vars(self).items():
            require(value >= 1, name, value, "1 or more")


@dataclass(frozen=True)
class Benchmarks:
    """Section `evaluate.benchmarks`: lm-eval tasks. Each is scored on its first `limit` items (null: all items)."""

    tasks: tuple[str, ...]
    include: str | None = None  # a directory of task files; null: lm-eval's own tasks, with data from the hub
    data_root: str = "."  # relative paths inside those files start here
    limit: int | None = None
    num_fewshot: int | None = None  # null: the task's own number
    batch_size: BatchSize = 8
    apply_chat_template: bool | str = False  # write prompts with the tokenizer's chat template, or the one of this name
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None  # examples as turns of a conversation; null: with a chat template
    gen_kwargs: dict[str, Any] = field(default_factory=dict)  # of generative tasks, in place of the task's own values
    stop: tuple[str, ...] = ()  # texts that end an answer, beside those of the task
    think_end_token: str | None = None  # the answer begins after this text, such as </think>
    enable_thinking: bool | None = None  # the switch of this name in the chat template; null: the template's default

    def check(self, require: Require = require) -> None:
        require(bool(self.tasks), "tasks", self.tasks, "one or more; or benchmarks: null")
        require(len(set(self.tasks)) == len(self.tasks), "tasks", self.tasks, "every task once")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "1 or more, or null")
        require(self.num_fewshot is None or self.num_fewshot >= 0, "num_fewshot", self.num_fewshot, "0 or more")
        check_batch_size("batch_size", self.batch_size, require)
        check_answer_options(self, require)

    def located(self) -> Benchmarks:
        """The same with absolute paths (paths.py)."""
        include = None if self.include is None else locate(self.include)
        return replace(self, include=include, data_root=locate(self.data_root))


@dataclass(frozen=True)
class Evaluate:
    """Section `evaluate`: the data on which the extracted models are measured.

    `max_tokens` counts tokens per source of `held_out`; `limit` counts items per task of `tasks`. `cache_tokens` is the
    length of the sequence with which the cache is measured. `lengths` are further sequence lengths for the loss.
    `dtype` null is bfloat16 on GPUs and float32 on CPUs. `backend` is what generates answers of tasks.
    """

    held_out: tuple[str, ...] | None = None  # null: all texts and conversations that are not generated
    tasks: tuple[str, ...] | None = None  # null: the tasks of prepare_data.evaluation whose kind of source is there
    max_tokens: int = 16384
    sequence_length: int = 256
    lengths: tuple[int, ...] | None = None  # null: those of train_short and train_extended
    batch_size: BatchSize = 16
    limit: int = 200
    task_batch_size: BatchSize = 64
    cache_tokens: int = 1024
    latency: LatencyOptions = field(default_factory=LatencyOptions)
    benchmarks: Benchmarks | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    backend: Literal["hf", "vllm"] = "hf"
    vllm: Vllm = field(default_factory=Vllm)

    def check(self, require: Require = require) -> None:
        for name in ("max_tokens", "sequence_length", "limit", "cache_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("batch_size", "task_batch_size"):
            check_batch_size(name, getattr(self, name), require)
        for length in self.lengths or ():
            require(length >= 1, "lengths", length, "1 or more")
        check_backend(self.backend, self.vllm, require)


@dataclass(frozen=True)
class Compute:
    """Section `compute`: where training and calibration run. It changes results only by rounding, and reruns no stage.

    With `workers` 0 the stage computes in its own process. `retries` is how often all workers start again after one
    was lost. `storage` is the location of the checkpoints: a directory or a URL that every worker can reach.
    """

    workers: int = 0
    cpus_per_worker: int = 1
    gpus_per_worker: int = 0
    retries: int = 2
    storage: str = "checkpoints"
    execution: Execution = field(default_factory=Execution)

    def check(self, require: Require = require) -> None:
        require(self.workers >= 0, "workers", self.workers, "0 (in this process), or more")
        require(self.cpus_per_worker >= 1, "cpus_per_worker", self.cpus_per_worker, "1 or more")
        require(self.gpus_per_worker in (0, 1), "gpus_per_worker", self.gpus_per_worker, "0 or 1: a worker has one GPU")
        require(self.retries >= 0, "retries", self.retries, "0 or more")
        # Under torchrun this process is one of WORLD_SIZE workers.
        shards, workers = self.execution.shard_over, self.workers or int(os.environ.get("WORLD_SIZE", 1))
        divides = shards is None or shards < 1 or workers % shards == 0
        require(divides, "execution.shard_over", shards, f"null, or a divisor of the number of workers ({workers})")
        self.execution.check_workers(self.workers or int(os.environ.get("WORLD_SIZE", 0)), require)


@dataclass(frozen=True)
class Tracking:
    """Section `tracking`: trackers that show training, in addition to the terminal. Both are off by default.

    `tensorboard` is a directory; every run gets its own directory inside it. `wandb` is a project of Weights & Biases.
    """

    tensorboard: str | None = None
    wandb: str | None = None
    wandb_mode: Literal["online", "offline"] = "online"

    def check(self, require: Require = require) -> None:
        for name in ("tensorboard", "wandb"):
            if (value := getattr(self, name)) is not None:
                require(value.strip() != "", name, value, "a directory" if name == "tensorboard" else "a project name")
                allowed = f"null, because the package {name} is not installed (to install it: {INSTALL_TRACKING})"
                require(is_installed(name), name, value, allowed)
        if self.tensorboard is not None:
            require(not Path(self.tensorboard).is_file(), "tensorboard", self.tensorboard, "a directory, not a file")
        if self.wandb is not None:
            valid = len(self.wandb) <= 128 and not set(self.wandb) & set("/\\#?%:")
            require(valid, "wandb", self.wandb, "a project name of up to 128 characters without / \\ # ? % :")


def is_installed(package: str) -> bool:
    """Whether a package can be imported.

    A plain directory of that name, such as a log directory `tensorboard`, does not count.
    """
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
