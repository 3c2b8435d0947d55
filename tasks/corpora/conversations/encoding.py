"""Encodes conversations: tokens as the chat template renders them, and which of them are trained."""

from __future__ import annotations

import bisect
import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from operator import itemgetter

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from elastic_core.data.token_files import Manifest
from elastic_core.errors import UserError
from elastic_core.io.ordered_map import ordered_map
from tasks.corpora.conversations.markers import MARKERS, START
from tasks.corpora.conversations.messages import Conversation
from tasks.corpora.conversations.rendering import ChatTemplate, Rendered
from tasks.corpora.encoding import Batch, batches, plain_encoder

UNTRAINED = "without a trained token"  # a reason why a conversation is skipped
_LONGEST_HEADER = 64  # characters
_MOST_HEADERS = 1000


class ConversationEncoder:
    """Encodes conversations as `template` renders them, and nothing is added. `threads`: as of Encoder.

    `skipped` counts the conversations without a trained token, and `notes` what the user should know of the others.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, manifest: Manifest, threads: int, template: ChatTemplate, masked: bool
    ):
        self._encoder = plain_encoder(tokenizer, special_as_text=False)
        self._tokenizer = tokenizer
        self._is_special = np.zeros(manifest.vocab_size, bool)
        self._is_special[[i for i, token in tokenizer.added_tokens_decoder.items() if token.special]] = True
        self._headers: dict[str, list[int]] = {}  # the beginning of a turn → its ids; templates have few of them
        self._template, self._masked = template, masked
        self._dtype, self._threads = manifest.dtype, threads
        self.skipped, self.notes = Counter(), Counter()

    def encoded(self, documents: Iterable[tuple[str, Conversation]]) -> Iterator[Batch]:
        """Encode (split, conversation) in batches. The conversations of a split keep their order.

        Raises UserError, which names the file and the line, for a conversation that cannot be rendered.
        """
        # Only this thread renders: a template with marks has a state while it renders.
        return ordered_map(self._encode, batches(self._rendered(documents)), self._threads)

    @functools.cached_property
    def _text_encoder(self) -> Tokenizer:
        return plain_encoder(self._tokenizer, special_as_text=True)

    def _rendered(self, documents: Iterable[tuple[str, Conversation]]) -> Iterator[tuple[str, Rendered]]:
        for split, conversation in documents:
            rendered = self._template.documents(conversation, self.notes)
            if not rendered:
                self.skipped[UNTRAINED] += 1
            for document in rendered:
                try:
                    document.text.isascii() or document.text.encode()
                except UnicodeEncodeError:  # JSON can contain half of a surrogate pair
                    raise UserError(
                        f"{conversation.place}: holds a lone surrogate, which is not valid Unicode"
                    ) from None
                yield split, document

    def _encode(self, batch: tuple[str, list[Rendered]]) -> Batch:
        split, documents = batch
        plain = [document for document in documents if not document.is_marked]
        encodings = self._encoder.encode_batch_fast([document.text for document in plain], add_special_tokens=False)
        plain_ids = [np.array(encoding.ids, self._dtype) for encoding in encodings]
        plain_masks = self._masks(plain, plain_ids) if self._masked else [None] * len(plain)
        found = iter(zip(plain_ids, plain_masks, strict=True))
        pairs = [self._encode_marked(document) if document.is_marked else next(found) for document in documents]
        ids, masks = [one for one, _ in pairs], [mask for _, mask in pairs]
        texts = [MARKERS.sub("", d.text) if d.is_marked else d.text for d in documents]
        num_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        return Batch(split, ids, num_bytes, sum(map(len, texts)), masks if self._masked else None)

    def _masks(self, documents: list[Rendered], ids: list[np.ndarray]) -> list[np.ndarray]:
        """Which tokens of each document are trained, each (L,) bool."""
        # One search for special tokens in all documents takes a fraction of the time of a search in each.
        ends = np.cumsum([0, *map(len, ids)])
        found = np.flatnonzero(self._is_special[np.concatenate([np.empty(0, self._dtype), *ids])])
        bounds, found = np.searchsorted(found, ends).tolist(), found.tolist()
        masks = []
        for i, (document, begin) in enumerate(zip(documents, ends.tolist(), strict=False)):
            positions = [position - begin for position in found[bounds[i] : bounds[i + 1]]]
            masks.append(self._mask(document, ids[i], positions))
        return masks

    def _mask(self, document: Rendered, ids: np.ndarray, positions: list[int]) -> np.ndarray:
        """Which tokens are trained (L,) bool: those that begin in a span or hold its first character.

        `positions`: of special tokens in `ids`. They are the same in the text and in the ids. From the last one before
        an end of a span, only a few characters have to be counted in tokens. Offsets of all tokens would take a fifth
        of the time of encoding.
        """
        mask, text = np.zeros(len(ids), bool), document.text
        marks = list(self._template.special.finditer(text))
        if len(marks) == len(positions):
            behind = {mark.end(): position + 1 for mark, position in zip(marks, positions, strict=True)}
            for start, end in document.spans:
                first = behind.get(start) or self._token_at(text, ids, marks, positions, start)
                last = behind.get(end) or self._token_at(text, ids, marks, positions, end)
                if first is None and start < end:
                    first = self._token_of(text, ids, marks, positions, start)
                if first is None or last is None:
                    break
                mask[first:last] = True
            else:
                return mask
        encoding = self._encoder.encode(document.text, add_special_tokens=False)  # seldom, and exact for any tokenizer
        for start, end in document.spans:
            first, last = _token_of(encoding, start, end, 1), _token_of(encoding, end - 1, start - 1, -1)
            if first is not None:
                mask[first : last + 1] = True
        return mask

    def _token_at(self, text: str, ids: np.ndarray, marks: list[re.Match], positions: list[int], at: int) -> int | None:
        """The number of tokens before the character `at`; None if no token ends there, as far as this can be seen."""
        before = bisect.bisect_right(marks, at, key=re.Match.end)  # special tokens that end before `at`
        begin, first = (marks[before - 1].end(), positions[before - 1] + 1) if before else (0, 0)
        if before < len(marks) and marks[before].start() == at:
            return positions[before]
        if at == len(text):
            return len(ids)
        if begin == at:
            return first
        header = text[begin:at]
        if len(header) > _LONGEST_HEADER or (before < len(marks) and marks[before].start() < at):
            return None
        expected = self._headers.get(header)
        if expected is None:
            expected = self._encoder.encode(header, add_special_tokens=False).ids
            if len(self._headers) < _MOST_HEADERS:
                self._headers[header] = expected
        end = first + len(expected)
        return end if ids[first:end].tolist() == expected else None

    def _token_of(self, text: str, ids: np.ndarray, marks: list[re.Match], positions: list[int], at: int) -> int | None:
        """The token that holds the character `at`, if it begins before it: a line end of the prompt and of the answer.

        None if a few characters behind the last special token do not tell.
        """
        before = bisect.bisect_right(marks, at, key=re.Match.end)
        begin, first = (marks[before - 1].end(), positions[before - 1] + 1) if before else (0, 0)
        end = marks[before].start() if before < len(marks) else len(text)
        cut = min(end, at + _LONGEST_HEADER)
        if end <= at or at - begin > _LONGEST_HEADER:
            return None
        part = self._encoder.encode(text[begin:cut], add_special_tokens=False)
        number = next((i for i, (_, stop) in enumerate(part.offsets) if stop > at - begin), None)
        # The last tokens before a cut may be others in the whole text.
        seen = len(part.ids) if cut == end else bisect.bisect_left(part.offsets, cut - begin - 16, key=itemgetter(1))
        if number is None or number + 1 >= seen or ids[first : first + seen].tolist() != part.ids[:seen]:
            return None
        return first + number

    def _encode_marked(self, document: Rendered) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of a document in which some special tokens are ordinary text. It is encoded in pieces."""
        ids, starts, ends = [], [], []
        edges = [0, *(match.start() for match in MARKERS.finditer(document.text)), len(document.text)]
        for begin, end in pairwise(edges):
            as_text = document.text[begin] == START
            piece = MARKERS.sub("", document.text[begin:end])
            found, offsets = _encode_piece(self._text_encoder if as_text else self._encoder, piece, is_first=begin == 0)
            ids += found
            starts += [end - len(piece) + start for start, _ in offsets]  # end - len(piece): behind the marker
            ends += [end - len(piece) + stop for _, stop in offsets]
        mask = np.full(len(ids), document.spans is None)
        for start, end in document.spans or ():  # with the token that holds the first character, as in `_mask`
            mask |= (np.array(ends) > start) & (np.array(starts) < end)
        return np.array(ids, self._dtype), mask


def _encode_piece(encoder: Tokenizer, piece: str, is_first: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a piece of a text, and where they start and end in it.

    A piece inside a text is encoded behind a line end, as in transformers: SentencePiece adds a space to what is first.
    """
    if not is_first:
        line_end = encoder.encode("\n", add_special_tokens=False).ids
        encoding = encoder.encode("\n" + piece, add_special_tokens=False)
        if encoding.ids[: len(line_end)] == line_end:
            inside = encoding.offsets[len(line_end) :]
            return encoding.ids[len(line_end) :], [(start - 1, stop - 1) for start, stop in inside]
    encoding = encoder.encode(piece, add_special_tokens=False)
    return encoding.ids, encoding.offsets


def _token_of(encoding, first: int, end: int, step: int) -> int | None:
    """The token of the first character from `first` on that has one: white space may have none."""
    return next((t for at in range(first, end, step) if (t := encoding.char_to_token(at)) is not None), None)
