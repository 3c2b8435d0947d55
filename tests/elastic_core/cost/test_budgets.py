"""Budgets as people write them: what each spelling means, what is refused, and how they become targets."""

import pytest

from elastic_core.config import ConfigError, load
from elastic_core.cost.budgets import Budget, Cost, parse
from elastic_core.cost.memory import Memory
from elastic_core.cost.metrics import PARAMETERS, exact_cost, num_parameters
from elastic_core.cost.targets import family_metric, metric_of, shares
from tests.support.models.routed_family import CONFIG

FULL = num_parameters(CONFIG)
MEMORY = Memory(4096, 2)


@pytest.mark.parametrize(
    "given, amount, kind, context, batch",
    [
        (0.75, 0.75, "share", None, None),
        (1, 1.0, "share", None, None),
        ("0.75", 0.75, "share", None, None),
        (1e-3, 0.001, "share", None, None),
        (9e9, 9e9, "parameters", None, None),
        (12345, 12345, "parameters", None, None),
        ("9B", 9e9, "parameters", None, None),
        ("1.2M", 1.2e6, "parameters", None, None),
        (" 1.5 k ", 1500, "parameters", None, None),
        ("2t", 2e12, "parameters", None, None),
        ("16GiB@128k", 16 * 2**30, "bytes", 131072, None),
        ("16GiB@128k×8", 16 * 2**30, "bytes", 131072, 8),
        ("16gib @ 128K x 8", 16 * 2**30, "bytes", 131072, 8),
        ("16GB@1M", 16e9, "bytes", 2**20, None),
        ("1.5MiB@100", 1.5 * 2**20, "bytes", 100, None),
        ("640KB", 640e3, "bytes", None, None),
        ("2TiB×3", 2 * 2**40, "bytes", None, 3),
        ("3MB@64x1", 3e6, "bytes", 64, 1),
    ],
)
def test_spellings(given, amount, kind, context, batch):
    assert parse(given) == Budget(given, amount, kind, context, batch)
    assert parse(given).is_full == (kind == "share" and amount == 1)


NUMBERS = ["", "B", "9X", "large", "-1", "-9B", 0, -0.5, 1.5, 75, True, None, "nan", "inf", float("nan"), "1.2.3"]
SETTINGS = ["9B@128k", "0.5@4k", "9B×8", "16GiB@", "16GiB@k", "16GiB@1.5k", "16GiB×", "16GiB@128k×8×2", "16GiB@128g"]
OTHERS = ["9e999", "1e", "@128k", "0GiB@4k", "16iB@4k", "16GiB@-5", "16 GiB of memory"]


@pytest.mark.parametrize("given", [*NUMBERS, *SETTINGS, *OTHERS])
def test_what_is_no_budget(given):
    with pytest.raises(ConfigError) as caught:
        parse(given, "budgets.small")
    told = f"budgets.small: got {given!r}; allowed: a fraction as 0.75, a count as 9B, memory as 16GiB@128k or 16GiB@"
    assert str(caught.value).startswith(told)


def test_no_context_and_no_batch_of_zero():
    with pytest.raises(ConfigError, match=r"budget: got '1GiB@0k'; allowed: a context of 1 or more"):
        parse("1GiB@0k")
    with pytest.raises(ConfigError, match=r"budget: got '1GiB@4k×0'; allowed: a batch of 1 or more"):
        parse("1GiB@4k×0")


def test_names_are_offered_first():
    with pytest.raises(ConfigError, match=r"^budget: got 'big'; allowed: one of full, small, a fraction"):
        parse("big", names=["full", "small"])


def test_what_a_budget_leaves_open_is_as_in_training():
    own = Memory(4096, 2, weights="fp8")
    assert metric_of(parse(0.5), own) == own and metric_of(parse(0.5), PARAMETERS) == PARAMETERS
    assert metric_of(parse("9B"), own) == PARAMETERS
    assert metric_of(parse("1GiB"), own) == own
    assert metric_of(parse("1GiB@8k"), own) == Memory(8192, 2, weights="fp8")
    assert metric_of(parse("1GiB@8k×5"), own) == Memory(8192, 5, weights="fp8")
    assert metric_of(parse("1GiB@8k"), PARAMETERS) == Memory(8192)
    with pytest.raises(ConfigError, match=r"budget: got '1GiB'; allowed: bytes at a context in tokens, as 16GiB@128k"):
        metric_of(parse("1GiB"), PARAMETERS)


def section(**values):
    return load(Cost, values, "cost")


def test_the_metric_of_a_family():
    assert family_metric(Cost(), {"full": 1.0, "small": "0.5", "tiny": "2M"}) == PARAMETERS
    memory = section(metric="memory", context=131072, weights="fp8", cache="fp8")
    expected = Memory(131072, 1, weights="fp8", cache="fp8")
    assert family_metric(memory, {"full": 1.0, "small": "1GiB", "tiny": "0.5GiB@128k"}) == expected
    open_context = section(metric="memory", batch=4)
    assert family_metric(open_context, {"full": 1, "a": "1GiB@2k", "b": "2GiB@2k×4", "c": "3GiB"}) == Memory(2048, 4)
    assert family_metric(section(metric="memory"), {"a": "1GiB@2k×8"}) == Memory(2048, 8)


@pytest.mark.parametrize(
    "cost, budgets, words",
    [
        ({}, {"a": "1GiB@2k"}, r"budgets\.a: got '1GiB@2k'; allowed: a share or a count .* set cost: {metric: memory}"),
        ({"metric": "memory", "context": 8}, {"a": "9B"}, r"budgets\.a: got '9B'; allowed: a share of .* or bytes"),
        (
            {"metric": "memory"},
            {"a": 0.5},
            r"cost\.context: got None; allowed: tokens, such as 131072, here or in a bud",
        ),
        (
            {"metric": "memory", "context": 4096},
            {"a": "1GiB@2k"},
            r"budgets\.a: got '1GiB@2k'; allowed: the context of section cost and of the other budgets, 4096",
        ),
        ({"metric": "memory"}, {"a": "1GiB@2k", "b": "2GiB@4k"}, r"budgets\.b: got '2GiB@4k'; allowed: the context of"),
        (
            {"metric": "memory", "batch": 2},
            {"a": "1GiB@2k×3"},
            r"budgets\.a: got .*; allowed: the batch of section cost",
        ),
    ],
)
def test_budgets_that_do_not_agree_with_their_metric(cost, budgets, words):
    with pytest.raises(ConfigError, match=words):
        family_metric(section(**cost), budgets)


@pytest.mark.parametrize(
    "values, words",
    [
        (
            {"metric": "time"},
            r"cost\.metric: got 'time'; allowed: 'parameters', 'active_parameters', 'memory', 'latency', 'throughput'",
        ),
        ({"metric": "parameters", "context": 8}, r"cost\.context: got 8; allowed: nothing, as long as metric is param"),
        ({"cache": "fp8"}, r"cost\.cache: got 'fp8'; allowed: nothing, as long as metric is parameters"),
        ({"metric": "memory", "weights": "int3"}, r"cost\.weights: got 'int3'; allowed: float32, bf16, fp8, int8, fp4"),
        ({"metric": "memory", "context": 0}, r"cost\.context: got 0; allowed: 1 or more"),
        ({"metric": "memory", "contxt": 8}, r"cost\.contxt: unknown parameter; did you mean 'context'\?"),
        ({"metric": "memory", "context": "128k"}, r"cost\.context: got '128k'; allowed: an integer"),
    ],
)
def test_a_section_that_is_no_metric(values, words):
    with pytest.raises(ConfigError, match=words):
        section(**values)


def test_budgets_become_shares_of_the_parents_cost():
    assert shares({"full": 1.0, "a": 0.68, "b": f"{FULL / 2e3:.6f}K"}, PARAMETERS, CONFIG) == {
        "full": 1.0,
        "a": 0.68,
        "b": pytest.approx(0.5, rel=1e-6),
    }
    full = exact_cost(MEMORY, CONFIG)
    found = shares({"full": "1", "a": f"{full / 2**20 / 4:.12f}MiB", "b": 0.3}, MEMORY, CONFIG)
    assert found == {"full": 1.0, "a": pytest.approx(0.25), "b": 0.3}
    # Of what was not trained, in its own metric.
    assert shares({"c": f"{FULL / 4e3:.6f}K"}, MEMORY, CONFIG) == {"c": pytest.approx(0.25)}


def test_nothing_is_larger_than_the_parent():
    with pytest.raises(
        ConfigError, match=rf"^budgets\.a: got '9B'; allowed: up to the parent's own {FULL:,} parameters$"
    ):
        shares({"a": "9B"}, PARAMETERS, CONFIG)
    with pytest.raises(
        ConfigError, match=r"untrained\.a: got '9GiB'; .* own \d+\.\d+ KiB \(4,096 tokens × 2, weights bf"
    ):
        shares({"a": "9GiB"}, MEMORY, CONFIG, "untrained")
