"""Conversations in the evaluation: loss of trained tokens only, samples up to the end of a turn, chat tasks."""

import json
import math

import pytest
import torch

from elastic_core.data.chat_template import prompt_ids, render
from elastic_core.data.loader import TokenData, vocabulary_sha256
from elastic_core.data.token_files import Manifest, Source, SplitWriter
from elastic_core.errors import UserError
from tasks.corpora.reasoning import Evaluation, write_evaluation
from tasks.evaluation.lm_eval_tasks import reasoning_scores
from tasks.evaluation.samples import samples
from tasks.evaluation.text_scores import held_out_scores
from tasks.settings.sections import Evaluate
from tests.support.models.chat import chat_tokenizer, reciter

TURNS = [("hi", "hello"), ("what is six times seven?", "42"), ("a" * 20, "b" * 60)]
TEXTS = ["in the beginning", "god created the heaven and the earth", "and the earth was without form"]


def answer_of(tokenizer, question, answer):
    """(The ids of the prompt, and of the assistant's turn that follows.)"""
    prompt = prompt_ids(tokenizer, [{"role": "user", "content": question}])
    return prompt, tokenizer(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Source `talk` of conversations whose answers are trained, and source `prose`; two test tasks, one a chat."""
    directory, tokenizer = tmp_path_factory.mktemp("data"), chat_tokenizer()
    tokenizer.save_pretrained(directory / "tokenizer")
    manifest = Manifest(len(tokenizer), tokenizer.eos_token_id, None, vocabulary_sha256(tokenizer), {})
    splits = {}
    for split in ("train", "held_out"):
        writer = SplitWriter(directory, "talk", split, manifest.dtype, masked=True)
        for question, answer in TURNS:
            prompt, turn = answer_of(tokenizer, question, answer)
            masks = [False] * len(prompt) + [True] * len(turn)
            writer.append([prompt + turn], num_bytes=len(question + answer), trained=[masks])
        splits["talk", split] = writer.close()
        writer = SplitWriter(directory, "prose", split, manifest.dtype)
        for text in TEXTS:
            writer.append([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]], num_bytes=len(text))
        splits["prose", split] = writer.close()
    for name in ("talk", "prose"):
        manifest.sources[name] = Source("truncate", {split: splits[name, split] for split in ("train", "held_out")})
    manifest.write(directory)
    write_evaluation(directory / "lm_eval", Evaluation((3,), (), (2,), items=8), seed=0)
    file = directory / "lm_eval/chains_3.yaml"
    file.write_text(file.read_text().replace("metadata: {", 'metadata: {"apply_chat_template": true, '))
    return TokenData(directory)


@pytest.fixture(scope="module")
def model():
    return reciter(chat_tokenizer(), "#5<|im_end|>", eos_token_id=[0, 5])


@torch.no_grad()
def nats(model, ids: list[int], first: int) -> float:
    """The cross-entropy of the tokens from number `first` on, of one document by itself."""
    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(logprobs[i - 1, ids[i]].item() for i in range(first, len(ids)))


def test_of_a_conversation_only_trained_tokens_are_scored(data, model):
    tokenizer, turns, length = chat_tokenizer(), [], 48
    for question, answer in TURNS:
        prompt, turn = answer_of(tokenizer, question, answer)
        turns.append(((prompt + turn)[: length + 1], len(prompt)))  # the last one is truncated
    texts = [[*tokenizer(text)["input_ids"], 0] for text in TEXTS]
    talk = sum(nats(model, ids, first) for ids, first in turns)
    talk_tokens = sum(len(ids) - first for ids, first in turns)
    prose, prose_tokens = sum(nats(model, ids, 1) for ids in texts), sum(len(ids) - 1 for ids in texts)
    section = Evaluate(held_out=("talk", "prose"), tasks=(), sequence_length=length, max_tokens=10_000)
    scores = held_out_scores(section, data, model, model)
    assert scores["loss_talk"] == pytest.approx(talk / talk_tokens, rel=1e-5)
    assert (scores["tokens_talk"], scores["tokens_prose"]) == (talk_tokens, prose_tokens)
    assert scores["loss"] == pytest.approx((talk + prose) / (talk_tokens + prose_tokens), rel=1e-5)
    num_bytes = prose_tokens * sum(map(len, TEXTS)) / sum(map(len, texts))
    assert scores["bits_per_byte"] == scores["bits_per_byte_prose"] == pytest.approx(prose / math.log(2) / num_bytes)
    assert "bits_per_byte_talk" not in scores and scores["kl_to_parent"] == 0
    alone = held_out_scores(Evaluate(("talk",), (), sequence_length=length), data, model, None)
    assert alone["loss"] == scores["loss_talk"] and not any(name.startswith("bits") for name in alone)


def test_conversations_without_a_trained_token_are_named(data, model):
    with pytest.raises(UserError, match=r"evaluate\.held_out: talk has no trained token in the first 8 tokens of"):
        held_out_scores(Evaluate(("talk",), (), sequence_length=8), data, model, None)


def test_samples_of_conversations_stop_at_the_end_of_the_turn(data, model):
    talk, prose, chains = samples(Evaluate(("talk", "prose"), ("chains_3",)), data, model)
    tokenizer, first = chat_tokenizer(), json.loads((data.directory / "lm_eval/chains_3.jsonl").open().readline())
    question = [{"role": "user", "content": "hi"}]
    assert talk["prompt"] == render(tokenizer, question, add_generation_prompt=True)
    assert (talk["expected"], talk["continuation"]) == ("hello<|im_end|>", "#5<|im_end|>")
    assert prose["prompt"] == TEXTS[1][:32] and prose["continuation"] == "x" * 40
    question = [{"role": "user", "content": first["prompt"]}]
    assert chains["prompt"] == render(tokenizer, question, add_generation_prompt=True)
    assert (chains["expected"], chains["continuation"]) == (first["answer"], "#5<|im_end|>")


def test_tasks_that_are_conversations_are_scored_with_the_chat_template(data, model):
    """The model answers #5 to every conversation, which is no answer to a recall."""
    scores = reasoning_scores(Evaluate(("talk",), ("chains_3", "recall_2"), limit=8), data, model)
    lines = (data.directory / "lm_eval/chains_3.jsonl").read_text().splitlines()
    right = sum(json.loads(line)["answer"] == "5" for line in lines)
    assert list(scores) == ["chains_3", "recall_2"] and 0 < right < 8
    assert scores["chains_3"]["exact_match"] == right / 8 and scores["recall_2"]["exact_match"] == 0
    assert scores["chains_3"]["items"] == 8 and scores["chains_3"]["chance"] == 0.1
