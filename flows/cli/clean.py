"""`elastic clean`: what runs have left, and removing it."""

from typing import Annotated

import typer

from flows.cli.errors import clear_errors, say
from flows.tables import aligned


def clean(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="What to remove, as the command without names lists it.")
    ] = None,
    runs: Annotated[bool, typer.Option("--runs", help="Remove the files of stopped runs.")] = False,
    workspaces: Annotated[bool, typer.Option("--workspaces", help="Remove workspaces and their reports.")] = False,
) -> None:
    """Show what runs have left, with its size, and remove it where it is named.

    The checkpoints of finished runs are removed by themselves, once DVC has their results. What is left are those of
    stopped runs, which go on from them when they are started again, and the workspaces of profiles and of runs with
    other parameters. Results that are in DVC's cache stay there: see `dvc gc`.

    - `elastic clean`: only show
    - `elastic clean .runs/smoke checkpoints/train_short-0123456789abcdef`
    - `elastic clean --runs`
    """
    with clear_errors("stopped"):
        from tasks.commands.clean import find_left, select
        from tasks.settings.profiles import ROOT

        found = find_left(ROOT)
        chosen = select(found, names or ())
        kinds = {"run": runs, "workspace": workspaces}
        chosen += [left for left in found if kinds.get(left.kind) and not left.holder]
        if not chosen:
            say(show(found))
        for left in chosen:
            if left.directory.exists():  # not in a workspace that is already removed
                left.remove()
                say(f"removed {left.name} ({size(left.num_bytes)})")


def show(found) -> str:
    """A row per item, the largest first."""
    if not found:
        return "nothing is left"
    rows = [("size", "what", "last used", "name")]
    for left in found:
        used = f"in use by {left.holder}" if left.holder else left.last_used.strftime("%Y-%m-%d %H:%M")
        rows.append((size(left.num_bytes), left.kind, used, left.name))
    return f"{aligned(rows)}\n\nTo remove: elastic clean NAME …, --runs or --workspaces"


def size(num_bytes: int) -> str:
    """A size for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError
