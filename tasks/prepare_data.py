"""Stage `prepare_data`: turn texts and conversations into token files, and write tokenizer and evaluation tasks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Container, Mapping
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from elastic_core.data.loader import vocabulary_sha256
from elastic_core.data.token_files import SPLITS, Manifest, Split, SplitWriter
from elastic_core.data.token_files import Source as SourceEntry
from elastic_core.errors import UserError
from elastic_core.io.atomic import whole_directory
from tasks.corpora import lengths
from tasks.corpora import sources as corpora
from tasks.corpora.conversations.encoding import ConversationEncoder
from tasks.corpora.conversations.rendering import LOST_MESSAGES, LOST_THINKING, ChatTemplate, read_template
from tasks.corpora.encoding import CONTROL_STRINGS, Encoder, num_cores
from tasks.corpora.inputs import OVERLAPS
from tasks.corpora.preparation import Begun, Documents, Preparation
from tasks.corpora.reasoning import write_evaluation
from tasks.corpora.sources import Source, is_conversation
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
    "held_out": "give it more documents, raise held_out, or give held_out_path",
}
ADVICE_FOR_TEXTS = {CONTROL_STRINGS: ", or give the messages themselves to kind: conversations"}
NAMES = {"train": "training", "held_out": "held-out"}  # of the splits, in messages
FEWEST_FOR_A_WARNING, LARGEST_SHARE = 100, 0.01  # of documents that hold special tokens as text
ADVICE = {
    CONTROL_STRINGS: "if they are meant as special tokens, set special_tokens: parse",
    OVERLAPS: "remove them from the training files, or held-out losses are too good",
    LOST_THINKING: "set chat_template to a template that keeps reasoning_content, to train on it",
    LOST_MESSAGES: "look at the chat template, or set another one",
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
    chats = {name for name, source in settings.prepare_data.parsed_sources().items() if is_conversation(source)}
    print_summary(manifest, OUT, {name: lengths.contexts(settings, name) for name in manifest.sources}, chats)


def print_summary(
    manifest: Manifest, directory: Path, contexts: Mapping[str, Mapping[str, int]], chats: Container[str] = ()
) -> None:
    """Print for each source its documents, tokens and skipped rows, and what each stage's sequences lose of them.

    `contexts`: source → stage → sequence_length. `chats`: the sources that hold conversations.
    """
    for name, source in manifest.sources.items():
        sizes = ", ".join(_size(entry, split) for split, entry in source.splits.items())
        skipped = ", ".join(f"{number:,} {reason}" for reason, number in source.skipped_rows.items())
        print(f"{name}: {sizes}" + (f"; skipped rows: {skipped}" if skipped else ""))
        for note, number in source.notes.items():
            print(f"  {number:,} {note}{_advice(note, name in chats)}")
        for stage, length in contexts.get(name, {}).items():
            split = lengths.split_of(stage)
            offsets = np.load(directory / source.splits[split].offsets, mmap_mode="r")
            found = lengths.fit(offsets, length, source.too_long)
            if found.lost_share:
                print(
                    f"  {stage}: {found.num_too_long:,} {NAMES[split]} documents are longer than {length:,} tokens "
                    f"(too_long: {source.too_long}); {found.lost_share:.1%} of the {NAMES[split]} tokens are lost"
                )


def _advice(note: str, is_chat: bool) -> str:
    """What the user can do about a note."""
    return f": {ADVICE[note]}{'' if is_chat else ADVICE_FOR_TEXTS.get(note, '')}" if note in ADVICE else ""


def _size(entry: Split, split: str) -> str:
    trained = "" if entry.num_trained is None else f" ({entry.num_trained:,} trained)"
    return f"{entry.num_documents:,} documents and {entry.num_tokens:,} tokens{trained} {split}"


def prepare(
    section: PrepareData,
    tokenizer_source: str | Path | None,
    out_dir: str | Path,
    seed: int,
    threads: int | None = None,
    work: Path | None = None,
) -> Manifest:
    """Write the data directory `out_dir`: token files (see elastic_core.data.token_files), `tokenizer/` and `lm_eval/`.

    - `tokenizer_source`: the directory, URL, name on the hub or package of the tokenizer. None: train one on the
      training splits.
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
    encoders = {
        name: _encoder(name, source, tokenizer, manifest, threads or num_cores()) for name, source in sources.items()
    }
    for name, source in sources.items():
        if name not in progress.finished:
            progress = _tokenise_source(name, source, encoders[name], manifest.dtype, progress, seed)
        manifest.sources[name] = progress.finished[name]
    return manifest


def _encoder(
    name: str, source: Source, tokenizer: PreTrainedTokenizerFast, manifest: Manifest, threads: int
) -> Encoder | ConversationEncoder:
    """The encoder of a source. Raises UserError for a chat template that cannot be used."""
    parse = getattr(source, "special_tokens", "text") == "parse"
    if not is_conversation(source):
        return Encoder(tokenizer, manifest, threads, parse)
    if source.is_generated and not tokenizer.chat_template:
        raise UserError(
            f"prepare_data.sources.{name}: kind {source.kind} needs a chat template, and the tokenizer has none; add "
            "chat_template.jinja to the parent's directory, or use other sources"
        )
    called = f"{source.chat_template or 'the chat template'} (of prepare_data.sources.{name})"
    options = (read_template(source.chat_template), source.template_variables, source.train_on, parse, called)
    template = ChatTemplate(tokenizer, *options)
    return ConversationEncoder(tokenizer, manifest, threads, template, _is_masked(source))


def _is_masked(source: Source) -> bool:
    return is_conversation(source) and source.train_on != "all"


def _tokenise_source(
    name: str,
    source: Source,
    encoder: Encoder | ConversationEncoder,
    dtype: np.dtype,
    progress: Preparation,
    seed: int,
) -> Preparation:
    """Write the token files of one source, or what an earlier call has not written of them."""
    begun, masked = progress.begun.get(name, Begun()), _is_masked(source)
    writers = {
        split: SplitWriter(progress.directory, name, split, dtype, begun.written.get(split), masked) for split in SPLITS
    }
    encoder.skipped.update(begun.skipped)
    encoder.notes.update(begun.notes)
    skipped, notes = Counter(), Counter()  # sources begin at the first document again, so that these count all rows
    documents = Documents(corpora.documents(source, seed, skipped, notes), begun.num_documents)
    warned = False
    with progress_bar(name, source.expected_characters(), "char", scaled=True) as bar:
        bar.update(begun.num_characters)
        while not documents.ended:
            for batch in encoder.encoded(documents.next_part()):
                writers[batch.split].append(batch.documents, batch.num_bytes, batch.trained)
                bar.update(batch.num_characters)
                warned = warned or _warn(name, source, encoder.notes[CONTROL_STRINGS], documents.number)
            written = {split: writer.flush() for split, writer in writers.items()}
            counted = dict(encoder.skipped), dict(encoder.notes)
            progress = progress.with_begun(name, Begun(documents.number, bar.n, written, *counted))
    splits = {split: writer.close() for split, writer in writers.items()}
    skipped, notes = +(skipped + encoder.skipped), +(notes + encoder.notes)
    for split, entry in splits.items():
        if entry.num_documents == 0:
            left_out = "".join(f"; {number:,} rows were skipped: {reason}" for reason, number in skipped.items())
            raise UserError(
                f"prepare_data.sources.{name}: got no document in {split}; {ADVICE_IF_EMPTY[split]}{left_out}"
            )
    return progress.with_finished(name, SourceEntry(source.too_long, splits, dict(skipped), dict(notes)))


def _warn(name: str, source: Source, number: int, num_documents: int) -> bool:
    """Say early that many documents have special tokens as text. Returns whether it was said."""
    if num_documents < FEWEST_FOR_A_WARNING or number <= LARGEST_SHARE * num_documents:
        return False
    print(
        f"{name}: {number:,} of the first {num_documents:,} are {CONTROL_STRINGS}"
        f"{_advice(CONTROL_STRINGS, is_conversation(source))}",
        flush=True,
    )
    return True
