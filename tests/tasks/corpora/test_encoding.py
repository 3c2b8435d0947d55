"""Encoding by threads: the same tokens as one text after another, whatever the number of threads."""

import numpy as np
import pytest

from elastic_core.data.token_files import Manifest
from tasks.corpora import encoding
from tasks.corpora.encoding import Encoder
from tasks.corpora.tokenizer import END_OF_TEXT, train_tokenizer
from tasks.prepare_data import PrepareData, prepare

TEXTS = [f"{i}: " + f"words and {END_OF_TEXT}, größer {i * i} " * (i % 7 + 1) for i in range(200)]
DOCUMENTS = [("held_out" if i % 9 == 4 else "train", text) for i, text in enumerate(TEXTS)]


class Given:
    """A source of the texts above."""

    is_generated = False

    def texts(self, seed):
        return iter(DOCUMENTS)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer({"given": Given()}, 300, 10_000, 0, progress=lambda number: None)


@pytest.mark.parametrize("bos", [None, 0, 7])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_encode_as_one_text_after_another(tokenizer, monkeypatch, threads, bos):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 500)
    manifest = Manifest(300, 0, bos, "", {})
    batches = list(Encoder(tokenizer, manifest, threads).encoded(DOCUMENTS))
    assert len(batches) > 20
    tokenizer.backend_tokenizer.encode_special_tokens = True
    for split in ("train", "held_out"):
        texts = [text for part, text in DOCUMENTS if part == split]
        documents = [ids for batch in batches if batch.split == split for ids in batch.documents]
        assert len(documents) == len(texts)
        for text, ids in zip(texts, documents, strict=True):
            plain = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
            assert ids.dtype == np.uint16 and ids.tolist() == [*([] if bos is None else [bos]), *plain, 0]
        assert sum(b.num_bytes for b in batches if b.split == split) == sum(len(text.encode()) for text in texts)
        assert sum(b.num_characters for b in batches if b.split == split) == sum(map(len, texts))


def test_the_number_of_threads_changes_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 700)
    (tmp_path / "a.txt").write_text("\n".join(TEXTS * 12))
    config = PrepareData(sources={"mine": {"kind": "files", "path": str(tmp_path / "a.txt"), "held_out": 0.3}})
    for threads in (1, 2, 7):
        prepare(config, None, tmp_path / str(threads), 0, threads)
    names = sorted(path.name for path in (tmp_path / "1").iterdir() if path.is_file())
    assert len(names) == 5
    for name in names:
        assert len({(tmp_path / str(threads) / name).read_bytes() for threads in (1, 2, 7)}) == 1


def test_a_reader_is_not_left_far_behind(tokenizer, monkeypatch):
    """Texts are read as they are encoded: a corpus larger than memory goes through."""
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 100)
    read = []
    documents = (read.append(1) or ("train", "x" * 100) for _ in range(1000))
    for done, _ in enumerate(Encoder(tokenizer, Manifest(300, 0, None, "", {}), 2).encoded(documents), 1):
        assert len(read) - done < 2 * 2
    assert len(read) == done == 1000
