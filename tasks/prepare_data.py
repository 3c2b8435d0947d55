"""Stage `prepare_data`: corpora and generated reasoning in; a tokenizer, token files and test tasks out."""

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from elastic_core import config as configuration
from elastic_core.config import ConfigError, require
from elastic_core.data.loader import vocabulary_sha256
from elastic_core.data.token_files import SPLITS, Manifest, Source, SplitWriter
from elastic_core.io import storage
from elastic_core.model import hf
from tasks.corpora.encoding import Encoder, num_cores
from tasks.corpora.reasoning import Chains, Evaluation, Recall, write_evaluation
from tasks.corpora.text_sources import Bible, Files, Sympy
from tasks.parents import gguf
from tasks.runtime.exit_status import errors_as_text

KINDS = {"bible": Bible, "sympy": Sympy, "files": Files, "chains": Chains, "recall": Recall}
END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
_SMALLEST_VOCABULARY = 256 + 2  # every byte, and the two special tokens
_IF_EMPTY = {
    "train": "give it more documents, or lower held_out",
    "held_out": "give it more documents, or raise held_out",
}


@dataclass(frozen=True)
class PrepareData:
    """Section `prepare_data` of params.yaml."""

    sources: dict[str, Any]  # name → section of one kind; the other keys are the fields of KINDS[kind]
    vocab_size: int = 1024  # at most; of the tokenizer trained here, unused with a parent's own
    tokenizer_characters: int = 4_000_000  # how much training text the tokenizer sees, over all sources
    evaluation: Evaluation = field(default_factory=Evaluation)

    def check(self) -> None:
        require(
            self.vocab_size >= _SMALLEST_VOCABULARY, "vocab_size", self.vocab_size, f"{_SMALLEST_VOCABULARY} or more"
        )
        require(self.tokenizer_characters > 0, "tokenizer_characters", self.tokenizer_characters, "1 or more")
        require(len(self.sources) > 0, "sources", self.sources, "one source or more")
        for name in self.sources:
            fits = re.fullmatch(r"\w[\w-]*", name)
            require(fits is not None, "sources", name, "names of letters, digits, _ and -: files are named after them")
        self.parsed_sources()

    def parsed_sources(self) -> dict[str, Bible | Sympy | Files | Chains | Recall]:
        """The sources as the dataclasses of their kinds."""
        return {name: _parse_source(values, f"sources.{name}") for name, values in self.sources.items()}


def prepare(
    config: PrepareData, tokenizer_source: str | Path | None, out_dir: str | Path, seed: int, threads: int | None = None
) -> Manifest:
    """Write the data directory `out_dir` (see elastic_core.data.token_files) with `tokenizer/` and `lm_eval/` in it.

    `tokenizer_source` is the directory (or URL) of a tokenizer to use, or None to train one on the training splits.
    Text is encoded by `threads` threads (None: one per core), whose number changes nothing in the files.
    All is written beside and renamed at the end, so `out_dir` is complete or not there; what it held before is
    replaced.
    Raises ValueError that names the source, file or tokenizer that cannot be used.
    """
    out_dir = Path(out_dir)
    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    sources = config.parsed_sources()
    if tokenizer_source is None:
        tokenizer = train_tokenizer(sources, config.vocab_size, config.tokenizer_characters, seed)
    else:
        tokenizer = load_tokenizer(tokenizer_source)
    tokenizer.save_pretrained(partial / "tokenizer")
    manifest = _tokenise(sources, tokenizer, partial, seed, threads)
    write_evaluation(partial / "lm_eval", config.evaluation, seed)
    manifest.write(partial)
    _replace(partial, out_dir)
    return manifest


def train_tokenizer(sources: dict, vocab_size: int, num_characters: int, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single digits, learnt from the training splits; any text survives a round trip.

    One token ends a document, starts the next and stands for bos; called plainly, the tokenizer puts it in front, so
    that a prompt is presented (by lm-eval, say) as a document is in training. Padding has a token of its own.
    """
    # Generated reasoning is one token per character by design: there is nothing to merge.
    texts = {name: source for name, source in sources.items() if not source.whole_documents} or sources
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with tqdm(desc="tokenizer", total=num_characters, unit="char", unit_scale=True) as progress:
        sample = _training_sample(texts, num_characters // len(texts) or 1, seed)
        tokenizer.train_from_iterator(_counted(sample, progress), trainer)
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A $B", special_tokens=[(END_OF_TEXT, end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a directory or package or behind a URL; ValueError where none is, or it cannot end documents."""
    if gguf.is_package(directory):
        with tempfile.TemporaryDirectory(prefix="elastic-") as written:
            gguf.write_tokenizer(str(directory), Path(written))
            return load_tokenizer(written)
    if not storage.is_url(directory) and not Path(directory).is_dir():
        raise ValueError(
            f"tokenizer {str(directory)!r}: no such directory; parent.path is a model's directory, or null"
        )
    with storage.local_files(directory, ("config.json", *hf.TOKENIZER_FILES)) as local:
        try:
            tokenizer = AutoTokenizer.from_pretrained(local, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer {str(directory)!r}: cannot be loaded ({error})") from None
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {str(directory)!r}: needs a fast tokenizer (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {str(directory)!r}: has no eos token; set eos_token in tokenizer_config.json")
    return tokenizer


def document_start(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The token that `tokenizer` puts before a text by itself; None where it puts none."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    return ids[0] if len(ids) > len(plain) and ids[0] != plain[0] else None


def _parse_source(values, where: str):
    kind = values.get("kind") if isinstance(values, Mapping) else None
    if kind not in KINDS:
        raise ConfigError(f"{where}.kind: got {kind!r}; allowed: {', '.join(KINDS)}")
    return configuration.load(KINDS[kind], values, where)


def _tokenise(
    sources: dict, tokenizer: PreTrainedTokenizerFast, directory: Path, seed: int, threads: int | None
) -> Manifest:
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
        with tqdm(desc=name, total=source.expected_characters(), unit="char", unit_scale=True) as progress:
            for batch in encoder.encoded(source.texts(seed)):
                writers[batch.split].append(batch.documents, batch.num_bytes)
                progress.update(batch.num_characters)
        splits = {split: writer.close() for split, writer in writers.items()}
        for split, entry in splits.items():
            if entry.num_documents == 0:
                raise ValueError(f"prepare_data.sources.{name}: no document fell into {split}; {_IF_EMPTY[split]}")
        manifest.sources[name] = Source(source.whole_documents, splits)
    return manifest


def _training_sample(sources: dict, characters_each: int, seed: int) -> Iterator[str]:
    for source in sources.values():
        left = characters_each
        for split, text in source.texts(seed):
            if split == "train":
                yield text[:left]
                left -= len(text)
            if left <= 0:
                break


def _counted(texts: Iterator[str], progress: tqdm) -> Iterator[str]:
    for text in texts:
        progress.update(len(text))
        yield text


def _replace(partial: Path, out_dir: Path) -> None:
    old = out_dir.with_name(out_dir.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out_dir.exists():
        out_dir.rename(old)
    partial.rename(out_dir)
    shutil.rmtree(old, ignore_errors=True)


@errors_as_text()
def main() -> None:
    from tasks.settings import params, remote_checks

    parameters = params.load()
    remote_checks.check(parameters, "prepare_data", "parent")
    manifest = prepare(parameters.prepare_data, parameters.parent.path, "artifacts/data", parameters.seed)
    for name, source in manifest.sources.items():
        sizes = ", ".join(f"{entry.num_tokens:,} {split}" for split, entry in source.splits.items())
        print(f"{name}: {sizes} tokens")


if __name__ == "__main__":
    main()
