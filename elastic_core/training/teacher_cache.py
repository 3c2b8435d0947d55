"""A teacher's largest logits on disk, computed once: with them, a training step runs no teacher.

A file holds FILE_BYTES of rows of the packed data, at most MOST_ROWS: for every position the ids of the k most probable
tokens, their log-probabilities, and that of all other tokens together. Rows that a stage reads in several epochs are
stored once. Files appear whole, so a killed stage goes on with the files that are missing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from elastic_core.config import ConfigError
from elastic_core.data.loader import PackedSequences
from elastic_core.errors import UserError
from elastic_core.io import tensor_files
from elastic_core.io.atomic import whole_file
from elastic_core.model.documents import documents_of
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.model.ops.device_copy import to_device
from elastic_core.training.distributed.placement import reshard
from elastic_core.training.distributed.ranks import Ranks
from elastic_core.training.losses import KeptLogits
from elastic_core.training.stage import Stage

FILE_BYTES, MOST_ROWS = 2**26, 256
TOKENS = 512  # positions whose logits exist at a time
LARGEST_INT16 = 2**15


@dataclass(frozen=True)
class CachedRows:
    """The rows of the data that a stage reads: (source, row) of each, ordered and without repetition, (N, 2)."""

    pairs: np.ndarray

    @classmethod
    def of(cls, data: PackedSequences, stage: Stage) -> CachedRows:
        found = set()
        for step in range(stage.steps):
            found.update(data.rows(step * stage.batch_size, stage.batch_size))
        return cls(np.array(sorted(found), dtype=np.int64))

    def numbers(self, pairs: list[tuple[int, int]]) -> list[int]:
        """The place of each (source, row) among the rows."""
        return [self._places[pair] for pair in pairs]

    @functools.cached_property
    def _places(self) -> dict[tuple[int, int], int]:
        return {(int(source), int(row)): place for place, (source, row) in enumerate(self.pairs)}


def bytes_per_token(kept: int, vocab_size: int) -> int:
    """The bytes on disk of one position: `kept` ids with log-probabilities, and the log-probability of the rest."""
    return kept * (_id_type(vocab_size).itemsize + 2) + 2


class TeacherCache:
    """The files of one stage, in `directory`. `make` computes those that are missing; then `logits` reads them."""

    def __init__(self, directory: Path, data: PackedSequences, stage: Stage, vocab_size: int):
        if stage.kept_logits >= vocab_size:
            allowed = f"below the size of the vocabulary ({vocab_size})"
            raise ConfigError(f"kept_logits: got {stage.kept_logits}; allowed: {allowed}")
        self.directory, self.data, self.stage, self.vocab_size = Path(directory), data, stage, vocab_size
        self.rows = CachedRows.of(data, stage)
        row_bytes = bytes_per_token(stage.kept_logits, vocab_size) * stage.sequence_length
        self.rows_per_file = max(1, min(MOST_ROWS, FILE_BYTES // row_bytes))
        self._file = functools.lru_cache(maxsize=64)(self._open)

    def path(self, number: int) -> Path:
        return self.directory / f"{number:08d}.safetensors"

    def missing(self) -> list[int]:
        """The numbers of the files that do not exist yet."""
        count = -(-len(self.rows.pairs) // self.rows_per_file)
        return [number for number in range(count) if not self.path(number).is_file()]

    def make(
        self,
        load: Callable[[], ElasticModel],
        ranks: Ranks,
        autocast,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compute the missing files. `load()` gives the placed teacher; it is not called if no file is missing.

        All ranks call this together; each writes files of its own. `autocast` is the context of the stage's precision.
        """
        missing = ranks.from_first(self.missing)
        if not missing:
            return
        model = load()
        for start in range(0, len(missing), ranks.world):
            part = missing[start : start + ranks.world]
            # A sharded teacher needs all ranks: one without a file of its own computes the last file too.
            number = part[min(ranks.rank, len(part) - 1)]
            num_rows = max(len(self._pairs(number)) for number in part)
            with torch.no_grad(), autocast:
                tensors = self._compute(model, number, num_rows, ranks)
            if ranks.rank < len(part):
                with whole_file(self.path(number)) as partial:
                    tensor_files.save(tensors, partial)
            if progress is not None:
                progress(min(start + ranks.world, len(missing)), len(missing))
        reshard(model)
        ranks.barrier()

    def _compute(self, model: ElasticModel, number: int, num_rows: int, ranks: Ranks) -> dict[str, Tensor]:
        """The content of a file: `ids` (rows, L, k) and `logprobs` (rows, L, k + 1), of which the last is the rest.

        num_rows: those of the largest file that a rank computes now.
        """
        pairs = [(int(source), int(row)) for source, row in self._pairs(number)]
        per_pass = max(1, self.stage.batch_size // self.stage.microbatches // ranks.world)
        ids, logprobs = [], []
        # All ranks make the same number of passes: where a file has fewer rows than others, its last row is repeated.
        padded = pairs + [pairs[-1]] * (num_rows - len(pairs))
        for start in range(0, len(padded), per_pass):
            batch = self.data.batch_of_rows(padded[start : start + per_pass])
            input_ids = batch.input_ids.to(ranks.device)
            sliced = model.slice()
            hidden = model.hidden_states(input_ids, sliced, documents_of(batch.document_ids, input_ids))
            head, shape = model.head(sliced), input_ids.shape
            found = list(self._largest(hidden.flatten(0, 1), head))
            ids.append(torch.cat([part for part, _ in found]).view(*shape, -1))
            logprobs.append(torch.cat([part for _, part in found]).view(*shape, -1))
        return {
            "ids": torch.cat(ids)[: len(pairs)].contiguous(),
            "logprobs": torch.cat(logprobs)[: len(pairs)].contiguous(),
        }

    def _largest(self, hidden: Tensor, head: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids, log-probabilities) of TOKENS positions at a time, in CPU memory."""
        kept, temperature = self.stage.kept_logits, self.stage.loss.temperature
        for part in hidden.split(TOKENS):
            logits = F.linear(part, head)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
            top = logits.topk(kept, dim=-1)
            total = logits.logsumexp(-1, keepdim=True)
            rest = logits.scatter_(-1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
            logprobs = torch.cat([top.values, rest], dim=-1) - total
            yield top.indices.to(_id_type(self.vocab_size)).cpu(), logprobs.to(torch.float16).cpu()

    def _pairs(self, number: int) -> np.ndarray:
        return self.rows.pairs[number * self.rows_per_file : (number + 1) * self.rows_per_file]

    def _open(self, number: int) -> tuple[Tensor, Tensor]:
        """The tensors of a file, mapped: rows are read from disk when they are used. Raises UserError."""
        path, shape = self.path(number), (len(self._pairs(number)), self.stage.sequence_length)
        try:
            with safe_open(path, "pt") as file:
                ids, logprobs = file.get_tensor("ids"), file.get_tensor("logprobs")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); remove it, and the next start computes it") from None
        kept = self.stage.kept_logits
        if ids.shape != (*shape, kept) or logprobs.shape != (*shape, kept + 1):
            raise UserError(f"{path}: holds {tuple(ids.shape)} ids, not {(*shape, kept)}; remove {self.directory}")
        return ids, logprobs

    def logits(self, first: int, count: int, device: torch.device) -> KeptLogits:
        """What the teacher says about samples `first` to `first + count - 1`, in their order."""
        found = []
        for place in self.rows.numbers(self.data.rows(first, count)):
            number, row = divmod(place, self.rows_per_file)
            ids, logprobs = self._file(number)
            found.append((ids[row], logprobs[row]))
        ids, logprobs = (to_device(torch.stack(part), device) for part in zip(*found, strict=True))
        return KeptLogits(ids.long(), logprobs)


def _id_type(vocab_size: int) -> torch.dtype:
    return torch.int16 if vocab_size <= LARGEST_INT16 else torch.int32
