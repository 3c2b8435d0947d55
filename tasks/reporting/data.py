"""Tables about the data: what each source holds, how long documents are, and what sequences lose of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elastic_core import config
from elastic_core.data.token_files import SPLITS, Manifest
from elastic_core.io.json_files import read_json
from tasks.corpora import lengths
from tasks.settings.schema import Params

MISSING = "–"


@dataclass(frozen=True)
class Table:
    """A small table: its title, the names of its columns, and rows of text."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def data_tables(settings: Params, directory: Path) -> list[Table]:
    """The tables of a data directory: sources, lengths of training documents, and what the stages' sequences lose."""
    path = directory / "manifest.json"
    manifest = config.load(Manifest, read_json(path), str(path))
    offsets = {
        split: {
            name: np.load(directory / source.splits[split].offsets, mmap_mode="r")
            for name, source in manifest.sources.items()
        }
        for split in SPLITS
    }
    return [_sources(settings, manifest), _lengths(offsets["train"]), _losses(settings, manifest, offsets)]


def _sources(settings: Params, manifest: Manifest) -> Table:
    """A row per source: its kind, and the documents and tokens of both splits."""
    rows = []
    for name, source in manifest.sources.items():
        section = settings.prepare_data.sources.get(name, {})
        kind = " ".join(str(section[key]) for key in ("kind", "path", "dataset") if section.get(key))
        train, held_out = source.splits["train"], source.splits["held_out"]
        trained = train.num_tokens if train.num_trained is None else train.num_trained
        counts = (train.num_documents, train.num_tokens, trained, held_out.num_tokens)
        skipped = ", ".join(f"{number:,} {reason}" for reason, number in source.skipped_rows.items())
        rows.append((name, kind or MISSING, *(f"{count:,}" for count in counts), skipped or "0"))
    counts = ("documents to train on", "tokens to train on", "of them trained", "held-out tokens")
    return Table("Data", ("source", "kind", *counts, "skipped rows"), rows)


def _lengths(offsets: dict[str, np.ndarray]) -> Table:
    """A row per power of two: the documents of each source that are that long, and their share of its tokens."""
    found = {name: {b.shortest: b for b in lengths.histogram(array)} for name, array in offsets.items()}
    rows = []
    for shortest in sorted({shortest for buckets in found.values() for shortest in buckets}):
        cells = []
        for name, buckets in found.items():
            bucket, total = buckets.get(shortest), int(offsets[name][-1])
            has_any = bucket is not None and bucket.num_documents
            cells.append(f"{bucket.num_documents:,} ({bucket.num_tokens / total:.1%})" if has_any else MISSING)
        rows.append((f"{shortest:,} to {2 * shortest - 1:,}", *cells))
    return Table("Lengths of training documents (share of tokens)", ("tokens", *found), rows)


def _losses(settings: Params, manifest: Manifest, offsets: dict[str, dict[str, np.ndarray]]) -> Table:
    """A row per source and stage that reads it: documents that are too long, and the share of tokens that is lost.

    `offsets`: split → source → the offsets of its documents.
    """
    rows = []
    for name, source in manifest.sources.items():
        for stage, length in lengths.contexts(settings, name).items():
            found = lengths.fit(offsets[lengths.split_of(stage)][name], length, source.too_long)
            rows.append(
                (name, stage, f"{length:,}", source.too_long, f"{found.num_too_long:,}", f"{found.lost_share:.1%}")
            )
    head = ("source", "stage", "sequence length", "too_long", "documents too long", "tokens lost")
    return Table("What sequences lose of documents that are too long", head, rows)
