"""Data preparation against one core of `tokenizers`, and in little memory."""

import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree
from unittest import mock

from tokenizers import Tokenizer

from benchmarks.comparison import MB, in_turn, median_ratio, peak_memory
from benchmarks.report import FAIL, PASS, Row, at_least, measured, not_measured
from elastic_core.data.chat_template import render
from elastic_core.data.tokenizer import load_tokenizer
from tasks.corpora.encoding import num_cores
from tasks.corpora.reasoning import Evaluation
from tasks.corpora.text_sources import Files, Sympy
from tasks.corpora.tokenizer import train_tokenizer
from tasks.prepare_data import PrepareData, prepare

SHARE_OF_CORES = 0.8
RATE_OF_TEXTS = 0.9
VOCABULARY = 16384
REPEATS = 3
NO_TASKS = Evaluation(chains=(), chains_direct=(), recall=(), items=1)  # no text is encoded for them
_PREPARE = """
import resource
resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + {limit}, -1))
mine = {{"kind": "files", "path": {path!r}, "held_out": 0.2}}
config = PrepareData(sources={{"mine": mine}}, evaluation=Evaluation(items=1))
prepare(config, {tokenizer!r}, {out!r}, 0)
"""


def rows(quick: bool) -> Iterator[Row]:
    characters = 400_000 if quick else 10_000_000
    with tempfile.TemporaryDirectory(prefix="elastic-preparation-") as temporary:
        directory = Path(temporary)
        with (directory / "code.txt").open("w", encoding="utf-8") as file:
            file.writelines(text for split, text in Sympy(max_characters=characters).texts(0) if split == "train")
        source = Files(path=str(directory / "code.txt"))
        vocabulary = 300 if quick else VOCABULARY
        tokenizer = train_tokenizer({"code": source}, vocabulary, min(characters, 4_000_000), 0, lambda _: None)
        tokenizer.save_pretrained(directory / "own")
        yield from against_one_core(directory, source, quick)
        yield from against_text(directory, source, quick)
        if sys.platform != "linux":
            yield not_measured("preparation, memory", "peak", "reads /proc")
            return
        yield memory(directory, 4 * MB if quick else 450 * MB, 300 * MB)


def against_one_core(directory: Path, source: Files, quick: bool) -> Iterator[Row]:
    """The whole stage, from a text file to files of tokens, against the encoding alone."""
    encoder = Tokenizer.from_file(str(directory / "own" / "tokenizer.json"))
    texts = [text for _, text in source.texts(0)]
    config = PrepareData(sources={"mine": {"kind": "files", "path": source.path, "held_out": 0.2}}, evaluation=NO_TASKS)

    def one_core() -> None:
        for first in range(0, len(texts), 16):
            encoder.encode_batch_fast(texts[first : first + 16], add_special_tokens=False)

    ways = {
        "one core": one_core,
        "stage": lambda: prepare(config, directory / "own", directory / "data", 0),
    }
    seconds = {name: [] for name in ways}

    def timed(name: str) -> None:
        begin = time.process_time()
        ways[name]()
        seconds[name].append(time.process_time() - begin)

    with mock.patch.dict(os.environ, TOKENIZERS_PARALLELISM="false"):  # its own threads; ours are not
        times = in_turn(
            {name: functools.partial(timed, name) for name in ways},
            1 if quick else REPEATS,
            lambda: rmtree(directory / "data", ignore_errors=True),
        )
    ratio, size = median_ratio(times, "one core", "stage"), Path(source.path).stat().st_size
    what = f"text file of {size / MB:.1f} MB, {num_cores()} cores"
    note = f" ({size / MB / statistics.median(times['stage']):.1f} MB/s)"
    # Says something on a loaded machine too: how much more there is to do than what is shared out between cores.
    work = median_ratio(seconds, "stage", "one core")
    if quick:
        yield measured("preparation, speed of one core of tokenizers", what, f"{ratio:.2f} ×{note}")
        yield measured("preparation, processor time of the encoding alone", what, f"{work:.2f} ×")
        return
    goal = SHARE_OF_CORES * num_cores()
    yield at_least("preparation, speed of one core of tokenizers", what, ratio, goal, note)
    yield measured("preparation, processor time of the encoding alone", what, f"{work:.2f} ×")


def against_text(directory: Path, source: Files, quick: bool) -> Iterator[Row]:
    """Conversations against texts that hold the same, already rendered: processor time of the whole stage."""
    tokenizer = load_tokenizer(directory / "own")
    text = "".join(text for _, text in source.texts(0))
    for what, answer in (("answers of 4,000 characters", 4000), ("answers of 400 characters", 400)):
        step, part = 300 + answer, text[: len(text) if answer > 400 else len(text) // 4]
        pairs = [(part[at : at + 300], part[at + 300 : at + step]) for at in range(0, len(part) - step, step)]
        rows = {
            "texts": [{"text": render(tokenizer, as_messages(*pair))} for pair in pairs],
            "conversations": [{"prompt": user, "completion": assistant} for user, assistant in pairs],
        }
        configs = {}
        for name, given in rows.items():
            path = directory / f"{name}.{answer}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
            section = {"kind": "files" if name == "texts" else name, "path": str(path), "held_out": 0.2}
            section |= {"special_tokens": "parse"} if name == "texts" else {}
            configs[name] = PrepareData(sources={"mine": section}, evaluation=NO_TASKS)
        seconds = {name: [] for name in configs}

        def timed(name: str, configs=configs, seconds=seconds) -> None:
            begin = time.process_time()
            prepare(configs[name], directory / "own", directory / "data", 0)
            seconds[name].append(time.process_time() - begin)

        with mock.patch.dict(os.environ, TOKENIZERS_PARALLELISM="false"):
            ways = {name: functools.partial(timed, name) for name in configs}
            in_turn(ways, 1 if quick else REPEATS, lambda: rmtree(directory / "data", ignore_errors=True))
        ratio = median_ratio(seconds, "texts", "conversations")
        check = "preparation, conversations: characters per second and core, of rendered texts"
        if quick or answer < 4000:
            yield measured(check, what, f"{ratio:.2f} ×")
        else:
            yield at_least(check, what, ratio, RATE_OF_TEXTS)


def as_messages(user: str, assistant: str) -> list[dict]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def memory(directory: Path, file_bytes: float, limit: float) -> Row:
    """A text file larger than what the process may allocate beyond its imports."""
    path = directory / "large.txt"
    words = " ".join(["the", "of", "and", "to", "in", "you", "that", "it"] * 250)
    with path.open("w") as file:
        for line in range(int(file_bytes) // len(words)):
            file.write(f"{line} {words}\n")
    body = _PREPARE.format(
        limit=int(limit), path=str(path), tokenizer=str(directory / "own"), out=str(directory / "large")
    )
    imports = "from tasks.prepare_data import PrepareData, prepare; from tasks.corpora.reasoning import Evaluation"
    before, peak = peak_memory(imports, body)
    what = f"text file of {path.stat().st_size / MB:,.0f} MB, {num_cores()} cores, under RLIMIT_DATA"
    result = f"{(peak - before) / MB:,.0f} MB above the imports"
    status = PASS if peak - before <= limit else FAIL
    return Row("preparation, memory", what, result, f"≤ {limit / MB:,.0f} MB", status)
