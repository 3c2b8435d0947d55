"""Benchmarks with a chat template: what the model is shown, where its answers end, and what is scored of them."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import lm_eval.evaluator
import pytest
import torch
import yaml

from elastic_core.config import ConfigError, Problems, load
from elastic_core.data.chat_template import prompt_ids
from elastic_core.errors import UserError
from tasks.evaluation import lm_eval_tasks
from tasks.evaluation.lm_eval_tasks import benchmark_scores, check_benchmark_tasks
from tasks.runtime.chat_templates import check_chat_template
from tasks.settings.local_checks import OF_EVERY_STAGE, check_benchmarks, check_local
from tasks.settings.sections import Benchmarks
from tests.support.models.chat import CHATML, LLAMA3, chat_tokenizer, reciter, write_lm_eval_task
from tests.support.models.letters import CHOICE

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT.parent / "shared/data"
DATA = SimpleNamespace(directory=Path("data"))
THINKING = "<think>9Question:8</think>42<|im_end|>"  # with a stop text inside the thinking


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(write_lm_eval_task(tmp_path))
    return tmp_path


def write(task, template=CHATML, **options):
    """A task file, and the tokenizer with a template."""
    (Path("files") / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    shutil.rmtree("data", ignore_errors=True)
    chat_tokenizer(template, **options).save_pretrained("data/tokenizer")


def section(**values):
    return load(Benchmarks, {"tasks": ["numbers"], "include": "files", "data_root": "root"} | values, "here")


class Recorder:
    """A model that notes the ids that it is asked to continue, and its answers, batch by batch."""

    def __init__(self, model):
        self.model, self.prompts, self.answers = model, [], []

    def __enter__(self):
        self.generate, self.model.generate = self.model.generate, self._generate
        return self

    def __exit__(self, *_):
        self.model.generate = self.generate

    def _generate(self, input_ids, attention_mask=None, **options):
        kept = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
        self.prompts += [ids.tolist() for ids in kept]
        output = self.generate(input_ids=input_ids, attention_mask=attention_mask, **options)
        self.answers.append(output[:, input_ids.shape[1] :].tolist())
        return output


def score(section, answer, template=CHATML, eos=None):
    """(exact match, the prompts in the order of their length, the number of new tokens)."""
    tokenizer = chat_tokenizer(template)
    model = reciter(tokenizer, answer, eos)
    with Recorder(model) as recorder:
        result = benchmark_scores(section, DATA, model)["numbers"]
    return (
        result["value"],
        [tokenizer.decode(ids) for ids in recorder.prompts],
        [len(ids[0]) for ids in recorder.answers],
    )


@pytest.mark.parametrize("starts_with_end", [False, True])
@pytest.mark.parametrize("template", [CHATML, LLAMA3])
def test_prompts_have_exactly_the_ids_of_the_chat_template(here, template, starts_with_end):
    """No bos is added to a template without one, and none is doubled, also where the tokenizer adds bos to a text."""
    write(write_lm_eval_task(here), template, starts_with_end=starts_with_end)
    tokenizer = chat_tokenizer(template)
    model = reciter(tokenizer, "42")
    with Recorder(model) as recorder:
        benchmark_scores(section(apply_chat_template=True, batch_size=2), DATA, model)
    questions = ("six times seven", "one and one")
    expected = [prompt_ids(tokenizer, [{"role": "user", "content": question}]) for question in questions]
    assert sorted(recorder.prompts) == sorted(expected)


def test_an_answer_ends_at_the_models_stop_ids(here):
    value, _, lengths = score(section(apply_chat_template=True, limit=1), "42<|im_end|>", eos=5)
    assert (value, lengths) == (1.0, [3])
    value, _, lengths = score(section(apply_chat_template=True, limit=1), "42<|im_end|>")  # no stop id
    assert (value, lengths) == (0.0, [16])  # up to max_gen_toks of the task


def test_stop_texts_are_added_to_those_of_the_task(here):
    for stop, value in (([], 0.0), (["y"], 1.0), (["Question:"], 0.0)):
        assert score(section(apply_chat_template=True, limit=1, stop=stop), "42yz")[0] == value
    assert score(section(apply_chat_template=True, limit=1, stop=["yz"]), "42Question:")[0] == 1.0
    changed = section(apply_chat_template=True, limit=1, gen_kwargs={"until": ["yz"]})  # in place of the task's
    assert score(changed, "42Question:")[0] == 0.0


def test_settings_of_generation_go_before_those_of_the_task(here):
    _, _, lengths = score(section(apply_chat_template=True, limit=1, gen_kwargs={"max_gen_toks": 7}), "42")
    assert lengths == [7]
    torch.manual_seed(0)
    hot = section(apply_chat_template=True, gen_kwargs={"temperature": 1e6, "max_gen_toks": 2})  # the task is greedy
    assert score(hot, "42<|im_end|>", eos=5)[0] == 0.0
    cold = section(apply_chat_template=True, limit=1, gen_kwargs={"temperature": 0, "max_gen_toks": 3})
    sampled = write_lm_eval_task(here, generation_kwargs={"until": [], "do_sample": True, "temperature": 1e6})
    write(sampled)
    assert score(cold, "42<|im_end|>", eos=5)[0] == 1.0


@pytest.mark.parametrize("end", ["</think>", ")"])  # a special token, and an ordinary text
def test_thinking_is_removed_before_scoring(here, end):
    answer = THINKING if end == "</think>" else "9Question:)42<|im_end|>"
    shown = section(apply_chat_template=True, limit=1, gen_kwargs={"max_gen_toks": 20})
    assert score(shown, answer, eos=5)[0] == 0.0
    removed = section(
        apply_chat_template=True, limit=1, think_end_token=end, enable_thinking=True, gen_kwargs={"max_gen_toks": 20}
    )
    value, prompts, _ = score(removed, answer, eos=5)
    assert value == 1.0 and prompts[0].endswith("assistant\n")
    off = section(apply_chat_template=True, limit=1, enable_thinking=False)
    assert score(off, "42<|im_end|>", eos=5)[1][0].endswith("<think></think>")


def test_system_prompt_and_examples_are_turns(here):
    few = {"apply_chat_template": True, "num_fewshot": 1, "system_instruction": "Be brief."}
    _, (prompt, _), _ = score(section(**few), "42<|im_end|>", eos=5)
    assert [prompt.count(f"<|im_start|>{role}\n") for role in ("system", "user", "assistant")] == [1, 2, 2]
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    _, (prompt, _), _ = score(section(**few, fewshot_as_multiturn=False), "42<|im_end|>", eos=5)
    assert [prompt.count(f"<|im_start|>{role}\n") for role in ("system", "user", "assistant")] == [1, 1, 1]
    _, prompts, _ = score(section(limit=1), "42")
    assert prompts == ["six times seven"]  # without the template


@pytest.mark.parametrize("in_file, given", [(None, None), (None, 1), (0, 1), (1, 0), (1, None)])
def test_results_are_those_of_simple_evaluate(here, monkeypatch, in_file, given):
    """Of prompts, examples and sampled answers; what it says of the machine and the time is not used."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)  # it asks pip
    task = write_lm_eval_task(here, generation_kwargs={"until": [], "do_sample": True, "max_gen_toks": 3})
    examples = [json.dumps({"question": f"{n} and one", "answer": str(n + 1)}) for n in range(40)]
    (here / "root/examples.jsonl").write_text("\n".join(examples))
    task["dataset_kwargs"]["data_files"]["train"] = "examples.jsonl"
    write(task if in_file is None else task | {"num_fewshot": in_file})
    options = {"num_fewshot": given, "system_instruction": "Be brief.", "gen_kwargs": {"temperature": 20.0}}
    tokenizer, asked = chat_tokenizer(), section(apply_chat_template=True, **options)
    model = reciter(tokenizer, "42<|im_end|>", 5)
    with Recorder(model) as ours:
        found = lm_eval_tasks._evaluate(asked, DATA, model, lm_eval_tasks._manager(Path("files")))
    with Recorder(model) as theirs, contextlib.chdir("root"):
        expected = lm_eval.simple_evaluate(
            model=lm_eval_tasks.Model(asked, model, tokenizer),
            tasks=["numbers"],
            task_manager=lm_eval_tasks._manager(here / "files"),
            apply_chat_template=True,
            fewshot_as_multiturn=True,
            bootstrap_iters=lm_eval_tasks.RESAMPLES,
            log_samples=False,
            **options | {"gen_kwargs": {"temperature": 20.0, "do_sample": True}},
        )
    assert ours.prompts == theirs.prompts and ours.answers == theirs.answers
    assert {"results", "configs", "n-samples", "group_subtasks"} <= found.keys()
    assert found == {name: expected[name] for name in found}


def test_sampled_answers_of_a_task_do_not_depend_on_other_tasks(here):
    """So they are the same on any number of workers, each of which has other tasks."""
    sampled = {"until": [], "do_sample": True, "temperature": 20.0, "max_gen_toks": 6}
    for name in ("numbers", "others"):
        write(write_lm_eval_task(here, task=name, generation_kwargs=sampled))
    model = reciter(chat_tokenizer(), "42<|im_end|>", 5)

    def answers(*tasks):
        with Recorder(model) as recorder:
            lm_eval_tasks._evaluate(section(tasks=list(tasks)), DATA, model, lm_eval_tasks._manager(Path("files")))
        return recorder.answers

    together = answers("numbers", "others")
    assert together == answers("numbers") + answers("others")
    assert together[0][0] != together[0][1]  # they are sampled


def test_gsm8k_of_lm_eval_reads_local_data(here):
    """The task file of the documentation: lm-eval's own file, with five examples as turns and two filters."""
    rows = [{"question": f"{i} and {i}?", "answer": f"Add them.\n#### {2 * i}"} for i in range(8)]
    (here / "root/gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "include": f"{lm_eval.__path__[0]}/tasks/gsm8k/gsm8k.yaml",
        **{"task": "gsm8k_here", "tag": None, "dataset_path": "json", "dataset_name": None},
        "dataset_kwargs": {"data_files": {"train": "gsm8k.jsonl", "test": "gsm8k.jsonl"}},
    }
    write(task)
    given = section(tasks=["gsm8k_here"], apply_chat_template=True, limit=4, gen_kwargs={"max_gen_toks": 8})
    check_benchmarks(given, "here")
    check_benchmark_tasks(given, "here")
    tokenizer = chat_tokenizer()
    model = reciter(tokenizer, "so 4.<|im_end|>", 5)
    model.config.max_position_embeddings = 1024
    with Recorder(model) as recorder:
        result = benchmark_scores(given, DATA, model)["gsm8k_here"]
    prompts = [tokenizer.decode(ids) for ids in recorder.prompts]
    assert all(prompt.count("<|im_start|>assistant\n") == 6 for prompt in prompts) and result["items"] == 4
    assert result["all"]["exact_match,flexible-extract"] == 0.25  # of 0, 2, 4 and 6
    assert result["all"]["exact_match,strict-match"] == 0  # there is no ####


@pytest.mark.skipif(not (SHARED / "gsm8k/test.jsonl").is_file(), reason="no ../shared/data beside the checkout")
def test_a_users_task_file_on_local_data(here):
    (here / "files").rename(here / "other")
    given = section(
        tasks=["local_gsm8k"], include=str(SHARED / "lmeval_examples"), data_root=str(ROOT), limit=2,
        apply_chat_template=True,
    )  # fmt: skip
    check_benchmark_tasks(given, "here")
    model = reciter(chat_tokenizer(), "# 1<|im_end|>", 5)
    model.config.max_position_embeddings = 2048
    assert benchmark_scores(given, DATA, model)["local_gsm8k"]["items"] == 2


def test_a_template_is_chosen_by_its_name(here):
    both = {"default": CHATML, "other": LLAMA3}
    write(write_lm_eval_task(here), both)
    for name, begin in ((True, "<|im_start|>"), ("default", "<|im_start|>"), ("other", "<end><|start_header_id|>")):
        given = section(apply_chat_template=name, limit=1)
        check_chat_template(given, "data/tokenizer")
        assert score(given, "42", both)[1][0].startswith(begin)


def test_answers_longer_than_the_context_are_refused(here):
    with pytest.raises(ConfigError, match=r"numbers asks for answers of up to 256 tokens, .* context of 256; set gen_"):
        score(section(apply_chat_template=True, gen_kwargs={"max_gen_toks": 256}), "42")


@pytest.mark.parametrize(
    "values, template, message",
    [
        ({"apply_chat_template": True}, None, r"x\.apply_chat_template \(mine\): .* no chat template; copy chat_temp"),
        ({"apply_chat_template": "tools"}, CHATML, r"x\.apply_chat_template \(mine\): .*'tools'; allowed: true, beca"),
        (
            {"apply_chat_template": True, "enable_thinking": False},
            LLAMA3,
            r"x\.enable_thinking: got False; allowed: nul",
        ),
        (
            {"apply_chat_template": True},
            "{{ raise_exception('no') }}",
            r"x\.apply_chat_template: cannot write these mes",
        ),
    ],
)
def test_what_the_template_cannot_do_is_named(here, values, template, message):
    write(write_lm_eval_task(here), template)
    with pytest.raises(UserError, match=message):
        check_chat_template(section(**values), "data/tokenizer", "x", "mine")
    check_chat_template(section(), "data/tokenizer", "x")  # nothing is asked for
    check_chat_template(None, "data/tokenizer", "x")


def test_a_local_parent_without_a_template_is_refused_at_once(here):
    def problems(path, **values):
        found, benchmarks = Problems(), section(**values)
        sections = SimpleNamespace(evaluate=SimpleNamespace(benchmarks=benchmarks), parent=SimpleNamespace(path=path))
        check_local(found, sections, OF_EVERY_STAGE)
        return found.found

    chat_tokenizer(None).save_pretrained("bare")
    (here / "bare/config.json").write_text("{}")
    (problem,) = problems("bare", apply_chat_template=True)
    assert re.match(
        r"evaluate\.benchmarks\.apply_chat_template: got True; allowed: false, because .*/bare has", problem
    )
    assert problems("bare") == problems(None, apply_chat_template=True) == []
    for template in (CHATML, {"default": CHATML, "other": LLAMA3}, {"other": LLAMA3}):
        chat_tokenizer(template).save_pretrained("bare")
        assert problems("bare", apply_chat_template=True) == []
        for path in (*(here / "bare").glob("*.jinja"), *(here / "bare").glob("*/*.jinja")):
            path.unlink()


def test_thinking_needs_a_task_with_answers(here):
    write(CHOICE | {"dataset_kwargs": {"data_files": {"test": "letters.jsonl"}}})
    (here / "root/letters.jsonl").write_text('{"question": "a", "choices": ["b", "c"], "label": 0}\n')
    thinking = {"apply_chat_template": True, "enable_thinking": True, "think_end_token": "</think>"}
    check_benchmark_tasks(section(**thinking), "x")
    with pytest.raises(
        ConfigError, match=r"x\.enable_thinking: .* because letters generates no answer \(output_type m"
    ):
        check_benchmark_tasks(section(tasks=["letters"], **thinking), "x")


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"apply_chat_templates": True},
            r"apply_chat_templates: unknown parameter; did you mean 'apply_chat_template'",
        ),
        ({"apply_chat_template": ""}, r"here\.apply_chat_template: got ''; allowed: true, false, or the name"),
        ({"apply_chat_template": 3}, r"here\.apply_chat_template: "),
        (
            {"enable_thinking": True},
            r"here\.enable_thinking: got True; allowed: null, because apply_chat_template is f",
        ),
        ({"fewshot_as_multiturn": False}, r"here\.fewshot_as_multiturn: got False; allowed: null, because apply_chat"),
        ({"apply_chat_template": True, "enable_thinking": True}, r"here\.think_end_token: got None; allowed: the text"),
        ({"think_end_token": ""}, r"here\.think_end_token: got ''; allowed"),
        ({"stop": ["a", ""]}, r"here\.stop: got .*; allowed: texts that are not empty"),
        ({"stop": "a"}, r"here\.stop: got 'a'; allowed: a list"),
        (
            {"gen_kwargs": {"temprature": 1}},
            r"here\.gen_kwargs: got 'temprature'; allowed: max_gen_toks, do_sample, te",
        ),
        ({"gen_kwargs": {"temperature": -1}}, r"here\.gen_kwargs\.temperature: got -1; allowed: 0 \("),
        ({"gen_kwargs": {"temperature": True}}, r"here\.gen_kwargs\.temperature: got True"),
        ({"gen_kwargs": {"max_gen_toks": 0}}, r"here\.gen_kwargs\.max_gen_toks: got 0; allowed: most tokens"),
        ({"gen_kwargs": {"top_p": 0}}, r"here\.gen_kwargs\.top_p: got 0; allowed: above 0"),
        ({"gen_kwargs": {"until": [1]}}, r"here\.gen_kwargs\.until: got \[1\]; allowed: a text or a list"),
        (
            {"gen_kwargs": {"do_sample": True}},
            r"here\.gen_kwargs\.temperature: got None; allowed: above 0, because do_",
        ),
        ({"gen_kwargs": [1]}, r"here\.gen_kwargs: "),
    ],
)
def test_refusals(values, message):
    with pytest.raises(ConfigError, match=message):
        section(**values)
