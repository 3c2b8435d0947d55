"""The parts of section `evaluate` that say with what models are evaluated. Needs no torch."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from elastic_core.config import Require, require

BatchSize = int | Literal["auto"]  # auto: as many as the device's memory allows


@dataclass(frozen=True)
class Vllm:
    """Section `evaluate.vllm`: the vLLM that generates, with `backend: vllm`.

    `python` is the interpreter of an environment that has vLLM; null is this one. `options` are arguments of
    ``vllm.LLM``, such as max_model_len and gpu_memory_utilization.
    """

    python: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def check(self, require: Require = require) -> None:
        for name in ("model", "dtype"):  # the stage sets these
            require(name not in self.options, f"options.{name}", self.options.get(name), "nothing: evaluate sets it")


def check_batch_size(name: str, value: BatchSize, require: Require) -> None:
    require(value == "auto" or value >= 1, name, value, "1 or more, or auto")


def check_backend(backend: str, vllm: Vllm, require: Require) -> None:
    """Raise ConfigError for a vLLM that is not there. Whether an interpreter has it is seen when it starts."""
    if backend != "vllm":
        return
    if vllm.python is None:
        allowed = "the interpreter of an environment with vLLM, because vllm is not installed here"
        require(importlib.util.find_spec("vllm") is not None, "vllm.python", None, allowed)
    else:
        require(os.access(vllm.python, os.X_OK), "vllm.python", vllm.python, "an interpreter, as /opt/vllm/bin/python")
