"""Trains a tokenizer on the corpus, and finds the token that starts a document."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tasks.corpora.sources import Source

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
# Of chat_template.jinja. The first four start the turn of a role, and the last one ends every turn.
USER, ASSISTANT, SYSTEM, TOOL, END_OF_TURN = "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end_of_turn|>"
CHAT_TOKENS = (USER, ASSISTANT, SYSTEM, TOOL, END_OF_TURN)
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def train_tokenizer(
    sources: Mapping[str, Source], vocab_size: int, num_characters: int, seed: int, progress: Callable[[int], object]
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that splits digits, on the training splits. It encodes every text without loss.

    sources: name → source.
    vocab_size: the most tokens, special tokens included.
    num_characters: how much text to train on, divided equally among the sources.
    progress: is called with the number of characters of each text that was read.

    The tokenizer has one token that ends a document, starts the next and serves as bos, and another token for padding.
    It puts bos before a text on its own. So lm-eval presents a prompt exactly as training presents a document. The
    tokens of roles and turns belong to its chat template, chat_template.jinja.
    """
    # Generated reasoning has one token per character by design. BPE has nothing to merge there.
    texts = {name: source for name, source in sources.items() if not source.is_generated} or sources
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD, *CHAT_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = _training_sample(texts, num_characters // len(texts) or 1, seed)
    tokenizer.train_from_iterator(_with_progress(sample, progress), trainer)
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A $B", special_tokens=[(END_OF_TEXT, end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        extra_special_tokens=list(CHAT_TOKENS),
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
        clean_up_tokenization_spaces=False,
    )


def document_start(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The token that `tokenizer` puts before a text on its own; None if it puts none."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    return ids[0] if len(ids) > len(plain) and ids[0] != plain[0] else None


def _training_sample(sources: Mapping[str, Source], characters_each: int, seed: int) -> Iterator[str]:
    """The first `characters_each` characters of the training split of each source."""
    for source in sources.values():
        left = characters_each
        for split, text in source.texts(seed):
            if split == "train":
                yield text[:left]
                left -= len(text)
            if left <= 0:
                break


def _with_progress(texts: Iterator[str], progress: Callable[[int], object]) -> Iterator[str]:
    for text in texts:
        progress(len(text))
        yield text
