"""A preparation that was stopped goes on where it was, and gives the same bits."""

import pytest

from tasks import prepare_data
from tasks.corpora import preparation
from tasks.corpora.conversations.encoding import ConversationEncoder
from tasks.corpora.encoding import Encoder
from tasks.prepare_data import prepare
from tasks.settings.sections import PrepareData
from tests.support.pipeline.corpora import configure, texts, write_jsonl
from tests.support.places import files_below

SECTION = PrepareData(
    vocab_size=300,
    tokenizer_characters=20_000,
    sources={
        "first": {"kind": "chains", "documents": 400, "max_steps": 3},
        "second": {"kind": "chains", "documents": 300, "max_steps": 4},
        "recall": {"kind": "recall", "documents": 300, "max_pairs": 4},
    },
)


class Stopped(BaseException):
    """As a kill: nothing of ours catches it."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(preparation, "PART_CHARACTERS", 1500)


@pytest.mark.parametrize("parts", [0, 1, 3, 5, 9])
def test_a_stopped_preparation_goes_on(tmp_path, monkeypatch, parts):
    """Stopped in the middle of a part, and again at the last moment: what is finished is not encoded again."""
    prepare(SECTION, None, tmp_path / "whole", seed=3)
    encoded, encode = [], ConversationEncoder.encoded

    def counted(self, documents):
        encoded.append(list(documents))
        batches = list(encode(self, encoded[-1]))
        yield batches[0]
        if len(encoded) == parts + 1:
            raise Stopped
        yield from batches[1:]

    monkeypatch.setattr(ConversationEncoder, "encoded", counted)
    with pytest.raises(Stopped):
        prepare(SECTION, None, tmp_path / "data", seed=3, work=tmp_path / "work")
    assert not (tmp_path / "data").exists()
    with monkeypatch.context() as patched:
        patched.setattr(prepare_data, "write_evaluation", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            prepare(SECTION, None, tmp_path / "data", seed=3, work=tmp_path / "work")
    num_parts = len(encoded)
    prepare(SECTION, None, tmp_path / "data", seed=3, work=tmp_path / "work")
    assert len(encoded) == num_parts  # everything was finished
    assert sum(map(len, encoded)) - len(encoded[parts]) == 1000  # every document once, but for the part that was lost
    assert files_below(tmp_path / "data") == files_below(tmp_path / "whole")
    assert not (tmp_path / "work").exists()


def test_rows_that_were_skipped_before_a_stop_are_counted(tmp_path, monkeypatch):
    rows = [None if i % 10 == 0 else text for i, text in enumerate(texts(300))]
    write_jsonl(tmp_path / "a.jsonl", rows)
    section = configure({"mine": {"kind": "files", "path": str(tmp_path / "a.jsonl"), "held_out": 0.1}})
    parts, encode = [], Encoder.encoded

    def stopping(self, documents):
        parts.append(1)
        if len(parts) == 6:
            raise Stopped
        return encode(self, documents)

    monkeypatch.setattr(Encoder, "encoded", stopping)
    with pytest.raises(Stopped):
        prepare(section, None, tmp_path / "data", seed=0, work=tmp_path / "work")
    manifest = prepare(section, None, tmp_path / "data", seed=0, work=tmp_path / "work")
    assert len(parts) > 12 and manifest.sources["mine"].skipped_rows == {"null": 30}
