"""The table of fuzz targets at the end: how many calls each had, and how many different faults they found."""

import pytest

from tests.support.fuzzing.calls import CALLS, FAULTS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table. With pytest-xdist the calls are in other processes, and there is none."""
    if not CALLS:
        return
    lines = [f"{'fuzz target':42}{'calls':>8}{'faults':>8}"]
    lines += [f"{name:42}{CALLS[name]:8}{len(FAULTS.get(name, ())):8}" for name in sorted(CALLS)]
    lines.append(f"{'all':42}{CALLS.total():8}{sum(map(len, FAULTS.values())):8}")
    for line in lines:
        terminalreporter.write_line(line)
    for name, faults in sorted(FAULTS.items()):
        for fault in sorted(faults):
            terminalreporter.write_line(f"{name}: {fault}")
