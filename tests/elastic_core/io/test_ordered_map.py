"""A stream worked on by threads: in order, in bounded memory, and its errors come through."""

import itertools
import threading
import time

import pytest

from elastic_core.io.ordered_map import ordered_map


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_order_whoever_is_fastest(threads):
    def work(item):
        time.sleep(0.002 * (item % 3))
        return item * item

    assert list(ordered_map(work, range(40), threads)) == [item * item for item in range(40)]
    assert list(ordered_map(work, [], threads)) == []


def test_no_more_is_taken_than_can_be_worked_on():
    taken = []
    results = ordered_map(str, (taken.append(i) or i for i in itertools.count()), 3)
    for done in range(1, 30):
        next(results)
        assert len(taken) - done < 2 * 3
    results.close()


def test_threads_work_at_the_same_time():
    meet = threading.Barrier(3, timeout=60)  # broken unless three are at work at once
    assert len(list(ordered_map(lambda _: meet.wait(), range(9), 3))) == 9


def test_errors_of_the_work_and_of_the_stream_come_through():
    done = []

    def work(item):
        if item == 3:
            raise ValueError("bad item")
        done.append(item)

    with pytest.raises(ValueError, match="bad item"):
        list(ordered_map(work, itertools.count(), 2))
    assert len(done) < 3 + 2 * 2

    def stream():
        yield 1
        raise OSError("bad stream")

    with pytest.raises(OSError, match="bad stream"):
        list(ordered_map(str, stream(), 2))
