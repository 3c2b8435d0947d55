"""Kill runs at random moments, many times, and compare what they end at: `python -m tests.soak --trials 50`.

Prints a line per trial and a table; writes everything to a JSON file; exits with 1 where anything differed. A
trial's workspace stays where something was wrong with it, and its line says the seed that repeats its moments.
"""

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.soak import checks
from tests.soak import workspace as spaces
from tests.soak.processes import marked
from tests.soak.server import prefect_server
from tests.soak.trials import KINDS, Result, Trial, random_trial, run_trial


def main() -> int:
    arguments = parse()
    directory = Path(tempfile.mkdtemp(prefix="soak-"))
    begin = time.monotonic()
    print(f"workspaces in {directory}", flush=True)
    prepared = spaces.prepare(directory)
    for workers in sorted({KINDS[kind].workers for kind in arguments.kinds} - {0}):
        spaces.make_reference(prepared, workers)
    with contextlib.ExitStack() as stack:
        settings = stack.enter_context(prefect_server(directory / "server")) if "flow" in arguments.kinds else {}
        checked = run_checks(prepared) if arguments.checks else {}
        results = run_trials(prepared, arguments, settings)
    report = {
        "seed": arguments.seed,
        "seconds": time.monotonic() - begin,
        "checks": checked,
        "trials": [result.to_dict() for result in results],
    }
    arguments.report.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{table(results)}\nreport: {arguments.report}, {report['seconds'] / 60:.0f} minutes")
    failed = any(result.problems for result in results) or any(checked.values())
    if not failed:
        shutil.rmtree(directory)
    return int(failed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=50, help="how many with a kill, dealt to the kinds in turn")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS), help=", ".join(KINDS))
    parser.add_argument("--seed", type=int, default=0, help="the trials have the seeds after it")
    parser.add_argument("--report", type=Path, default=Path("soak.json"))
    parser.add_argument("--no-checks", dest="checks", action="store_false", help="only the kills at random moments")
    arguments = parser.parse_args()
    if unknown := set(arguments.kinds) - set(KINDS):
        parser.error(f"--kinds: got {', '.join(sorted(unknown))}; allowed: {', '.join(KINDS)}")
    return arguments


def run_trials(prepared: spaces.Prepared, arguments: argparse.Namespace, settings: dict[str, str]) -> list[Result]:
    """The trials, after one run of each kind that nobody kills: it shows how long that takes, and counts as a check."""
    results, seconds = [], {}

    def carry_out(trial: Trial, name: str) -> Result:
        result = run_trial(prepared, trial, name, **settings)
        print(f"{name:11} {result.line()}", flush=True)
        results.append(result)
        return result

    for kind in arguments.kinds:
        seconds[kind] = carry_out(Trial(kind, ()), f"{kind}-whole").life
    seed, left = arguments.seed, [arguments.kinds[i % len(arguments.kinds)] for i in range(arguments.trials)]
    while left:  # a run that ended before its moment came is none of the trials: the machine was faster than thought
        kind, seed = left.pop(0), seed + 1
        rows = len(prepared.references[KINDS[kind].workers]["rows"])
        result = carry_out(random_trial(kind, seed, seconds[kind], rows), f"{kind}-{seed}")
        if not result.moments and not result.problems:
            seconds[kind] = min(seconds[kind], result.life)
            left.insert(0, kind)
    return results


def run_checks(prepared: spaces.Prepared) -> dict[str, list[str]]:
    """What is not left to chance, each by its name with what was wrong."""
    found = {}
    for name, check in CHECKS.items():
        directory = prepared.directory / name.replace(" ", "-")
        try:
            with marked() as mark:
                found[name] = check(prepared, directory, mark)
        except PermissionError as error:
            print(f"{name}: skipped, {error}", flush=True)
            continue
        print(f"{name}: {'; '.join(found[name]) or 'as it should be'}", flush=True)
    return found


def table(results: list[Result]) -> str:
    """How many trials of each kind and first signal there were, and how many of them ended differently."""
    lines = [f"{'kind':10}{'first signal':15}{'trials':>8}{'kills':>8}{'restarts':>10}{'different':>11}"]
    rows = {}
    for result in results:
        signal = result.trial.kills[0].signal if result.moments else "not killed"
        rows.setdefault((result.trial.kind, signal), []).append(result)
    for (kind, signal), group in sorted(rows.items()):
        kills, restarts = sum(len(r.moments) for r in group), sum(r.restarts for r in group)
        different = sum(bool(r.problems) for r in group)
        lines.append(f"{kind:10}{signal:15}{len(group):8}{kills:8}{restarts:10}{different:11}")
    kills = sum(len(result.moments) for result in results)
    lines.append(f"{'all':25}{len(results):8}{kills:8}{'':10}{sum(bool(r.problems) for r in results):11}")
    return "\n".join(lines)


Check = Callable[[spaces.Prepared, Path, str], list[str]]
CHECKS: dict[str, Check] = {
    "two runs and damaged checkpoints": checks.two_runs_and_damage,
    "a full disk": checks.full_disk,
}

if __name__ == "__main__":
    sys.exit(main())
