"""The cases of distributed_cases.py that rank a parent: see there."""

import contextlib

import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import LlamaConfig, NemotronHConfig

from elastic_core import rank
from elastic_core.data.loader import IGNORED_LABEL, Batch
from elastic_core.search.importance import depth
from elastic_core.search.importance.methods import DEPTH_METHODS
from elastic_core.search.importance.state import RankingState
from elastic_core.training.distributed.execution import Execution
from elastic_core.training.distributed.gradients import local
from elastic_core.training.distributed.placement import autocast, gather_root, is_matrix, place, reshard
from elastic_core.training.estimate.live_bytes import TrainingSetting
from elastic_core.training.estimate.rank_memory import RankWorkload, rank_peak
from tasks.rank import load_parent, make_state
from tests.support.models.parents import random_elastic
from tests.support.models.routed_family import CONFIG

MIXTURES = {
    "layers_block_type": ["moe", "full_attention", "moe"],
    **{"n_routed_experts": 6, "n_group": 2, "num_experts_per_tok": 2, "moe_latent_size": 8},
    **{"moe_intermediate_size": 12, "moe_shared_expert_intermediate_size": 16},
}
EXPERTS = NemotronHConfig(**CONFIG.to_dict() | MIXTURES)
RANKINGS = [
    *((CONFIG, method, "projection", "float32") for method in DEPTH_METHODS),
    (EXPERTS, "one_shot_nmse", "output_norm", "float32"),
    (CONFIG, "iterative_nmse", "projection", "bfloat16"),
    (CONFIG, "one_shot_perplexity", "output_norm", "bfloat16"),
    (EXPERTS, "iterative_nmse", "output_norm", "bfloat16"),
    (EXPERTS, "one_shot_nmse", "projection", "bfloat16"),
]
WIDE_LAYERS = NemotronHConfig(
    **CONFIG.to_dict()
    | {"vocab_size": 512, "hidden_size": 128, "layers_block_type": ["mamba", "mlp", "full_attention"]}
    | {"intermediate_size": 512, "mamba_num_heads": 8, "mamba_head_dim": 32}
)
WIDE_LLAMA = LlamaConfig(
    vocab_size=1024, hidden_size=128, num_hidden_layers=3, intermediate_size=384, num_attention_heads=4, head_dim=32,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip


def sharded(config, ranks, precision="float32"):
    """A parent for forward passes, of which every rank holds a part."""
    model = place(random_elastic(3, config), ranks, Execution(), precision, frozen=True)
    gather_root(model)
    return model


def ranking(ranks, data, directory):
    """By every method, in both precisions; and experts, of which a rank's tokens ask some."""
    ids = torch.randint(0, CONFIG.vocab_size, (3, 4, 16), generator=torch.Generator().manual_seed(0))
    found, batches = {}, list(ids[:, ranks.part(4)])
    for config, method, measure, precision in RANKINGS:
        with autocast(precision, ranks.device):
            options = {"depth_method": method, "measure": measure, "reduce": ranks.sum}
            ranked = rank(sharded(config, ranks, precision), batches, **options)
        found[f"{method} {measure} {precision}"] = vars(ranked)
    return found


def stored_ranking(ranks, data, directory):
    """Of a parent with bfloat16 files, computed in float32: only a sharded parent is held in bfloat16."""
    with ranks.first_only() as is_first:
        if is_first:
            random_elastic(3, CONFIG).bfloat16().save_pretrained(directory / "parent")
    model = load_parent(directory / "parent", ranks, "float32")
    ids = torch.randint(0, CONFIG.vocab_size, (3, 4, 16), generator=torch.Generator().manual_seed(0))
    ranked = vars(rank(model, list(ids[:, ranks.part(4)]), reduce=ranks.sum))
    reshard(model)
    types = {str(p.dtype) for p in model.parameters() if is_matrix(p)}
    return {**ranked, "types": types, "bytes": sum(local(p).nbytes for p in model.parameters() if is_matrix(p))}


def padded_ranking(ranks, data, directory):
    """One rank has padding, and so fewer positions. Stopped, and gone on with. Final states are held while they fit."""
    ids = torch.randint(0, CONFIG.vocab_size, (3, 4, 16), generator=torch.Generator().manual_seed(0))
    numbers = torch.zeros(4, 16, dtype=torch.int64)
    numbers[3, 9:] = 16  # padding
    labels = torch.where(numbers < 16, ids.roll(-1, 2), IGNORED_LABEL)
    part, kept, saves = ranks.part(4), {}, []
    batches = [Batch(i[part], label[part], numbers[part]) for i, label in zip(ids, labels, strict=True)]

    def save(name, content):
        kept[name] = content if ranks.rank == 0 else None
        saves.append(name)
        if len(saves) == 8:
            raise Stopped

    def load(name):
        return ranks.from_first(lambda: kept.get(name))

    held_bytes, depth.HELD_BYTES = depth.HELD_BYTES, 2 * 32 * CONFIG.hidden_size * 4 - 1  # a batch of the rank without
    for _ in range(2):
        with contextlib.suppress(Stopped):
            state = RankingState(load, save, ranks.rank == 0)
            ranked = rank(sharded(CONFIG, ranks), batches, reduce=ranks.sum, state=state)
        ranks.barrier()
    depth.HELD_BYTES = held_bytes
    return vars(ranked)


class Tracker(MemTracker):
    """torch's tracker of live memory, without its hooks on modules, which allow one call of each."""

    def _pre_fw_hook(self, *_):
        pass

    _post_fw_hook = _pre_bw_hook = _post_bw_hook = _pre_fw_hook


def ranking_memory(ranks, data, directory):
    """(planned bytes, bytes that a real ranking held), where layers and where gathered weights are the most."""
    found = []
    for config, precision, method, rows, length in (
        (WIDE_LAYERS, "float32", "iterative_nmse", 2, 384),
        (WIDE_LLAMA, "bfloat16", "one_shot_perplexity", 2, 384),
        (WIDE_LLAMA, "float32", "iterative_nmse", 1, 32),
    ):
        model = place(random_elastic(3, config), ranks, Execution(), precision, frozen=True)
        ids = torch.randint(0, config.vocab_size, (2, rows, length), generator=torch.Generator().manual_seed(0))
        numbers = (torch.arange(length) >= length // 2).long().expand(rows, length).contiguous()
        tracker = Tracker()
        tracker.track_external(model)
        with tracker, autocast(precision, ranks.device):
            gather_root(model)
            batches = [Batch(i.clone(), i.roll(-1, 1), numbers) for i in ids]
            rank(model, batches, depth_method=method, reduce=ranks.sum, depth_batches=1, min_depth=2)
        real = sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())
        held, setting = getattr(torch, precision), TrainingSetting(precision, Execution(), ranks.is_distributed)
        load = RankWorkload(rows, length, 2, 1, held, ranks.world, depth_method=method)
        found.append((rank_peak(config, setting, load).total, real))
    return found


class Stopped(BaseException):
    """As a kill: nothing of ours catches it."""


def resumed_ranking(ranks, data, directory):
    """Stopped after some batches and scores, and then gone on with."""
    ids = torch.randint(0, CONFIG.vocab_size, (3, 4, 16), generator=torch.Generator().manual_seed(0))
    batches, model, saves = list(ids[:, ranks.part(4)]), sharded(CONFIG, ranks), []
    state = make_state(str(directory), ranks)

    def stop(name, content):
        state.save(name, content)
        saves.append(name)
        if len(saves) in (2, 9):
            raise Stopped

    options = {"reduce": ranks.sum, "measure": "projection"}
    for _ in range(2):
        with contextlib.suppress(Stopped):
            rank(model, batches, **options, state=RankingState(state.load, stop, state.is_first))
        ranks.barrier()
    ranked = rank(model, batches, **options, state=make_state(str(directory), ranks))
    return {**vars(ranked), "num_saves": len(saves)}
