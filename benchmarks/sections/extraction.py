"""Extraction against `cp` of the bytes that it writes, and what extracting and loading hold in memory."""

import functools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import rmtree

import torch
from torch import Tensor
from transformers import NemotronHConfig

from benchmarks.comparison import MB, in_turn, median_ratio, peak_memory
from benchmarks.report import FAIL, PASS, Row, at_least, measured, not_measured
from elastic_core import Submodel, extract
from elastic_core.io.atomic import whole_directory
from elastic_core.io.tensor_files import Entry
from elastic_core.model import hf
from elastic_core.model.architectures import parameter_layout
from elastic_core.model.architectures.nemotron_h import disk_name

SHARE_OF_CP, SLACK = 0.8, 300 * MB
SHARD_BYTES = 1 << 30
REPEATS = 9


def config_like_12b(pattern: str, hidden: int = 5120) -> NemotronHConfig:
    """Layers of Nemotron-Nano-12B-v2's shape (at hidden 5120); few of them, and a quarter of the vocabulary."""
    return NemotronHConfig(
        vocab_size=32768 * hidden // 5120, hidden_size=hidden, intermediate_size=4 * hidden,
        layers_block_type=NemotronHConfig._pattern_to_list(pattern), num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 640, head_dim=128, mamba_num_heads=hidden // 40, mamba_head_dim=80,
        n_groups=8, ssm_state_size=128, conv_kernel=4, mlp_hidden_act="relu2",
    )  # fmt: skip


class Repeated:
    """A tensor of any size, of one block of random numbers over and over."""

    def __init__(self, shape: tuple[int, ...], block: Tensor):
        self.shape, self.block = shape, block

    def __getitem__(self, rows: slice) -> Tensor:
        shape = (rows.stop - rows.start, *self.shape[1:])
        size = torch.Size(shape).numel()
        return self.block.repeat(-(-size // len(self.block)))[:size].view(shape)


def write_checkpoint(directory: Path, config: NemotronHConfig, shard_bytes: int = SHARD_BYTES) -> int:
    """A sharded bfloat16 directory of `config`; returns the bytes of its largest tensor."""
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    shapes = {disk_name(name): tuple(dim.size for dim in dims) for name, dims in parameter_layout(config).items()}
    entries = {name: Entry(torch.bfloat16, shape) for name, shape in shapes.items()}
    with whole_directory(directory) as partial:
        hf.write_config(partial, config, dtype="bfloat16")
        hf.write_tensors(partial, entries, ((n, Repeated(s, block)) for n, s in shapes.items()), shard_bytes)
    return max(entry.num_bytes for entry in entries.values())


def total_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def flush(directory: Path) -> None:
    for path in directory.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def rows(quick: bool) -> Iterator[Row]:
    hidden = 640 if quick else 5120
    config = config_like_12b("M-*M-", hidden)
    # The widths of 9B in 12B; and half of every width, where much is read that is not kept.
    submodels = {
        "9B's widths": Submodel(hidden_size=7 * hidden // 8, intermediate_size=49 * hidden // 16),
        "half of every width": Submodel(
            hidden_size=hidden // 2, intermediate_size=2 * hidden, mamba_num_heads=hidden // 80, mamba_head_dim=40,
            num_attention_heads=max(hidden // 256 // 8 * 8, config.num_key_value_heads),
        ),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="elastic-extraction-") as temporary:
        directory = Path(temporary) / "parent"
        largest = write_checkpoint(directory, config, SHARD_BYTES if not quick else SHARD_BYTES >> 6)
        for name, submodel in submodels.items():
            for synced in (False, True):
                yield from against_cp(directory, submodel, name, synced, quick)
        if sys.platform != "linux":
            yield not_measured("extraction, memory", "peak", "reads /proc")
            return
        yield extraction_memory(directory, submodels["9B's widths"], largest)
        yield loading_memory(directory, largest)


def against_cp(directory: Path, submodel: Submodel, name: str, synced: bool, quick: bool) -> Iterator[Row]:
    """Extract, and copy an earlier extraction's files, in turn, from and to the page cache or the disk alike."""
    reference, out, copy = (directory.with_name(kind) for kind in ("reference", "out", "copy"))
    rmtree(reference, ignore_errors=True)
    extract(directory, submodel, reference)

    def clear() -> None:
        rmtree(out, ignore_errors=True)
        rmtree(copy, ignore_errors=True)

    def take() -> None:
        extract(directory, submodel, out)
        if synced:
            flush(out)

    def cp() -> None:
        subprocess.run(["cp", "-r", reference, copy], check=True)
        if synced:
            flush(copy)

    work = {"extract": [], "cp": []}

    def timed(name: str, way: Callable[[], None]) -> None:
        begin = sum(os.times()[:4])  # of children too
        way()
        work[name].append(sum(os.times()[:4]) - begin)

    ways = {"extract": functools.partial(timed, "extract", take), "cp": functools.partial(timed, "cp", cp)}
    times = in_turn(ways, 1 if quick else REPEATS, clear)
    written = total_bytes(reference)
    rate = written / statistics.median(times["extract"]) / 1e9
    what = f"{name}: {total_bytes(directory) / 1e9:.1f} GB → {written / 1e9:.2f} GB{', fsync' if synced else ''}"
    clear()
    ratio, note = median_ratio(times, "cp", "extract"), f" ({rate:.2f} GB/s)"
    if quick:  # small files are all overhead
        yield measured("extraction, speed of cp", what, f"{ratio:.2f} ×{note}")
        return
    yield at_least("extraction, speed of cp", what, ratio, SHARE_OF_CP, note)
    # On a machine whose other cores are taken, the time follows from this: cp moves bytes once, inside the kernel.
    yield measured("extraction, processor time of cp", what, f"{median_ratio(work, 'extract', 'cp'):.2f} ×")


def within_memory(check: str, what: str, peak: float, bound: float) -> Row:
    result = f"{peak / MB:,.0f} MB above torch and transformers"
    return Row(check, what, result, f"≤ {bound / MB:,.0f} MB", PASS if peak <= bound else FAIL)


def extraction_memory(directory: Path, submodel: Submodel, largest: int) -> Row:
    out = directory.with_name("out")
    before, peak = peak_memory(
        "from elastic_core import Submodel, extract",
        f"extract({str(directory)!r}, {submodel!r}, {str(out)!r})",
    )
    rmtree(out)
    return within_memory("extraction, memory", "resident at most, mapped files too", peak - before, largest + SLACK)


def loading_memory(directory: Path, largest: int) -> Row:
    before, peak = peak_memory(
        "import torch; from elastic_core import ElasticModel",
        f"ElasticModel.from_pretrained({str(directory)!r}, dtype=torch.bfloat16)",
    )
    size = total_bytes(directory)
    what = f"from_pretrained of {size / 1e9:.1f} GB in bfloat16, beyond the model itself"
    return within_memory("loading, memory", what, peak - before - size, largest + SLACK)
