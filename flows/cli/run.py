"""`elastic run` and `elastic up`: the pipeline, in this terminal or from a browser."""

from typing import Annotated

import typer

from flows.cli.errors import clear_errors, say
from flows.cli.options import Settings, complete_profile, stage_option


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

    Stages with unchanged code, parameters and inputs are skipped. A run that was stopped, by Ctrl-C or a crash, goes on
    from its newest checkpoint when it is started again. The default profile runs in the checkout. Every other profile,
    and every run with other budgets or parameters, has a directory of its own under `.runs/`.

    - `elastic run smoke`: everything, small, in two minutes
    - `elastic run --until rank`: data, parent and importance, no training
    - `elastic run --budget full=1.0 --budget half=0.5`: another family
    - `elastic run --set train_short.steps=900 --from train_short`: longer, from there on
    """
    with clear_errors("stopped; the same command goes on from the newest checkpoint"):
        from flows.cli.pipeline import Selection, run_pipeline
        from tasks.settings.merging import read_budgets

        chosen = Selection(first, last, only or ())
        run_pipeline(profile, chosen, read_budgets(budgets or ()), settings or (), force, say)


def up() -> None:
    """Bring up the dashboard: server, worker and deployments in the foreground, until Ctrl-C.

    It prints its address. Runs that are started in the browser use the same checkout, profiles and results as
    `elastic run`.
    """
    with clear_errors("stopped"):
        from flows.stages import check_checkout
        from tasks.settings.merging import ROOT

        check_checkout(ROOT, "prefect.toml")
        from flows.dashboard import server

        server.main()
