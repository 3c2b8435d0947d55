"""Continues many texts at the same time, on one copy of a family's weights, in a thread of its own.

In each round the thread reads a part of the prompts that wait, and then one token of every text that it has read: the
texts of one budget in one call of the model. So a text that comes later starts while others are still being written,
and long prompts do not hold the others up. Each text is continued as its budget would continue it alone.

Where memory runs out, the states of earlier texts are forgotten, and only those texts fail that cannot go on.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from elastic_core.export.conversation import new_cache
from elastic_core.model.submodel import Submodel
from tasks.serving.batch import Batch, Row, read
from tasks.serving.family import Family
from tasks.serving.jobs import Failure, Full, Job, Limits, Piece, Stopped
from tasks.serving.metrics import Metrics
from tasks.serving.prefixes import Found, Prefixes
from tasks.serving.sampling import NoChoice
from tasks.serving.text_stream import TextStream


@dataclass(eq=False)
class _Text:
    """A job that the engine has begun with."""

    job: Job
    prompt: list[int]
    stream: TextStream
    cache: Cache | None = None
    length: int = 0  # tokens of the prompt that are in the cache
    num_cached: int = 0
    pure: bool = True  # no state in the cache comes from a larger budget


class Engine:
    """Continues texts of a family. `start` it, `submit` jobs from any thread, and `stop` it."""

    def __init__(self, family: Family, limits: Limits, metrics: Metrics):
        self.family, self.limits, self._metrics = family, limits, metrics
        self._prefixes = Prefixes(family.config, limits.cache_bytes)
        self._waiting: deque[Job] = deque()
        self._reading: _Text | None = None
        self._batches: dict[Submodel, Batch] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="elastic-engine", daemon=True)
        metrics.watch(lambda: len(self._waiting), self._num_running)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Jobs that are not done fail."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def submit(self, jobs: list[Job]) -> None:
        """Put all jobs into the queue, or none. Raises Full if it has too little space, and Stopped."""
        with self._changed:
            if not self.is_running:
                raise Stopped("the server is stopping")
            if len(self._waiting) + len(jobs) > self.limits.max_waiting:
                self._metrics.refused()
                taken = f"{len(self._waiting)} of {self.limits.max_waiting} places in the queue are taken"
                raise Full(f"{taken}, and {len(jobs)} are needed; try later")
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def cancel(self, jobs: list[Job]) -> None:
        """Stop working on jobs. Those that have ended are left as they are."""
        for job in jobs:
            job.gone = True

    def _num_running(self) -> int:
        return sum(len(batch.rows) for batch in list(self._batches.values())) + (self._reading is not None)

    def _run(self) -> None:
        try:
            while self._wait():
                with torch.no_grad():
                    self._drop_ended()
                    self._read()
                    for batch in self._batches.values():
                        self._step(batch)
        finally:  # at the end, and after a mistake: nobody waits for ever
            self._stopping = True
            with self._changed:
                jobs = [*self._waiting, *(text.job for text in self._texts())]
                self._waiting.clear()
            for job in jobs:
                self._fail(job, "stopped")

    def _wait(self) -> bool:
        """Wait until there is work. False: the engine has to stop."""
        with self._changed:
            while not self._stopping and not self._waiting and not self._num_running():
                self._changed.wait()
            return not self._stopping

    def _texts(self) -> list[_Text]:
        texts = [row.owner for batch in self._batches.values() for row in batch.rows]
        return texts if self._reading is None else [self._reading, *texts]

    def _drop_ended(self) -> None:
        """Drop jobs that nobody waits for, and those that took too long."""

        def reason(job: Job) -> str | None:
            return "cancelled" if job.gone else "timeout" if time.monotonic() > job.deadline else None

        with self._changed:
            ended = [job for job in self._waiting if reason(job)]
            for job in ended:
                self._waiting.remove(job)
        for job in ended:
            self._fail(job, reason(job))
        if self._reading is not None and (why := reason(self._reading.job)):
            self._fail(self._reading.job, why, self._reading)
            self._reading = None
        for batch in self._batches.values():
            gone = [row for row in batch.rows if reason(row.owner.job)]
            for row in gone:
                self._fail(row.owner.job, reason(row.owner.job), row.owner)
            self._remove(batch, gone)

    def _read(self) -> None:
        """Read at most `chunk` tokens of prompts."""
        left = self.limits.chunk
        while left > 0:
            self._reading = text = self._reading or self._next()
            if text is None:
                return
            try:
                left -= self._read_some(text, left)
            except torch.OutOfMemoryError:
                self._prefixes.clear()
                self._fail(text.job, "memory", text)
                self._reading = None

    def _next(self) -> _Text | None:
        """The first job in the queue with a free place in its budget's batch."""
        with self._changed:
            for job in self._waiting:
                batch = self._batches.get(job.budget.submodel)
                if batch is None or len(batch.rows) < self.limits.max_batch:
                    self._waiting.remove(job)
                    prompt = job.prompt
                    return _Text(job, prompt, TextStream(self.family.tokenizer, prompt, job.stop))
        return None

    def _read_some(self, text: _Text, most: int) -> int:
        """Read up to `most` tokens of a prompt, and begin to write after the last one. Returns how many were read."""
        if text.cache is None:
            found = self._find(text)
            text.cache = found.cache or new_cache(text.job.budget.model.config)
            text.length = text.num_cached = found.length
            text.pure = found.pure
        tokens = text.prompt[text.length : text.length + most]
        logits = read(text.job.budget.model, text.cache, tokens, text.length)
        text.length += len(tokens)
        if text.length == len(text.prompt):
            self._begin(text, logits)
            self._reading = None
        return len(tokens)

    def _find(self, text: _Text) -> Found:
        """States to go on from, if there are any, and memory for a copy of them."""
        try:
            return self._prefixes.find(text.job.budget.submodel, text.prompt, text.job.hand_over)
        except torch.OutOfMemoryError:
            self._prefixes.clear()
        return Found()

    def _begin(self, text: _Text, logits: Tensor) -> None:
        """Choose the first token of a text, and put the text into its budget's batch."""
        submodel = text.job.budget.submodel
        self._prefixes.put(submodel, text.prompt, text.cache, text.pure)
        self._metrics.first_token(text.job.budget.label, time.monotonic() - text.job.begin)
        if not self._take(text, logits, *map(Tensor.item, logits.max(-1))):
            batch = self._batches.setdefault(submodel, Batch(text.job.budget.model))
            row = Row(text, text.length, text.job.chooser.ids[-1])
            self._with_memory(lambda: batch.add(row, text.cache))
        text.cache = None

    def _step(self, batch: Batch) -> None:
        """The next token of every text of a budget."""
        if not batch.rows:
            return
        try:
            logits = batch.step()
            largest, likeliest = map(Tensor.tolist, logits.max(-1))
        except torch.OutOfMemoryError:  # a part of the layers may have read the tokens, so nothing can be repeated
            self._prefixes.clear()
            self._fail_rows(batch.rows)
            batch.clear()
            return
        ended = []
        for row, values, value, token in zip(batch.rows, logits, largest, likeliest, strict=True):
            text = row.owner
            if self._take(text, values, value, token):
                ended.append(row)
            row.token = text.job.chooser.ids[-1]
        for row in ended:
            self._keep(batch, row)
        self._remove(batch, ended)

    def _keep(self, batch: Batch, row: Row) -> None:
        """Keep the states of a text that has ended, if there is memory for a copy of them."""
        text, ids = row.owner, row.owner.job.chooser.ids
        if len(ids) != row.length + 1:  # the logits were of no use
            return
        try:
            self._prefixes.put(text.job.budget.submodel, ids[:-1], batch.cache_of(row), text.pure)
        except torch.OutOfMemoryError:
            self._prefixes.clear()

    def _remove(self, batch: Batch, gone: list[Row]) -> None:
        """Remove texts that have ended. If there is no memory for the others without them, the others fail."""
        try:
            self._with_memory(lambda: batch.remove(gone))
        except torch.OutOfMemoryError:
            self._fail_rows([row for row in batch.rows if row not in gone])
            batch.clear()

    def _with_memory(self, action: Callable[[], None]) -> None:
        """Do it, and if memory runs out, once more without the kept states. Raises torch.OutOfMemoryError."""
        try:
            action()
            return
        except torch.OutOfMemoryError:
            self._prefixes.clear()
        action()  # not in the handler, because the error holds on to the memory of the first try

    def _take(self, text: _Text, logits: Tensor, largest: float, likeliest: int) -> bool:
        """Choose the next token of a text and tell its reader. Returns whether the text has ended."""
        job, stream = text.job, text.stream
        if not math.isfinite(largest):
            self._fail(job, "numbers", text)
            return True
        try:
            chosen = job.chooser.choose(logits, likeliest)
        except NoChoice:
            self._fail(job, "settings", text)
            return True
        except torch.OutOfMemoryError:
            self._prefixes.clear()
            self._fail(job, "memory", text)
            return True
        if chosen.token in job.stop_ids:
            new, finish = stream.end(), "stop"
        else:
            new, finish = stream.push(chosen.token), None
            if not stream.stopped and job.num_new == job.max_new_tokens:
                new, finish = new + stream.end(), "length"
            finish = "stop" if stream.stopped else finish
        if finish is not None:
            self._count(text, finish)
        job.emit(Piece(new, (chosen,), finish, text.num_cached))
        return finish is not None

    def _fail_rows(self, rows: list[Row]) -> None:
        for row in rows:
            self._fail(row.owner.job, "memory", row.owner)

    def _fail(self, job: Job, reason: str, text: _Text | None = None) -> None:
        if text is None:
            self._metrics.ended(job.budget.label, reason, time.monotonic() - job.begin, 0, 0, 0)
        else:
            self._count(text, reason)
        job.emit(Failure(reason))

    def _count(self, text: _Text, outcome: str) -> None:
        job = text.job
        numbers = len(text.prompt), text.num_cached, job.num_new
        self._metrics.ended(job.budget.label, outcome, time.monotonic() - job.begin, *numbers)
