"""Generated reasoning: right by independent arithmetic, split by prompt, cheap in tokens, and tested as trained."""

import json
import re
import shutil
from itertools import islice, pairwise

import pytest
import yaml
from transformers import AutoTokenizer

from elastic_core import config
from elastic_core.config import ConfigError
from elastic_core.data.loader import TokenData
from tasks.corpora.reasoning import Chains, Evaluation, Recall, write_evaluation
from tasks.corpora.tokenizer import ASSISTANT, END_OF_TEXT, END_OF_TURN, USER
from tasks.evaluation import lm_eval_tasks
from tasks.prepare_data import PrepareData, prepare
from tasks.settings.sections import Benchmarks
from tests.support.models.tiny_reasoner import tiny_model

CHAINS = Chains(documents=4000, max_steps=8, direct_share=0.2)
RECALL = Recall(documents=2000, max_pairs=12)
SMALL = Evaluation(chains=(3, 6), chains_direct=(6,), recall=(8,), items=60)


@pytest.fixture(scope="module")
def data_directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("reasoning") / "data"
    sources = {
        "prose": {"kind": "bible", "max_characters": 60_000},
        "chains": {"kind": "chains", "documents": 4000, "max_steps": 8, "direct_share": 0.2},
        "recall": {"kind": "recall", "documents": 2000, "max_pairs": 12},
    }
    evaluation = {"chains": [3, 6], "chains_direct": [6], "recall": [8], "items": 60}
    section = config.load(PrepareData, {"sources": sources, "evaluation": evaluation}, "test")
    prepare(section, None, out, seed=0)
    return out


def read_items(directory, task):
    return [json.loads(line) for line in (directory / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]


def turns(source, seed):
    """(split, requests, answers) of every conversation; of a chain, there is one of each."""
    for split, one in source.conversations(seed):
        assert [message["role"] for message in one.messages] == ["user", "assistant"] * (len(one.messages) // 2)
        assert one.is_target == [message["role"] == "assistant" for message in one.messages]
        texts = [message["content"] for message in one.messages]
        yield split, texts[::2], texts[1::2]


def test_every_worked_step_is_right():
    for _, (request,), (text,) in turns(CHAINS, seed=1):
        expression = request.removesuffix("#")
        answer = eval(expression) % 10  # Python's own arithmetic, all at once
        if request != expression:
            assert text == str(answer)
            continue
        assert text[-2:] == f"#{answer}"
        digits, value = re.findall(r"[+-]\d", expression), expression[0]
        steps = text[:-2].split(";")
        assert len(steps) == len(digits)
        for step, operation in zip(steps, digits, strict=True):
            left, result = step.split("=")
            assert left == value + operation and (eval(left) - int(result)) % 10 == 0
            value = result


def test_recall_answers_are_in_the_pairs():
    for _, (first, *others), answers in turns(RECALL, seed=1):
        pairs, query = first.split("?")
        known = dict(zip(pairs[::2], pairs[1::2], strict=True))
        assert 2 <= len(known) == len(pairs) // 2 <= 12
        asked = dict(zip([query, *others], answers, strict=True))
        assert len(asked) == len(answers) == min(len(known), 8)
        assert asked.items() <= known.items()


@pytest.mark.parametrize("source", [CHAINS, RECALL], ids=["chains", "recall"])
def test_the_seed_decides_the_documents(source):
    first = list(turns(source, seed=1))
    assert first == list(turns(source, seed=1)) and first != list(turns(source, seed=2))
    assert len(first) == source.documents


def test_formats_and_lengths_come_in_their_shares():
    weights = (0, 0, 3, 1)
    source = Chains(documents=4000, max_steps=4, step_weights=weights, direct_share=0.25)
    found = [request for _, (request,), _ in turns(source, 0)]
    direct = [text for text in found if text.endswith("#")]
    assert 0.22 < len(direct) / len(found) < 0.28
    steps = [len(re.match(r"[\d+-]+", text).group()) // 2 for text in found]
    assert set(steps) == {3, 4} and 0.72 < steps.count(3) / len(steps) < 0.78


@pytest.mark.parametrize("seed", [0, 1])
def test_no_held_out_prompt_is_ever_trained_on(tmp_path, seed):
    write_evaluation(tmp_path / "lm_eval", SMALL, seed=7)
    splits = {"train": set(), "held_out": set()}
    for source in (CHAINS, RECALL):
        for split, (request, *_), _ in turns(source, seed):
            splits[split].add(re.split("[#?]", request)[0])
    assert not splits["train"] & splits["held_out"]
    assert all(re.fullmatch(r"\d([+-]\d){3,}", p) for p in splits["held_out"] if not p[0].isalpha())
    assert 0.03 < len(splits["held_out"]) / len(splits["train"]) < 0.07
    for task in ("chains_3", "chains_6", "chains_direct_6", "recall_8"):
        prompts = {re.split("[#?]", item["prompt"])[0] for item in read_items(tmp_path / "lm_eval", task)}
        assert len(prompts) == 60 and not prompts & splits["train"]


def test_conversations_cost_one_token_per_character(data_directory):
    tokenizer = AutoTokenizer.from_pretrained(data_directory / "tokenizer")
    for source in (CHAINS, RECALL):
        for _, requests, answers in islice(turns(source, seed=3), 300):
            assert all(tokenizer.tokenize(text) == list(text) for text in requests + answers)
    data = TokenData(data_directory)
    for name, source in (("chains", CHAINS), ("recall", RECALL)):
        for split in ("train", "held_out"):
            entry, found = data.manifest.sources[name].splits[split], [t for t in turns(source, 0) if t[0] == split]
            assert entry.num_documents == len(found)
            # A token of bos, and of each turn one of its role and one of its end; answers and their ends are trained.
            expected = sum(1 + sum(len(text) + 2 for text in requests + answers) for _, requests, answers in found)
            assert entry.num_tokens == expected
            assert entry.num_trained == sum(len(answer) + 1 for _, _, answers in found for answer in answers)


def test_training_and_lm_eval_show_a_prompt_alike(data_directory):
    """The ids of a prompt are the start of a training document, and the trained tokens come after it."""
    data = TokenData(data_directory)
    tokenizer = AutoTokenizer.from_pretrained(data_directory / "tokenizer")
    options = Benchmarks(("none",), apply_chat_template=True)
    model = lm_eval_tasks.Model(options, tiny_model(tokenizer), tokenizer)
    for name in ("chains", "recall"):
        tokens, offsets, trained = (read(name, "train") for read in (data.tokens, data.offsets, data.trained))
        for start, end in islice(pairwise(offsets.tolist()), 40):
            request = tokenizer.decode(tokens[start:end]).split(USER)[1].split(END_OF_TURN)[0]
            prompt = model.apply_chat_template([{"role": "user", "content": request}])
            shown = model.tok_batch_encode([prompt])[0][0].tolist()
            assert shown == tokens[start : start + len(shown)].tolist()
            answer = tokens[start + len(shown) : end].tolist()
            answer = answer[: answer.index(tokenizer.convert_tokens_to_ids(END_OF_TURN)) + 1]
            mask = trained[start : start + len(shown) + len(answer)].tolist()
            assert mask == [False] * len(shown) + [True] * len(answer)


def run_tasks(directory, model):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(directory / "lm_eval"), include_defaults=False)
    tasks = sorted(manager.all_tasks)
    options = {"apply_chat_template": True, "bootstrap_iters": 0, "log_samples": True}
    results = simple_evaluate(model=model, tasks=tasks, task_manager=manager, **options)
    return tasks, results


def test_the_tasks_run_and_stop_early_and_follow_their_files(data_directory, tmp_path, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    tokenizer = AutoTokenizer.from_pretrained(data_directory / "tokenizer")
    model, calls = tiny_model(tokenizer), []

    def end_at_once(module, inputs, output):
        calls.append(output.logits.shape)
        output.logits[..., tokenizer.eos_token_id] = 1e4

    model.register_forward_hook(end_at_once)
    moved = tmp_path / "moved"
    data_directory.rename(moved)
    try:
        tasks, results = run_tasks(moved, HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=60))
        assert tasks == ["chains_3", "chains_6", "chains_direct_6", "recall_8"]
        assert len(calls) == len(tasks)  # one token for each batch, whatever max_gen_toks allows
        for task in tasks:
            assert results["results"][task]["exact_match,answer"] == 0
            assert results["configs"][task]["metadata"]["chance"] == 0.1
            shown = [sample["arguments"][0][0] for sample in results["samples"][task]]
            start, end = f"{END_OF_TEXT}{USER}", f"{END_OF_TURN}{ASSISTANT}"
            assert shown == [start + item["prompt"] + end for item in read_items(moved / "lm_eval", task)]
    finally:
        moved.rename(data_directory)


def test_right_answers_count_and_new_items_are_noticed(tmp_path):
    from lm_eval.api.model import LM

    class Oracle(LM):
        """Answers in the format of training, with one recall item in ten wrong."""

        def generate_until(self, requests):
            return [self.answer(i, request.args[0]) for i, request in enumerate(requests)]

        def answer(self, i, prompt):
            if prompt[0].isalpha():
                value = prompt[prompt.index(prompt[-1]) + 1]
                return value if i % 10 else str((int(value) + 1) % 10)
            if prompt[-1] == "#":
                return str(eval(prompt[:-1]) % 10)
            return f"0+0=0;{prompt[:3]}=5#{eval(prompt) % 10}"

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return chat_history[-1]["content"]

        tokenizer_name = "none"

        def chat_template(self, name):
            return ""

        def loglikelihood(self, requests):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    prompts = []
    for seed in (1, 2):  # the second time over the first
        shutil.rmtree(tmp_path / "lm_eval", ignore_errors=True)
        write_evaluation(tmp_path / "lm_eval", SMALL, seed)
        tasks, results = run_tasks(tmp_path, Oracle())
        scores = {task: float(results["results"][task]["exact_match,answer"]) for task in tasks}
        assert scores == {"chains_3": 1, "chains_6": 1, "chains_direct_6": 1, "recall_8": 0.9}
        prompts.append([sample["doc"]["prompt"] for sample in results["samples"]["chains_6"]])
        assert prompts[-1] == [item["prompt"] for item in read_items(tmp_path / "lm_eval", "chains_6")]
    assert prompts[0] != prompts[1]


def test_chance_in_context_is_that_of_the_commonest_value(tmp_path):
    write_evaluation(tmp_path / "lm_eval", Evaluation(chains=(), chains_direct=(), recall=(2, 40), items=400), seed=0)
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda loader, node: node.value)
    chances = []
    for task in ("recall_2", "recall_40"):
        text = (tmp_path / "lm_eval" / f"{task}.yaml").read_text(encoding="utf-8")
        chances.append(yaml.load(text, Loader=loader)["metadata"]["chance_in_context"])
    assert 0.45 < chances[0] < 0.65  # one of two values, or both alike in one case of ten
    assert 0.1 < chances[1] < 0.3


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "chains", "max_steps": 0}, "max_steps: got 0"),
        ({"kind": "chains", "direct_share": 1.0}, "direct_share: got 1.0"),
        ({"kind": "chains", "max_steps": 3, "step_weights": [1.0, 1.0]}, "step_weights: .*3 numbers"),
        ({"kind": "recall", "max_pairs": 53}, "max_pairs: got 53; allowed: 2 to 52"),
        ({"kind": "recall", "documents": 0}, "documents: got 0"),
    ],
)
def test_settings_that_cannot_be_met_are_named(section, message):
    with pytest.raises(ConfigError, match=r"params\.sources\.x\." + message):
        config.load(PrepareData, {"sources": {"x": section}}, "params")


@pytest.mark.parametrize("values", [{"chains": [2]}, {"chains_direct": [1]}, {"recall": [60]}, {"items": 0}])
def test_evaluations_that_would_mislead_are_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        config.load(Evaluation, values, "params.evaluation")
