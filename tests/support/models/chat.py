"""A tokenizer with a chat template, and a model that answers every prompt with the same tokens."""

import json
import string
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from elastic_core import Submodel
from elastic_core.export import elastic_checkpoint
from elastic_core.model import hf
from elastic_core.search.selection import Member

END, PAD, THINK, THOUGHT = "<end>", "<pad>", "<think>", "</think>"
CHATML = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"""
LLAMA3 = """\
{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant\
<|end_header_id|>

{% endif %}"""
CONTROL = (
    *(END, PAD, THINK, THOUGHT, "<|im_start|>", "<|im_end|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)


def chat_tokenizer(template: str | dict | None = CHATML, starts_with_end: bool = False) -> PreTrainedTokenizerFast:
    """One token per character, and control tokens. `starts_with_end`: it puts END before a text on its own."""
    vocabulary = {token: i for i, token in enumerate([*CONTROL, *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    if starts_with_end:
        tokenizer.post_processor = processors.TemplateProcessing(f"{END} $A", special_tokens=[(END, vocabulary[END])])
    control = {"bos_token": END, "eos_token": END, "pad_token": PAD, "additional_special_tokens": list(CONTROL[2:])}
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **control)
    found.chat_template = template
    return found


def reciter(tokenizer, answer: str, eos_token_id=None) -> LlamaForCausalLM:
    r"""A Llama that continues any text that ends with "\n" with `answer`, whose tokens all differ.

    After the last token of the answer it repeats "x" for ever. Its layers add nothing to the residual stream, which is
    one-hot: the head maps every token to the one after it.
    """
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size, hidden_size=size + size % 2, num_hidden_layers=2, num_attention_heads=2, head_dim=4,
        intermediate_size=8, tie_word_embeddings=False, max_position_embeddings=256, bos_token_id=0,
        eos_token_id=eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    x = tokenizer.convert_tokens_to_ids("x")
    after = dict.fromkeys(range(size), x)
    ids = tokenizer("\n" + answer, add_special_tokens=False)["input_ids"]
    assert len(set(ids)) == len(ids)
    after |= dict(pairwise(ids))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size, config.hidden_size))
        model.lm_head.weight.zero_()
        for token, follower in after.items():
            model.lm_head.weight[follower, token] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def write_family(directory: Path, answer: str, template: str | dict | None = CHATML, **options) -> None:
    """A family of `reciter`, with budgets full and small, and the generation_config.json that transformers writes."""
    tokenizer = chat_tokenizer(template)
    reciter(tokenizer, answer, **options).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    config = hf.read_config(directory)
    small = Submodel(kept_layers=(1,), intermediate_size=4)
    members = {"full": Member(1.0, Submodel().resolve(config)), "small": Member(0.9, small.resolve(config))}
    elastic_checkpoint.write(directory, config, members, [])


def write_lm_eval_task(directory: Path, **changes) -> dict:
    """A task `numbers` in files/numbers.yaml, with two items in root/numbers.jsonl. The right answer is 42."""
    for name in ("files", "root"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    rows = [{"question": "six times seven", "answer": "42"}, {"question": "one and one", "answer": "2"}]
    (directory / "root/numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": "numbers",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": "numbers.jsonl", "test": "numbers.jsonl"}},
        "training_split": "train",
        "fewshot_split": "train",
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["Question:"], "do_sample": False, "max_gen_toks": 16},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    } | changes
