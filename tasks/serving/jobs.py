"""What the engine takes and gives: texts to continue, and their pieces."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from elastic_core.errors import UserError
from tasks.serving.family import Budget
from tasks.serving.sampling import Chooser, Chosen


@dataclass(frozen=True)
class Limits:
    """What a server takes on at a time.

    max_batch: texts of one budget that are continued together. max_waiting: texts in the queue. context: tokens of a
    text, its prompt included. cache_bytes: for the states of texts that were read (see Prefixes). chunk: tokens of
    prompts that are read in a round.
    """

    max_batch: int = 8
    max_waiting: int = 64
    context: int = 4096
    cache_bytes: int = 256 * 2**20
    chunk: int = 512


class Full(UserError):
    """The queue has no place for a request."""


class Stopped(UserError):
    """The engine does not run, or no longer."""


@dataclass(frozen=True)
class Piece:
    """What is new of a text. `finish` is None until the end: then "stop" (a stop token or string) or "length"."""

    text: str
    tokens: tuple[Chosen, ...]
    finish: str | None = None
    num_cached: int = 0  # tokens of the prompt that did not have to be read


@dataclass(frozen=True)
class Failure:
    """A text has ended without a result.

    `reason`: "timeout", "memory", "stopped", "cancelled", "numbers" (the logits are not finite), or "settings" (see
    `NoChoice`).
    """

    reason: str


@dataclass(eq=False)
class Job:
    """A text to continue. `emit` takes every piece of it, in the engine's thread; the last one has `finish`.

    deadline: in seconds of time.monotonic. stop: strings that end the text. stop_ids: tokens that do.
    """

    budget: Budget
    chooser: Chooser
    max_new_tokens: int
    emit: Callable[[Piece | Failure], object]
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    hand_over: bool = False
    deadline: float = float("inf")
    gone: bool = False  # nobody waits for it any more
    begin: float = field(default_factory=time.monotonic)

    @property
    def prompt(self) -> list[int]:
        return self.chooser.ids[: self.chooser.num_prompt]

    @property
    def num_new(self) -> int:
        return len(self.chooser.ids) - self.chooser.num_prompt
