"""Stage `parent`: get the model that the family is made from.

It is imported from a directory, the Hugging Face hub, a URL or a pip package (`parent.path`), or trained here from
scratch (`parent.model`).
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from elastic_core import ElasticModel
from elastic_core.config import ConfigError
from elastic_core.data.loader import IGNORED_LABEL, PackedSequences, TokenData, check_tokenizer, held_out_batches
from elastic_core.errors import UserError
from elastic_core.export import model_card
from elastic_core.io import storage
from elastic_core.io.atomic import write_text
from elastic_core.io.directory_transfer import download_directory
from elastic_core.io.tokenizer_files import is_companion, is_tokenizer_file, left_out
from elastic_core.model import architectures, hf
from elastic_core.model.files.parent_copy import copy_model
from elastic_core.model.files.parent_dtype import with_parent_dtype
from elastic_core.model.files.weights import weight_file_names
from elastic_core.model.parent_files import check_stored_logits, check_weights
from elastic_core.search.selection import Member
from elastic_core.training.distributed import model_files, placement
from elastic_core.training.distributed.ranks import Ranks
from elastic_core.training.run import Run
from tasks.parents import gguf, hub
from tasks.parents.config import as_used, new_config, read_parent_config
from tasks.parents.tokenizer import load_tokenizer
from tasks.runs import provenance
from tasks.runs.job import LOCAL, Job, started
from tasks.runtime.chat_templates import check_chat_template, check_tasks_template
from tasks.runtime.preflight import check_family, check_parent
from tasks.settings import remote_checks
from tasks.settings.load import FILE, load
from tasks.settings.local_checks import is_package
from tasks.settings.parts.parent import Parent
from tasks.settings.paths import is_hub_name
from tasks.settings.schema import Params
from tasks.settings.sections import Evaluate
from tasks.training.family import run_to_end, training_record
from tasks.training.start import run_stage

DATA, OUT = Path("artifacts/data"), Path("artifacts/parent")
METRICS = Path("artifacts/parent_metrics.jsonl")
TEST_TOKENS = 64  # of the text on which an imported parent has to compute different logits


def main() -> None:
    settings, data = load(), TokenData(DATA)
    remote_checks.check(settings, "parent")
    check_family(settings, FILE)
    check_parent(settings, FILE)
    check_stages(settings, data)
    if settings.parent.path is not None:
        begin = time.monotonic()
        with started("parent") as job:
            source = import_parent(settings.parent, data)
            write_text(METRICS, "")
            seconds, device = time.monotonic() - begin, provenance.describe_device()
            provenance.write_record(provenance.end(job.record, seconds, device, source=source))
    else:
        run_stage(work, settings, "parent", settings.parent.training)


def initialise(config: PreTrainedConfig, seed: int) -> ElasticModel:
    """A new model with the initial weights that transformers would give it."""
    torch.manual_seed(seed)
    reference = architectures.model_class(config)(config)
    model = ElasticModel(config)
    model.load_state_dict(reference.state_dict())
    return model


def import_parent(parent: Parent, data: TokenData) -> str:
    """Take over the parent from a directory, the hub, a URL or a package, with the element types of its files.

    Returns where it came from: its path; for a model of the hub, its name and commit.
    Its config.json has the `rope_scaling` of the section and the element type of the parent's files, and its head is
    untied if the section says so. Memory holds one layer at a time. Files that need no change are linked or copied as
    they are (see `copy_model`).
    Raises UserError if the parent's tokenizer is not the one that the data was made with, if weights or logits are not
    finite, and if the logits do not depend on the text.
    """
    config, where = read_parent_config(parent, 0), f"parent.path ({parent.path})"
    check_tokenizer(data, load_tokenizer(parent.path), config.vocab_size, where)
    with local_parent(parent.path) as (directory, is_own):
        model, reader = ElasticModel.empty(directory, config)
        if reader.has_tied_head and not parent.untie_head:
            print(f"parent: {hf.HEAD} equals the embeddings, and config.json ties them; one copy is kept")
        if others := left_out(storage.states(parent.path if storage.is_url(parent.path) else directory)):
            print(f"parent: files that the family does not keep: {', '.join(others)}")
        check_weights(reader, list(architectures.shapes(hf.read_config(directory))))  # an untied head is no file's
        num_tokens = min(TEST_TOKENS, config.vocab_size)
        check_stored_logits(model, reader, torch.arange(num_tokens)[None], where)
        model.config = with_parent_dtype(model.config, reader.stored(next(iter(model.layout))).entry.dtype)
        model.norm_gains = None  # of submodels, if this is an elastic checkpoint; stage `rank` measures new ones
        copy_model(model, reader, directory, OUT, may_link=not is_own)
        name = hub.HubModel.parse(parent.path).name if is_hub_name(parent.path) else None
        model_card.write_parent_facts(OUT, model_card.parent_facts(directory, name))
        return hub.at_commit(parent.path, directory) if is_hub_name(parent.path) else parent.path


@contextmanager
def local_parent(path: str) -> Iterator[tuple[Path, bool]]:
    """The parent as a local directory, and whether it is the user's own, whose files may change later.

    From a URL or package, it is copied, and the copy is deleted at the end. It is beside the checkpoints and not in a
    temporary directory, for two reasons: that disk has space for a model, and a download that was killed can be resumed
    file by file. From the hub, it is in the hub's cache.
    """
    copy = LOCAL / "parent-download"
    if is_hub_name(path):
        yield hub.fetch_model(path), False
        return
    if is_package(path):
        gguf.write_directory(path, copy)
    elif storage.is_url(path):
        download_parent(path, copy)
    else:
        yield Path(path), True
        return
    try:
        yield copy, False
    finally:
        shutil.rmtree(copy)


def download_parent(path: str, copy: Path) -> None:
    """Download configuration, tokenizer and weights of a model from a URL to the directory `copy`."""
    keep = {*weight_file_names(path), model_card.CARD}  # the card tells the licence
    shutil.rmtree(copy, ignore_errors=True)
    download_directory(path, copy, only=lambda name: is_tokenizer_file(name) or is_companion(name) or name in keep)


def train_parent(settings: Params, job: Job, ranks: Ranks) -> None:
    """Train `parent.model` on text, with the training loop of the later stages.

    Its only budget is the full model, and it has no teacher.
    """
    data, stage = TokenData(DATA), settings.parent.training
    manifest = data.manifest
    eos = manifest.eos_token_id
    tokens = {"eos_token_id": eos, "bos_token_id": manifest.bos_token_id, "pad_token_id": eos}
    config = as_used(new_config(settings.parent.model, manifest.vocab_size, **tokens), settings.parent)
    model = initialise(config, settings.seed)
    if ranks.rank == 0:
        print(
            f"parent: {sum(p.numel() for p in model.parameters()):,} parameters, layers {architectures.pattern(config)}"
        )
    run = Run(
        placement.place(model, ranks, settings.compute.execution, stage.precision),
        stage,
        PackedSequences(data, stage.mixture, stage.sequence_length, settings.seed),
        budgets={"full": 1.0},
        members={"full": Member(1.0, model.full)},
        seed=settings.seed,
        checkpoints=job.checkpoints(settings),
        ranks=ranks,
        execution=settings.compute.execution,
    )
    run_to_end(run, settings, job, METRICS)
    model_files.save_pretrained(model, OUT, ranks, tokenizer_from=DATA / "tokenizer")
    with ranks.first_only() as is_first:
        if is_first:
            provenance.write_record(training_record(run, job))


def work(arguments: dict, ranks: Ranks) -> None:
    """The stage's work on one worker."""
    train_parent(arguments["settings"], arguments["job"], ranks)


def check_stages(settings: Params, data: TokenData) -> None:
    """Raise UserError for what a later stage would find wrong with the data or its tokenizer.

    That is data too short for its sequences, held-out data without a token to predict, and tasks or benchmarks that
    need another chat template. The check is made here, so that the error comes before any training.
    """
    owner = settings.parent.path or "the tokenizer of prepare_data"
    tokenizer = data.directory / "tokenizer"
    check_chat_template(settings.evaluate.benchmarks, tokenizer, f"{FILE}: evaluate.benchmarks", owner)
    check_tasks_template(settings.evaluate.tasks, tokenizer, f"{FILE}: evaluate.tasks", owner)
    sections = {"rank": settings.rank, "train_short": settings.train_short, "train_extended": settings.train_extended}
    for name, section in sections.items():
        try:
            PackedSequences(data, section.mixture, section.sequence_length, settings.seed)
        except UserError as error:
            raise ConfigError(f"{FILE}: {name}: {error}") from None
    for source in settings.evaluate.held_out:
        check_held_out(settings.evaluate, data, source)


def check_held_out(section: Evaluate, data: TokenData, source: str) -> None:
    """Raise ConfigError unless evaluation reads a token to predict of a held-out source. Mostly reads one sequence."""
    batches = held_out_batches(data, source, section.sequence_length, 1, section.max_tokens)
    try:
        has_any = any(bool((batch.labels != IGNORED_LABEL).any()) for batch in batches)
    except UserError as error:
        raise ConfigError(f"{FILE}: evaluate.held_out, evaluate.sequence_length: {error}") from None
    if not has_any:
        raise ConfigError(
            f"{FILE}: evaluate.held_out: {source} has no trained token in what evaluation reads of its documents; "
            f"raise evaluate.sequence_length ({section.sequence_length:,}) or max_tokens ({section.max_tokens:,})"
        )
