"""Generated reasoning as conversations: arithmetic that needs worked steps, and recall that needs a long context.

- A *chain* is a sequence of sums and differences modulo 10, computed from left to right. To `7+5-3` the assistant
  answers `7+5=2;2-3=9#9`: every step is written out, and the result follows `#`. Some users ask `7+5-3#` and get `9`
  without steps. They are the control: worked steps help only if the score with them is higher.
- In a *recall* the user lists pairs of a key and a value and asks for one key, `a5b3c7?c`, and the assistant answers
  `7`. In further turns, the user asks for further keys: `a`, and the assistant answers `5`.

Two digits never stand side by side, and neither do two letters. A tokenizer that separates digits, letters and other
characters therefore spends exactly one token on each character.

A hash of the expression or of the pairs alone decides whether a conversation is held out. So no held-out prompt is in
any training data, whatever the run, the seed or the number of documents.
"""

import functools
import hashlib
import json
import random
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from elastic_core.config import Require, require
from tasks.corpora.conversations.messages import Conversation

_HELD_OUT_SHARE = 0.05
_FEWEST_HELD_OUT_STEPS = 3  # shorter chains are all used for training, because there are too few of them
_KEYS = string.ascii_letters
_MOST_ITEMS = 2000  # 80,000 chains have three steps, and one in twenty (4000) is held out

_TASK = """\
# Made by prepare_data. The chat template of data/tokenizer presents a prompt as training does.
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
    documents: int = 60_000  # conversations, both splits together
    max_steps: int = 12
    step_weights: tuple[float, ...] | None = None  # relative frequency of 1, 2, ... max_steps steps; null: equal
    direct_share: float = 0.1  # share of the conversations without worked steps

    chat_template: ClassVar[None] = None  # the tokenizer's, as in the test tasks
    template_variables: ClassVar[dict] = {}
    train_on: ClassVar[str] = "assistant"
    too_long: ClassVar[str] = "drop"  # of a conversation that is longer than a training sequence
    is_generated: ClassVar[bool] = True

    def check(self, require: Require = require) -> None:
        require(self.documents > 0, "documents", self.documents, "1 or more")
        require(self.max_steps > 0, "max_steps", self.max_steps, "1 or more")
        require(0 <= self.direct_share < 1, "direct_share", self.direct_share, "0 or more and less than 1")
        _check_weights("step_weights", self.step_weights, self.max_steps, require)

    def conversations(self, seed: int) -> Iterator[tuple[str, Conversation]]:
        """Yield (split, conversation). The same seed gives the same conversations."""
        rng = random.Random(f"chains {seed}")
        lengths = rng.choices(range(1, self.max_steps + 1), self.step_weights, k=self.documents)
        for number, steps in enumerate(lengths):
            expression = draw_chain(rng, steps)
            split = "held_out" if steps >= _FEWEST_HELD_OUT_STEPS and is_held_out(expression) else "train"
            direct = rng.random() < self.direct_share
            turns = direct_chain(expression) if direct else worked_chain(expression)
            yield split, _conversation(f"chain {number}", [turns])

    def texts(self, seed: int) -> Iterator[tuple[str, str]]:
        """Yield (split, text of the messages), to train a tokenizer on."""
        return ((split, one.text()) for split, one in self.conversations(seed))

    def expected_characters(self) -> int:
        """Estimate how many characters `conversations` yields in all. Progress bars need the number."""
        steps = _weighted_mean(self.max_steps, self.step_weights, 1)
        return round(self.documents * (2 * steps + 2 + (1 - self.direct_share) * (6 * steps + 1)))


@dataclass(frozen=True)
class Recall:
    """Section `prepare_data.sources.<name>` with kind `recall`: 2 to `max_pairs` pairs.

    Each conversation asks for several keys, one in each turn (multi-query recall).
    """

    kind: str = "recall"
    documents: int = 20_000  # conversations, both splits together
    max_pairs: int = 24
    pair_weights: tuple[float, ...] | None = None  # relative frequency of 2, 3, ... max_pairs pairs; null: equal
    max_queries: int = 8  # the most keys that a conversation asks for

    chat_template: ClassVar[None] = None  # the tokenizer's, as in the test tasks
    template_variables: ClassVar[dict] = {}
    train_on: ClassVar[str] = "assistant"
    too_long: ClassVar[str] = "drop"  # of a conversation that is longer than a training sequence
    is_generated: ClassVar[bool] = True

    def check(self, require: Require = require) -> None:
        require(self.documents > 0, "documents", self.documents, "1 or more")
        require(2 <= self.max_pairs <= len(_KEYS), "max_pairs", self.max_pairs, f"2 to {len(_KEYS)}")
        require(self.max_queries > 0, "max_queries", self.max_queries, "1 or more")
        _check_weights("pair_weights", self.pair_weights, self.max_pairs - 1, require)

    def conversations(self, seed: int) -> Iterator[tuple[str, Conversation]]:
        """Yield (split, conversation). The same seed gives the same conversations."""
        rng = random.Random(f"recall {seed}")
        lengths = rng.choices(range(2, self.max_pairs + 1), self.pair_weights, k=self.documents)
        for number, num_pairs in enumerate(lengths):
            pairs = draw_pairs(rng, num_pairs)
            split = "held_out" if is_held_out("".join(pairs)) else "train"
            asked = rng.sample(pairs, min(num_pairs, self.max_queries))
            yield split, _conversation(f"recall {number}", recall_turns(pairs, asked))

    def texts(self, seed: int) -> Iterator[tuple[str, str]]:
        """Yield (split, text of the messages), to train a tokenizer on."""
        return ((split, one.text()) for split, one in self.conversations(seed))

    def expected_characters(self) -> int:
        """Estimate how many characters `conversations` yields in all. Progress bars need the number."""
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


def worked_chain(expression: str) -> tuple[str, str]:
    """Request and answer with worked steps: `7+5-3` and `7+5=2;2-3=9#9`."""
    value, steps = expression[0], []
    for operator, digit in zip(expression[1::2], expression[2::2], strict=True):
        result = (int(value) + int(operator + digit)) % 10
        steps.append(f"{value}{operator}{digit}={result}")
        value = str(result)
    return expression, f"{';'.join(steps)}#{value}"


def direct_chain(expression: str) -> tuple[str, str]:
    """Request and answer without worked steps: `7+5-3#` and `9`."""
    return f"{expression}#", worked_chain(expression)[1][-1]


def recall_turns(pairs: list[str], asked: list[str]) -> list[tuple[str, str]]:
    """Requests and answers: `a5b3c7?c` and `7`, then `a` and `5`."""
    (key, value), *others = asked
    return [("".join(pairs) + f"?{key}", value), *((key, value) for key, value in others)]


def _conversation(place: str, turns: Sequence[tuple[str, str]]) -> Conversation:
    roles = ("user", "assistant")
    messages = [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]
    return Conversation(place, messages, None, [False, True] * len(turns))


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
        draw = functools.partial(_chain_item, steps=steps, write=worked_chain)
        items = _draw_items(draw, config.items, f"chains {steps} {seed}")
        _write_task(directory, f"chains_{steps}", items, r"#(\d)", 6 * steps + 2, {"num_steps": steps})
    for steps in config.chains_direct:
        draw = functools.partial(_chain_item, steps=steps, write=direct_chain)
        items = _draw_items(draw, config.items, f"direct {steps} {seed}")
        _write_task(directory, f"chains_direct_{steps}", items, r"^(\d)", 1, {"num_steps": steps})
    for num_pairs in config.recall:
        items = _draw_items(lambda rng, n=num_pairs: _recall_item(rng, n), config.items, f"recall {num_pairs} {seed}")
        most_frequent = [Counter(prompt[1 : 2 * num_pairs : 2]).most_common(1)[0][0] for prompt in items]
        hits = sum(guess == answer for guess, answer in zip(most_frequent, items.values(), strict=True))
        metadata = {"num_pairs": num_pairs, "chance_in_context": round(hits / len(items), 4)}
        _write_task(directory, f"recall_{num_pairs}", items, r"^(\d)", 1, metadata)


def _chain_item(rng: random.Random, steps: int, write: Callable) -> tuple[str, str, str]:
    """(The text whose hash decides the split, the prompt, the answer.)"""
    expression = draw_chain(rng, steps)
    prompt, answer = write(expression)
    return expression, prompt, answer[-1]


def _recall_item(rng: random.Random, num_pairs: int) -> tuple[str, str, str]:
    """(The text whose hash decides the split, the prompt, the answer.)"""
    pairs = draw_pairs(rng, num_pairs)
    ((prompt, answer),) = recall_turns(pairs, [rng.choice(pairs)])
    return "".join(pairs), prompt, answer


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
    metadata = json.dumps({"version": 2.0, "chance": 0.1} | metadata)
    text = _TASK.format(name=name, pattern=pattern, max_gen_toks=max_gen_toks, metadata=metadata)
    (directory / f"{name}.yaml").write_text(text, encoding="utf-8")


def _check_weights(key: str, weights: tuple[float, ...] | None, count: int, require: Require) -> None:
    fits = weights is None or (0 < len(weights) == count and min(weights) >= 0 and sum(weights) > 0)
    require(fits, key, weights, f"null, or {count} numbers of 0 or more, at least one above 0")


def _weighted_mean(count: int, weights: tuple[float, ...] | None, first: int) -> float:
    """Mean of first, first + 1, …, first + count - 1, weighted; without weights the plain mean."""
    weights = weights or (1.0,) * count
    return sum((first + i) * weight for i, weight in enumerate(weights)) / sum(weights)
