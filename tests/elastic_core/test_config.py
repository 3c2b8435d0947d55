"""The strict loader: what it takes, and what it says about what it does not."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from elastic_core.config import ConfigError, load, require


@dataclass(frozen=True)
class Inner:
    rate: float
    name: str = "x"

    def check(self):
        require(self.rate >= 0, "rate", self.rate, "0 or more")


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
        ({"inner": 3}, r"outer\.inner: expected a section with keys, got 3"),
        ({"inner": {"rate": -1.0}}, r"outer\.inner\.rate: got -1\.0; allowed: 0 or more"),
        ({"sections": {"s": {"rate": -1}}}, r"outer\.sections\.s\.rate: got -1\.0; allowed: 0 or more"),
        (
            {"inner": {"rate": "1e-3"}},
            r"rate: expected a number, got '1e-3' \(YAML reads 1e-3 as text; write 1\.0e-3\)",
        ),
        ({"inner": {"rate": True}}, r"inner\.rate: expected a number, got True"),
        ({"inner": {"rate": float("nan")}}, r"inner\.rate: expected a finite number, got nan"),
        ({"inner": {"rate": float("inf")}}, r"inner\.rate: expected a finite number, got inf"),
        ({"inner": {"rate": 1.0, "name": 3}}, r"inner\.name: expected a string, got 3"),
        ({"steps": True}, r"outer\.steps: expected an integer, got True"),
        ({"steps": 1.0}, r"outer\.steps: expected an integer, got 1\.0"),
        ({"steps": None}, r"outer\.steps: expected an integer, got None"),
        ({"flag": 1}, r"outer\.flag: expected true or false, got 1"),
        ({"mode": "firm"}, r"outer\.mode: got 'firm'; allowed: 'soft', 'hard'"),
        ({"limit": "3"}, r"outer\.limit: expected an integer, got '3'"),
        ({"sizes": 3}, r"outer\.sizes: expected a list, got 3"),
        ({"sizes": "32"}, r"outer\.sizes: expected a list, got '32'"),
        ({"sizes": [3, "2"]}, r"outer\.sizes\[1\]: expected an integer, got '2'"),
        ({"shares": [1]}, r"outer\.shares: expected a section with keys, got \[1\]"),
        ({"shares": {"a": "b"}}, r"outer\.shares\.a: expected a number, got 'b'"),
        ({"shares": {1: 1.0}}, r"outer\.shares: expected a string, got 1"),
    ],
)
def test_what_is_refused_and_how(values, words):
    with pytest.raises(ConfigError, match=words):
        read(**values)


@pytest.mark.parametrize("values", [None, [], "steps", 3])
def test_a_section_that_is_none(values):
    with pytest.raises(ConfigError, match=r"^here: expected a section with keys, got "):
        load(Outer, values, "here")


def test_missing():
    with pytest.raises(ConfigError, match=r"^here\.steps: missing; it has no default and must be set$"):
        load(Outer, {}, "here")


def test_errors_are_value_errors():
    assert issubclass(ConfigError, ValueError)
