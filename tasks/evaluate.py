"""Stage `evaluate`: what an extracted directory is worth, loaded as any user would load it.

Held-out text gives bits per byte, loss and KL to the parent; the reasoning tasks and benchmarks run through lm-eval
(tasks/evaluation/lm_eval_tasks.py); memory and speed are measured as in tasks/evaluation/latency_and_memory.py.
"""

import argparse
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from elastic_core.data.loader import IGNORED_LABEL, TokenData, held_out_batches
from elastic_core.io import storage
from tasks.evaluation import latency_and_memory, lm_eval_tasks
from tasks.runtime.exit_status import errors_as_text
from tasks.settings import params

DATA, PARENT, MODELS, OUT = (Path("artifacts") / name for name in ("data", "parent", "models", "evaluate"))
EVEN = "even"  # see tasks/extract.py
VERSIONS = ("zero_shot", "short", "extended")


def load_model(directory: Path):
    """The directory as transformers loads it; heterogeneous exports bring their modeling file."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=True).eval()


@torch.no_grad()
def text_scores(model, parent, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, float, int]:
    """Summed cross-entropy and summed KL(parent ‖ model) in nats, and the number of predicted tokens."""
    loss, kl, tokens = 0.0, 0.0, 0
    for input_ids, labels in batches:
        logprobs = model(input_ids, use_cache=False).logits.log_softmax(-1)
        loss += F.nll_loss(logprobs.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum").item()
        if parent is not None:
            parent_logprobs = parent(input_ids, use_cache=False).logits.log_softmax(-1)
            divergence = (parent_logprobs.exp() * (parent_logprobs - logprobs)).sum(-1)
            kl += divergence[labels != IGNORED_LABEL].sum().item()
        tokens += int((labels != IGNORED_LABEL).sum())
    return loss, kl, tokens


def held_out_scores(section: "params.Evaluate", data: TokenData, model, parent) -> dict:
    """Loss and KL in nats per token and bits per byte, on every held-out source and on all of them together.

    `tokens` is the number of predicted ones.
    """
    scores, totals = {}, [0.0, 0.0, 0, 0.0]
    for source in section.held_out:
        batches = held_out_batches(data, source, section.sequence_length, section.batch_size, section.max_tokens)
        loss, kl, tokens = text_scores(model, parent, batches)
        num_bytes = tokens * data.bytes_per_token(source, "held_out")
        totals = [total + value for total, value in zip(totals, (loss, kl, tokens, num_bytes), strict=True)]
        scores[f"loss_{source}"] = loss / tokens
        scores[f"bits_per_byte_{source}"] = loss / math.log(2) / num_bytes
        scores[f"tokens_{source}"] = tokens
    loss, kl, tokens, num_bytes = totals
    return scores | {
        "loss": loss / tokens,
        "kl_to_parent": kl / tokens,
        "bits_per_byte": loss / math.log(2) / num_bytes,
        "tokens": tokens,
    }


def first_tokens(data: TokenData, source: str, number: int) -> Tensor:
    """The beginning of a held-out source as one sequence (1, number)."""
    input_ids, _ = next(held_out_batches(data, source, number, 1))
    return input_ids


def count_parameters(model) -> dict[str, int]:
    """Numbers in what transformers loaded: parameters, and buffers that files hold (of the routers of experts).

    Where there are experts, also those that one token uses.
    """
    stored = model.state_dict().keys()
    total = sum(parameter.numel() for parameter in model.parameters())
    total += sum(buffer.numel() for name, buffer in model.named_buffers() if name in stored)
    of_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    if of_experts == 0:
        return {"num_parameters": total}
    used = of_experts * model.config.num_experts_per_tok // model.config.n_routed_experts
    return {"num_parameters": total, "num_active_parameters": total - of_experts + used}


def evaluate(section: "params.Evaluate", data: TokenData, directory: Path, parent) -> dict:
    """All scores of one directory."""
    model, source = load_model(directory), section.held_out[0]
    return {
        **count_parameters(model),
        **held_out_scores(section, data, model, parent),
        "memory": latency_and_memory.memory(model, first_tokens(data, source, section.cache_tokens)),
        "latency": latency_and_memory.latency(
            section.latency, model, parent, first_tokens(data, source, section.latency.prompt_tokens)
        ),
        "tasks": lm_eval_tasks.reasoning_scores(section, data, model),
        "benchmarks": lm_eval_tasks.benchmark_scores(section.benchmarks, data, model),
        "environment": latency_and_memory.environment(),
    }


def quiet() -> None:
    """One progress bar of our own instead of the libraries' many, and their errors only."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name in ("lm_eval", "transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


@errors_as_text()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("budget", help="a name in params.yaml, in budgets or untrained; or parent")
    budget = parser.parse_args().budget
    section, data = params.load().evaluate, TokenData(DATA)
    if section.benchmarks is None or section.benchmarks.include is not None:  # lm-eval's own need their data
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    quiet()
    parent = None if budget == "parent" else load_model(PARENT)
    directories = {"parent": PARENT} if budget == "parent" else {v: MODELS / budget / v for v in VERSIONS}
    submodel = None if budget == "parent" else json.loads((MODELS / budget / "submodel.json").read_text())
    rows = {}
    for version, directory in tqdm(directories.items(), desc=f"evaluate {budget}", unit="model"):
        rows[version] = evaluate(section, data, directory, parent) | {"submodel": submodel}
    if (even := MODELS / budget / EVEN).is_dir():  # beside the slice that costs as much
        model = load_model(even)
        rows["zero_shot"]["even"] = count_parameters(model) | held_out_scores(section, data, model, parent)
    storage.write_text(OUT / f"{budget}.json", json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
