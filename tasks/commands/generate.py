"""`elastic generate`: prints how a member of a family, or an extracted model, continues a prompt."""

import contextlib
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, TextStreamer

from elastic_core import extract
from elastic_core.data.tokenizer import load_tokenizer
from elastic_core.errors import UserError
from elastic_core.export import elastic_checkpoint
from elastic_core.io.json_files import read_json
from elastic_core.model.architectures.nemotron_h import MODELING_FILE
from tasks.commands.extract import find_budget
from tasks.commands.inspect import open_model
from tasks.settings.local_checks import TOKENIZERS


def generate(
    directory: Path, budget: str | None, prompt: str, max_new_tokens: int = 100, temperature: float = 0.0
) -> list[int]:
    """Print the continuation of `prompt` token by token, and return its token ids.

    directory: a family or an extracted model. A family needs a `budget`: its member is extracted to a temporary
        directory, so that transformers runs exactly the model that would be served. An extracted model takes None.
    temperature: 0 always takes the most likely token; above 0 tokens are sampled.

    Raises UserError for what the caller has to change.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: got {max_new_tokens}; allowed: 1 or more")
    if not temperature >= 0:
        raise UserError(f"--temperature: got {temperature}; allowed: 0 (always the most likely token) or more")
    if not any((directory / name).is_file() for name in TOKENIZERS):
        raise UserError(f"{directory}: no tokenizer ({' or '.join(TOKENIZERS)}); copy the parent's tokenizer to it")
    with _quiet():
        with _plain_model(directory, budget) as plain:
            trust = {"trust_remote_code": _has_our_code(plain)}
            tokenizer = load_tokenizer(plain, directory, **trust)
            with _errors_of_transformers(directory):
                model = AutoModelForCausalLM.from_pretrained(plain, dtype="auto", **trust).eval()
        with _errors_of_transformers(directory):
            return _continue(model, tokenizer, prompt, max_new_tokens, temperature)


@contextlib.contextmanager
def _errors_of_transformers(directory: Path) -> Iterator[None]:
    """Raise UserError where transformers fails: the weights have been checked, so it is the values in other files."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(
            f"{directory}: transformers cannot use it ({type(error).__name__}: {error}); correct "
            "generation_config.json or config.json, or copy them again"
        ) from None


def _continue(model, tokenizer, prompt: str, max_new_tokens: int, temperature: float) -> list[int]:
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    length = encoded["input_ids"].shape[1]
    if length == 0:
        raise UserError("prompt: got no tokens; allowed: a text that is not empty")
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    output = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        pad_token_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        eos_token_id=end,
        **({"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}),
    )
    return output[0, length:].tolist()


@contextlib.contextmanager
def _plain_model(directory: Path, budget: str | None) -> Iterator[Path]:
    """The directory that transformers loads: an extracted model, or a temporary copy of a member."""
    if not (directory / elastic_checkpoint.FILE).is_file():
        if budget is not None:
            raise UserError(
                f"--budget: got {budget!r}; allowed: none, because {directory} is a single model and not a family"
            )
        open_model(directory)  # names damaged files, which transformers does not
        yield directory
        return
    submodel = find_budget(directory, budget)
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Switch off transformers' progress bars and hints, so that only the continuation is printed."""
    before, had_bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        if had_bars:
            transformers.logging.enable_progress_bar()
