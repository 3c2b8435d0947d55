"""The garbage collector during imports: paused, and afterwards as it was, also after an error."""

import gc

import pytest

from tasks.runtime import garbage_collector


@pytest.fixture(autouse=True)
def enabled():
    yield
    gc.enable()


@pytest.mark.parametrize("is_enabled", [True, False])
def test_it_is_paused_and_then_as_before(is_enabled):
    if not is_enabled:
        gc.disable()
    before, made = gc.get_freeze_count(), []
    with pytest.raises(ImportError), garbage_collector.paused():
        assert not gc.isenabled()
        made += [[] for _ in range(1000)]
        raise ImportError
    assert gc.isenabled() == is_enabled
    assert gc.get_freeze_count() >= before + 1000  # what is there is not looked through again
