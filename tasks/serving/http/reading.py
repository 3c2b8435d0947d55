"""The texts of one request, from the engine's thread to the loop of the server."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import time
from collections.abc import AsyncIterator

from tasks.serving.engine import Engine
from tasks.serving.http.answers import Answer, Text, usage
from tasks.serving.http.bodies import Body
from tasks.serving.http.service import Refused
from tasks.serving.http.token_bytes import Offsets
from tasks.serving.jobs import Failure, Full, Job, Piece, Stopped

log = logging.getLogger("elastic.serve")

FAILURES = {
    "timeout": (504, "the answer took longer than the server's time limit (--timeout)"),
    "memory": (503, "the server is out of memory; try a shorter text, or later"),
    "stopped": (503, "the server is stopping"),
    "settings": (400, "temperature or repetition_penalty is too extreme: no token can be chosen"),
    "numbers": (500, "the model computed numbers that are not finite"),
}


class Reading:
    """The texts of one request as the engine writes them. `close` it whatever happens, so that the engine stops too."""

    def __init__(self, engine: Engine, jobs: list[Job], kind: str):
        """Raises Refused if the queue is full."""
        self._engine, self._jobs, self._kind, self._outcome = engine, jobs, kind, "cancelled"
        self.texts = [Text(len(job.prompt)) for job in jobs]
        loop, self._queue = asyncio.get_running_loop(), asyncio.Queue()
        for index, job in enumerate(jobs):
            job.emit = functools.partial(self._emit, loop, index)
        try:
            engine.submit(jobs)
        except Full as error:
            raise Refused(429, str(error), "queue_full") from None
        except Stopped:
            raise Refused(*FAILURES["stopped"], code="stopped") from None

    def _emit(self, loop: asyncio.AbstractEventLoop, index: int, piece: Piece | Failure) -> None:
        loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces with the number of their choice. Raises Refused where the engine fails."""
        open_texts = len(self.texts)
        while open_texts:
            index, piece = await self._queue.get()
            if isinstance(piece, Failure):
                self._outcome = piece.reason
                raise Refused(*FAILURES[piece.reason], code=piece.reason)
            self.texts[index].pieces.append(piece)
            open_texts -= piece.finish is not None
            yield index, piece
        self._outcome = self.texts[0].pieces[-1].finish

    def close(self) -> None:
        self._engine.cancel(self._jobs)
        first, counts = self._jobs[0], usage(self.texts, 1)
        log.info(
            "%s %s: %d + %d tokens, %.2f s, %s", self._kind, first.budget.label, counts["prompt_tokens"],
            counts["completion_tokens"], time.monotonic() - first.begin, self._outcome,
        )  # fmt: skip


async def chunks(reading: Reading, answer: Answer, body: Body, logprobs: bool) -> AsyncIterator[str]:
    """The events of an answer. An error after the first one is an event too, because the status has been sent."""
    offsets = [Offsets() for _ in reading.texts]
    if answer.chat:
        for index in range(len(offsets)):
            yield _event(answer.first_chunk(index))
    try:
        async for index, piece in reading.pieces():
            if piece.text or piece.finish or logprobs:
                yield _event(answer.chunk(index, piece, offsets[index]))
    except Refused as error:
        yield _event(error.content)
        return
    if body.stream_options is not None and body.stream_options.include_usage:
        yield _event(answer.last_chunk(usage(reading.texts, body.n)))
    yield "data: [DONE]\n\n"


def _event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
