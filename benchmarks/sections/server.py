"""`elastic serve` under 8 concurrent requests, against `transformers serve` with the extracted model."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.report import Row, at_least, measured
from benchmarks.sections.serving import QUICK, SHAPE, write_family
from benchmarks.shapes import Shape
from elastic_core import extract
from tasks.serving.engine import Engine
from tasks.serving.family import Family
from tasks.serving.http import app
from tasks.serving.http.service import Service
from tasks.serving.metrics import Metrics
from tasks.serving.serve import limits_of

CONCURRENT, PROMPT, NEW, REPEATS = 8, 32, 24, 5
START = 180  # seconds until a server answers


def rows(quick: bool) -> Iterator[Row]:
    """Tokens per second of all requests together. The quick run has no other server: that takes too long to start."""
    shape, budgets = (QUICK, ["0.3"]) if quick else (SHAPE, ["full", "0.3"])
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as running:
        directory = Path(temporary)
        write_family(directory / "elastic", shape)
        _write_tokenizer(directory / "elastic", shape)
        elastic, others = running.enter_context(_elastic(directory / "elastic", quick)), {}
        for name in [] if quick else budgets:
            extract(directory / "elastic", name, directory / name)
            program = Path(sys.executable).with_name("transformers")
            command = [str(program), "serve", str(directory / name), "--device", "cpu"]
            others[name] = running.enter_context(_server(command))
        for name in budgets:
            ways = {"elastic": (elastic, name)} | ({} if quick else {"other": (others[name], str(directory / name))})
            rates = {way: [] for way in ways}
            for repeat in range(1 if quick else REPEATS + 1):
                for way, (address, model) in ways.items():
                    rate = _rate(address, model, repeat)
                    if repeat or quick:  # the first round warms up
                        rates[way].append(rate)
            own, what = statistics.median(rates["elastic"]), f"{CONCURRENT} concurrent requests at budget {name}"
            if quick:
                yield measured("server", f"tokens/s, {what}", f"{own:,.0f}")
                continue
            ratio = statistics.median(a / b for a, b in zip(rates["elastic"], rates["other"], strict=True))
            yield at_least("server", f"tokens/s, {what}, / transformers serve", ratio, 1.0, f" ({own:,.0f} tokens/s)")


def _write_tokenizer(directory: Path, shape: Shape) -> None:
    """A word for every token id, so that every text of the random model has its tokens."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape.vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def _elastic(directory: Path, quick: bool) -> contextlib.AbstractContextManager[str]:
    """The address of `elastic serve`: a process, or for a quick run a thread of this one."""
    if not quick:
        return _server([sys.executable, "-m", "flows.cli", "serve", str(directory)])
    family, metrics = Family(directory), Metrics()
    engine = Engine(family, limits_of(directory), metrics)
    return app.running(app.create_app(Service(family, engine, metrics, 60.0)), engine, app.bind("127.0.0.1", 0))


@contextlib.contextmanager
def _server(command: list[str]) -> Iterator[str]:
    """The address of a server, once it answers."""
    with app.bind("127.0.0.1", 0) as place:
        port = place.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=output, stderr=output, env=environment)
        try:
            begin = time.monotonic()
            while not _answers(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None or time.monotonic() - begin > START:
                    output.seek(0)
                    raise RuntimeError(f"{' '.join(command)} does not answer: {output.read()[-2000:].decode()}")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _rate(address: str, model: str, seed: int) -> float:
    """Tokens per second of CONCURRENT requests that come together."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, 256, (CONCURRENT, PROMPT), generator=generator).tolist()

    def ask(prompt: list[int]) -> int:
        text = " ".join(f"w{token}" for token in prompt)
        body = {"model": model, "prompt": text, "max_tokens": NEW, "temperature": 0}
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["usage"]["completion_tokens"]

    begin = time.perf_counter()
    with ThreadPoolExecutor(CONCURRENT) as pool:
        num_tokens = sum(pool.map(ask, prompts))
    return num_tokens / (time.perf_counter() - begin)
