"""`elastic`: the command line. It starts at once; what a command needs is imported when that command runs."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from elastic_core.errors import UserError
from flows.cli.options import Budget, Dtype, Heterogeneous, Settings, complete_profile, stage_option

INTERRUPTED = 130  # the exit status after Ctrl-C, as shells have it

app = typer.Typer(
    name="elastic",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""One pretrained language model in, one elastic checkpoint out, with a nested model for every budget.

    `plan` tells what that takes, `profile` measures the device that is to serve, `run` trains a family, `inspect` shows
    its members, `generate` tries one, `extract` cuts one out for serving; `up` does it all from a browser. Where no
    directory is named, the family of the last run is meant.
    """,
)


@app.command()
def run(
    profile: Annotated[
        str,
        typer.Argument(
            metavar="PROFILE",
            help="A file in profiles/; `default` is params.yaml as it is.",
            autocompletion=complete_profile,
        ),
    ] = "default",
    first: Annotated[str | None, stage_option("--from", "Start with this stage.")] = None,
    last: Annotated[str | None, stage_option("--until", "End with this stage.")] = None,
    only: Annotated[list[str] | None, stage_option("--only", "Nothing but this stage; can be repeated.")] = None,
    budgets: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            "-b",
            metavar="NAME=BUDGET",
            help="Train this family instead: once per member, `small=0.4`, `small=9B`, `small=16GiB@128k` or "
            "`small=35ms/token`.",
        ),
    ] = None,
    settings: Settings = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Run stages also where nothing has changed.")] = False,
) -> None:
    """Run the pipeline in this terminal, from a parent to an evaluated family and its report.

    Stages whose code, parameters and inputs are unchanged are skipped. A run that was stopped, by Ctrl-C or a crash,
    goes on from its newest checkpoint when it is started again. The default profile runs in the checkout; another one,
    and one with other budgets or parameters, in a directory of its own under `.runs/`, so that results stay apart.

    - `elastic run smoke`: everything, small, in two minutes
    - `elastic run --until rank`: data, parent and importance, no training
    - `elastic run --budget full=1.0 --budget half=0.5`: another family
    - `elastic run --set train_short.steps=900 --from train_short`: longer, from there on
    """
    with clear_errors("stopped; the same command goes on from the newest checkpoint"):
        from flows.cli.pipeline import Selection, read_budgets, run_pipeline

        chosen = Selection(first, last, only or ())
        run_pipeline(profile, chosen, read_budgets(budgets or ()), settings or (), force, say)


@app.command()
def plan(
    profile: Annotated[
        str, typer.Argument(metavar="PROFILE", help="As `elastic run` takes it.", autocompletion=complete_profile)
    ] = "default",
    gpus: Annotated[
        int | None, typer.Option("--gpus", "-n", min=1, help="Workers, with a GPU each, instead of the profile's.")
    ] = None,
    gpu_memory: Annotated[str, typer.Option(help="Of one GPU; a tenth is left for what is not counted.")] = "80GB",
    utilisation: Annotated[float, typer.Option(help="The share of the peak that training reaches.")] = 0.4,
    peak: Annotated[
        float | None,
        typer.Option(help="TFLOP/s of one GPU.", show_default="an H100's: 989 in bfloat16, 67 in float32"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The parent's config.json, or its directory.",
            show_default="parent.path, or in profiles/parents by its name",
        ),
    ] = None,
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Tell what a profile's training will take, before anything is there: sizes, memory, work and hours.

    Needs the parent's config.json and no weights, no data and no GPU. Where a stage does not fit it says what to
    change, and ends with status 1.

    - `elastic plan nemotron-nano-12b-v2`: the paper's run
    - `elastic plan nemotron-nano-12b-v2 --gpus 8`: the same on one node
    """
    with clear_errors("stopped"):
        from tasks.commands.plan import plan_profile
        from tasks.commands.plan_stages import Hardware

        hardware = Hardware.read(gpu_memory, utilisation, peak)
        description = plan_profile(profile, settings or (), gpus, hardware, config)
        if as_json:
            say(json.dumps(description, indent=1))
        else:
            from flows.cli.show_plan import show

            show(description)
    raise typer.Exit(0 if description["fits"] else 1)


@app.command()
def profile(
    profile: Annotated[
        str, typer.Argument(metavar="PROFILE", help="As `elastic run` takes it.", autocompletion=complete_profile)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where the table goes.", show_default="the profile's cost.table")
    ] = None,
    contexts: Annotated[
        list[int] | None,
        typer.Option("--context", help="Tokens in the cache, besides the profile's own; can be repeated."),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences at once.", show_default="the profile's, or 1")] = None,
    threads: Annotated[int | None, typer.Option(help="Of a CPU.", show_default="evaluate.latency's")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda where there is one")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Element type.", show_default="float32 on a CPU, bfloat16 on a GPU")
    ] = None,
    points: Annotated[int | None, typer.Option(help="Sizes of an axis, at most.", show_default="3")] = None,
    rounds: Annotated[int | None, typer.Option(help="More are more exact.", show_default="15")] = None,
    settings: Settings = None,
) -> None:
    """Measure what layers of a profile's sizes take on this machine: the table that `cost: {metric: latency}` needs.

    Needs the parent's config.json and no weights: transformers' modules of those sizes decode random text with a cache.

    - `elastic profile latency`: a few minutes on a CPU
    - `elastic profile nemotron-nano-12b-v2 --context 4096 --batch 8 --out profiles/h100.json`
    """
    with clear_errors("stopped; nothing was written"):
        from tasks.commands.measure import describe
        from tasks.commands.measure import profile as measure

        chosen = {"batch": batch, "threads": threads, "device": device, "dtype": dtype, "points": points}
        chosen["contexts"] = tuple(sorted(set(contexts))) if contexts else None
        say(describe(*measure(profile, settings or (), out, rounds=rounds, **chosen)))


@app.command()
def up() -> None:
    """Bring up the dashboard: server, worker and deployments in the foreground, until Ctrl-C.

    It prints its address. Runs that are started in the browser use the same checkout, profiles and results as
    `elastic run`.
    """
    with clear_errors("stopped"):
        from flows.dashboard import server

        server.main()


class LikeCp(TyperCommand):
    """Takes one path or two, which usage would show as a list of any length."""

    def collect_usage_pieces(self, ctx) -> list[str]:
        return ["[OPTIONS]", "[DIR]", "OUT"]


@app.command(cls=LikeCp)
def extract(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="[DIR] OUT", help="The family (by default of the last run), and where the model goes."),
    ],
    budget: Budget = None,
    heterogeneous: Annotated[
        Heterogeneous,
        typer.Option(help="Where widths differ between layers: a modeling file beside the weights, or zeros in MLPs."),
    ] = Heterogeneous.remote_code,
    dtype: Annotated[Dtype | None, typer.Option(help="Element type (default: as stored).", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace a model that is at OUT.")] = False,
) -> None:
    """Cut one member out of a family, as a directory that transformers and others load.

    - `elastic extract models/small --budget small`
    - `elastic extract path/to/family models/9b --budget 9B --dtype bfloat16`
    - `elastic extract models/served --budget 16GiB@128k×8`
    """
    with clear_errors("stopped; nothing was written"):
        if len(paths) > 2:
            raise UserError(f"got {len(paths)} paths; allowed: [DIR] OUT, the family's directory and the new one")
        out = paths[-1]
        if out.exists() and not force:
            raise UserError(f"{out}: exists; name another directory, or replace it with --force")
        from tasks.commands import find_family
        from tasks.commands.extract import export

        family = find_family.find(*paths[:-1])
        written = export(family, budget, out, heterogeneous, dtype)
        share = written.num_parameters / written.parent_num_parameters
        predicted = f"{written.predicted}\n" if written.predicted else ""
        say(
            f"{out}: {written.num_parameters:,} parameters, {share:.1%} of {written.parent_num_parameters:,} in "
            f"{family}; {written.num_bytes:,} bytes of weights in {written.seconds:.1f} s\n"
            f"{predicted}{written.submodel}"
        )


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    directory: Annotated[
        Path | None,
        typer.Option(
            "--model", "-m", metavar="DIR", help="The family, or an extracted model.", show_default="last run"
        ),
    ] = None,
    budget: Budget = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Where to stop at the latest.")] = 100,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="0 takes the likeliest token, 1 the model's own spread.")
    ] = 0.0,
) -> None:
    """Print a member's continuation of a prompt as it comes.

    The member is cut out of the family for this one call; to use it often, `elastic extract` it and name that
    directory, without a budget.

    - `elastic generate --budget small "In the beginning"`
    - `elastic generate --model models/small "In the beginning" --temperature 0.8`
    """
    with clear_errors("stopped"):
        from tasks.commands import find_family

        directory = find_family.find(directory)
        print(f"{directory}{f', budget {budget}' if budget else ''}", file=sys.stderr)
        from tasks.commands.generate import generate

        generate(directory, budget, prompt, max_new_tokens, temperature)


@app.command()
def inspect(
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR", help="A family, an extracted model, a parent, or a run.", show_default="last run"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Show what a model directory holds: sizes, budgets, layers and where it comes from.

    Only headers are read, and checked against config.json, so it is quick for models of any size. In a pattern, M is
    a Mamba-2 layer, * attention, - an MLP, and · a layer of the parent that the member has dropped.
    """
    with clear_errors("stopped"):
        from tasks.commands import find_family
        from tasks.commands.inspect import inspect_checkpoint

        description = inspect_checkpoint(find_family.find(directory))
        if as_json:
            say(json.dumps(description, indent=1))
        else:
            from flows.cli.show_inspect import show

            show(description)


def say(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def clear_errors(interrupted: str) -> Iterator[None]:
    """End with one line, and without a traceback, for what the caller can mend."""
    from flows.stages import StageFailed, StageInterrupted

    try:
        yield
    except KeyboardInterrupt:
        fail(f"\n{interrupted}", INTERRUPTED)
    except StageInterrupted as error:
        fail(f"error: {error.summary}, see above; another try may help, and goes on from the newest checkpoint")
    except StageFailed as error:
        fail(f"error: {error.summary}, see above")
    except subprocess.CalledProcessError as error:
        fail(f"error: {error}{f': {error.stderr.strip()}' if error.stderr else ''}")
    except BrokenPipeError:  # nobody reads any more, which is no error; Typer ends quietly
        raise
    except (ValueError, OSError) as error:
        fail(f"error: {error}")


def fail(text: str, status: int = 1) -> None:
    print(text, file=sys.stderr)
    raise typer.Exit(status)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
