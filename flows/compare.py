"""The Prefect flow `compare`: what differs between two finished runs, in parameters and in results."""

from pathlib import Path

from prefect import flow, runtime
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.differences import changes, count
from flows.publish import run_name
from flows.records import NAMED, choose, records

ROOT = Path(__file__).resolve().parents[1]


def _name() -> str:
    given = runtime.flow_run.parameters
    return run_name(f"{given['before'] or 'the run before'} → {given['after'] or 'the last run'}")


@flow(name="compare", flow_run_name=_name)
def compare(before: str = "", after: str = "") -> State:
    """Show a table of the differences between two finished runs: parameters and results.

    Runs of the flow `elastic` and of the command `elastic run` can be compared.

    Args:
        before: The name of a finished run; empty: the last one before the other.
        after: The name of a finished run; empty: the last one.
    """
    before, after = choose(records(ROOT), before or None, after or None)
    rows = changes(ROOT / NAMED / before, ROOT / NAMED / after)
    create_table_artifact(key="comparison", table=rows, description=f"From run `{before}` to run `{after}`")
    return Completed(message=f"{before} → {after}: {count(rows)}")
