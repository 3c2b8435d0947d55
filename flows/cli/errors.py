"""How a command ends: with one line, and without a traceback, for what the caller can change."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import typer

from elastic_core.errors import UserError

INTERRUPTED = 130  # the exit status after Ctrl-C, as shells have it


def say(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def clear_errors(interrupted: str) -> Iterator[None]:
    """End the command with one line for an error that the caller can change; `interrupted` is said after Ctrl-C."""
    from flows.stages import StageFailed, StageInterrupted

    try:
        yield
    except KeyboardInterrupt:
        fail(f"\n{interrupted}", INTERRUPTED)
    except StageInterrupted as error:
        advice = "another try may help, and goes on from the newest checkpoint"
        fail(f"error: {error.summary}, see above; {advice}", os.EX_TEMPFAIL)
    except StageFailed as error:
        fail(f"error: {error.summary}, see above")
    except subprocess.CalledProcessError as error:
        fail(f"error: {error}{f': {error.stderr.strip()}' if error.stderr else ''}")
    except BrokenPipeError:  # the reader of our output has ended, which is no error; Typer ends quietly
        raise
    except UserError as error:
        fail(error.report())
    except OSError as error:
        fail(f"error: {error}")


def fail(text: str, status: int = 1) -> None:
    print(text, file=sys.stderr)
    raise typer.Exit(status)
