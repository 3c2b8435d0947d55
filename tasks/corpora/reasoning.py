"""Generated reasoning: arithmetic that needs worked steps, and recall that needs a long memory.

- A *chain*, `7+5-3:7+5=2;2-3=9#9`: sums and differences modulo 10 from left to right, every step written out, the
  answer after `#`. As a control some chains are answered at once, `7+5-3#9`: steps that help must beat that.
- A *recall*, `a5b3c7?c7a5`: key/value pairs, then some of the keys again, each with its value.

Between two digits stands one other character, and between two letters a digit: a tokenizer that splits digits and runs
of letters spends one token on each character, whatever else it has merged.

Every prompt is held out or not by its own hash, so no run, seed or number of documents can train on a held-out one.
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

from elastic_core.config import require

_HELD_OUT_SHARE = 0.05
_FEWEST_HELD_OUT_STEPS = 3  # there are too few shorter chains to keep any from training
_KEYS = string.ascii_letters
_MOST_ITEMS = 2000  # there are 80,000 chains of three steps, of which one in twenty is held out

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
    """Chains of sums and differences modulo 10."""

    kind: str = "chains"
    documents: int = 60_000  # both splits together
    max_steps: int = 12
    step_weights: tuple[float, ...] | None = None  # how often 1, 2, ... max_steps steps come; null: all alike
    direct_share: float = 0.1  # of the documents: answered without worked steps

    whole_documents: ClassVar[bool] = True

    def check(self) -> None:
        require(self.documents > 0, "documents", self.documents, "1 or more")
        require(self.max_steps > 0, "max_steps", self.max_steps, "1 or more")
        require(0 <= self.direct_share < 1, "direct_share", self.direct_share, "0 or more and less than 1")
        _check_weights("step_weights", self.step_weights, self.max_steps)

    def texts(self, seed: int) -> Iterator[tuple[str, str]]:
        """Yield (split, chain); the same seed gives the same chains."""
        rng = random.Random(f"chains {seed}")
        lengths = rng.choices(range(1, self.max_steps + 1), self.step_weights, k=self.documents)
        for steps in lengths:
            prompt = draw_chain(rng, steps)
            split = "held_out" if steps >= _FEWEST_HELD_OUT_STEPS and is_held_out(prompt) else "train"
            direct = rng.random() < self.direct_share
            yield split, direct_chain(prompt) if direct else worked_chain(prompt)

    def expected_characters(self) -> int:
        """Roughly how much `texts` will yield, for a progress bar."""
        steps = _mean(self.max_steps, self.step_weights, 1)
        return round(self.documents * (2 * steps + 3 + (1 - self.direct_share) * 6 * steps))


@dataclass(frozen=True)
class Recall:
    """Multi-query recall of values by keys, two to `max_pairs` pairs."""

    kind: str = "recall"
    documents: int = 20_000  # both splits together
    max_pairs: int = 24
    pair_weights: tuple[float, ...] | None = None  # how often 2, 3, ... max_pairs pairs come; null: all alike
    max_queries: int = 8  # at most this many of the keys are asked for

    whole_documents: ClassVar[bool] = True

    def check(self) -> None:
        require(self.documents > 0, "documents", self.documents, "1 or more")
        require(2 <= self.max_pairs <= len(_KEYS), "max_pairs", self.max_pairs, f"2 to {len(_KEYS)}")
        require(self.max_queries > 0, "max_queries", self.max_queries, "1 or more")
        _check_weights("pair_weights", self.pair_weights, self.max_pairs - 1)

    def texts(self, seed: int) -> Iterator[tuple[str, str]]:
        """Yield (split, pairs and queries); the same seed gives the same documents."""
        rng = random.Random(f"recall {seed}")
        lengths = rng.choices(range(2, self.max_pairs + 1), self.pair_weights, k=self.documents)
        for num_pairs in lengths:
            pairs = draw_pairs(rng, num_pairs)
            split = "held_out" if is_held_out("".join(pairs)) else "train"
            asked = rng.sample(pairs, min(num_pairs, self.max_queries))
            yield split, "".join(pairs) + "?" + "".join(asked)

    def expected_characters(self) -> int:
        """Roughly how much `texts` will yield, for a progress bar."""
        pairs = _mean(self.max_pairs - 1, self.pair_weights, 2)
        return round(self.documents * (2 * pairs + 1 + 2 * min(pairs, self.max_queries)))


@dataclass(frozen=True)
class Evaluation:
    """Which test tasks are written, as numbers of steps or pairs; they may be longer than any in training."""

    chains: tuple[int, ...] = (3, 6, 9, 12)
    chains_direct: tuple[int, ...] = (6,)
    recall: tuple[int, ...] = (4, 8, 16)
    items: int = 200  # per task; the standard error of an exact match of 0.5 is then 0.035

    def check(self) -> None:
        for name in ("chains", "chains_direct"):
            allowed = f"numbers of steps from {_FEWEST_HELD_OUT_STEPS}: shorter chains are all trained on"
            require(all(n >= _FEWEST_HELD_OUT_STEPS for n in getattr(self, name)), name, getattr(self, name), allowed)
        allowed = f"numbers of pairs from 2 to {len(_KEYS)}"
        require(all(2 <= n <= len(_KEYS) for n in self.recall), "recall", self.recall, allowed)
        require(1 <= self.items <= _MOST_ITEMS, "items", self.items, f"1 to {_MOST_ITEMS}")


def draw_chain(rng: random.Random, steps: int) -> str:
    """A random expression of `steps` operators between digits, such as `7+5-3`."""
    return rng.choice(string.digits) + "".join(rng.choice("+-") + rng.choice(string.digits) for _ in range(steps))


def worked_chain(expression: str) -> str:
    """The document that works an expression out: `7+5-3:7+5=2;2-3=9#9`."""
    value, steps = expression[0], []
    for operator, digit in zip(expression[1::2], expression[2::2], strict=True):
        result = (int(value) + int(operator + digit)) % 10
        steps.append(f"{value}{operator}{digit}={result}")
        value = str(result)
    return f"{expression}:{';'.join(steps)}#{value}"


def direct_chain(expression: str) -> str:
    """The document that answers an expression at once: `7+5-3#9`."""
    return expression + worked_chain(expression)[-2:]


def draw_pairs(rng: random.Random, num_pairs: int) -> list[str]:
    """Random pairs of a letter and a digit, no letter twice, such as `a5`, `b3`."""
    return [key + rng.choice(string.digits) for key in rng.sample(_KEYS, num_pairs)]


def is_held_out(prompt: str) -> bool:
    """Whether a prompt is kept for testing: one in twenty are, by a hash of the prompt alone."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") < _HELD_OUT_SHARE * 2**64


def write_evaluation(directory: Path, config: Evaluation, seed: int) -> None:
    """Write lm-eval tasks `chains_<steps>`, `chains_direct_<steps>` and `recall_<pairs>` to a new `directory`.

    Load them with ``TaskManager(include_path=directory, include_defaults=False)``. A task's metadata holds `chance`,
    the exact match of guessing among all values, and for recall `chance_in_context`, that of always answering the
    value which the prompt shows most often. No item's prompt is in the training split.
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
    expression = draw_chain(rng, steps)
    return expression, expression + separator, worked_chain(expression)[-1]


def _recall_item(rng: random.Random, num_pairs: int) -> tuple[str, str, str]:
    pairs = draw_pairs(rng, num_pairs)
    key, answer = rng.choice(pairs)
    return "".join(pairs), f"{''.join(pairs)}?{key}", answer


def _draw_items(draw: Callable, num_items: int, seed: str) -> dict[str, str]:
    """Different held-out prompts and their answers."""
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


def _check_weights(key: str, weights: tuple[float, ...] | None, count: int) -> None:
    fits = weights is None or (len(weights) == count and min(weights) >= 0 and sum(weights) > 0)
    require(fits, key, weights, f"null, or {count} numbers of 0 or more, not all 0")


def _mean(count: int, weights: tuple[float, ...] | None, first: int) -> float:
    weights = weights or (1.0,) * count
    return sum((first + i) * weight for i, weight in enumerate(weights)) / sum(weights)
