"""`elastic generate`: prints how a member of a family, or an extracted model, continues a prompt."""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, TextStreamer

from elastic_core import extract
from elastic_core.cost.metrics import num_parameters
from elastic_core.data.chat_template import knows_thinking, prompt_ids
from elastic_core.data.tokenizer import load_tokenizer, require_tokenizer
from elastic_core.errors import UserError
from elastic_core.export import elastic_checkpoint
from elastic_core.io.json_files import check_numbers, check_shape, read_json
from elastic_core.model import hf
from elastic_core.model.architectures.nemotron_h import MODELING_FILE
from elastic_core.model.ops import transformers_kernels
from tasks.commands.extract import find_budget
from tasks.commands.inspect import open_model
from tasks.serving.quiet import quiet


@dataclass(frozen=True)
class Chat:
    """How a prompt is written as a user's message: after a system message, and with or without thinking.

    With `think` None, the chat template decides.
    """

    system: str | None = None
    think: bool | None = None


GENERATION_FILE = "generation_config.json"
# The values in it that count: where a text ends, and which tokens are taken. Others are for other kinds of models and
# ways of decoding, and transformers does not check them.
USED = {
    **dict.fromkeys(("top_k?", "no_repeat_ngram_size?"), (int, type(None))),
    **dict.fromkeys(("top_p?", "min_p?", "typical_p?", "repetition_penalty?"), (float, type(None))),
    **{"eos_token_id?": (int, [int], type(None)), "suppress_tokens?": ([int], type(None))},
}


def generate(
    directory: Path,
    budget: str | None,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    chat: Chat | None = None,
    nearest: bool = False,
) -> list[int]:
    """Print the continuation of `prompt` token by token, and return its token ids.

    It ends at the stop ids of generation_config.json.

    directory: a family or an extracted model. A family needs a `budget`: its member is extracted to a temporary
        directory, so that transformers runs exactly the model that would be served. An extracted model takes None.
    temperature: 0 always takes the most likely token; above 0 tokens are sampled.
    chat: the prompt is a user's message, and its continuation is the assistant's answer. None: a text.
    nearest: take the nearest member, however far its cost is from the budget; its sizes are printed to stderr.

    Raises UserError for what the caller has to change.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: got {max_new_tokens}; allowed: 1 or more")
    if not temperature >= 0:
        raise UserError(f"--temperature: got {temperature}; allowed: 0 (always the most likely token) or more")
    require_tokenizer(directory)
    with quiet():
        if chat is not None:  # before a member is extracted
            with hf.errors_of_transformers(directory):
                _prompt_ids(load_tokenizer(directory, trust_remote_code=False), prompt, chat)
        with _plain_model(directory, budget, nearest) as plain:
            trust = {"trust_remote_code": _has_our_code(plain)}
            with hf.errors_of_transformers(directory):
                tokenizer = load_tokenizer(plain, directory, **trust)
                model = AutoModelForCausalLM.from_pretrained(plain, dtype="auto", **trust).eval()
                transformers_kernels.choose_by_device()
            for place in (directory, plain):  # the file of a family is checked first, so that an error names it
                if (place / GENERATION_FILE).is_file():
                    model.generation_config = _read_generation(place / GENERATION_FILE)
        with hf.errors_of_transformers(directory):
            return _continue(model, tokenizer, _prompt_ids(tokenizer, prompt, chat), max_new_tokens, temperature)


def _read_generation(path: Path) -> GenerationConfig:
    """The values that count of a generation_config.json. Raises UserError for a wrong type or size."""
    values = {name: value for name, value in read_json(path).items() if f"{name}?" in USED}
    check_shape(values, USED, path)
    check_numbers(values, path)
    return GenerationConfig(**values)


def _prompt_ids(tokenizer, prompt: str, chat: Chat | None) -> list[int]:
    """The token ids of a text, or of a user's message and the beginning of the answer."""
    plain = tokenizer(prompt)["input_ids"]
    if not prompt or not plain:
        raise UserError("prompt: got no tokens; allowed: a text that is not empty")
    if chat is None:
        return plain
    system = [] if chat.system is None else [{"role": "system", "content": chat.system}]
    if chat.think is not None and tokenizer.chat_template and not knows_thinking(tokenizer):
        raise UserError(
            f"--{'' if chat.think else 'no-'}think: the chat template has no switch enable_thinking; allowed: neither "
            "--think nor --no-think; some models are told in --system, by /think or /no_think"
        )
    options = {} if chat.think is None else {"enable_thinking": chat.think}
    return prompt_ids(tokenizer, [*system, {"role": "user", "content": prompt}], "--chat", **options)


def _continue(model, tokenizer, prompt: list[int], max_new_tokens: int, temperature: float) -> list[int]:
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    input_ids = torch.tensor([prompt], device=model.device)
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    pad = end[0] if isinstance(end, list) and end else end
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        pad_token_id=pad if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        eos_token_id=end,
        **({"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}),
    )
    return output[0, len(prompt) :].tolist()


@contextlib.contextmanager
def _plain_model(directory: Path, budget: str | None, nearest: bool) -> Iterator[Path]:
    """The directory that transformers loads: an extracted model, or a temporary copy of a member."""
    if not (directory / elastic_checkpoint.FILE).is_file():
        if budget is not None:
            raise UserError(
                f"--budget: got {budget!r}; allowed: none, because {directory} is a single model and not a family"
            )
        open_model(directory)  # names damaged files, which transformers does not
        yield directory
        return
    submodel = find_budget(directory, budget, nearest)
    if nearest:
        print(f"{num_parameters(hf.read_config(directory), submodel):,} parameters: {submodel}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="elastic-") as temporary:
        extract(directory, submodel, Path(temporary) / "model")
        yield Path(temporary) / "model"


def _has_our_code(directory: Path) -> bool:
    """Whether the model comes with the modeling file that this library writes. Raises UserError for other code.

    Other code is never run, because it could do anything.
    """
    if "auto_map" not in read_json(directory / "config.json"):
        return False
    ours = resources.files("elastic_core.export").joinpath(MODELING_FILE + ".txt").read_text()
    file = directory / MODELING_FILE
    if not file.is_file() or file.read_text() != ours:
        raise UserError(
            f"{directory}: has modeling code that this library did not write; to use it, load the model in Python"
        )
    return True
