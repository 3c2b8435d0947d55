"""The tokenizer that is trained on the corpus, and its chat template."""

import pytest
from transformers import AutoTokenizer

from tasks.corpora.tokenizer import CHAT_TOKENS, END_OF_TEXT, train_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "reasoning_content": "2 and 2.", "content": "4"},
    {"role": "tool", "content": "ok"},
    {"role": "assistant", "content": "Done: ß."},
]
RENDERED = (
    "<|endoftext|><|system|>Be short.<|end_of_turn|><|user|>2 + 2?<|end_of_turn|>"
    "<|assistant|><think>2 and 2.</think>4<|end_of_turn|><|tool|>ok<|end_of_turn|>"
    "<|assistant|>Done: ß.<|end_of_turn|>"
)


class Words:
    is_generated = False

    def texts(self, seed):
        yield "train", "ordinary words and numbers, 12 of them. " * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """As it is read again from its files."""
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer({"words": Words()}, 300, 10_000, 0, progress=lambda number: None).save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


def test_the_chat_template_renders_roles_turns_and_thinking(tokenizer):
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == RENDERED
    prompt = tokenizer.apply_chat_template(MESSAGES[:2], tokenize=False, add_generation_prompt=True)
    assert RENDERED.startswith(prompt) and prompt.endswith("<|assistant|>")


def test_control_tokens_are_one_token_each_and_count_in_the_size(tokenizer):
    assert len(tokenizer) <= 300
    assert set(CHAT_TOKENS) <= set(tokenizer.all_special_tokens)
    ids = tokenizer.apply_chat_template(MESSAGES)["input_ids"]
    for token in (END_OF_TEXT, *CHAT_TOKENS):
        assert ids.count(tokenizer.convert_tokens_to_ids(token)) == RENDERED.count(token)
    assert tokenizer.decode(ids) == RENDERED


def test_the_chat_template_marks_the_assistants_tokens(tokenizer):
    found = tokenizer.apply_chat_template(MESSAGES, return_assistant_tokens_mask=True, return_dict=True)
    trained = [token for token, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
    expected = "<think>2 and 2.</think>4<|end_of_turn|>Done: ß.<|end_of_turn|>"
    assert tokenizer.decode(trained) == expected


def test_an_unknown_role_is_refused(tokenizer):
    with pytest.raises(Exception, match="unknown role 'critic'; allowed: system, user, assistant, tool"):
        tokenizer.apply_chat_template([{"role": "critic", "content": "x"}], tokenize=False)
