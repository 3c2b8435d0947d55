"""What several ranks and one process both do; `run_all` runs some of the cases.

Each case is a function of (ranks, data, directory) and returns plain numbers and whole tensors.
"""

import errno
import os
from pathlib import Path

import torch

from elastic_core import Submodel
from elastic_core.config import ConfigError
from elastic_core.data.loader import PackedSequences
from elastic_core.search.selection import Member
from elastic_core.training.checkpoint import Checkpoints
from elastic_core.training.distributed.execution import Execution
from elastic_core.training.distributed.gradients import local, whole
from elastic_core.training.distributed.model_files import from_pretrained, save_pretrained
from elastic_core.training.distributed.placement import place
from elastic_core.training.loop import train, train_step
from elastic_core.training.run import Run, named_parameters, save
from elastic_core.training.stage import Loss, Routing
from tasks.runtime import launch
from tests.support.models.parents import random_elastic, random_llama_config, random_ratios
from tests.support.models.routed_family import CONFIG
from tests.support.ranking_cases import (
    EXPERTS,
    padded_ranking,
    ranking,
    ranking_memory,
    resumed_ranking,
    stored_ranking,
)
from tests.support.runs import BUDGETS, MEMBERS, TEXT, make_router, make_stage, measured_on_little_text

# FFN and attention widths differ by layer; layer 3 is gone in one budget, layers 3 and 4 in another.
UNEVEN = Submodel(14, (0, 1, 2, 4), (16, 24), 4, 6, 4).resolve(CONFIG)
PLAIN = Execution()
TIED = random_llama_config(12)
assert TIED.tie_word_embeddings and TIED.num_hidden_layers == 3
# Every budget is trained in every step. From step 9 on, the norm of a nearly silent group makes gradients leap: with
# 0.3 % of noise in the weights, as bfloat16 has, their norm goes from 0.8 to 2.7, on one rank too; and what float32
# rounds off grows to a thousandth.
STEPS = 6
SHORT = {"steps": 4}  # as many microbatches as let every budget come several times
FAMILY = MEMBERS | {"medium": Member(0.7, UNEVEN)}


def start(ranks, data, execution=PLAIN, routed=False, teacher=True, members=None, stage=None, config=CONFIG, **values):
    """A run like that of tests.support.runs, placed on these ranks."""
    stage = make_stage(**{"batch_size": 12, "microbatches": 3, "steps": STEPS, **(stage or {})})
    members = None if routed else members or FAMILY
    model, frozen = random_elastic(0, config), random_elastic(7, config)
    model.norm_gains = random_ratios(config)
    return Run(
        place(model, ranks, execution, stage.precision),
        stage,
        PackedSequences(data, stage.mixture, stage.sequence_length, seed=1),
        {name: BUDGETS[name] for name in BUDGETS if routed or name in members},
        members=members,
        router=make_router() if routed else None,
        teacher=place(frozen, ranks, execution, stage.precision, frozen=True) if teacher else None,
        ranks=ranks,
        execution=execution,
        **values,
    )


def outcome(run, rows):
    """Rows without times, and every weight whole."""
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "memory_bytes")} for row in rows]
    return {"rows": rows, "weights": {name: whole(p.detach()).clone() for name, p in named_parameters(run)}}


def trained(ranks, data, **values):
    run = start(ranks, data, **values)
    return outcome(run, list(train(run)))


def hard(ranks, data, directory):
    """Depth and widths change from microbatch to microbatch."""
    return trained(ranks, data)


def soft(ranks, data, directory):
    """Three soft steps, then the choice. With a larger learning rate, gradients leap earlier (see STEPS)."""
    routing, stage = Routing(share=0.5, settle_steps=100, candidates=4), {"learning_rate": 1e-3}
    with measured_on_little_text():
        return trained(ranks, data, routed=True, routing=routing, stage=stage)


def straight_through(ranks, data, directory):
    return trained(ranks, data, routed=True, routing=Routing(mode="hard", share=1.0, candidates=1), stage=SHORT)


def recomputed(ranks, data, directory):
    return trained(ranks, data, execution=Execution(activation_checkpointing=True, offload_teacher=True))


def copies(ranks, data, directory):
    """Every rank has all weights; gradients are averaged."""
    return trained(ranks, data, execution=Execution(shard_over=1))


def tied_llama(ranks, data, directory):
    """One matrix is embeddings and head; the layers of another architecture, and one of them gone in a budget."""
    small = Submodel(8, (0, 2), 9, num_attention_heads=2)
    members = {"full": Member(1.0, Submodel()), "small": Member(0.45, small)}
    members = {name: Member(member.target, member.submodel.resolve(TIED)) for name, member in members.items()}
    return trained(ranks, data, config=TIED, members=members, stage=SHORT)


def experts(ranks, data, directory):
    """More experts than ranks, and in one budget fewer of them; some are asked for nothing by one of the ranks."""
    small = Submodel(12, (0, 1, 2), num_experts=4, moe_intermediate_size=10, moe_shared_expert_intermediate_size=8)
    members = {"full": Member(1.0, Submodel()), "small": Member(0.45, small)}
    members = {name: Member(member.target, member.submodel.resolve(EXPERTS)) for name, member in members.items()}
    return trained(ranks, data, config=EXPERTS, members=members, stage=SHORT)


def own_teacher(ranks, data, directory):
    stage = {"teacher": "trainable", "loss": Loss(1.0, 1.0)}
    return trained(ranks, data, stage=stage, teacher=False)


MATCHED = Loss(1.0, 1.0, state_weight=0.5)


def states(ranks, data, directory):
    return trained(ranks, data, stage={"loss": MATCHED})


def states_recomputed(ranks, data, directory):
    """The teacher is the sharded model itself."""
    stage = {"teacher": "trainable", "loss": MATCHED}
    return trained(ranks, data, stage=stage, teacher=False, execution=Execution(activation_checkpointing=True))


HALF = {"precision": "bfloat16"}


def half(ranks, data, directory):
    return trained(ranks, data, stage=HALF)


def half_soft(ranks, data, directory):
    """One soft step: Adam's first step is a sign, and from then on the router goes its own way at other roundings."""
    run = start(ranks, data, routed=True, stage=HALF)
    return outcome(run, [train_step(run)])


def half_states(ranks, data, directory):
    """With recomputation."""
    execution = Execution(activation_checkpointing=True)
    return trained(ranks, data, stage=HALF | {"loss": MATCHED}, execution=execution)


def budgets_of_ranks(ranks, data, directory):
    """What every rank computes with, microbatch by microbatch."""
    run, seen = start(ranks, data, routed=True, routing=Routing(mode="hard", share=1.0, candidates=1), stage=SHORT), []
    slice_ = run.model.slice

    def remember(submodel=None, gates=None, observe=None):
        made = slice_(submodel, gates, observe)
        values = {key: gate.tolist() for key, gate in made.gates.items()}
        seen.append((made.sizes, made.kept_layers, values))
        return made

    run.model.slice = remember
    rows = list(train(run))
    dealt = [[result["budget"] for result in row["microbatches"]] for row in rows]
    return {"seen": ranks.gather(seen), "dealt": ranks.gather(dealt)}


def routed_run(ranks, data, checkpoints):
    """Four soft steps and two hard ones. A checkpoint follows step 4, and after it the choice is made."""
    routing = Routing(share=2 / 3, settle_steps=100, candidates=4)
    return start(ranks, data, routed=True, routing=routing, stage={"checkpoint_every": 2}, checkpoints=checkpoints)


def resumed(ranks, data, directory):
    """Killed after step 3 and after step 5, resumed from 2 and from 4; and the same without a break.

    The choice is made by forward passes that gather the weights.
    """
    with measured_on_little_text():
        straight = routed_run(ranks, data, directory / "straight")
        rows = list(train(straight))
        for _ in range(2):
            killed = train(routed_run(ranks, data, directory / "killed"))
            for _ in range(3):
                next(killed)
            killed.close()
        last = routed_run(ranks, data, directory / "killed")
        return {"straight": outcome(straight, rows), "killed": outcome(last, list(train(last)))}


def remote(ranks, data, directory):
    """Like `resumed`, with checkpoints on S3."""
    place = f"{os.environ['TEST_PLACE']}/remote"
    killed = train(start(ranks, data, checkpoints=place))
    for _ in range(4):
        next(killed)
    killed.close()
    run = start(ranks, data, checkpoints=place)
    return outcome(run, list(train(run)))


def from_other_ranks(ranks, data, directory):
    """The second half of a run whose first half another number of ranks has computed (in `directory`/first)."""
    run = start(ranks, data, checkpoints=directory / "first")
    return outcome(run, list(train(run)))


def poisoned(ranks, data, directory):
    """One rank alone has a bad number, in one step: all skip it."""
    run = start(ranks, data, members={"full": MEMBERS["full"]}, stage={"loss": TEXT}, teacher=False)
    before = {name: whole(p.detach()).clone() for name, p in named_parameters(run)}
    handle = None
    if ranks.rank == ranks.world - 1:
        handle = run.model.model.norm_f.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    bad = train_step(run)
    if handle:
        handle.remove()
    unchanged = all([torch.equal(whole(p.detach()), before[name]) for name, p in named_parameters(run)])
    good = train_step(run)
    return {"skipped": bad["skipped"], "unchanged": unchanged, "next": good["skipped"], "loss": good["budgets"]}


def explained(ranks, data, directory):
    """The last rank's sequences alone drive a layer out of range, step after step: everybody says so and stops."""
    run = start(ranks, data, members={"full": MEMBERS["full"]}, stage={"max_skipped_steps": 1}, teacher=True)

    def overflow(module, inputs, output):
        return output * float("inf") if ranks.rank == ranks.world - 1 else output

    run.model.model.layers[2].register_forward_hook(overflow)
    try:
        list(train(run))
    except RuntimeError as error:
        return {"messages": ranks.gather(f"{type(error).__name__}: {error}")}


def stored(ranks, data, directory):
    """Written from shards, read into shards, gathered again."""
    model = place(random_elastic(5, CONFIG), ranks, Execution(), "float32")
    save_pretrained(model, directory / "model", ranks)
    again = from_pretrained(directory / "model", ranks, Execution(), "float32")
    teacher = from_pretrained(directory / "model", ranks, Execution(offload_teacher=True), "bfloat16", frozen=True)
    return {
        "same": all(
            [torch.equal(whole(a), whole(b)) for a, b in zip(model.parameters(), again.parameters(), strict=True)]
        ),
        "dtypes": {name: str(p.dtype) for name, p in teacher.named_parameters()},
        "frozen": not any(p.requires_grad for p in teacher.parameters()),
        "numbers": sum(local(p).numel() for p in again.parameters()),
    }


def unwritable(ranks, data, directory):
    """A place that cannot be written to ends the run on every rank with the same kind of error."""
    (directory / "file").write_text("")
    run = start(ranks, data)
    try:
        checkpoints = Checkpoints(directory / "file" / "run", 2, ranks)
        save(run, checkpoints)
        checkpoints.wait()
    except RuntimeError as error:
        return {"errors": ranks.gather(f"{type(error).__name__}: {error}")}


def told(ranks, data, directory):
    """Rank 0 looks for checkpoints at a place that is refused; a tracker that only it has cannot be opened."""
    messages = []
    try:
        Checkpoints("nowhere://bucket/run", 2, ranks).load_newest({})
    except ValueError as error:
        messages.append(f"{type(error).__name__}: {error}")
    try:
        with ranks.first_only() as is_first:
            if is_first:
                raise ConfigError("tracking.wandb: got 'x'")
    except ConfigError as error:
        messages.append(str(error))
    return {"messages": ranks.gather(messages)}


def ended(ranks, data, directory):
    """A disk that is full for rank 0 alone, in the middle of a model, ends the stage with the same text on each."""
    model = place(random_elastic(5, CONFIG), ranks, PLAIN, "float32")

    def work(arguments, ranks):
        def write(target, tensors, tokenizer_from):
            next(tensors)
            raise OSError(errno.ENOSPC, "No space left on device")

        model.write = write
        save_pretrained(model, directory / "model", ranks)

    call = {"work": work, "arguments": {}, "directory": os.getcwd(), "use_gpu": False}
    return {"endings": ranks.gather(launch._worker(call))}


QUICK = (
    hard,
    soft,
    states,
    tied_llama,
    experts,
    half,
    budgets_of_ranks,
    remote,
    poisoned,
    explained,
    ranking,
    stored,
    unwritable,
    told,
    ended,
)
THOROUGH = (
    straight_through,
    recomputed,
    copies,
    own_teacher,
    resumed,
    states_recomputed,
    half_soft,
    half_states,
    from_other_ranks,
    ranking_memory,
    stored_ranking,
    padded_ranking,
    resumed_ranking,
)


def run_all(ranks, cases, data, out: Path, environment: dict[str, str]) -> dict:
    """The results of some cases on these ranks, by their names. Each has a directory in `out`, of its own name."""
    os.environ.update(environment)
    found = {}
    for case in cases:
        directory = out / case.__name__
        directory.mkdir(exist_ok=True)
        found[case.__name__] = case(ranks, data, directory)
    return found
