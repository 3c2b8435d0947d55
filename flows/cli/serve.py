"""`elastic serve` and `elastic chat`: all members of a family from one copy of the weights."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.errors import clear_errors
from flows.cli.options import BudgetOption, Dtype

FamilyArgument = Annotated[Path | None, typer.Argument(metavar="DIR", help="The family.", show_default="last run")]
DtypeOption = Annotated[
    Dtype | None, typer.Option(help="Element type of the weights (default: as stored).", show_default=False)
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:1.", show_default="cuda, or cpu without a GPU")
]


def serve(
    directory: FamilyArgument = None,
    host: Annotated[str, typer.Option(help="The address to listen at. 0.0.0.0 is reached from outside.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="0 takes a free one.")] = 8000,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of a text, with its prompt.", show_default="the model's")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Texts of one budget that are continued together.")] = 8,
    max_waiting: Annotated[int, typer.Option(help="Texts in the queue; further ones are refused with 429.")] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds for a request, from its arrival to its last token.")] = 600.0,
    cache_mib: Annotated[int, typer.Option(min=0, help="Memory for texts that were read, for their next turn.")] = 256,
) -> None:
    """Serve all budgets of a family, with OpenAI's HTTP interface.

    `model` in a request names a budget: small, 0.8 or 9B. The weights are in memory once. Clients have to send the key
    in the environment variable ELASTIC_API_KEY, if there is one. For more texts per second, extract a budget and serve
    it with vLLM.

    - `elastic serve`
    - `elastic serve path/to/family --port 8001 --dtype bfloat16`
    """
    with clear_errors("stopped"):
        from tasks.commands import find_family

        directory = find_family.find(directory)
        from tasks.serving.serve import serve as run

        limits = {"max_batch": max_batch, "max_waiting": max_waiting, "cache_bytes": cache_mib * 2**20}
        run(directory, host, port, dtype, device, context, timeout, **limits)


def chat(
    directory: FamilyArgument = None,
    budget: BudgetOption = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.", show_default=False)] = None,
    think: Annotated[
        bool | None, typer.Option("--think/--no-think", help="Whether to think first.", show_default="the template's")
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="0 takes the likeliest token, 1 the model's own spread.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers.", show_default="another every time")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Of an answer, at most.")] = 512,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Talk to the members of a family, in turn if you like: `/budget small` changes who answers.

    Every line is a question, and the whole conversation is read by whoever answers. `/help` lists the commands.

    - `elastic chat`
    - `elastic chat path/to/family --budget small --system "Answer briefly."`
    """
    with clear_errors("stopped"):
        from tasks.commands import find_family

        directory = find_family.find(directory)
        from tasks.serving.chat import chat as run

        run(directory, budget, system, think, temperature, seed, max_new_tokens, dtype, device)
