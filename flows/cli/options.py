"""Options that commands of `elastic` share, and what shells complete them to; imports nothing that takes time."""

import contextlib
from enum import StrEnum
from typing import Annotated

import typer

from elastic_core.errors import UserError


class Heterogeneous(StrEnum):
    """How widths that differ between layers are exported."""

    remote_code = "remote_code"
    pad = "pad"


class Dtype(StrEnum):
    """Element types of an export."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def complete_profile(incomplete: str) -> list[str]:
    from tasks.settings.merging import profile_names

    return [name for name in profile_names() if name.startswith(incomplete)]


def complete_stage(incomplete: str) -> list[str]:
    from flows.stages import stage_names
    from tasks.settings.merging import ROOT

    return [name for name in stage_names(ROOT) if name.startswith(incomplete)]


def complete_run(incomplete: str) -> list[str]:
    from flows.records import records
    from tasks.settings.profiles import ROOT

    return [name for name in records(ROOT) if name.startswith(incomplete)]


def complete_budget(incomplete: str) -> list[str]:
    from tasks.commands import find_family

    with contextlib.suppress(UserError):  # no run has ended yet
        return [name for name in find_family.budget_names(find_family.find()) if name.startswith(incomplete)]
    return []


def stage_option(name: str, text: str) -> typer.models.OptionInfo:
    return typer.Option(
        name, metavar="STAGE", help=text, autocompletion=complete_stage, rich_help_panel="Only some of the stages"
    )


BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget",
        "-b",
        metavar="BUDGET",
        help="A trained budget's name; or a share of the parent (0.75), a count of parameters (9B, 1.2M), memory "
        "(16GiB@128k×8: context × sequences) or time (35ms/token, 1200tokens/s), served by the nearest nested model.",
        autocompletion=complete_budget,
        show_default=False,
    ),
]

NearestOption = Annotated[
    bool,
    typer.Option("--nearest", help="Take the nearest model there is, where none is within 2 % of the budget."),
]

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a parameter: `train_short.learning_rate=1e-3`."),
]
