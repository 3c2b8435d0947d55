"""The tokenizer that is trained on the corpus, and which token starts a document."""

from collections.abc import Callable, Iterator, Mapping

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tasks.corpora.sources import Source

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"


def train_tokenizer(
    sources: Mapping[str, Source], vocab_size: int, num_characters: int, seed: int, progress: Callable[[int], object]
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single digits, trained on the training splits; any text survives a round trip.

    `progress` is called with the number of characters of each text that was taken in.

    One token ends a document, starts the next and serves as bos. The tokenizer puts it before a text by itself, so that
    lm-eval presents a prompt as training presents a document. Padding has a token of its own.
    """
    # Generated reasoning is one token per character by design, so there is nothing to merge in it.
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


def document_start(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The token that `tokenizer` puts before a text by itself; None where it puts none."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    return ids[0] if len(ids) > len(plain) and ids[0] != plain[0] else None


def _training_sample(sources: Mapping[str, Source], characters_each: int, seed: int) -> Iterator[str]:
    for source in sources.values():
        left = characters_each
        for split, text in source.texts(seed):
            if split == "train":
                yield text[:left]
                left -= len(text)
            if left <= 0:
                break


def _counted(texts: Iterator[str], progress: Callable[[int], object]) -> Iterator[str]:
    for text in texts:
        progress(len(text))
        yield text
