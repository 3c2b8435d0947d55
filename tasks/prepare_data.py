"""Stage `prepare_data`: turn text sources into token files, and write the tokenizer and the evaluation tasks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from elastic_core.data.loader import vocabulary_sha256
from elastic_core.data.token_files import SPLITS, Manifest, SplitWriter
from elastic_core.data.token_files import Source as SourceEntry
from elastic_core.errors import UserError
from elastic_core.io.atomic import whole_directory
from tasks.corpora.encoding import Encoder, num_cores
from tasks.corpora.preparation import Begun, Documents, Preparation
from tasks.corpora.reasoning import write_evaluation
from tasks.corpora.sources import Source
from tasks.corpora.tokenizer import document_start, train_tokenizer
from tasks.parents.tokenizer import load_tokenizer
from tasks.progress.bars import progress_bar
from tasks.runs import provenance
from tasks.runs.job import started
from tasks.runtime.preflight import check_family, check_parent
from tasks.settings import load, remote_checks
from tasks.settings.sections import PrepareData

OUT = Path("artifacts/data")
ADVICE_IF_EMPTY = {
    "train": "give it more documents, or lower held_out",
    "held_out": "give it more documents, or raise held_out",
}


def main() -> None:
    settings = load.load()
    remote_checks.check(settings, "prepare_data", "parent")
    check_family(settings, load.FILE)
    check_parent(settings, load.FILE)
    begin = time.monotonic()
    with started("prepare_data") as job:
        work = job.directory / "data"
        manifest = prepare(settings.prepare_data, settings.parent.path, OUT, settings.seed, work=work)
        tokens = sum(entry.num_tokens for source in manifest.sources.values() for entry in source.splits.values())
        record = provenance.end(job.record, time.monotonic() - begin, provenance.describe_device(), tokens=tokens)
        provenance.write_record(record)
    print_summary(manifest)


def print_summary(manifest: Manifest) -> None:
    """Print a line per source: its tokens, and the rows that were skipped."""
    for name, source in manifest.sources.items():
        sizes = ", ".join(f"{entry.num_tokens:,} {split}" for split, entry in source.splits.items())
        skipped = ", ".join(f"{number:,} {reason}" for reason, number in source.skipped_rows.items())
        print(f"{name}: {sizes} tokens" + (f"; skipped rows without text: {skipped}" if skipped else ""))


def prepare(
    section: PrepareData,
    tokenizer_source: str | Path | None,
    out_dir: str | Path,
    seed: int,
    threads: int | None = None,
    work: Path | None = None,
) -> Manifest:
    """Write the data directory `out_dir`: token files (see elastic_core.data.token_files), `tokenizer/` and `lm_eval/`.

    - `tokenizer_source`: the directory, URL or package of the tokenizer. None: train one on the training splits.
    - `threads`: the number of threads that encode text (None: one per core). It does not change the files.
    - `work`: a directory for unfinished files, on the disk of `out_dir`. A call that was stopped goes on there, when it
      is made again with the same arguments. None: a stopped call starts over.

    `out_dir` appears when it is complete, and replaces an existing one. Raises UserError for a source, file or
    tokenizer that cannot be used.
    """
    with whole_directory(out_dir, marker="manifest.json", work=work) as directory:
        progress = Preparation.load(directory)
        sources = section.parsed_sources()
        if not progress.has_tokenizer:
            _make_tokenizer(section, sources, tokenizer_source, seed).save_pretrained(directory / "tokenizer")
            progress = progress.with_tokenizer()
        tokenizer = load_tokenizer(directory / "tokenizer")
        manifest = _tokenise(sources, tokenizer, progress, seed, threads)
        write_evaluation(directory / "lm_eval", section.evaluation, seed)
        manifest.write(directory)
        progress.remove()
    return manifest


def _make_tokenizer(
    section: PrepareData, sources: Mapping[str, Source], tokenizer_source: str | Path | None, seed: int
) -> PreTrainedTokenizerFast:
    if tokenizer_source is not None:
        return load_tokenizer(tokenizer_source)
    with progress_bar("tokenizer", section.tokenizer_characters, "char", scaled=True) as bar:
        return train_tokenizer(sources, section.vocab_size, section.tokenizer_characters, seed, bar.update)


def _tokenise(
    sources: Mapping[str, Source],
    tokenizer: PreTrainedTokenizerFast,
    progress: Preparation,
    seed: int,
    threads: int | None,
) -> Manifest:
    """Write the token files of all sources that are not finished, and return the manifest that describes all."""
    manifest = Manifest(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=document_start(tokenizer),
        tokenizer_sha256=vocabulary_sha256(tokenizer),
        sources={},
    )
    encoder = Encoder(tokenizer, manifest, threads or num_cores())
    for name, source in sources.items():
        if name not in progress.finished:
            progress = _tokenise_source(name, source, encoder, manifest.dtype, progress, seed)
        manifest.sources[name] = progress.finished[name]
    return manifest


def _tokenise_source(
    name: str, source: Source, encoder: Encoder, dtype: np.dtype, progress: Preparation, seed: int
) -> Preparation:
    """Write the token files of one source, or what an earlier call has not written of them."""
    begun = progress.begun.get(name, Begun())
    writers = {split: SplitWriter(progress.directory, name, split, dtype, begun.written.get(split)) for split in SPLITS}
    skipped = Counter()  # texts begins at the first document again, so that this counts all rows
    documents = Documents(source.texts(seed, skipped), begun.num_documents)
    with progress_bar(name, source.expected_characters(), "char", scaled=True) as bar:
        bar.update(begun.num_characters)
        while not documents.ended:
            for batch in encoder.encoded(documents.next_part()):
                writers[batch.split].append(batch.documents, batch.num_bytes)
                bar.update(batch.num_characters)
            written = {split: writer.flush() for split, writer in writers.items()}
            progress = progress.with_begun(name, Begun(documents.number, bar.n, written))
    splits = {split: writer.close() for split, writer in writers.items()}
    for split, entry in splits.items():
        if entry.num_documents == 0:
            raise UserError(f"prepare_data.sources.{name}: got no document in {split}; {ADVICE_IF_EMPTY[split]}")
    return progress.with_finished(name, SourceEntry(source.too_long, splits, dict(skipped)))
