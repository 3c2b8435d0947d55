"""`elastic serve`: loads a family once and answers requests for all its budgets."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import torch

from elastic_core.errors import UserError
from elastic_core.export import elastic_checkpoint
from elastic_core.model import hf
from tasks.serving.engine import Engine
from tasks.serving.family import Family
from tasks.serving.http.app import bind, create_app, new_server
from tasks.serving.http.service import Service
from tasks.serving.jobs import Limits
from tasks.serving.metrics import Metrics
from tasks.serving.quiet import quiet

KEY = "ELASTIC_API_KEY"  # in the environment, so that no list of processes shows it
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def load(directory: Path, dtype: str | None, device: str | None) -> Family:
    """The family in `directory`, on a GPU if there is one. `dtype`: None keeps the stored element type."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device: got {device!r} ({str(error).splitlines()[0]}); allowed: cpu, cuda, cuda:1"
        ) from None
    return Family(directory, getattr(torch, dtype) if dtype else None, device)


def limits_of(directory: Path, context: int | None = None, **values) -> Limits:
    """Limits with the context of the model in `directory`, unless a shorter one is given. Raises UserError."""
    own = getattr(hf.read_config(directory), "max_position_embeddings", None) or Limits.context
    limits = Limits(context=own if context is None else context, **values)
    for name, most in (("max_batch", None), ("max_waiting", None), ("context", own)):
        value = getattr(limits, name)
        if value < 1 or (most is not None and value > most):
            allowed = "1 or more" if most is None else f"1 to {most} (max_position_embeddings in config.json)"
            raise UserError(f"--{name.replace('_', '-')}: got {value}; allowed: {allowed}")
    return limits


def serve(
    directory: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str | None = None,
    device: str | None = None,
    context: int | None = None,
    timeout: float = 600.0,
    **limits,
) -> None:
    """Serve the family in `directory` until the process is told to end.

    The key that clients have to send is in the environment, as ELASTIC_API_KEY. timeout: seconds for a request.
    context, limits: see `Limits`. Raises UserError for what the caller has to change.
    """
    if not timeout > 0:
        raise UserError(f"--timeout: got {timeout}; allowed: more than 0 seconds")
    address, key = bind(host, port), os.environ.get(KEY) or None
    with address, quiet():
        found = limits_of(directory, context, **limits)
        family, metrics = load(directory, dtype, device), Metrics()
        engine = Engine(family, found, metrics)
        app = create_app(Service(family, engine, metrics, timeout), key)
        logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr)
        logging.getLogger("elastic.serve").setLevel(logging.INFO)
        _say(family, engine.limits, host, address.getsockname()[1], key)
        new_server(app, engine).run(sockets=[address])


def _say(family: Family, limits: Limits, host: str, port: int, key: str | None) -> None:
    """Print where the server is and what it serves."""
    budgets = ", ".join(f"{name} ({budget.num_parameters:,})" for name, budget in family.budgets.items())
    between = "; those in between too, such as 0.8" if elastic_checkpoint.read(family.model.directory)["path"] else ""
    place = f"[{host}]" if ":" in host else host
    print(
        f"http://{place}:{port}/v1 serves budgets of {family.model.directory}\n"
        f"budgets   {budgets}{between}\n"
        f"weights   {family.model.num_bytes():,} bytes, once for all budgets\n"
        f"limits    context {limits.context:,} tokens; {limits.max_batch} texts at a time per budget, "
        f"{limits.max_waiting} in the queue\n"
        f"API key   {f'that in {KEY}' if key else 'none'}\n"
        "For more texts per second, extract a budget and serve it with vLLM (docs/serving.md).",
        flush=True,
    )
    if key is None and host not in LOOPBACK:
        print(f"warning: everyone who reaches {host} can use this server; set {KEY}", file=sys.stderr, flush=True)
