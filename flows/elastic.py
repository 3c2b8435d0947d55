"""The Prefect flow `elastic`: one task per stage of dvc.yaml, in the order of that file.

DVC decides what is out of date; Prefect shows, queues, retries and cancels. A task brings one stage up to date
(flows/stages.py) and passes its output to the run's log, line by line. While a stage trains, its progress and losses
are artifacts of the run (flows/live.py). At the end the results, the report and the changes since the run before are
artifacts too (flows/publish.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from prefect import flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import AfterValidator, Field

from elastic_core.errors import UserError
from flows import publish
from flows.live import Live
from flows.process.output import follow
from flows.records import summary
from flows.stages import StageFailed, StageInterrupted, check_command, reproduce, select, stage_names
from tasks.runs.workspace import prepared
from tasks.settings import budgets as spellings
from tasks.settings import merging

ROOT = Path(__file__).resolve().parents[1]
RETRIES, RETRY_SECONDS = 3, 30  # of a stage that lost a server or a worker
# The dashboard deploys this file again when a profile or a stage is added (flows/dashboard/deployments.py).
Profile = Literal[tuple(merging.profile_names(ROOT))]
STAGES = stage_names(ROOT)
Stage = Literal[tuple(STAGES)]


def text_field(pattern: str, expected: str, check: Callable[[str], object]):
    """A text in a form. `check` raises UserError for a wrong one, when the run starts.

    The form itself knows only the pattern. It shows the message of JSON Schema, which for `pattern` is a regular
    expression, but for `const` is its value: "'section.key=value' was expected".
    """

    def checked(text: str) -> str:
        check(text)
        return text

    schema = {"if": {"not": {"pattern": f"^({pattern})$"}}, "then": {"const": expected}}
    return Annotated[str, AfterValidator(checked), Field(json_schema_extra=schema)]


Budget = text_field(spellings.MEMBER, spellings.MEMBER_FORMS, lambda text: spellings.read_family([text], "budgets"))
Override = text_field(merging.OVERRIDE, merging.OVERRIDE_FORM, merging.read_override)


@flow(name="elastic", flow_run_name=publish.profile_and_time)
def elastic(
    profile: Profile = "default",
    from_stage: Stage = STAGES[0],
    until_stage: Stage = STAGES[-1],
    only_stages: list[Stage] = [],  # noqa: B006 - never changed; a form shows it as an empty list
    budgets: list[Budget] = [],  # noqa: B006
    overrides: list[Override] = [],  # noqa: B006
    force: bool = False,
) -> State:
    """One parent in, one elastic checkpoint and its submodels out, evaluated and reported.

    *Run*, *Quick run* starts the default profile; *Custom run* asks for a profile, stages, budgets and parameters.

    Args:
        profile: `default` runs in the checkout with params.yaml; any other, a file in profiles/, in a workspace of its
            own, .runs/PROFILE/, with that file's parameters on top.
        from_stage: The first stage to run; what comes before it is taken as it is.
        until_stage: The last stage to run. Results are published when it is the last of all.
        only_stages: If any are chosen, no others run.
        budgets: The family, where it shall not be the profile's own: one member an item, as `NAME=BUDGET`. A budget is
            a share of the parent (`small=0.43`; 1 is the parent itself), a count of parameters (`small=9B`), memory at
            a context and a number of sequences (`small=16GiB@128k×8`) or time (`small=35ms/token`).
        overrides: Single parameters, one an item, as `section.key=value`: `train_short.learning_rate=1e-3`. A run with
            budgets or overrides has a workspace of its own; stages that they do not touch come from the cache.
        force: Run every chosen stage, also those that DVC finds unchanged.
    """
    try:
        family = spellings.read_family(budgets, "budgets")
        chosen = select(stage_names(ROOT), from_stage, until_stage, only_stages)
        check_parameters(profile, family, overrides)
        with prepared(profile, ROOT, family, overrides, get_run_logger().info) as workspace:
            return Completed(message=run_stages(profile, workspace, chosen, force))
    except StageFailed as error:  # the stage's task has logged all of it
        return Failed(message=error.reason, data=error)
    except (UserError, TimeoutError) as error:
        get_run_logger().error(error)
        return Failed(message=str(error), data=error)


def run_stages(profile: str, workspace: Path, chosen: list[str], force: bool) -> str:
    """Run the chosen stages, publish the results after the last of all; the run's result in one line."""
    names = stage_names(workspace)
    limits = time_limits(workspace)
    for stage in chosen:
        named = run_stage.with_options(name=stage, task_run_name=stage, timeout_seconds=limits.get(stage))
        try:
            # Called, not submitted: a cancellation interrupts a silent stage in this thread only.
            named(stage, workspace, force)
        except TimeoutError as error:
            hours = f"{limits[stage] / 3600:g} hours"
            raise TimeoutError(f"stage {stage}: stopped after {hours} (time_limits in params.yaml)") from error
    if chosen[-1] != names[-1]:
        return f"up to date: {', '.join(chosen)}"
    publish.results(profile, workspace, ROOT)
    return summary(workspace)


@task(name="check_parameters", task_run_name="check_parameters", cache_policy=NO_CACHE)
def check_parameters(profile: str, budgets: dict[str, float], overrides: list[str]) -> None:
    """Refuse wrong parameters now, before there is a workspace; their stage may come hours later."""
    log, lines = get_run_logger().info, []

    def take(line: str) -> None:
        lines.append(line)
        log(line)

    status, _ = follow(check_command(profile, budgets, overrides), ROOT, take)
    if status != 0:
        raise UserError(f"the parameters are not valid (profile {profile}):\n" + "\n".join(lines))


def time_limits(workspace: Path) -> dict[str, float]:
    """How long each stage may take, in seconds, where params.yaml says so."""
    from ruamel.yaml import YAML

    hours = YAML(typ="safe").load(workspace / "params.yaml").get("time_limits") or {}
    return {stage: 3600 * limit for stage, limit in hours.items()}


def may_succeed_later(task, task_run, state: State) -> bool:
    """Retry only where a server was away or a worker was lost, never for a wrong parameter or a bad loss."""
    return isinstance(state.result(raise_on_failure=False), StageInterrupted)


@task(retries=RETRIES, retry_delay_seconds=RETRY_SECONDS, retry_condition_fn=may_succeed_later, cache_policy=NO_CACHE)
def run_stage(stage: str, workspace: Path, force: bool = False) -> State:
    """Bring one stage of dvc.yaml, or every item of a foreach group, up to date."""
    live = Live(workspace, get_run_logger().info)
    force = force and runtime.task_run.run_count == 1  # another try goes on from the checkpoints of the first
    try:
        ran = reproduce(stage, workspace, force, get_run_logger().info, watch=live.watch)
    except StageFailed:
        live.refresh()
        raise
    live.refresh()
    if not ran:
        return Completed(name="Cached", message="Its inputs, parameters and code are those of an earlier run")
    return Completed(message=f"Ran {', '.join(ran)}")
