"""Items, a tokenizer and lm-eval tasks about single letters."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ITEMS = [
    {"question": "abcd", "choices": ["a", "bcd", "ccccc"], "label": 0},
    {"question": "dd", "choices": ["ab", "b", "dddd"], "label": 1},
    {"question": "caba", "choices": ["abc", "cc", "d"], "label": 2},
    {"question": "a", "choices": ["d", "aaaa", "bb"], "label": 1},
]
CHOICE = {
    "task": "letters",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "items/test.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "target_delimiter": "",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
LAST = CHOICE | {
    "task": "last",
    "output_type": "loglikelihood",
    "doc_to_target": "{{choices[label]}}",
    "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
}
del LAST["doc_to_choice"]


def write_letters(directory: Path) -> None:
    """The tokenizer in data/tokenizer, the items in root/items, and an empty directory `files` for task files."""
    for name in ("data/tokenizer", "root/items", "files"):
        (directory / name).mkdir(parents=True)
    letters = models.WordLevel({letter: i for i, letter in enumerate(["<end>", *"abcd"])}, unk_token="<end>")
    tokenizer = Tokenizer(letters)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.save_pretrained(directory / "data/tokenizer")
    (directory / "root/items/test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
