"""`elastic init`: a profile for a parent and text of the user."""

from typing import Annotated

import typer

from flows.cli.errors import clear_errors, say


def init(
    parent: Annotated[
        str,
        typer.Argument(metavar="DIR", help="A local Hugging Face directory with its tokenizer, or a name on the hub."),
    ],
    data: Annotated[
        list[str],
        typer.Option("--data", "-d", metavar="GLOB", help="Text files: .txt, .jsonl or .parquet; can be repeated."),
    ],
    budgets: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            "-b",
            metavar="NAME=BUDGET",
            help="A member: `small=0.5`, `small=9B` or `small=16GiB@128k`; can be repeated.",
            show_default="full=1.0, medium=0.75, small=0.5",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Of the profile.", show_default="the directory's name")
    ] = None,
    text_field: Annotated[str, typer.Option(help="The field with the text in .jsonl and .parquet files.")] = "text",
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace a profile of this name.")] = False,
) -> None:
    """Write profiles/NAME.yaml for your parent and your text, with a comment on every parameter.

    Sizes, sequence lengths, steps and learning rates fit the parent's config.json, the amount of text and this machine.
    They are a start: change what you know better. No weights are read.

    - `elastic init /models/SmolLM2-135M --data "corpus/*.jsonl"`
    - `elastic init Qwen/Qwen3-0.6B --data "corpus/*.jsonl" --name mine`: from the Hugging Face hub
    - `elastic init /models/mine --name mine --data "a/*.txt" --data "b/*.parquet" --budget full=1.0 --budget half=0.5`
    """
    with clear_errors("stopped; nothing was written"):
        from flows.stages import check_checkout
        from tasks.settings.budgets import read_family
        from tasks.settings.merging import ROOT

        check_checkout(ROOT)
        family = read_family(budgets or (), "--budget")
        from tasks.commands.init import init as write_profile

        path = write_profile(parent, data, family, name, text_field, force, ROOT)
        say(f"{path}: written; read it, and change what you know better. Then:")
        say(f"  elastic plan {path.stem}     # memory, operations and hours")
        say(f"  elastic run {path.stem}")
