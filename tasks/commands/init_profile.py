"""The text of a profile that `elastic init` writes: every parameter that depends on parent, data and machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from elastic_core.cost.budgets import Spelling

COMMENTS_OF_CHOICES = {
    "hidden_size": "channels of the residual stream",
    "intermediate_size": "neurons per MLP",
    "mamba_num_heads": "Mamba heads; multiples of n_groups",
    "mamba_head_dim": "channels per Mamba head",
    "num_attention_heads": "query heads; multiples of num_key_value_heads",
    "num_experts": "routed experts of a layer; multiples of n_group",
    "moe_intermediate_size": "width of every routed expert; multiples of 8",
    "moe_shared_expert_intermediate_size": "width of the shared expert",
    "depth": "number of layers; the ranking decides which",
}


@dataclass(frozen=True)
class Training:
    """A training stage: sequences of `sequence_length` tokens, `batch_size` of them per step, in `microbatches`."""

    sequence_length: int
    batch_size: int
    microbatches: int
    steps: int
    learning_rate: float

    @property
    def tokens(self) -> int:
        return self.sequence_length * self.batch_size * self.steps


@dataclass(frozen=True)
class Source:
    """A corpus: a glob of files, the field with the text, and the share of the documents that is held out."""

    path: str
    text_field: str
    held_out: float


@dataclass(frozen=True)
class Profile:
    """What `elastic init` has chosen. `held_out_tokens` is an estimate of the tokens per source for evaluation."""

    parent: str
    description: str  # of the parent, for the first line
    budgets: Mapping[str, Spelling]
    metric: str
    choices: Mapping[str, tuple[int, ...]]
    sources: Mapping[str, Source]
    tokens: int
    held_out_tokens: int
    short: Training
    extended: Training
    dtype: str
    basis: str  # of the residual stream
    gpus: int  # 0: the CPU


def text_of(profile: Profile) -> str:
    """The YAML text, with a comment on every line."""
    lines = [
        *_head(profile),
        *_choices(profile),
        *_data(profile),
        *_ranking(profile),
        *_stage("train_short", "stage 1: short context; the router chooses the sizes", profile, profile.short),
        *_stage("train_extended", "stage 2: extended context, the same fields", profile, profile.extended),
        *_evaluation(profile),
        *_compute(profile),
    ]
    width = 44
    return "".join(f"{line.ljust(width)} # {comment}\n" if comment else f"{line}\n" for line, comment in lines)


def _head(profile: Profile) -> list[tuple[str, str]]:
    lines = [
        (f"# {profile.description}", ""),
        (
            "# Written by `elastic init`. Values that are not here come from params.yaml, which explains all of them.",
            "",
        ),
        (
            f"parent: {{path: {quoted(profile.parent)}}}",
            "Hugging Face directory with its tokenizer, or a name on the hub",
        ),
    ]
    if profile.metric != "parameters":
        lines.append((f"cost: {{metric: {profile.metric}}}", "what the budgets count"))
    lines.append(("budgets:", "name → share of the parent, or a count such as 9B; within 2 %"))
    return lines + [(f"  {name}: {plain(given)}", _member(given)) for name, given in profile.budgets.items()]


def _member(given: Spelling) -> str:
    return "the parent's own size" if given == 1 else "a trained member of the family"


def _choices(profile: Profile) -> list[tuple[str, str]]:
    lines = [("choices:", "sizes that a member may have, largest first; the first is the parent's own")]
    lines += [(f"  {name}: {list(sizes)}", COMMENTS_OF_CHOICES[name]) for name, sizes in profile.choices.items()]
    return lines


def _data(profile: Profile) -> list[tuple[str, str]]:
    lines = [
        ("prepare_data:", f"about {profile.tokens:,} tokens; mixtures may be set per stage, otherwise equal shares")
    ]
    lines.append(("  sources:", "name → text; the parent's tokenizer encodes it"))
    for name, source in profile.sources.items():
        lines += [
            (f"    {name}:", ""),
            ("      kind: files", ".txt, .jsonl or .parquet"),
            (f"      path: {quoted(source.path)}", "a glob; relative paths start in the checkout"),
            (f"      text_field: {quoted(source.text_field)}", "of .jsonl and .parquet"),
            (f"      held_out: {source.held_out}", "share of the documents for evaluation only"),
        ]
    return lines


def _ranking(profile: Profile) -> list[tuple[str, str]]:
    settle = max(5, min(50, profile.short.steps // 20))
    return [
        ("rank:", "importance of units and layers, on training text"),
        ("  batches: 16", "calibration batches"),
        (f"  batch_size: {-(-4 // profile.gpus) * profile.gpus if profile.gpus else 2}", "sequences per batch"),
        (f"  sequence_length: {profile.short.sequence_length}", "tokens per sequence"),
        ("  depth_batches: 2", "of these batches, to score layers; every layer costs a forward pass each"),
        (f"  basis: {profile.basis}", "channels: the parent's own, sorted, as tied embeddings need; or principal axes"),
        ("routing:", "how the router learns, in stage 1"),
        ("  learning_rate: 5.0e-3", "of the router"),
        ("  share: 0.3", "of the steps of stage 1, at most"),
        (f"  settle_steps: {settle}", "steps without a change after which the choice is final"),
    ]


def _stage(name: str, comment: str, profile: Profile, stage: Training) -> list[tuple[str, str]]:
    per_microbatch = stage.batch_size // stage.microbatches // max(1, profile.gpus)
    return [
        (f"{name}:", comment),
        (f"  sequence_length: {stage.sequence_length}", "tokens per sequence"),
        (f"  batch_size: {stage.batch_size}", "sequences per step; a multiple of microbatches × compute.workers"),
        (f"  microbatches: {stage.microbatches}", f"each trains one budget, with {per_microbatch} sequences at a time"),
        (f"  steps: {stage.steps}", f"{stage.tokens:,} tokens, {stage.tokens / profile.tokens:.1f} times the data"),
        (f"  learning_rate: {stage.learning_rate:.1e}", "peak; lower it if the loss jumps"),
        ("  final_learning_rate: 0.1", "at the end, as a share of the peak"),
        (f"  warmup_steps: {min(60, stage.steps // 10)}", "steps of linear warm-up"),
        (f"  precision: {'bfloat16' if profile.gpus else 'float32'}", "of the computation; weights stay float32"),
        (f"  checkpoint_every: {max(1, min(100, stage.steps // 5))}", "steps; a stopped run goes on from there"),
        ("  budget_shares: {}", "budget → share of the microbatches; {}: equal"),
    ]


def _evaluation(profile: Profile) -> list[tuple[str, str]]:
    length = min(profile.short.sequence_length, max(8, profile.held_out_tokens // 8))
    most = 131_072 if profile.gpus else 8192
    tokens = max(length, min(most, profile.held_out_tokens // 2 // length * length))
    cached, prompt = min(1024, max(8, profile.held_out_tokens // 4)), min(64, max(4, profile.held_out_tokens // 8))
    return [
        (f"extract: {{dtype: {profile.dtype}}}", "element type of the extracted models, here the parent's"),
        ("evaluate:", "held_out and tasks are left out: all sources, and no test tasks"),
        (f"  max_tokens: {tokens}", "per source"),
        (f"  sequence_length: {length}", "tokens per sequence"),
        (f"  batch_size: {'auto' if profile.gpus else 1}", "sequences per batch; auto: what the memory allows"),
        (f"  cache_tokens: {cached}", "tokens in the cache when its bytes are measured"),
        (f"  latency: {{prompt_tokens: {prompt}, new_tokens: 8, repeats: 3}}", "speed of one sequence"),
    ]


def _compute(profile: Profile) -> list[tuple[str, str]]:
    if not profile.gpus:
        return [("compute: {workers: 0, gpus_per_worker: 0}", "in this process; with GPUs: workers and 1")]
    return [
        ("compute:", "`elastic plan` tells whether it fits, and what to change"),
        (f"  workers: {profile.gpus}", "one per GPU"),
        ("  gpus_per_worker: 1", "0 on a machine without GPUs"),
        ("  cpus_per_worker: 4", ""),
        ("  execution: {activation_checkpointing: true}", "less memory, more computation"),
        ("time_limits: {train_short: 96, train_extended: 96}", "hours, for runs of the dashboard"),
    ]


def quoted(text: str) -> str:
    """A text as a YAML scalar."""
    return json.dumps(text, ensure_ascii=False)


def plain(given: Spelling) -> str:
    """A budget as a YAML scalar."""
    return quoted(given) if isinstance(given, str) else f"{given}"
