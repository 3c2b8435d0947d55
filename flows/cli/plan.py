"""`elastic plan` and `elastic measure`: what training takes, and what layers take on this machine."""

import json
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.errors import clear_errors, say
from flows.cli.options import Settings, complete_profile


def plan(
    profile: Annotated[
        str,
        typer.Argument(
            metavar="PROFILE",
            help="As `elastic run` takes it; or a parent without a profile: a name on the hub, or a directory.",
            autocompletion=complete_profile,
        ),
    ] = "default",
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", "-n", min=1, help="Number of workers with a GPU each; default: the profile's."),
    ] = None,
    gpu_memory: Annotated[str, typer.Option(help="Memory of one GPU; a tenth is reserved.")] = "80GB",
    utilisation: Annotated[float, typer.Option(help="Share of the peak FLOP/s that training reaches.")] = 0.4,
    peak: Annotated[
        float | None,
        typer.Option(help="TFLOP/s of one GPU.", show_default="an H100's: 989 in bfloat16, 67 in float32"),
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="Of one GPU for one hour; the plan then has the cost in the same currency.")
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
    """Tell what the training of a profile takes: sizes of the family, memory of a GPU, operations and hours.

    It needs the parent's config.json only: no weights, no data, no GPU. If prepare_data has run, it counts attention by
    the lengths of the documents. Where a stage does not fit, it says what to
    change and ends with status 1.

    - `elastic plan nemotron-nano-12b-v2`: the paper's run
    - `elastic plan nemotron-nano-12b-v2 --gpus 8`: the same on one node
    - `elastic plan Qwen/Qwen3-8B`: a parent on the Hugging Face hub, in the profile that is made for it, or else in the
      one that `elastic init` would write
    """
    with clear_errors("stopped"):
        from tasks.commands.plan import plan_profile
        from tasks.commands.plan_stages import Hardware
        from tasks.commands.planning.parents import plan_parent

        hardware = Hardware.read(gpu_memory, utilisation, peak, price)
        make_plan = plan_parent if "/" in profile else plan_profile
        description = make_plan(profile, settings or (), gpus, hardware, config)
        if as_json:
            say(json.dumps(description, indent=1))
        else:
            from flows.cli.show_plan import show

            show(description)
    raise typer.Exit(0 if description["fits"] else 1)


def measure(
    profile: Annotated[
        str, typer.Argument(metavar="PROFILE", help="As `elastic run` takes it.", autocompletion=complete_profile)
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where the table goes.", show_default="profiles/measured/PROFILE.json"),
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
    """Measure how long layers take on this machine, at the sizes of a profile: the table for `cost: {metric: latency}`.

    It needs the parent's config.json only: transformers' modules with random weights decode random text with a cache.

    The table is used by a profile that names it: `cost: {metric: latency, table: profiles/measured/latency.json}`.

    - `elastic measure latency`: a few minutes on a CPU
    - `elastic measure nemotron-nano-12b-v2 --context 4096 --batch 8 --out profiles/h100.json`
    """
    with clear_errors("stopped; nothing was written"):
        from tasks.commands.measure import describe, measure_profile

        chosen = {"batch": batch, "threads": threads, "device": device, "dtype": dtype, "points": points}
        chosen["contexts"] = tuple(sorted(set(contexts))) if contexts else None
        say(describe(*measure_profile(profile, settings or (), out, rounds=rounds, **chosen)))
