"""Many texts of several budgets at a time: each gets the tokens that the extracted model gives it alone."""

import queue
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from elastic_core import extract
from elastic_core.export.conversation import new_cache
from tasks.serving import caches
from tasks.serving.batch import Batch, read
from tasks.serving.engine import Engine
from tasks.serving.family import Family
from tasks.serving.jobs import Failure, Full, Job, Limits, Stopped
from tasks.serving.metrics import Metrics
from tasks.serving.prefixes import Prefixes
from tasks.serving.sampling import Chooser, Settings
from tests.support.models.served_family import write_served_family


class Reader:
    """A job, and what its engine says about it."""

    def __init__(self, family: Family, budget: str, prompt: list[int], max_new_tokens: int, settings=None, **options):
        chosen = family.budget(budget)
        self.budget, self.prompt, self.max_new_tokens, self._found = budget, prompt, max_new_tokens, queue.SimpleQueue()
        chooser = Chooser(chosen.model, settings or Settings(), prompt, max_new_tokens)
        self.job = Job(chosen, chooser, max_new_tokens, self._found.put, **options)
        self.tokens, self.text, self.num_cached = [], "", 0

    def next(self):
        piece = self._found.get(timeout=60)
        if not isinstance(piece, Failure):
            self.tokens += [chosen.token for chosen in piece.tokens]
            self.text, self.num_cached = self.text + piece.text, piece.num_cached
        return piece

    def end(self):
        while not isinstance(piece := self.next(), Failure) and piece.finish is None:
            pass
        return piece


def start(family: Family, **limits) -> Engine:
    engine = Engine(family, Limits(**limits), Metrics())
    engine.start()
    return engine


def prompts(number: int, vocabulary: int, longest: int = 40) -> list[list[int]]:
    """Random texts of different lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest, (number,), generator=generator).tolist()
    return [torch.randint(2, vocabulary, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module", params=["nemotron_h M-*M-", "nemotron_h M-M-", "llama M-*M-"])
def served(request, tmp_path_factory):
    """A family in memory, and the extracted model of every budget."""
    directory = tmp_path_factory.mktemp("served")
    write_served_family(directory / "family", *request.param.split())
    family, alone = Family(directory / "family"), {}
    for name in family.budgets:
        extract(directory / "family", name, directory / name)
        alone[name] = AutoModelForCausalLM.from_pretrained(directory / name).eval()
    return family, alone


def greedy(model, prompt: list[int], number: int) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": number, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, **options)[0, len(prompt) :].tolist()


def test_texts_come_and_go_and_are_as_if_alone(served, monkeypatch):
    """Different lengths and ends, prompts that are read in parts, and more texts than places in a batch."""
    family, alone = served
    sizes, step = [], Batch.step
    monkeypatch.setattr(Batch, "step", lambda batch: sizes.append(len(batch.rows)) or step(batch))
    engine = start(family, max_batch=3, chunk=25)
    names = ("full", "small")
    texts = prompts(9, family.config.vocab_size)
    readers = [
        Reader(family, names[i % 2], text, 8 + 2 * i, stop_ids=family.stop_ids()) for i, text in enumerate(texts)
    ]
    engine.submit([reader.job for reader in readers])
    for reader in readers:
        assert reader.end().finish in ("stop", "length")
        assert reader.tokens == greedy(alone[reader.budget], reader.prompt, reader.max_new_tokens)
    engine.stop()
    assert engine._num_running() == 0 and not engine._waiting
    assert set(sizes) == {1, 2, 3}


def test_the_next_turn_reads_only_what_is_new(served):
    """And gives the same tokens. Another budget reads everything, unless it takes over from a larger one."""
    family, alone = served
    engine = start(family)
    first = Reader(family, "full", prompts(1, family.config.vocab_size, 30)[0] * 2, 6)
    engine.submit([first.job])
    first.end()
    text = [*first.prompt, *first.tokens, 7, 8, 9]
    cases = (("full", False), ("small", False), ("medium", True))
    turns = [Reader(family, budget, text, 6, hand_over=over) for budget, over in cases]
    for turn, num_cached in zip(turns, (len(text) - 4, 0, len(text) - 4), strict=True):
        engine.submit([turn.job])
        turn.end()
        assert turn.num_cached >= num_cached if num_cached else turn.num_cached == 0
        assert turn.job.hand_over or turn.tokens == greedy(alone[turn.budget], text, 6)
    recurrent = caches.has_recurrent_states(new_cache(family.budget("full").model.config))
    other = Reader(family, "full", [*text[:20], 5, 6], 6)  # a text that parts from the first one
    engine.submit([other.job])
    other.end()
    assert other.tokens == greedy(alone["full"], other.prompt, 6)
    assert other.num_cached == (len(first.prompt) if recurrent else 20)
    engine.stop()


def test_what_was_taken_over_is_for_those_only_who_ask_for_it(served):
    """Others get what the extracted model gives, also from texts of which a larger budget has read a part."""
    family, alone = served
    first = prompts(1, family.config.vocab_size, 30)[0] * 2
    turns = [("full", first, False), ("small", [*first, 5, 6], True), ("small", [*first, 5, 6, 7, 8], False)]
    engine, own = start(family), None
    for budget, text, over in turns:
        reader = Reader(family, budget, text, 6, hand_over=over)
        engine.submit([reader.job])
        reader.end()
        assert reader.num_cached == (len(first) if over else 0)
        if not over:
            own = reader
            assert own.tokens == greedy(alone[budget], text, 6)
    text = [*own.prompt, *own.tokens, 9]
    for over in (True, False):  # of as many tokens, the states of its own
        reader = Reader(family, "small", text, 6, hand_over=over)
        engine.submit([reader.job])
        reader.end()
        assert reader.num_cached >= len(text) - 2 and reader.tokens == greedy(alone["small"], text, 6)
    engine.stop()


def test_of_states_after_as_many_tokens_the_own_are_taken(served):
    family, _ = served
    budgets = [family.budget(name) for name in ("full", "small")]
    made = []
    for budget in budgets:
        made.append(new_cache(budget.model.config))
        with torch.no_grad():
            read(budget.model, made[-1], [1, 2, 3], 0)
    (full, small), prefixes = (budget.submodel for budget in budgets), Prefixes(family.config, 2**20)
    text = [1, 2, 3, 4]
    prefixes.put(full, text[:3], made[0])
    assert prefixes.find(small, text, hand_over=False) == (None, 0, True)
    assert prefixes.find(small, text, hand_over=True)[1:] == (3, False)
    prefixes.put(small, text[:3], made[1], pure=False)
    assert prefixes.find(small, text, hand_over=False) == (None, 0, True)
    assert prefixes.find(small, text, hand_over=True)[1:] == (3, False)
    prefixes.put(small, text[:3], made[1])
    prefixes.put(small, text[:3], made[1], pure=False)  # does not take the place of the pure ones
    for hand_over in (False, True):
        assert prefixes.find(small, text, hand_over)[1:] == (3, True)


def test_states_that_were_not_used_for_long_are_dropped(served):
    family, _ = served
    model = family.budget("small")
    one = new_cache(model.model.config)
    with torch.no_grad():
        read(model.model, one, [1, 2, 3], 0)
    size = caches.num_bytes(one)
    prefixes = Prefixes(family.config, 2 * size)
    for first in (1, 2, 3):
        prefixes.put(model.submodel, [first, 2, 3], one)
        prefixes.find(model.submodel, [1, 2, 3, 4], hand_over=False)
    assert prefixes.num_bytes == 2 * size
    assert [prefixes.find(model.submodel, [first, 2, 3, 4], False)[1] for first in (1, 2, 3)] == [3, 0, 3]
    prefixes.put(model.submodel, [5] * 3, caches.join([one] * 3))  # larger than all space
    assert prefixes.num_bytes == 2 * size


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small") / "family"
    write_served_family(directory, "llama")
    return Family(directory)


@pytest.fixture
def slow(monkeypatch):
    """A model that takes 10 ms for a token, so that a text of 400 tokens does not end before its test."""
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda batch: time.sleep(0.01) or step(batch))


def test_jobs_that_nobody_waits_for_are_dropped(family, slow):
    engine = start(family, max_batch=1, max_waiting=2)
    running, waiting = (Reader(family, "small", [5, 6], 400) for _ in range(2))
    engine.submit([running.job])
    running.next()
    engine.submit([waiting.job])
    engine.cancel([running.job, waiting.job])
    assert running.end().reason == waiting.end().reason == "cancelled"
    after = Reader(family, "small", [5, 6], 3)
    engine.submit([after.job])
    assert after.end().finish == "length"
    engine.stop()


def test_a_full_queue_refuses_and_time_ends(family, slow):
    engine = start(family, max_batch=1, max_waiting=2)
    running = Reader(family, "small", [5, 6], 450)
    engine.submit([running.job])
    running.next()
    late = Reader(family, "small", [5, 6], 3)
    last = [Reader(family, "small", [5, 6], 3) for _ in range(2)]
    engine.submit([late.job])
    with pytest.raises(Full, match="1 of 2 places in the queue are taken, and 2 are needed"):
        engine.submit([reader.job for reader in last])  # all or none
    late.job.deadline = time.monotonic()
    assert late.end().reason == "timeout"
    engine.submit([last[0].job])
    running.job.deadline = time.monotonic()
    assert running.end().reason == "timeout" and len(running.tokens) > 1
    assert last[0].end().finish == "length"
    engine.stop()


def test_a_budget_with_a_full_batch_holds_up_no_other(family, slow):
    engine = start(family, max_batch=1)
    long, queued = (Reader(family, "small", [5, 6], 400) for _ in range(2))
    other = Reader(family, "full", [5, 6], 2)
    engine.submit([long.job, queued.job, other.job])
    assert other.end().finish == "length"
    assert len(engine._batches[long.job.budget.submodel].rows) == 1
    engine.cancel([long.job, queued.job])
    engine.stop()


def test_a_stopped_engine_leaves_nobody_waiting(family, slow):
    engine = start(family, max_batch=1)
    readers = [Reader(family, "small", [5, 6], 400) for _ in range(3)]
    engine.submit([reader.job for reader in readers])
    readers[0].next()
    engine.stop()
    assert {reader.end().reason for reader in readers} == {"stopped"} and not engine.is_running
    with pytest.raises(Stopped):
        engine.submit([readers[0].job])


def test_after_a_mistake_nobody_waits_either(family, monkeypatch):
    """The thread ends with the error, which Python prints, and the engine says that it does not run."""
    seen = []
    monkeypatch.setattr("threading.excepthook", lambda args: seen.append(args.exc_type))
    engine = start(family)
    wrong = Reader(family, "small", [5, 6], 400)
    wrong.job.chooser.choose = None
    engine.submit([wrong.job])
    assert wrong.end().reason == "stopped"
    engine._thread.join(10)
    assert seen == [TypeError] and not engine.is_running


def test_a_text_that_does_not_fit_into_memory_fails_alone(family, monkeypatch):
    engine = start(family)
    failing = [True, False]

    def out_of_memory_once(*given):
        if failing.pop(0):
            raise torch.OutOfMemoryError
        return read(*given)

    monkeypatch.setattr("tasks.serving.engine.read", out_of_memory_once)
    readers = [Reader(family, "small", [5, 6], 3) for _ in range(2)]
    engine.submit([reader.job for reader in readers])
    assert readers[0].end().reason == "memory"
    assert readers[1].end().finish == "length"
    engine.stop()


def out_of_memory(action, times: int, where):
    """`action`, which runs out of memory the first `times` times that `where` is true of what it is given."""
    left = [times]

    def limited(*given, **options):
        if where(*given) and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError
        return action(*given, **options)

    return limited


@pytest.mark.parametrize(
    "owner, name, times, ends",
    [
        (Batch, "cache_of", 9, ["length", "length"]),  # the states of an earlier text are not needed
        (Prefixes, "find", 1, ["length", "length"]),
        (Batch, "remove", 1, ["length", "length"]),
        (Batch, "remove", 2, ["length", "memory"]),  # that which goes on when the other has ended
        (Batch, "add", 1, ["length", "length"]),
        (Batch, "add", 2, ["memory", "length"]),
        (Batch, "step", 1, ["memory", "memory"]),
        (Chooser, "choose", 1, ["memory", "length"]),  # the third token
    ],
)
def test_out_of_memory_ends_as_little_as_possible(family, monkeypatch, owner, name, times, ends):
    """Only texts that cannot go on, never the engine. The states of earlier texts make room first."""
    engine = start(family)
    earlier = Reader(family, "full", [7, 8, 9], 2)
    engine.submit([earlier.job])
    earlier.end()
    while engine._num_running():
        time.sleep(0.001)
    where = {"remove": lambda batch, gone: gone, "choose": lambda chooser, *given: len(chooser.ids) == 4}
    action = out_of_memory(getattr(owner, name), times, where.get(name, lambda *given: True))
    monkeypatch.setattr(owner, name, action)
    forgotten, clear = [], Prefixes.clear
    monkeypatch.setattr(Prefixes, "clear", lambda prefixes: forgotten.append(1) or clear(prefixes))
    readers = [Reader(family, "small", [5, 6], number) for number in (3, 6)]
    engine.submit([reader.job for reader in readers])
    found = [reader.end() for reader in readers]
    assert [getattr(end, "finish", None) or end.reason for end in found] == ends
    assert forgotten
    after = Reader(family, "small", [5, 6], 4)
    engine.submit([after.job])
    assert after.end().finish == "length" and engine.is_running
    engine.stop()
    assert engine._num_running() == 0
    assert after.tokens == readers[1].tokens[:4] or ends[1] == "memory"


def test_numbers_that_are_not_finite_are_no_text(family):
    engine = start(family)
    weight = family.model.weights["model.norm.weight"]
    own = family.budget("full").model.model.norm.weight
    before = own.data.clone()
    own.data.fill_(float("nan"))
    reader = Reader(family, "full", [5, 6], 3)
    engine.submit([reader.job])
    assert reader.end().reason == "numbers"
    own.data.copy_(before)
    assert weight.isfinite().all()
    engine.stop()


@pytest.mark.parametrize(
    "settings",
    [
        Settings(temperature=1e-44),
        Settings(temperature=1.0, repetition_penalty=1e-44),
        Settings(temperature=0, repetition_penalty=1e-300),
        Settings(temperature=1.0, repetition_penalty=1e300),
        Settings(temperature=1.0, top_p=1e-300, min_p=1.0),
    ],
)
def test_extreme_settings_end_only_their_own_text(family, settings):
    engine = start(family)
    readers = [Reader(family, "small", list(range(2, 12)), 3, one) for one in (settings, None)]
    engine.submit([reader.job for reader in readers])
    end = readers[0].end()
    assert getattr(end, "reason", "settings") == "settings"
    assert readers[1].end().finish in ("length", "stop") and engine.is_running
    engine.stop()


def test_a_conversation_without_attention_layers(served):
    """transformers cannot decode these with a cache, so the whole text is read at every token."""
    family, alone = served
    talk, prompt = family.model.conversation(), prompts(1, family.config.vocab_size)[0]
    talk.say(torch.tensor([prompt]))
    found = []
    for budget in ("full", "small", "full"):
        expected = greedy(alone[budget], [*prompt, *found], 4)
        assert talk.generate(budget, max_new_tokens=4, do_sample=False)[0].tolist() == expected
        found += expected
