"""benchmarks/memory.py: the counter counts, and the arithmetic agrees with the built model."""

import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import gpu, memory
from elastic_core import ElasticModel


def test_the_counter_sees_what_is_alive():
    with memory.Alive() as alive:
        x = torch.zeros(1000)  # 4,000 bytes
        y = x + 1
        z = y.view(10, 100)  # a view: nothing new
        assert alive.now == alive.peak == 8000
        del y
        assert alive.now == 8000  # z keeps it
        del z
        assert alive.now == 4000
        (x * 2).sum()
    assert alive.peak == 8004 and alive.now == 4000


def test_state_is_counted_as_the_model_is_built():
    config = gpu.TINY.config()
    model = ElasticModel(config)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    rest = sum(p.numel() for p in model.parameters() if p.dim() != 2)
    assert memory.count_parameters(model.layout) == (matrices, rest)
    parts = list(memory.estimate(config, 4, 2, 32).values())
    assert parts[:2] == [16 * (matrices / 4 + rest), 2 * matrices / 4 + 4 * rest]
    assert parts[2] == 2 * 2 * 2 * config.vocab_size * config.hidden_size
    assert parts[5] == 5 * 2 * 32 * config.hidden_size * 2


def test_layers_and_loss_grow_with_the_tokens():
    config = gpu.TINY.config()
    for layer in range(3):
        short, long = (memory.layer_bytes(config, layer, 1, length) for length in (256, 512))
        assert 1.5 * short < long < 2.5 * short
    small, large = (memory.loss_bytes(config, 1, length) for length in (2048, 4096))
    logits = 4 * 1024 * config.vocab_size  # of one chunk of tokens
    assert large - small < 2 * logits < small  # chunks are not held together


def test_the_command_line_needs_a_configuration_only(tmp_path):
    gpu.TINY.config().save_pretrained(tmp_path)
    command = [sys.executable, "-m", "benchmarks.memory", str(tmp_path), "--length", "64"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("GB  together")
