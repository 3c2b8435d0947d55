"""Stage `prepare_data`: turn text sources into token files, and write the tokenizer and the evaluation tasks."""

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from elastic_core.data.loader import vocabulary_sha256
from elastic_core.data.token_files import SPLITS, Manifest, SplitWriter
from elastic_core.data.token_files import Source as SourceEntry
from elastic_core.errors import UserError
from elastic_core.io.atomic import whole_directory
from tasks.corpora.encoding import Encoder, num_cores
from tasks.corpora.reasoning import write_evaluation
from tasks.corpora.sources import Source
from tasks.corpora.tokenizer import document_start, train_tokenizer
from tasks.parents.tokenizer import load_tokenizer
from tasks.progress.bars import progress_bar
from tasks.runtime.preflight import check_family
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
    manifest = prepare(settings.prepare_data, settings.parent.path, OUT, settings.seed)
    for name, source in manifest.sources.items():
        sizes = ", ".join(f"{entry.num_tokens:,} {split}" for split, entry in source.splits.items())
        print(f"{name}: {sizes} tokens")


def prepare(
    section: PrepareData,
    tokenizer_source: str | Path | None,
    out_dir: str | Path,
    seed: int,
    threads: int | None = None,
) -> Manifest:
    """Write the data directory `out_dir`: token files (see elastic_core.data.token_files), `tokenizer/` and `lm_eval/`.

    - `tokenizer_source`: the directory, URL or package of the tokenizer. None: train one on the training splits.
    - `threads`: the number of threads that encode text (None: one per core). It does not change the files.

    `out_dir` appears when it is complete, and replaces an existing one. Raises UserError for a source, file or
    tokenizer that cannot be used.
    """
    with whole_directory(out_dir, marker="manifest.json") as partial:
        sources = section.parsed_sources()
        if tokenizer_source is None:
            characters = section.tokenizer_characters
            with progress_bar("tokenizer", characters, "char", scaled=True) as bar:
                tokenizer = train_tokenizer(sources, section.vocab_size, characters, seed, bar.update)
        else:
            tokenizer = load_tokenizer(tokenizer_source)
        tokenizer.save_pretrained(partial / "tokenizer")
        manifest = _tokenise(sources, tokenizer, partial, seed, threads)
        write_evaluation(partial / "lm_eval", section.evaluation, seed)
        manifest.write(partial)
    return manifest


def _tokenise(
    sources: Mapping[str, Source], tokenizer: PreTrainedTokenizerFast, directory: Path, seed: int, threads: int | None
) -> Manifest:
    """Write the token files of all sources, and return the manifest that describes them."""
    manifest = Manifest(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=document_start(tokenizer),
        tokenizer_sha256=vocabulary_sha256(tokenizer),
        sources={},
    )
    encoder = Encoder(tokenizer, manifest, threads or num_cores())
    for name, source in sources.items():
        writers = {split: SplitWriter(directory, name, split, manifest.dtype) for split in SPLITS}
        with progress_bar(name, source.expected_characters(), "char", scaled=True) as bar:
            for batch in encoder.encoded(source.texts(seed)):
                writers[batch.split].append(batch.documents, batch.num_bytes)
                bar.update(batch.num_characters)
        splits = {split: writer.close() for split, writer in writers.items()}
        for split, entry in splits.items():
            if entry.num_documents == 0:
                raise UserError(f"prepare_data.sources.{name}: got no document in {split}; {ADVICE_IF_EMPTY[split]}")
        manifest.sources[name] = SourceEntry(source.whole_documents, splits)
    return manifest
