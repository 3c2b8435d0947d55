"""A user's conversations become a family that transformers loads, and that answers in their form."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks import extract, fingerprint
from tests.support.committed_params import profile_values
from tests.support.pipeline.dvc_workspace import make_workspace
from tests.support.pipeline.stages import run_stage
from tests.support.pipeline.tiny_pipeline import write_params

pytestmark = pytest.mark.thorough
COLOURS = ("red", "blue", "green", "white")


def conversation(number: int) -> dict:
    return {
        "messages": [
            {"role": "user", "content": f"Ball {number} is {COLOURS[number % 4]}?"},
            {"role": "assistant", "reasoning_content": "I look.", "content": "Yes."},
            {"role": "user", "content": "Thanks"},
            {"role": "assistant", "content": "Bye"},
        ]
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The directory of the extracted models: budget, then version."""
    directory = tmp_path_factory.mktemp("chats")
    lines = [json.dumps(conversation(number)) + "\n" for number in range(200)]
    (directory / "chats.jsonl").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        make_workspace(directory)
        chats = {"kind": "conversations", "path": f"{directory}/chats.jsonl", "held_out": 0.05}
        mixture, steps = {"mixture": {"chats": 1.0}}, {"warmup_steps": 2, "batch_size": 8, "mixture": {"chats": 1.0}}
        training = profile_values("smoke")["parent"]["training"]
        write_params(
            directory,
            directory,
            prepare_data={"vocab_size": 300, "sources": {"chats": chats}},
            parent={"training": training | steps | {"steps": 60}},
            rank=mixture | {"batches": 1, "depth_batches": 1},
            train_short=steps | {"sequence_length": 64, "steps": 30},
            train_extended=steps | {"sequence_length": 96, "steps": 10},
            extract={"destination": None},
            evaluate={"held_out": ["chats"], "tasks": []},
        )
        fingerprint.main()
        for stage in ("prepare_data", "parent", "rank", "train_short", "train_extended"):
            run_stage(stage)
        for budget in ("full", "small"):
            run_stage("extract", budget)
    return directory / extract.OUT


@pytest.mark.parametrize("budget", ["full", "small"])
def test_plain_transformers_gets_answers_that_end_with_their_turn(models, budget):
    """By the files of the directory alone. Numbers above 199 were never seen."""
    directory = models / budget / "extended"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    first, thought, thanks, _ = conversation(777)["messages"]
    for asked, answer in (
        ([first], "<think>I look.</think>Yes.<|end_of_turn|>"),
        ([first, thought, thanks], "Bye<|end_of_turn|>"),
    ):
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            ids = model.generate(**prompt, max_new_tokens=60, do_sample=False)
        written = ids[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(written) == answer  # and nothing behind the end of the turn
        assert written[-1] == tokenizer.convert_tokens_to_ids("<|end_of_turn|>")
