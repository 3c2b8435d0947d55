"""What saves memory or time on few GPUs and changes results: `python -m benchmarks.evidence.few_gpus DIRECTORY`.

DIRECTORY is the workspace of a finished run. Its family is trained from the sorted parent on stage 2's text for some
steps: with a frozen teacher and float32 moments, with 8-bit moments, and with cached logits. Every arm has the same
data, order and start. Printed, one JSON object per arm: the mean training KL over the last tenth of the steps and the
held-out loss, by budget; processor time per step; the size of the logits on disk.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.held_out import held_out_loss
from elastic_core import ElasticModel, Submodel
from elastic_core.data.loader import PackedSequences, TokenData
from elastic_core.export import elastic_checkpoint
from elastic_core.search.selection import Member
from elastic_core.training.distributed.ranks import Ranks
from elastic_core.training.loop import train
from elastic_core.training.run import Run
from elastic_core.training.stage import Loss, Stage
from elastic_core.training.teacher_cache import TeacherCache
from tasks.settings.load import read
from tasks.settings.merging import parameters

ARMS = {
    "frozen teacher, float32 moments": {},
    "8-bit moments": {"optimizer": "adamw8bit"},
    **{f"cached, k = {k}": {"teacher": "cached", "kept_logits": k} for k in (8, 32, 128)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--profile", default="default")
    parser.add_argument("--work", type=Path, default=Path("checkpoints/few-gpus"))
    arguments = parser.parse_args()
    artifacts, settings = arguments.directory / "artifacts", read(parameters(arguments.profile), "params.yaml")
    base = dataclasses.replace(
        settings.train_extended, steps=arguments.steps, teacher="frozen", loss=Loss(), loss_by_budget={}
    )
    for name, values in ARMS.items():
        arguments.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=arguments.work) as work:  # what else is there stays
            result = run_arm(artifacts, settings, dataclasses.replace(base, **values), Path(work))
        print(json.dumps({"arm": name, **result}), flush=True)


def run_arm(artifacts: Path, settings, stage: Stage, work: Path) -> dict:
    """Train one arm and measure it. `work`: an empty directory for the cached logits."""
    data, parent = TokenData(artifacts / "data"), artifacts / "rank" / "model"
    model = ElasticModel.from_pretrained(parent)
    sequences = PackedSequences(data, stage.mixture, stage.sequence_length, settings.seed + 3)
    content = elastic_checkpoint.read(artifacts / "train_short" / "model")["budgets"]
    members = {name: Member(entry["target"], Submodel(**entry["submodel"])) for name, entry in content.items()}
    values, size = {}, 0
    if stage.teacher == "cached":
        cache = TeacherCache(work, sequences, stage, model.config.vocab_size)
        cache.make(lambda: ElasticModel.from_pretrained(parent), Ranks(), contextlib.nullcontext())
        values, size = {"teacher_cache": cache}, sum(path.stat().st_size for path in work.iterdir())
    else:
        values = {"teacher": ElasticModel.from_pretrained(parent)}
    budgets = {name: member.target for name, member in members.items()}
    torch.manual_seed(settings.seed)
    run = Run(model, stage, sequences, budgets, members, seed=settings.seed, **values)
    begin = time.process_time()
    rows = list(train(run))
    seconds = time.process_time() - begin
    last = [row["budgets"] for row in rows[-max(1, len(rows) // 10) :]]
    found = {budget: [row[budget]["kl"] for row in last if budget in row] for budget in budgets}
    held_out = {}
    for budget, member in members.items():
        nats, tokens, _ = held_out_loss(model.eval(), member.submodel, data, settings.evaluate)
        held_out[budget] = nats / tokens
    return {
        "training_kl": {budget: sum(kl) / len(kl) for budget, kl in found.items() if kl},
        "held_out_loss": held_out,
        "cpu_seconds_per_step": seconds / len(rows),
        "bytes_per_token": size / max(1, stage.num_tokens()),
        "disk_bytes": size,
    }


if __name__ == "__main__":
    main()
