"""Generates with vLLM, which runs in an interpreter of its own: it rarely fits in one environment with training."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from elastic_core.config import ConfigError
from tasks.settings.parts.evaluation import Vllm

WORKER = Path(__file__).with_name("vllm_worker.py")
OF_A_MODEL = ("top_p", "top_k", "min_p", "repetition_penalty")  # what generation_config.json may set
SAMPLING = ("temperature", *OF_A_MODEL)
TOP_K = 50  # of transformers, where nothing sets it
CAUSE = re.compile(r" ERROR .*?\b(\w+(?:Error|Exception): .*)")  # in the log of vLLM's own processes
LINES = 20  # of a failed process that a message shows, where its log has no cause


class VllmEngine:
    """A vLLM process with the model of a directory; `close` it at the end. Raises ConfigError where it does not start.

    `dtype`: the element type of the weights. `log`: a file for what vLLM prints.
    """

    def __init__(self, section: Vllm, directory: Path, dtype: str, log: Path):
        self.log, self.python = log, section.python or sys.executable
        log.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(log, "w")  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            [self.python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._file, text=True
        )
        self._ask({"model": str(directory.absolute()), "dtype": dtype, "options": section.options})

    def generate(self, prompts: list[list[int]], stop: list[str], stop_ids: list[int], most: int, options: dict):
        """The new token ids of every prompt: up to `most`, to a text in `stop`, or to one of `stop_ids`.

        `options`: transformers' names of sampling, of which those in SAMPLING are known. Raises ConfigError for others.
        """
        options = dict(options)
        is_sampled = options.pop("do_sample", options.get("temperature", 0) > 0)
        if unknown := sorted(options.keys() - set(SAMPLING)):
            raise ConfigError(
                f"evaluate.backend: vllm does not know the gen_kwargs {', '.join(unknown)}; allowed: do_sample, "
                f"{', '.join(SAMPLING)}, or backend: hf"
            )
        if not is_sampled:
            options = {name: options[name] for name in ("repetition_penalty",) if name in options} | {"temperature": 0}
        sampling = {"max_tokens": most, "stop": stop, "stop_token_ids": stop_ids, **options}
        return self._ask({"prompts": prompts, "sampling": sampling})

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):  # it has ended
            self._process.stdin.close()
        self._process.wait()
        self._file.close()

    def _ask(self, request: dict):
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, which the empty answer tells
        if answer := self._process.stdout.readline():
            return json.loads(answer)
        self._process.wait()
        raise ConfigError(
            f"evaluate.vllm: vLLM in {self.python} has ended ({self.log}): {_reason(self.log.read_text())}"
        )


def _reason(log: str) -> str:
    """The first error of vLLM's own processes: the last lines then say only that they have ended. Else these lines."""
    found = CAUSE.search(log)
    return found[1] if found else " ".join(log.splitlines()[-LINES:])[-800:]


def with_defaults(options: dict, config: GenerationConfig) -> dict:
    """`options` of sampling, completed as transformers does: by the model's own, and by `TOP_K`."""
    own = {"top_k": TOP_K} | {name: value for name in OF_A_MODEL if (value := getattr(config, name, None)) is not None}
    return own | {name: value for name, value in options.items() if value is not None}


def continuations(engine: VllmEngine, context: Tensor, mask: Tensor, stop: list[str], stop_ids: list[int], most: int,
                  options: dict) -> Tensor:  # fmt: skip
    """As transformers' `generate`: `context` (B, L), padded on the left by `mask`, and what follows, padded (B, L + N).

    The padding after an answer is its last stop id, as far as there is one.
    """
    prompts = [row[kept.bool()].tolist() for row, kept in zip(context, mask, strict=True)]
    answers = engine.generate(prompts, stop, stop_ids, most, options)
    padding = stop_ids[0] if stop_ids else 0
    found = torch.full((len(answers), max(map(len, answers), default=0)), padding, dtype=context.dtype)
    for row, answer in zip(found, answers, strict=True):
        row[: len(answer)] = torch.tensor(answer, dtype=context.dtype)
    return torch.cat([context.cpu(), found], 1)
