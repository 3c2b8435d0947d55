"""Evaluation by items: any order and any batch size give the same scores, and finished items are not computed again."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import GenerationConfig

from elastic_core.config import ConfigError, load
from elastic_core.data.loader import IGNORED_LABEL, TokenData, held_out_batches, vocabulary_sha256
from elastic_core.data.token_files import Manifest, Source, SplitWriter
from tasks import evaluate
from tasks.evaluation import batch_sizes, items, lm_eval_model, text_scores, vllm_engine
from tasks.evaluation.teacher import CachedTeacher
from tasks.settings.parts.evaluation import Vllm
from tasks.settings.sections import Benchmarks, Compute, Evaluate
from tests.support.models.chat import chat_tokenizer, reciter, write_lm_eval_task
from tests.support.models.parents import CONFIGS, save_random_parent

FAKE = Path(__file__).resolve().parents[2] / "support/vllm_stand_in"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One source of documents of random tokens, and one in which every second token is trained."""
    directory, tokenizer = tmp_path_factory.mktemp("data"), chat_tokenizer()
    manifest, rng = Manifest(37, 0, None, vocabulary_sha256(tokenizer), {}), np.random.default_rng(0)
    for name in ("prose", "talk"):
        writer = SplitWriter(directory, name, "held_out", manifest.dtype, masked=name == "talk")
        for length in (3, 17, 40, 9, 25, 11):
            ids = rng.integers(0, 37, length).tolist()
            trained = {"trained": [[i % 2 == 1 and i < 20 for i in range(length)]]} if name == "talk" else {}
            writer.append([ids], num_bytes=2 * length, **trained)
        manifest.sources[name] = Source("split", {"held_out": writer.close()})
    manifest.write(directory)
    return TokenData(directory)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cached_teacher_gives_the_same_bits_as_a_live_one(name, data, tmp_path):
    """With the same batches the same bits, with other batches the same up to rounding; tied and untied heads."""
    section = Evaluate(held_out=("prose", "talk"), sequence_length=16, batch_size=3)
    for seed in (1, 4):
        parent, model = (save_random_parent(tmp_path, other, CONFIGS[name](seed)).eval() for other in (seed, seed + 50))
        text_scores.write_teacher(section, data, parent, str(tmp_path / "states"))
        teacher = CachedTeacher(str(tmp_path / "states"), torch.device("cpu"))
        expected = text_scores.held_out_scores(section, data, model, parent)
        assert text_scores.held_out_scores(section, data, model, teacher) == expected
        assert expected["kl_to_parent"] > 0.01
        other = Evaluate(held_out=section.held_out, sequence_length=16, batch_size=5)
        assert text_scores.held_out_scores(other, data, model, teacher) == pytest.approx(expected, rel=1e-5)


def test_losses_at_other_lengths_are_those_of_a_section_with_that_length(data, tmp_path):
    model = save_random_parent(tmp_path, 1, CONFIGS["llama"](1)).eval()
    section = Evaluate(held_out=("prose",), sequence_length=16, lengths=(8, 16, 32), batch_size=2)
    found = text_scores.scores_at_lengths(section, data, model)
    assert list(found) == ["8", "32"]
    for length in (8, 32):
        alone = Evaluate(held_out=("prose",), sequence_length=length, batch_size=2)
        expected = text_scores.held_out_scores(alone, data, model, None)
        assert found[str(length)] == {"loss": expected["loss"], "tokens": expected["tokens"]}


@pytest.mark.parametrize("name", CONFIGS)
def test_few_logits_at_a_time_give_the_same_scores(name, data, tmp_path, monkeypatch):
    """A text as long as those of the last stage would have logits that take more memory than the model."""
    parent, model = (save_random_parent(tmp_path, seed, CONFIGS[name](seed)).eval() for seed in (1, 2))
    section = Evaluate(held_out=("prose", "talk"), sequence_length=32, batch_size=4)
    expected = text_scores.held_out_scores(section, data, model, parent)
    (batch,) = held_out_batches(data, "talk", 32, 9)
    with torch.no_grad():
        logits = model(batch.input_ids).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORED_LABEL)
    assert expected["loss_talk"] == pytest.approx(loss.item(), rel=1e-5)
    shapes = []
    softmax = text_scores._logprobs
    monkeypatch.setattr(text_scores, "_logprobs", lambda *args: shapes.append(len(args[0])) or softmax(*args))
    batches = held_out_batches(data, "talk", 32, 9)
    found = text_scores.text_scores(model, None, batches, logits=4 * model.config.vocab_size)
    assert found[0] / found[2] == pytest.approx(expected["loss_talk"], rel=1e-5)
    assert max(shapes) == 4 and sum(shapes) >= found[2]


# --- the list of items -----------------------------------------------------------------------------------------------


VERSIONS = {version: Path(version) for version in evaluate.VERSIONS}
SECTION = Evaluate(held_out=("prose",), tasks=("chains_3", "recall_8"), benchmarks=Benchmarks(("piqa", "gsm8k")))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("uniform", [None, Path("uniform")])
def test_all_scores_come_from_some_item(split, uniform):
    found = items.list_items(SECTION, VERSIONS, Path("parent"), uniform, split)
    names = [item.name for item in found]
    assert len(set(names)) == len(names) == 1 + 3 * (2 + (4 if split else 2)) + 1 + (uniform is not None) + 1
    for number, item in enumerate(found):
        assert set(item.needs) <= set(names[:number])  # so they can be computed in this order
    assert found[-1].name == "speed" and set(found[-1].needs) == set(names[:-1])
    scores = {item.name: {f"{item.group} {item.tasks}": item.directory.name} for item in found}
    rows = evaluate.assemble(found, scores, {version: {"origin": version} for version in VERSIONS})
    assert list(rows) == list(VERSIONS) and ("uniform" in rows["zero_shot"]) == (uniform is not None)
    for version, row in rows.items():
        parts = [("chains_3",), ("recall_8",)] if split else [("chains_3", "recall_8")]
        assert row["tasks"] == {f"tasks {part}": version for part in parts}
        assert row["text ()"] == row["memory"]["memory ()"] == row["origin"] == version
        assert row["speed ()"] == "extended" and ("samples ()" in row) == (version == "extended")


def test_finished_items_are_kept(tmp_path, monkeypatch):
    """A stage that stops in the middle computes only the other items when it is started again."""
    found = items.list_items(SECTION, VERSIONS, None, None, split=True)
    setting = items.Setting(SECTION, tmp_path, None, "", tmp_path)
    settings = type("Settings", (), {"compute": Compute()})
    computed = []

    def compute(item, setting, models):
        if len(computed) == 5:
            raise KeyboardInterrupt
        computed.append(item.name)
        return {"name": item.name, "value": 0.1 + len(computed)}

    monkeypatch.setattr(evaluate, "compute", compute)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate("small", found, setting, settings)
    first, computed[:] = list(computed), []
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate("small", found, setting, settings)
    assert first + computed == [item.name for item in found][:10]
    while True:
        computed.clear()
        try:
            scores = evaluate.evaluate("small", found, setting, settings)
            break
        except KeyboardInterrupt:
            pass
    assert {name: values["name"] for name, values in scores.items()} == {item.name: item.name for item in found}


def test_items_of_another_element_type_are_computed_again(tmp_path, monkeypatch):
    """As after a move to GPUs: one table would have two roundings."""
    found, computed = items.list_items(SECTION, VERSIONS, None, None, split=True), []
    monkeypatch.setattr(evaluate, "compute", lambda item, setting, models: computed.append(item.name) or {})
    for dtype, number in ((None, len(found)), ("float32", 0), ("bfloat16", len(found)), (None, 0)):
        computed.clear()
        section = dataclasses.replace(SECTION, dtype=dtype)
        settings = type("Settings", (), {"compute": Compute()})
        evaluate.evaluate("small", found, items.Setting(section, tmp_path, None, "", tmp_path), settings)
        assert len(computed) == number


def test_states_of_the_parent_are_computed_again_for_another_place(tmp_path, monkeypatch):
    """The storage of the workers may be another one when a stopped stage goes on."""
    found = items.list_items(SECTION, VERSIONS, Path("parent"), None, split=True)[:2]
    settings, computed = type("Settings", (), {"compute": Compute()}), []

    def compute(item, setting, models):
        computed.append(item.name)
        return {"states": setting.states}

    monkeypatch.setattr(evaluate, "compute", compute)
    for place, expected in (("a", ["teacher", "zero_shot-text"]), ("a", []), ("b", ["teacher"]), ("b", [])):
        computed.clear()
        evaluate.evaluate("small", found, items.Setting(SECTION, tmp_path, Path("parent"), place, tmp_path), settings)
        assert computed == expected


def test_a_worker_has_one_model_at_a_time(tmp_path):
    for number in range(2):
        save_random_parent(tmp_path / str(number), number, CONFIGS["llama"](number))
    models = items.Models(torch.device("cpu"), None)
    first = models.load(tmp_path / "0")
    assert models.load(tmp_path / "0") is first and first.dtype == torch.float32
    assert models.load(tmp_path / "1") is not first
    assert models._model is models.load(tmp_path / "1")
    assert items.Models(torch.device("cuda"), None).dtype == torch.bfloat16
    assert items.Models(torch.device("cuda"), "float32").dtype == torch.float32


# --- batch sizes -----------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_tried_with_half():
    tried = []

    def work(batch_size):
        tried.append(batch_size)
        if batch_size > 5:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return batch_size

    assert batch_sizes.fitting(48, torch.device("cuda"), 7, work) == 3 and tried == [48, 24, 12, 6, 3]
    assert batch_sizes.fitting("auto", torch.device("cuda"), 7, work) == 3
    assert batch_sizes.fitting("auto", torch.device("cpu"), 4, work) == 4
    with pytest.raises(RuntimeError, match="out of memory"):
        batch_sizes.fitting(16, torch.device("cpu"), 4, work)


def test_auto_begins_with_what_logits_allow():
    cpu = torch.device("cpu")
    sizes = [batch_sizes.first_batch_size(cpu, tokens, 131072) for tokens in (64, 512, 49152)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1] == 1
    assert sizes[0] * 64 * 131072 * batch_sizes.LOGIT_BYTES <= batch_sizes.HOST_BYTES
    assert batch_sizes.first_batch_size(cpu, 64, 64) == batch_sizes.MOST


@pytest.mark.parametrize("name", ["batch_size", "task_batch_size"])
def test_batch_sizes_are_numbers_or_auto(name):
    assert getattr(load(Evaluate, {name: "auto"}, "evaluate"), name) == "auto"
    for wrong in (0, "automatic", 1.5):
        with pytest.raises(ConfigError, match=rf"evaluate\.{name}: got {wrong!r}"):
            load(Evaluate, {name: wrong}, "evaluate")


# --- vLLM ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model."""
    directory, tokenizer = tmp_path_factory.mktemp("vllm"), chat_tokenizer()
    model, (x, y) = reciter(tokenizer, "#5<|im_end|>", eos_token_id=[0, 5]), tokenizer.convert_tokens_to_ids(["x", "y"])
    with torch.no_grad():
        model.lm_head.weight[y, x] = 0.9  # after "x", which follows the answer for ever, only a penalty chooses "y"
    model.generation_config.repetition_penalty = 2.0
    model.save_pretrained(directory / "model")
    return directory


@pytest.fixture(scope="module")
def engine(place):
    """The process of the product, in which a stand-in of the package `vllm` generates with transformers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(FAKE))
        engine = vllm_engine.VllmEngine(Vllm(sys.executable), place / "model", "float32", place / "log")
        yield engine
        engine.close()


def test_vllm_answers_as_transformers_does(engine, place):
    tokenizer, section = chat_tokenizer(), Benchmarks(("any",), batch_size=2)
    texts = ["hi\n", "what is six times seven?\n", "a\n", "a"]
    stops, lengths = (["#"], ["5"], ["<|im_end|>"], ["5"]), (8, 8, 3, 4)
    requests = [
        Instance("generate_until", {}, (text, {"until": stop, "max_gen_toks": most}), number)
        for number, (text, stop, most) in enumerate(zip(texts, stops, lengths, strict=True))
    ]
    model = items.Models(torch.device("cpu"), None).load(place / "model")
    by_transformers = lm_eval_model.Model(section, model, tokenizer).generate_until(requests)
    served = lm_eval_model.Served(place / "model", lambda: model, lambda: engine)
    without_weights = served.without_weights()
    assert all(parameter.is_meta for parameter in without_weights.parameters())
    by_vllm = lm_eval_model.Model(section, without_weights, tokenizer, engine).generate_until(requests)
    assert by_vllm == by_transformers and len(set(by_vllm)) == 4
    assert by_vllm[-1] == "xyxx"  # by the penalty in generation_config.json
    assert "stand-in" in (place / "log").read_text()  # what libraries print does not disturb the answers


def test_what_a_task_leaves_out_of_sampling_is_as_in_transformers():
    config = GenerationConfig(top_p=0.9, repetition_penalty=1.2)
    options = {"do_sample": True, "top_p": 0.5, "min_p": None}
    expected = {"do_sample": True, "top_p": 0.5, "top_k": 50, "repetition_penalty": 1.2}
    assert vllm_engine.with_defaults(options, config) == expected
    assert vllm_engine.with_defaults({"top_k": 0}, GenerationConfig(top_k=7)) == {"top_k": 0}


@pytest.mark.thorough
def test_relative_paths_are_those_of_the_stage_where_tasks_have_another_directory(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    Path("model").symlink_to(place / "model")
    task = write_lm_eval_task(tmp_path)
    Path("files/numbers.yaml").write_text(json.dumps(task))
    chat_tokenizer().save_pretrained("data/tokenizer")
    benchmarks = load(Benchmarks, {"tasks": ["numbers"], "include": "files", "data_root": "root"}, "here")
    vllm = Vllm(os.path.relpath(sys.executable))
    section = Evaluate(("prose",), (), benchmarks=benchmarks, backend="vllm", vllm=vllm)
    setting = items.Setting(section, Path("data"), None, "", Path("logs"))
    item = items.Item("numbers", "benchmarks", Path("model"), ("numbers",))
    models = items.Models(torch.device("cpu"), None)
    scores = items._task_scores(item, setting, SimpleNamespace(directory=Path("data")), models)
    assert scores["numbers"]["items"] == 2 and Path("logs/numbers.vllm.log").is_file()


def test_vllm_says_what_it_does_not_know(engine, tmp_path):
    with pytest.raises(ConfigError, match="does not know the gen_kwargs num_beams"):
        engine.generate([[1]], [], [], 4, {"num_beams": 3})
    with pytest.raises(ConfigError, match=r"vLLM in .* has ended .*no such model"):
        vllm_engine.VllmEngine(Vllm(sys.executable), tmp_path / "nothing", "float32", tmp_path / "other.log")


def test_a_dead_vllm_is_reported_with_its_reason(engine):
    """The last test that needs the engine."""
    engine._process.kill()
    engine._process.wait()
    with pytest.raises(ConfigError, match=r"vLLM in .* has ended"):
        engine.generate([[1]], [], [], 4, {})


def test_a_backend_has_to_be_there(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluate\.vllm\.python: got None; allowed: the interpreter"):
        load(Evaluate, {"backend": "vllm"}, "evaluate")
    with pytest.raises(ConfigError, match=r"evaluate\.vllm\.python: got '/nowhere'"):
        load(Evaluate, {"backend": "vllm", "vllm": {"python": "/nowhere"}}, "evaluate")
    with pytest.raises(ConfigError, match=r"options\.model: got 'x'"):
        load(Evaluate, {"vllm": {"options": {"model": "x"}}}, "evaluate")
    assert load(Evaluate, {"backend": "vllm", "vllm": {"python": sys.executable}}, "evaluate").backend == "vllm"
