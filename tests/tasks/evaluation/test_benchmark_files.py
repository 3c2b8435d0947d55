"""Benchmarks before a run: tags, groups with and without an aggregate, and every fault in task files named in time."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from elastic_core.config import ConfigError
from tasks.evaluation.lm_eval_tasks import benchmark_scores, check_benchmark_tasks
from tasks.settings.local_checks import check_benchmarks
from tasks.settings.sections import Benchmarks
from tests.support.models.letters import CHOICE, LAST, write_letters
from tests.support.models.tiny_reasoner import tiny_model

MEAN = [{"metric": "acc", "aggregation": "mean"}]
FILES = {
    "letters": CHOICE | {"tag": "alphabet"},
    "more": CHOICE | {"task": "more", "tag": ["alphabet", "other"]},
    "last": LAST,
    "both": {"group": "both", "task": ["letters", "more"], "aggregate_metric_list": MEAN},
    "plain": {"group": "plain", "task": ["more", "last"]},
    "outer": {"group": "outer", "task": ["both", "last", {"group": "inner", "task": [CHOICE | {"task": "own"}]}]},
    "tagged": {"group": "tagged", "task": ["alphabet"], "aggregate_metric_list": [{"metric": "perplexity"}]},
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with items, task files in another one, and data with a tokenizer of letters."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    write_letters(tmp_path)
    for name, values in FILES.items():
        (tmp_path / "files" / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def section(*tasks):
    return Benchmarks(tasks, include="files", data_root="root")


@pytest.mark.parametrize(
    "tasks, shown",
    [
        (["alphabet"], ["letters", "more"]),
        (["other", "last"], ["more", "last"]),
        (["both"], ["both"]),
        (["plain"], ["more", "last"]),
        (["outer"], ["both", "last", "outer::inner::own"]),
        (["tagged"], ["letters", "more"]),
    ],
)
def test_each_task_of_a_tag_and_of_a_group_without_an_aggregate_is_scored(here, tasks, shown):
    """What the groups and tags show is what their tasks show alone."""
    check_benchmarks(section(*tasks), "here")
    check_benchmark_tasks(section(*tasks))
    data = SimpleNamespace(directory=Path("data"))
    model = tiny_model(PreTrainedTokenizerFast.from_pretrained("data/tokenizer"))
    scores = benchmark_scores(section(*tasks), data, model)
    assert list(scores) == shown
    alone = benchmark_scores(section("letters", "last"), data, model)
    for name, result in scores.items():
        expected = alone["last" if name == "last" else "letters"]
        if name != "both":
            assert {key: result[key] for key in ("metric", "value", "items")} == {
                key: expected[key] for key in ("metric", "value", "items")
            }
        else:
            assert result["value"] == expected["all"]["acc,none"] and result["items"] == 2 * expected["items"]
    json.dumps(scores)


def change(name, **values):
    """Write a task file again with other values; None removes a key."""

    def damage(files):
        merged = FILES.get(name, CHOICE | {"task": name}) | values
        (files / f"{name}.yaml").write_text(yaml.safe_dump({k: v for k, v in merged.items() if v is not None}))

    return damage


def write(name, text):
    return lambda files: (files / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def both(*damages):
    return lambda files: [damage(files) for damage in damages]


FUNCTION = "task: mine\ndataset_path: json\ntest_split: test\nprocess_docs: !function cleaning.clean\n"
STATIC = {  # found without lm-eval: damage, tasks, message
    "unknown name": (
        lambda files: None,
        ["words"],
        r"here\.tasks: got 'words'; allowed: alphabet, both, last, letters, ",
    ),
    "malformed": (
        write("bad.yaml", "task: bad\n  x: ["),
        ["bad"],
        r"got 'bad'; .*; not readable: .*files/bad\.yaml: not valid",
    ),
    "not UTF-8": (
        write("bad.yaml", b"task: \xff"),
        ["bad"],
        r"got 'bad'; .*; not readable: .*files/bad\.yaml: not valid YAML",
    ),
    "a list": (
        write("bad.yaml", "- task: bad"),
        ["bad"],
        r"got 'bad'; .*; not readable: .*files/bad\.yaml: holds no task",
    ),
    "include": (
        write("bad.yaml", "task: bad\ninclude: no.yaml"),
        ["bad"],
        r"bad\.yaml: includes .*files/no\.yaml, which does",
    ),
    "itself": (write("bad.yaml", "task: bad\ninclude: bad.yaml"), ["bad"], r"files/bad\.yaml: includes itself"),
    "member": (
        change("plain", task=["letters", "lost"]),
        ["plain"],
        r"plain\.yaml: group plain names lost, which no file",
    ),
    "no members": (change("plain", task="letters"), ["plain"], r"plain\.yaml: group plain has no list `task`"),
    "circle": (change("plain", task=["plain"]), ["plain"], r"plain\.yaml: group plain contains itself"),
    "twice": (
        lambda files: None,
        ["both", "more"],
        r"here\.tasks: more is in both and in more; allowed: every task once",
    ),
    "data": (
        change("letters", dataset_kwargs={"data_files": {"test": "lost.jsonl"}}),
        ["alphabet"],
        r"letters\.yaml: the data file lost\.jsonl of task letters does not exist in .*root; .*data_root",
    ),
    "data pattern": (
        change("letters", dataset_kwargs={"data_files": ["items/*.csv"]}),
        ["both"],
        r"data file items/\*\.csv of task letters",
    ),
    "no module": (
        write("mine.yaml", FUNCTION),
        ["mine"],
        r"mine\.yaml: !function cleaning\.clean: there is no cleaning\.py beside",
    ),
    "package": (
        both(write("mine.yaml", FUNCTION), write("cleaning.py", "import json\nimport no_such_package.sub\n")),
        ["mine"],
        r"files/cleaning\.py: needs the package no_such_package, which is not installed: pip install no_such_package",
    ),
    "package of an include": (
        both(
            write("base", FUNCTION),
            write("mine.yaml", "include: base\ntask: mine"),
            write("cleaning.py", "from no_such import a"),
        ),
        ["mine"],
        r"files/cleaning\.py: needs the package no_such,",
    ),
    "no Python": (
        both(write("mine.yaml", FUNCTION), write("cleaning.py", "def clean(:")),
        ["mine"],
        r"files/cleaning\.py: not valid Python",
    ),
}
WITH_LM_EVAL = {
    "metric": (
        change("letters", metric_list=[{"metric": "acccc"}]),
        ["both"],
        r"letters\.yaml: metric 'acccc' of task letters; allowed: acc, ",
    ),
    "no metric": (
        change("letters", metric_list=["acc"]),
        ["both"],
        r"letters\.yaml: metric_list: got 'acc'; allowed: entries",
    ),
    "aggregation": (
        change("last", metric_list=[{"metric": "perplexity", "aggregation": "middle"}]),
        ["plain"],
        r"last\.yaml: aggregation 'middle'",
    ),
    "output type": (
        change("letters", output_type="choose"),
        ["letters"],
        r"here\.tasks: letters \(.*letters\.yaml\): ValueError: ",
    ),
    "split": (
        change("letters", test_split="dev"),
        ["letters"],
        r"here\.tasks: letters \(.*letters\.yaml\): KeyError: 'dev'",
    ),
    "unknown key": (change("letters", doc_to_txt="x"), ["letters"], r"letters\.yaml\): TypeError: .*doc_to_txt"),
    "template": (change("letters", doc_to_text="{{question"), ["letters"], r"letters\.yaml\): TemplateSyntaxError"),
    "field": (
        change("letters", doc_to_text="{{quest.x}}"),
        ["letters"],
        r"letters\.yaml\): UndefinedError: 'quest' is unde",
    ),
    "data": (
        lambda files: (files.parent / "root/items/test.jsonl").write_text("{"),
        ["letters"],
        r"letters\.yaml\): Dataset",
    ),
    "aggregate": (
        change("both", aggregate_metric_list=[{"metric": "acc", "aggregation": "max"}]),
        ["both"],
        r"both\.yaml\): ValueError: ",
    ),
    "function": (
        both(write("mine.yaml", FUNCTION), write("cleaning.py", "")),
        ["mine"],
        r"here\.tasks: mine \(.*mine\.yaml\): AttributeError",
    ),
}


@pytest.mark.parametrize("kind", STATIC)
def test_faults_in_files_are_named_without_lm_eval(here, kind):
    damage, tasks, message = STATIC[kind]
    damage(here / "files")
    for check in (check_benchmarks, check_benchmark_tasks):
        with pytest.raises(ConfigError, match=message):
            check(section(*tasks), "here")


@pytest.mark.parametrize("kind", WITH_LM_EVAL)
def test_faults_that_only_lm_eval_sees_are_named_before_any_scoring(here, kind, capfd):
    damage, tasks, message = WITH_LM_EVAL[kind]
    damage(here / "files")
    check_benchmarks(section(*tasks), "here")
    with pytest.raises(ConfigError, match=message) as error:
        check_benchmark_tasks(section(*tasks), "here")
    assert "\n" not in str(error.value) and capfd.readouterr().err == ""


def test_what_is_optional_in_a_task_file_is_not_asked_for(here):
    write("mine.yaml", FUNCTION)(here / "files")
    write("cleaning.py", "try:\n    import no_such_package\nexcept ImportError:\n    pass\n")(here / "files")
    check_benchmarks(section("mine"), "here")
    check_benchmarks(section("letters"), "here")
    write("bad.yaml", "x: [")(here / "files")  # not asked for
    check_benchmarks(section("letters"), "here")
    check_benchmark_tasks(section("letters"))
    check_benchmark_tasks(None)
