"""`elastic run`, `compare` and `up`: the pipeline, in this terminal or from a browser, and its finished runs."""

from pathlib import Path
from typing import Annotated

import typer

from elastic_core.errors import UserError
from flows.cli.errors import clear_errors, say
from flows.cli.options import Settings, complete_profile, complete_run, stage_option


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
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Run stages from the start, also where nothing has changed.")
    ] = False,
    old_run: Annotated[
        str | None,
        typer.Option(
            "--continue",
            metavar="RUN",
            help="Go on from the checkpoints of this stopped run of a stage, though code or inputs have changed since "
            "(`elastic clean` lists runs); this is put on record.",
        ),
    ] = None,
) -> None:
    """Run the pipeline in this terminal, from a parent to an evaluated family and its report.

    Stages with unchanged code, parameters and inputs are skipped. A run that was stopped, by Ctrl-C or a crash, goes on
    from its newest checkpoint when it is started again. The default profile runs in the checkout. Every other profile,
    and every run with other budgets or parameters, has a directory of its own under `.runs/`. Results of a run to the
    last stage are kept in `reports/runs/`, for `elastic compare`.

    - `elastic run smoke`: everything, small, in two minutes
    - `elastic run --until rank`: data, parent and importance, no training
    - `elastic run --budget full=1.0 --budget half=0.5`: another family
    - `elastic run --set train_short.steps=900`: longer; stages before that one come from the cache
    """
    with clear_errors("stopped; the same command goes on from the newest checkpoint"):
        from flows.cli.pipeline import Selection, run_pipeline
        from tasks.settings.budgets import read_family

        chosen = Selection(first, last, only or ())
        if old_run is not None and force:
            raise UserError("--continue goes on from checkpoints, --force starts from the start; allowed: one of them")
        family = read_family(budgets or (), "--budget")
        run_pipeline(profile, chosen, family, settings or (), force, say, old_run=old_run and Path(old_run).name)


def compare(
    before: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN", help="A finished run.", autocompletion=complete_run, show_default="the one before the other"
        ),
    ] = None,
    after: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="Another one.", autocompletion=complete_run, show_default="the last one"),
    ] = None,
) -> None:
    """Show what differs between two finished runs: parameters and results. Or between two model directories.

    Runs of `elastic run` and of the dashboard are in `reports/runs/`. A run's name may be written as that directory's.
    Of model directories, it compares sizes, and what their provenance says: parameters, libraries, code and inputs.

    - `elastic compare`: the last two
    - `elastic compare smoke-2026-11-29-21-43`: from that run to the last one
    - `elastic compare models/monday models/tuesday`: two exports
    """
    with clear_errors("stopped"):
        from flows.differences import as_text, changes, count, model_changes
        from flows.records import NAMED, choose, records
        from tasks.settings.profiles import ROOT

        if before and after and all((Path(name) / "config.json").is_file() for name in (before, after)):
            from tasks.commands.inspect import inspect_checkpoint

            first, second = before, after
            rows = model_changes(*(inspect_checkpoint(Path(name)) for name in (before, after)))
        else:
            first, second = choose(records(ROOT), before, after)
            rows = changes(ROOT / NAMED / first, ROOT / NAMED / second)
        say(f"{first} → {second}: {count(rows)}\n\n{as_text(rows)}")


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
