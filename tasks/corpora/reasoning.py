"""Generated reasoning data: arithmetic that needs worked steps, and recall that needs a long context.

- A *chain* such as `7+5-3:7+5=2;2-3=9#9` is a sequence of sums and differences modulo 10, computed from left to right.
  Every step is written out, and the answer follows `#`. Some chains, such as `7+5-3#9`, have no worked steps. They are
  the control: worked steps help only if the score with them is higher.
- A *recall* such as `a5b3c7?c7a5` lists pairs of a key and a value, then asks for some keys and gives their values.

Two digits never stand side by side, and neither do two letters. A tokenizer that separates digits, letters and other
characters therefore spends exactly one token on each character.

A hash of the prompt alone decides whether the prompt is held out. So no held-out prompt is in any training data,
whatever the run, the seed or the number of documents.
"""

import hashlib
import json
import random
import string
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from elastic_core.config import Require, require

_HELD_OUT_SHARE = 0.05
_FEWEST_HELD_OUT_STEPS = 3  # shorter chains are all used for training, because there are too few of them
_KEYS = string.ascii_letters
_MOST_ITEMS = 2000  # 80,000 chains have three steps, and one in twenty (4000) is held out

_TASK = """\
# Made by prepare_data; data/tokenizer presents a prompt as training does, after the token that starts a document.
task: {name}
custom_dataset: !function items.load
dataset_kwargs: {{file: {name}.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["\\n"], max_gen_toks: {max_gen_toks}, do_sample: false}}
filter_list:
  - name: answer
    filter:
      - {{function: regex, regex_pattern: '{pattern}'}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {metadata}
"""

_ITEMS_MODULE = '''\
"""Test items of the tasks beside this file, read whenever a task is loaded: no cache to go stale, no fixed place."""

import json
from pathlib import Path

import datasets


def load(file: str, **metadata):
    """The test split of one task: rows with `prompt` and `answer`."""
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
'''


@dataclass(frozen=True)
class Chains:
    """Section `prepare_data.sources.<name>` with kind `chains`: sums and differences modulo 10."""

    kind: str = "chains"
    documents: int = 60_000  # both splits together
    max_steps: int = 12
    step_weights: tuple[float, ...] | None = None  # relative frequency of 1, 2, ... max_steps steps; null: equal
    direct_share: float = 0.1  # share of the documents without worked steps

    too_long: ClassVar[str] = "drop"  # of a document that is longer than a training sequence
    is_generated: ClassVar[bool] = True

    def check(self, require: Require = require) -> None:
        require(self.documents > 0, "documents", self.documents, "1 or more")
        require(self.max_steps > 0, "max_steps", self.max_steps, "1 or more")
        require(0 <= self.direct_share < 1, "direct_share", self.direct_share, "0 or more and less than 1")
        _check_weights("step_weights", self.step_weights, self.max_steps, require)

    def texts(self, seed: int, skipped: Counter | None = None) -> Iterator[tuple[str, str]]:
        """Yield (split, chain). The same seed gives the same chains. `skipped` has no effect."""
        rng = random.Random(f"chains {seed}")
        lengths = rng.choices(range(1, self.max_steps + 1), self.step_weights, k=self.documents)
        for steps in lengths:
            prompt = draw_chain(rng, steps)
            split = "held_out" if steps >= _FEWEST_HELD_OUT_STEPS and is_held_out(prompt) else "train"
            direct = rng.random() < self.direct_share
            yield split, direct_chain(prompt) if direct else worked_chain(prompt)

    def expected_characters(self) -> int:
        """Estimate how many characters `texts` yields in all. Progress bars need the number."""
        steps = _weighted_mean(self.max_steps, self.step_weights, 1)
        return round(self.documents * (2 * steps + 3 + (1 - self.direct_share) * 6 * steps))


@dataclass(frozen=True)
class Recall:
    """Section `prepare_data.sources.<name>` with kind `recall`: documents of 2 to `max_pairs` pairs.

    Each asks for several keys (multi-query recall).
    """

    kind: str = "recall"
    documents: int = 20_000  # both splits together
    max_pairs: int = 24
    pair_weights: tuple[float, ...] | None = None  # relative frequency of 2, 3, ... max_pairs pairs; null: equal
    max_queries: int = 8  # the most keys that a document asks for

    too_long: ClassVar[str] = "drop"  # of a document that is longer than a training sequence
    is_generated: ClassVar[bool] = True

    def check(self, require: Require = require) -> None:
        require(self.documents > 0, "documents", self.documents, "1 or more")
        require(2 <= self.max_pairs <= len(_KEYS), "max_pairs", self.max_pairs, f"2 to {len(_KEYS)}")
        require(self.max_queries > 0, "max_queries", self.max_queries, "1 or more")
        _check_weights("pair_weights", self.pair_weights, self.max_pairs - 1, require)

    def texts(self, seed: int, skipped: Counter | None = None) -> Iterator[tuple[str, str]]:
        """Yield (split, pairs and queries). The same seed gives the same documents. `skipped` has no effect."""
        rng = random.Random(f"recall {seed}")
        lengths = rng.choices(range(2, self.max_pairs + 1), self.pair_weights, k=self.documents)
        for num_pairs in lengths:
            pairs = draw_pairs(rng, num_pairs)
            split = "held_out" if is_held_out("".join(pairs)) else "train"
            asked = rng.sample(pairs, min(num_pairs, self.max_queries))
            yield split, "".join(pairs) + "?" + "".join(asked)

    def expected_characters(self) -> int:
        """Estimate how many characters `texts` yields in all. Progress bars need the number."""
        pairs = _weighted_mean(self.max_pairs - 1, self.pair_weights, 2)
        return round(self.documents * (2 * pairs + 1 + 2 * min(pairs, self.max_queries)))


@dataclass(frozen=True)
class Evaluation:
    """Section `prepare_data.evaluation`: the test tasks to write, each given by its number of steps or pairs.

    A task may be longer than every training document.
    """

    chains: tuple[int, ...] = (3, 6, 9, 12)
    chains_direct: tuple[int, ...] = (6,)
    recall: tuple[int, ...] = (4, 8, 16)
    items: int = 200  # per task; with 200 items an exact match of 0.5 has a standard error of 0.035

    def check(self, require: Require = require) -> None:
        for name in ("chains", "chains_direct"):
            allowed = f"{_FEWEST_HELD_OUT_STEPS} steps or more: all shorter chains are in the training data"
            require(all(n >= _FEWEST_HELD_OUT_STEPS for n in getattr(self, name)), name, getattr(self, name), allowed)
        allowed = f"numbers of pairs from 2 to {len(_KEYS)}"
        require(all(2 <= n <= len(_KEYS) for n in self.recall), "recall", self.recall, allowed)
        require(1 <= self.items <= _MOST_ITEMS, "items", self.items, f"1 to {_MOST_ITEMS}")


def draw_chain(rng: random.Random, steps: int) -> str:
    """A random expression of `steps` operators between digits, such as `7+5-3`."""
    return rng.choice(string.digits) + "".join(rng.choice("+-") + rng.choice(string.digits) for _ in range(steps))


def worked_chain(expression: str) -> str:
    """The document of an expression with worked steps: `7+5-3:7+5=2;2-3=9#9`."""
    value, steps = expression[0], []
    for operator, digit in zip(expression[1::2], expression[2::2], strict=True):
        result = (int(value) + int(operator + digit)) % 10
        steps.append(f"{value}{operator}{digit}={result}")
        value = str(result)
    return f"{expression}:{';'.join(steps)}#{value}"


def direct_chain(expression: str) -> str:
    """The document of an expression without worked steps: `7+5-3#9`."""
    return expression + worked_chain(expression)[-2:]


def draw_pairs(rng: random.Random, num_pairs: int) -> list[str]:
    """Random pairs of a letter and a digit, such as `a5`, `b3`. No letter occurs twice."""
    return [key + rng.choice(string.digits) for key in rng.sample(_KEYS, num_pairs)]


def is_held_out(prompt: str) -> bool:
    """Whether a prompt is held out for testing. A hash of the prompt decides; it selects one in twenty."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") < _HELD_OUT_SHARE * 2**64


def write_evaluation(directory: Path, config: Evaluation, seed: int) -> None:
    """Write the lm-eval tasks `chains_<steps>`, `chains_direct_<steps>` and `recall_<pairs>` to a new `directory`.

    Load them with ``TaskManager(include_path=directory, include_defaults=False)``. The metadata of a task has `chance`:
    the exact match of a random guess among all values. For recall it also has `chance_in_context`: the exact match of
    always answering with the most frequent value in the prompt. No item's prompt is in the training split.
    """
    directory.mkdir()
    (directory / "items.py").write_text(_ITEMS_MODULE, encoding="utf-8")
    for steps in config.chains:
        items = _draw_items(lambda rng, n=steps: _chain_item(rng, n, ":"), config.items, f"chains {steps} {seed}")
        _write_task(directory, f"chains_{steps}", items, r"#(\d)", 6 * steps + 2, {"num_steps": steps})
    for steps in config.chains_direct:
        items = _draw_items(lambda rng, n=steps: _chain_item(rng, n, "#"), config.items, f"direct {steps} {seed}")
        _write_task(directory, f"chains_direct_{steps}", items, r"^(\d)", 1, {"num_steps": steps})
    for num_pairs in config.recall:
        items = _draw_items(lambda rng, n=num_pairs: _recall_item(rng, n), config.items, f"recall {num_pairs} {seed}")
        most_frequent = [Counter(prompt[1:-2:2]).most_common(1)[0][0] for prompt in items]
        hits = sum(guess == answer for guess, answer in zip(most_frequent, items.values(), strict=True))
        metadata = {"num_pairs": num_pairs, "chance_in_context": round(hits / len(items), 4)}
        _write_task(directory, f"recall_{num_pairs}", items, r"^(\d)", 1, metadata)


def _chain_item(rng: random.Random, steps: int, separator: str) -> tuple[str, str, str]:
    """(The text whose hash decides the split, the prompt, the answer.)"""
    expression = draw_chain(rng, steps)
    return expression, expression + separator, worked_chain(expression)[-1]


def _recall_item(rng: random.Random, num_pairs: int) -> tuple[str, str, str]:
    """(The text whose hash decides the split, the prompt, the answer.)"""
    pairs = draw_pairs(rng, num_pairs)
    key, answer = rng.choice(pairs)
    return "".join(pairs), f"{''.join(pairs)}?{key}", answer


def _draw_items(draw: Callable, num_items: int, seed: str) -> dict[str, str]:
    """Held-out prompts without duplicates, and their answers: prompt → answer."""
    rng, items = random.Random(seed), {}
    while len(items) < num_items:
        hashed, prompt, answer = draw(rng)
        if is_held_out(hashed):
            items[prompt] = answer
    return items


def _write_task(
    directory: Path, name: str, items: dict[str, str], pattern: str, max_gen_toks: int, metadata: dict
) -> None:
    rows = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in items.items()]
    (directory / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    metadata = json.dumps({"version": 1.0, "chance": 0.1} | metadata)
    text = _TASK.format(name=name, pattern=pattern, max_gen_toks=max_gen_toks, metadata=metadata)
    (directory / f"{name}.yaml").write_text(text, encoding="utf-8")


def _check_weights(key: str, weights: tuple[float, ...] | None, count: int, require: Require) -> None:
    fits = weights is None or (0 < len(weights) == count and min(weights) >= 0 and sum(weights) > 0)
    require(fits, key, weights, f"null, or {count} numbers of 0 or more, at least one above 0")


def _weighted_mean(count: int, weights: tuple[float, ...] | None, first: int) -> float:
    """Mean of first, first + 1, …, first + count - 1, weighted; without weights the plain mean."""
    weights = weights or (1.0,) * count
    return sum((first + i) * weight for i, weight in enumerate(weights)) / sum(weights)
