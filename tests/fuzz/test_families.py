"""Elastic checkpoints with broken files: read, or refused by one message that names the directory."""

import json
import re

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic_core import ElasticModel, Submodel, extract
from elastic_core.cost.latency import Latency
from elastic_core.cost.memory import Memory
from elastic_core.cost.metrics import PARAMETERS
from elastic_core.errors import UserError
from elastic_core.export.elastic_checkpoint import find_submodel
from elastic_core.export.nested import NestedModel
from elastic_core.io.provenance_file import read_provenance
from elastic_core.model import hf
from elastic_core.model.norm_gains import BUDGETS, RATIOS
from flows.cli.show_inspect import show
from tasks.commands.extract import find_budget
from tasks.commands.find_family import budget_names
from tasks.commands.generate import generate
from tasks.commands.inspect import inspect_checkpoint
from tests.support.fuzzing import directories
from tests.support.fuzzing.broken import broken_file, broken_metadata, broken_tensors, header_of, with_header
from tests.support.fuzzing.calls import call, examples
from tests.support.models.parents import random_ratios
from tests.support.oracles.latencies import make_table

METRICS = {
    "parameters": lambda config: PARAMETERS,
    "memory": lambda config: Memory(64),
    "latency": lambda config: Latency(make_table(config, {"hidden_size": (1, 8)}), 16),
}
FAMILIES = {"parameters": "nemotron_h", "memory": "llama", "latency": "qwen3"}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A family for every metric, which can be read."""
    scratch = tmp_path_factory.mktemp("families")
    for metric, architecture in FAMILIES.items():
        config = directories.CONFIGS[architecture]()
        directory = directories.write_family(scratch / metric, architecture, METRICS[metric](config))
        assert not [end for end in read(scratch, directory, "valid") if isinstance(end, UserError)]
    return scratch


def read(scratch, directory, target: str) -> list:
    readers = {
        "find_submodel": lambda: find_submodel(directory, 1.0),
        "find_budget": lambda: find_budget(directory, "small"),
        "budget_names": lambda: budget_names(directory),
        "NestedModel": lambda: NestedModel.from_pretrained(directory).at("small"),
        "inspect": lambda: inspect_checkpoint(directory),
        "provenance": lambda: read_provenance(directory),
    }
    return [call(f"{target}: {name}", scratch, reader, directory, "budget") for name, reader in readers.items()]


@pytest.mark.parametrize("metric", FAMILIES)
def test_elastic_json(scratch, metric):
    file = scratch / metric / "elastic.json"
    valid = file.read_bytes()

    @examples(16)
    @given(content=broken_file(json.loads(valid)))
    def check(content):
        file.write_bytes(content)
        read(scratch, file.parent, "elastic.json")

    with directories.restored(file):
        check()


FOUND = [
    {},
    {"cost": "parameters", "budgets": {"a": {"target": 1.0, "submodel": {"hidden_size": 9}}}, "path": []},
    {"cost": "parameters", "budgets": {"a": {"target": 1.0, "submodel": {}}}, "path": [{"kept_layers": [-1]}]},
    {
        **{"cost": "parameters", "budgets": {"a": {"target": 1.0, "submodel": {"hidden_size": 4}}}},
        "path": [{"hidden_size": 8, "intermediate_size": 3}],
    },
    {"cost": {"metric": "memory", "context": "x"}, "budgets": {}, "path": []},
    {"cost": {"metric": "latency", "context": 16, "table": {"format": 1}}, "budgets": {}, "path": []},
]


@pytest.mark.parametrize("content", FOUND)
def test_elastic_json_that_was_found(scratch, content):
    directory = directories.copy(scratch / "memory", scratch / "found")
    (directory / "elastic.json").write_text(json.dumps(content))
    end = call("found", scratch, lambda: NestedModel.from_pretrained(directory), directory)
    assert isinstance(end, UserError)
    read(scratch, directory, "found")


def test_a_latency_table_without_a_part(scratch):
    directory = directories.copy(scratch / "latency", scratch / "found")
    content = json.loads((directory / "elastic.json").read_text())
    del content["cost"]["table"]["parts"]["L"]
    (directory / "elastic.json").write_text(json.dumps(content))
    assert isinstance(call("found", scratch, lambda: find_submodel(directory, "small"), directory), UserError)


@pytest.mark.parametrize(
    "name, change",
    [
        *(("generation_config.json", {"max_new_tokens": value}) for value in (-1, {}, [1])),
        *(("generation_config.json", {"repetition_penalty": value}) for value in ("x", float("nan"), 1e308)),
        *(("generation_config.json", {"eos_token_id": value}) for value in (1e308, [None], [[0]], True, 10**30)),
        *(("generation_config.json", {"suppress_tokens": value}) for value in ([None], [{}], [10**30])),
        ("tokenizer_config.json", {"model_max_length": "x"}),
    ],
)
def test_generation_files_that_were_found(scratch, name, change):
    directory = directories.copy(scratch / "memory", scratch / "found")
    values = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps(values | change))
    end = call("found", scratch, lambda: generate(directory, "small", "ab", 2), directory)
    assert isinstance(end, UserError)


@pytest.mark.parametrize(
    "change",
    [
        *({"guidance_scale": 10**30}, {"prefill_chunk_size": 0}, {"assistant_early_exit": True}),
        *({"encoder_no_repeat_ngram_size": 2**31}, {"forced_eos_token_id": {}}, {"decoder_start_token_id": 1e308}),
    ],
    ids=str,
)
def test_other_ways_of_decoding_have_no_effect(scratch, change):
    """They are for other kinds of models, and transformers checks few of them. What is generated is the same."""
    directory = directories.copy(scratch / "memory", scratch / "found")
    tokens = generate(directory, "small", "ab", 4)
    values = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps(values | change))
    assert call("found", scratch, lambda: generate(directory, "small", "ab", 4), directory) == tokens


def test_any_token_of_a_list_ends_a_text(scratch):
    """Also where the tokenizer has no token for padding."""
    directory = directories.copy(scratch / "memory", scratch / "found")
    (directory / "generation_config.json").write_text("{}")
    first, *_ = tokens = generate(directory, "small", "ab", 4)
    unused = next(token for token in range(9) if token not in tokens)
    for ends, expected in (([unused, first], [first]), ([unused], tokens)):
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        assert generate(directory, "small", "ab", 4) == expected


@pytest.mark.parametrize("budget", [0, "0", "0B", float("nan"), -1.0])
def test_a_budget_of_nothing_is_refused(scratch, budget):
    end = call("found", scratch, lambda: find_submodel(scratch / "memory", budget), "budget")
    assert isinstance(end, UserError)


@pytest.mark.parametrize("content", [[], {}, {"stages": [{"stage": "rank"}]}, {"stages": {"stage": "rank"}}], ids=str)
def test_provenance_that_was_found(scratch, content):
    directory = directories.copy(scratch / "memory", scratch / "found")
    (directory / "provenance.json").write_text(json.dumps(content))
    assert isinstance(call("found", scratch, lambda: read_provenance(directory), directory), UserError)


@examples(12)
@given(content=broken_file(directories.PROVENANCE))
def test_provenance(scratch, content):
    directory = scratch / "memory"
    (directory / "provenance.json").write_bytes(content)
    call("provenance.json", scratch, lambda: read_provenance(directory), directory)
    call("provenance.json: inspect", scratch, lambda: show(inspect_checkpoint(directory)), directory)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_generate(scratch, name):
    file = scratch / "memory" / name
    valid = file.read_bytes()

    @examples(6)
    @given(content=broken_file(json.loads(valid)))
    def check(content):
        file.write_bytes(content)
        call(f"generate: {name}", scratch, lambda: generate(file.parent, "small", "ab", 2), file.parent, "prompt")

    with directories.restored(file):
        check()


@pytest.fixture(scope="module")
def with_gains(scratch):
    """A family whose budgets have gains of the norms of their own, and which can be read."""
    directory = directories.add_norm_gains(directories.write_family(scratch / "gains", "llama"))
    assert not [end for end in read_norms(scratch, directory, "valid") if isinstance(end, UserError)]
    return directory


def read_norms(scratch, directory, target: str) -> list:
    """Whatever reads gains of the norms. What is read can be computed with."""

    def compute():
        model = ElasticModel.from_pretrained(directory)
        assert model(torch.arange(4)[None], Submodel(hidden_size=4)).isfinite().all()

    def write():
        extract(directory, "small", scratch / "extracted")

    ends = [call(f"{target}: {f.__name__}", scratch, f, directory) for f in (compute, write)]
    return ends + read(scratch, directory, target)


def test_gains_of_budgets(scratch, with_gains):
    file = with_gains / BUDGETS
    valid = file.read_bytes()

    @examples(16)
    @given(content=broken_metadata(valid, "budgets"))
    def check(content):
        file.unlink()  # an earlier call may have mapped it
        file.write_bytes(content)
        read_norms(scratch, with_gains, "norm gains")

    with directories.restored(file):
        check()


def test_ratios_of_norms(scratch):
    directory = directories.write_family(scratch / "ratios", "qwen3")
    random_ratios(hf.read_config(directory)).write(directory)
    assert not [end for end in read_norms(scratch, directory, "valid") if isinstance(end, UserError)]
    file = directory / RATIOS
    valid = file.read_bytes()

    @examples(12)
    @given(content=broken_tensors(valid))
    def check(content):
        file.unlink()
        file.write_bytes(content)
        read_norms(scratch, directory, "norm ratios")

    check()


SMALL, MIDDLE = ({"hidden_size": size, "kept_layers": [0, 1]} for size in (4, 6))


@pytest.mark.parametrize(
    "budgets, words",
    [
        ("", "is empty"),
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ('{"small": 3}', "small holds a JSON int"),
        ('{"small": {"size": 3}}', "size: unknown parameter"),
        ('{"small": {"hidden_size": 9}}', "hidden_size: got 9"),
        (json.dumps({"small": SMALL, "middle": MIDDLE}), "budget middle .* is not nested in small"),
        (json.dumps({"other": MIDDLE, "small": SMALL}), "lacks other.model"),
        (json.dumps({"middle": MIDDLE}), "no gains for the submodel of small"),
    ],
)
def test_gains_of_budgets_that_were_found(scratch, with_gains, budgets, words):
    """The message says what is wrong, and names the file or, where it does not fit elastic.json, the directory."""
    directory = directories.copy(with_gains, scratch / "found")
    header, rest = header_of((directory / BUDGETS).read_bytes())
    header["__metadata__"]["budgets"] = budgets
    (directory / BUDGETS).write_bytes(with_header(header, rest))
    end = call("found", scratch, lambda: find_submodel(directory, "small"), directory)
    assert isinstance(end, UserError) and re.search(words, str(end)), end


def test_gains_that_are_no_numbers(scratch, with_gains):
    directory = directories.copy(with_gains, scratch / "found")
    tensors = safetensors.torch.load_file(directory / BUDGETS)
    with safetensors.safe_open(directory / BUDGETS, "pt") as handle:
        metadata = handle.metadata()
    name = next(iter(tensors))
    gain = tensors[name]
    for broken in (gain * float("nan"), gain.long(), gain[1:], gain.double() * 1e300):
        safetensors.torch.save_file(tensors | {name: broken}, directory / BUDGETS, metadata)
        end = call("found", scratch, lambda: extract(directory, "small", scratch / "extracted"), directory / BUDGETS)
        assert isinstance(end, UserError) and name in str(end)


@examples(12)
@given(budget=st.text(max_size=12) | st.sampled_from(["1B", "0.5", "9e9", "8MB@1×1", "35ms/token"]) | st.floats())
def test_budgets(scratch, budget):
    for metric in FAMILIES:
        call("budget", scratch, lambda: find_submodel(scratch / metric, budget), "budget")  # noqa: B023
