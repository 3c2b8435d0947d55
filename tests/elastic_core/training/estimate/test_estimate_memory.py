"""The memory of a step: the counter counts, pieces add up, and what is predicted is what real steps take."""

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import gpu, memory
from elastic_core import ElasticModel
from elastic_core.training.distributed.execution import Execution
from elastic_core.training.distributed.ranks import Ranks
from elastic_core.training.estimate.live_bytes import LiveBytes, TrainingSetting, extrapolate
from elastic_core.training.estimate.piece_memory import Pieces
from elastic_core.training.estimate.step_memory import (
    FLOAT32,
    KINDS,
    Workload,
    count_parameters,
    state_bytes,
    step_peak,
)
from elastic_core.training.state_matching import NUMBERS_PER_CHUNK
from tasks.commands.plan_stages import stage_peak
from tasks.parents.config import new_config
from tasks.settings.load import read
from tasks.settings.merging import parameters
from tests.support.marks import thorough_but
from tests.support.models.parents import random_config
from tests.support.oracles.memory_cases import CASES

CHECKPOINTED = Execution(activation_checkpointing=True)
CONFIG = gpu.TINY.config()


def test_the_counter_sees_what_is_alive():
    before = torch.zeros(500)
    with LiveBytes() as alive:
        x = torch.zeros(1000)  # 4,000 bytes
        y = x + 1
        z = y.view(10, 100)  # a view: nothing new
        assert alive.now == alive.peak == 8000
        del y
        assert alive.now == 8000  # z keeps it
        del z
        assert alive.now == 4000
        (x * 2).sum()
        before.view(10, 50)  # of what was there: not its own
    assert alive.peak == 8004 and alive.now == 4000


def test_state_is_counted_as_the_model_is_built():
    model = ElasticModel(CONFIG)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    rest = sum(p.numel() for p in model.parameters() if p.dim() != 2)
    assert count_parameters(model.layout) == (matrices, rest)
    sharded = TrainingSetting("bfloat16", CHECKPOINTED, distributed=True)
    held = FLOAT32 * (matrices / 4 + rest)
    state = {"weights": held, "optimizer": 2 * held, "gradients": held, "teacher": 2 * matrices / 4 + 4 * rest}
    assert state_bytes(Pieces(CONFIG, sharded), Workload(2, 32, shards=4)) == state
    elsewhere = Pieces(CONFIG, TrainingSetting("bfloat16", Execution(offload_teacher=True), distributed=True))
    assert state_bytes(elsewhere, Workload(2, 32, shards=4)) == state | {"teacher": 4 * rest}
    assert state_bytes(elsewhere, Workload(2, 32, has_teacher=False))["teacher"] == 0


LLAMA = [  # all sizes are the parent's own: steps of the largest budget are measured
    *(f"choices.{name}=null" for name in
      ("hidden_size", "intermediate_size", "mamba_num_heads", "mamba_head_dim", "num_attention_heads", "depth")),
    *(f"{stage}.{name}" for stage in ("train_short", "train_extended") for name in
      ("sequence_length=24", "batch_size=2")),
]  # fmt: skip


@pytest.mark.parametrize("case", thorough_but(("plain", "states"), CASES))
def test_real_steps_of_the_default_parent_take_what_is_predicted(case):
    """Both stages, well within the 15 % that are promised; benchmarks/memory.py prints the numbers at full size."""
    smaller = ["train_short.batch_size=4", "train_extended.batch_size=2"]
    settings = read(parameters(overrides=[*smaller, *CASES[case]]), "params.yaml")
    config = new_config(settings.parent.model, settings.prepare_data.vocab_size)
    for name, peak, real in memory.compare(settings, config):
        assert abs(peak.total / real - 1) < 0.08, (name, peak, real)


@pytest.mark.parametrize("length", [256, 257])  # with a mask, and with a call per document
def test_documents_are_predicted(length):
    """They take more than 1 % in such rows, which this does not allow."""
    values = f"sequence_length={length}", "batch_size=2"
    settings = read(parameters(overrides=[*(f"train_extended.{value}" for value in values)]), "params.yaml")
    config = new_config(settings.parent.model, settings.prepare_data.vocab_size)
    peak = stage_peak("train_extended", settings, config)
    real = memory.measured(config, settings, "train_extended", Ranks())
    assert abs(peak.total / real - 1) < 0.002, (peak, real)


@pytest.mark.parametrize("tied", ["tied", "untied"])
@pytest.mark.parametrize("case", thorough_but(("plain", "checkpointed"), CASES))
def test_real_steps_of_a_llama_take_what_is_predicted(case, tied):
    """A vocabulary so large that it matters where the gradients of head and embeddings wait for each other.

    What sharding holds of them is an upper estimate, within the 15 % that are promised.
    """
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=128, tie_word_embeddings=tied == "tied",
    )  # fmt: skip
    settings = read(parameters(overrides=[*LLAMA, *CASES[case]]), "params.yaml")
    for name, peak, real in memory.compare(settings, config):
        assert 0.97 < peak.total / real < (1.15 if case == "sharded" else 1.03), (name, peak, real)


@pytest.mark.parametrize("character", "M*-")
def test_a_checkpointed_layer_keeps_its_input_alone(character):
    x = 2 * 32 * CONFIG.hidden_size * FLOAT32
    footprint = Pieces(CONFIG, TrainingSetting(execution=CHECKPOINTED)).layer(character, 2, 32)
    assert footprint.kept == footprint.output == x
    assert Pieces(CONFIG, TrainingSetting()).layer(character, 2, 32).kept > x
    weights = [p for name, p in ElasticModel(CONFIG).named_parameters()
               if name.startswith(f"model.layers.{gpu.TINY.pattern.index(character)}.")]  # fmt: skip
    assert footprint.gradients == FLOAT32 * sum(p.numel() for p in weights)


@pytest.mark.thorough
def test_long_sequences_are_counted_by_two_shorter_ones():
    pieces = Pieces(CONFIG, TrainingSetting("bfloat16", CHECKPOINTED))
    line, direct = pieces.layer("M", 1, 2560), pieces._count_layer("M", 1, 2560)  # from 1,024 and 2,048
    assert line is not direct
    assert vars(line) == pytest.approx(vars(direct), rel=0.1)  # another piece of work may be the largest
    tail = pieces._count_tail(6000)
    assert vars(pieces.tail(6000)) == pytest.approx(vars(tail), rel=0.02)
    chunk = NUMBERS_PER_CHUNK // CONFIG.hidden_size
    for tokens in (chunk // 2, 4 * chunk, 9 * chunk // 2):  # exact: only whole chunks are the largest
        assert pieces.states(tokens) == pieces._count_states(tokens)
    assert extrapolate(lambda length: direct, 8192, (4096, 8192)) is direct  # no longer than the longer one: as it is


def test_the_loss_does_not_hold_all_logits():
    small, large = (Pieces(CONFIG, TrainingSetting()).tail(tokens).forward for tokens in (2048, 4096))
    logits = 4 * 1024 * CONFIG.vocab_size  # of one chunk of tokens
    assert large - small < 2 * logits < small  # chunks are not held together


def test_a_scan_on_a_gpu_is_counted_with_its_own_blocks():
    cpu, gpu_ = (Pieces(CONFIG, TrainingSetting(gpu=on_gpu)).layer("M", 2, 300) for on_gpu in (False, True))
    assert gpu_.output == cpu.output and gpu_.gradients == cpu.gradients
    assert gpu_.kept != cpu.kept  # fewer states between chunks


def test_a_gpu_alone_casts_weights_as_a_cpu_does():
    cpu, gpu_ = (Pieces(CONFIG, TrainingSetting("bfloat16", gpu=on_gpu)).layer("M", 2, 33) for on_gpu in (False, True))
    assert gpu_.gradients == cpu.gradients
    assert gpu_.kept == pytest.approx(cpu.kept, rel=0.1) and gpu_.forward == pytest.approx(cpu.forward, rel=0.1)
    assert gpu_.backward == pytest.approx(cpu.backward, rel=0.15)


def test_sharding_moves_state_to_others_and_gathers_blocks():
    config = random_config(1)
    setting = TrainingSetting(distributed=True)
    one, four = (step_peak(Pieces(config, setting), Workload(1, 16, shards=shards)) for shards in (1, 4))
    alone = step_peak(Pieces(config, TrainingSetting()), Workload(1, 16))
    assert four.kinds["optimizer"] < one.kinds["optimizer"] == alone.kinds["optimizer"]
    assert four.kinds["gathered"] == one.kinds["gathered"] > alone.kinds["gathered"] == 0
    assert tuple(one.kinds) == KINDS and one.total == sum(one.kinds.values())


def test_with_kernels_only_layers_with_a_scan_take_other_memory():
    """`tests/cuda_path` compares the numbers with the package's own code."""
    pieces = Pieces(CONFIG, TrainingSetting("bfloat16", gpu=True, distributed=True))
    kernels = pieces.with_kernels()
    assert pieces.has_kernels
    assert kernels.layer("M", 1, 300).kept < pieces.layer("M", 1, 300).kept
    assert kernels.layer("*", 1, 300) == pieces.layer("*", 1, 300) and kernels.tail(64) == pieces.tail(64)
    assert kernels.layer("M", 1, 300).gradients == pieces.layer("M", 1, 300).gradients
    for setting, gates in (
        (TrainingSetting("float32", gpu=True), False),
        (TrainingSetting("bfloat16", gpu=True), True),
    ):
        assert not Pieces(CONFIG, setting, gates).has_kernels
