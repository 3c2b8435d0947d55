"""The strict loader: what it takes, and what it says about what it does not."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from elastic_core.config import ConfigError, load, require


@dataclass(frozen=True)
class Inner:
    rate: float
    name: str = "x"

    def check(self, require=require):
        require(self.rate >= 0, "rate", self.rate, "0 or more")
        require(self.name != "", "name", self.name, "a name")


@dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner = field(default_factory=lambda: Inner(1.0))
    flag: bool = False
    mode: Literal["soft", "hard"] = "soft"
    limit: int | None = None
    sizes: tuple[int, ...] = ()
    shares: dict[str, float] = field(default_factory=dict)
    sections: dict[str, Inner] = field(default_factory=dict)
    anything: Any = None


def read(**values):
    return load(Outer, {"steps": 1, **values}, "params.yaml: outer")


def test_values_of_every_kind():
    config = read(
        inner={"rate": 2},
        flag=True,
        mode="hard",
        limit=3,
        sizes=[3, 2],
        shares={"a": 1, "b": 0.5},
        sections={"s": {"rate": 0.1}},
        anything=[{"x": 1}],
    )
    assert config == Outer(1, Inner(2.0), True, "hard", 3, (3, 2), {"a": 1.0, "b": 0.5}, {"s": Inner(0.1)}, [{"x": 1}])
    assert isinstance(config.inner.rate, float) and isinstance(config.shares["a"], float)
    assert read() == Outer(1) and read(limit=None).limit is None


@pytest.mark.parametrize(
    "values, words",
    [
        ({"stepz": 2}, r"^params\.yaml: outer\.stepz: unknown parameter; did you mean 'steps'\? Allowed: steps, inner"),
        ({"zzz": 2}, r"outer\.zzz: unknown parameter\. Allowed: steps"),
        ({"inner": {"rate": 1.0, "nam": "y"}}, r"outer\.inner\.nam: unknown parameter; did you mean 'name'\?"),
        ({"inner": {}}, r"outer\.inner\.rate: missing; it has no default and must be set"),
        ({"inner": 3}, r"outer\.inner: got 3; allowed: a section with keys"),
        ({"inner": {"rate": -1.0}}, r"outer\.inner\.rate: got -1\.0; allowed: 0 or more"),
        ({"sections": {"s": {"rate": -1}}}, r"outer\.sections\.s\.rate: got -1\.0; allowed: 0 or more"),
        (
            {"inner": {"rate": "1e-3"}},
            r"rate: got '1e-3'; allowed: a number, without quotes",
        ),
        ({"inner": {"rate": True}}, r"inner\.rate: got True; allowed: a number"),
        ({"inner": {"rate": float("nan")}}, r"inner\.rate: got nan; allowed: a finite number"),
        ({"inner": {"rate": float("inf")}}, r"inner\.rate: got inf; allowed: a finite number"),
        ({"inner": {"rate": 1.0, "name": 3}}, r"inner\.name: got 3; allowed: a string"),
        ({"steps": True}, r"outer\.steps: got True; allowed: an integer"),
        ({"steps": 1.0}, r"outer\.steps: got 1\.0; allowed: an integer"),
        ({"steps": None}, r"outer\.steps: got None; allowed: an integer"),
        ({"flag": 1}, r"outer\.flag: got 1; allowed: true or false"),
        ({"mode": "firm"}, r"outer\.mode: got 'firm'; allowed: 'soft', 'hard'"),
        ({"limit": "3"}, r"outer\.limit: got '3'; allowed: an integer"),
        ({"sizes": 3}, r"outer\.sizes: got 3; allowed: a list"),
        ({"sizes": "32"}, r"outer\.sizes: got '32'; allowed: a list"),
        ({"sizes": [3, "2"]}, r"outer\.sizes\[1\]: got '2'; allowed: an integer"),
        ({"shares": [1]}, r"outer\.shares: got \[1\]; allowed: a section with keys"),
        ({"shares": {"a": "b"}}, r"outer\.shares\.a: got 'b'; allowed: a number"),
        ({"shares": {1: 1.0}}, r"outer\.shares: got 1; allowed: a string"),
    ],
)
def test_what_is_refused_and_how(values, words):
    with pytest.raises(ConfigError, match=words):
        read(**values)


@pytest.mark.parametrize("values", [None, [], "steps", 3])
def test_a_section_that_is_none(values):
    with pytest.raises(ConfigError, match=r"^here: got .*; allowed: a section with keys"):
        load(Outer, values, "here")


def test_missing():
    with pytest.raises(ConfigError, match=r"^here\.steps: missing; it has no default and must be set$"):
        load(Outer, {}, "here")


def test_all_problems_come_at_once_a_line_for_each():
    wrong = {"stepz": 1, "steps": "ten", "inner": {"rate": -1, "name": ""}, "sizes": ["a", 2], "shares": {"a": None}}
    with pytest.raises(ConfigError) as caught:
        read(**wrong)
    assert caught.value.problems == [
        "params.yaml: outer.stepz: unknown parameter; did you mean 'steps'? Allowed: "
        "steps, inner, flag, mode, limit, sizes, shares, sections, anything",
        "params.yaml: outer.steps: got 'ten'; allowed: an integer",
        "params.yaml: outer.inner.rate: got -1.0; allowed: 0 or more",
        "params.yaml: outer.inner.name: got ''; allowed: a name",
        "params.yaml: outer.sizes[0]: got 'a'; allowed: an integer",
        "params.yaml: outer.shares.a: got None; allowed: a number",
    ]
    assert caught.value.report().splitlines() == [f"error: {problem}" for problem in caught.value.problems]


def test_a_check_that_is_called_alone_raises_at_its_first_problem():
    with pytest.raises(ConfigError, match=r"^rate: got -1\.0; allowed: 0 or more$"):
        Inner(-1.0, "").check()


def test_errors_are_value_errors():
    assert issubclass(ConfigError, ValueError)
