"""One teacher pass for several budgets: `python -m benchmarks.teacher_pass [CHECKOUT]`, after `make run` there.

Trains stage 1's family again, from the sorted parent, with the stage's own settings but for how its sequences are
dealt; all ways train as many sequences, or compute as much. Prints held-out losses. Some ten minutes on one core.
"""

import argparse
import dataclasses
import statistics
from pathlib import Path

from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.held_out import held_out_loss
from elastic_core import ElasticModel, Submodel
from elastic_core.data.loader import PackedSequences, TokenData
from elastic_core.export import elastic_checkpoint
from elastic_core.export.elastic_checkpoint import Member
from elastic_core.training.loop import train, train_step
from elastic_core.training.run import Run
from elastic_core.training.stage import Stage
from tasks.settings import params

SEEDS = (0, 1)
TOGETHER = 3  # microbatches of a step; each of the stage's own batch size
COUNTED = 10  # steps whose operations are counted: budgets are dealt in shares, so more of them differ little


def ways(stage: Stage) -> dict[str, Stage]:
    """The same sequences per step and in all, dealt in other ways."""
    wide = dataclasses.replace(
        stage, batch_size=TOGETHER * stage.batch_size, microbatches=TOGETHER, steps=stage.steps // TOGETHER
    )
    return {
        "a budget a step": stage,
        f"{TOGETHER} budgets a step, a text each": wide,
        f"{TOGETHER} budgets a step, one text": dataclasses.replace(wide, budgets_per_batch=TOGETHER),
    }


def start(checkout: Path, stage: Stage, seed: int) -> Run:
    content = elastic_checkpoint.read(checkout / "artifacts/train_short/model")["budgets"]
    members = {name: Member(entry["target"], Submodel(**entry["submodel"])) for name, entry in content.items()}
    model, teacher = (ElasticModel.from_pretrained(checkout / "artifacts/rank/model") for _ in range(2))
    data = PackedSequences(TokenData(checkout / "artifacts/data"), stage.mixture, stage.sequence_length, 2 + seed)
    budgets = {name: member.target for name, member in members.items()}
    return Run(model, stage, data, budgets, members, teacher=teacher, seed=seed)


def flops_per_step(run: Run) -> float:
    with FlopCounterMode(display=False) as counter:
        for _ in range(COUNTED):
            train_step(run)
    return counter.get_total_flops() / COUNTED


def held_out(run: Run, data: TokenData, section: params.Evaluate) -> dict[str, float]:
    """Nats per token of every member, on all held-out text."""
    losses = {}
    for name, member in run.members.items():
        nats, num_tokens, _ = held_out_loss(run.model, member.submodel, data, section)
        losses[name] = nats / num_tokens
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="?", default=Path(), help="where `make run` has ended")
    checkout = parser.parse_args().checkout
    settings = params.load(checkout / "params.yaml")
    stages = ways(settings.train_short)
    flops = {name: flops_per_step(start(checkout, stage, 0)) for name, stage in stages.items()}
    *_, apart, shared = stages
    more = dataclasses.replace(stages[shared], steps=round(stages[shared].steps * flops[apart] / flops[shared]))
    stages[f"{shared}, as much computed"], flops[f"{shared}, as much computed"] = more, flops[shared]
    total = {name: flops[name] * stage.steps for name, stage in stages.items()}
    print("| dealt | steps | FLOPs | " + " | ".join(settings.budgets) + " |\n|" + "---|" * (3 + len(settings.budgets)))
    for name, stage in stages.items():
        losses = []
        for seed in SEEDS:
            run = start(checkout, stage, seed)
            for _ in tqdm(train(run), desc=f"{name}, seed {seed}", total=stage.steps, leave=False):
                pass
            losses.append(held_out(run, TokenData(checkout / "artifacts/data"), settings.evaluate))
        means = [f"{statistics.mean(found[budget] for found in losses):.3f}" for budget in settings.budgets]
        print(
            f"| {name} | {stage.steps} | {total[name] / total[apart]:.2f} × | " + " | ".join(means) + " |", flush=True
        )


if __name__ == "__main__":
    main()
