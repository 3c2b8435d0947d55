"""`elastic adopt`, `extract`, `generate` and `inspect`: what is done with a trained family."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from elastic_core.errors import UserError
from elastic_core.io.atomic import check_out
from flows.cli.errors import clear_errors, say
from flows.cli.options import BudgetOption, Dtype, Heterogeneous, NearestOption


class LikeCp(TyperCommand):
    """Takes one path or two, like cp; Typer's usage would show a list of any length."""

    def collect_usage_pieces(self, ctx) -> list[str]:
        return ["[OPTIONS]", "[DIR]", "OUT"]


def extract(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="[DIR] OUT", help="The family (by default of the last run), and where the model goes."),
    ],
    budget: BudgetOption = None,
    nearest: NearestOption = False,
    heterogeneous: Annotated[
        Heterogeneous,
        typer.Option(help="For widths that differ between layers: add a modeling file, or pad MLPs with zeros."),
    ] = Heterogeneous.remote_code,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Element type (default: that of the parent's files).", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace a model that is at OUT.")] = False,
) -> None:
    """Cut one member out of a family, as a directory that transformers and others load.

    - `elastic extract models/small --budget small`
    - `elastic extract path/to/family models/9b --budget 9B --dtype bfloat16`
    - `elastic extract models/served --budget 16GiB@128k×8`
    """
    with clear_errors("stopped; nothing was written"):
        if len(paths) > 2:
            raise UserError(f"got {len(paths)} paths; allowed: [DIR] OUT, the family's directory and the new one")
        out = paths[-1]
        check_out(out, force)
        from tasks.commands import find_family
        from tasks.commands.extract import export

        family = find_family.find(*paths[:-1])
        written = export(family, budget, out, heterogeneous, dtype, nearest)
        share = written.num_parameters / written.parent_num_parameters
        predicted = f"{written.predicted}\n" if written.predicted else ""
        say(
            f"{out}: {written.num_parameters:,} parameters, {share:.1%} of {written.parent_num_parameters:,} in "
            f"{family}; {written.num_bytes:,} bytes of weights in {written.seconds:.1f} s\n"
            f"{predicted}{written.submodel}"
        )


def adopt(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The full model, in which its members are nested.", show_default=False)
    ],
    sizes: Annotated[
        Path,
        typer.Option(metavar="FILE", help="YAML or JSON: the name and the sizes of every member.", show_default=False),
    ],
    head_order: Annotated[
        str | None,
        typer.Option(
            metavar="ORDER",
            help="Which heads a member keeps: `group` for the first of every group, `shard:8` for the first of every "
            "one of 8 tensor-parallel shards.",
            show_default="what the losses say",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write a copy there, and leave DIR as it is.", show_default=False)
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The text for losses.", show_default="docs/method.md")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="How many tokens of the text.")] = 2048,
    most_excess: Annotated[
        float, typer.Option(help="How much larger than the whole model's a member's loss may be, in nats per token.")
    ] = 1.0,
    force: Annotated[bool, typer.Option("--force", "-f", help="Whatever the losses; replace what is there.")] = False,
) -> None:
    """Make a nested checkpoint of another program one that `extract`, `generate` and `inspect` know.

    The file lists sizes as elastic.json does. What a member does not name is the full model's; a member without sizes
    is the full model:

        large: {}
        small: {hidden_size: 2048, kept_layers: [0, 1, 2, 5], intermediate_size: 5632, num_attention_heads: 16}

    The members have to be nested. Their losses on a text are measured, to tell right sizes from wrong ones.

    - `elastic adopt /models/nested-12b --sizes sizes.yaml`
    - `elastic adopt /models/nested-12b --sizes sizes.yaml --head-order shard:16 --out models/nested-12b`
    """
    with clear_errors("stopped; nothing was written"):
        from flows.tables import aligned
        from tasks.commands.adoption.adopt import adopt as adopt_checkpoint

        done = adopt_checkpoint(directory, sizes, head_order, out, text, tokens, most_excess, force)
        rows = [("member", "loss", "sizes"), ("(whole)", f"{done.loss:.3f}", "")]
        rows += [(name, f"{done.losses[name]:.3f}", str(member)) for name, member in done.members.items()]
        others = ", ".join(f"{order} {loss:.3f}" for order, loss in done.by_order.items())
        say(f"{done.out}: an elastic checkpoint of {len(done.members)} members; losses on {done.tokens:,} tokens\n")
        say(aligned(rows))
        if len(done.by_order) > 1:
            say(f"\nhead order {done.head_order}; the members' mean loss by order: {others}")


def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A family, or an extracted model.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hugging Face hub.")],
    public: Annotated[bool, typer.Option("--public", help="For everyone (default: private).")] = False,
    revision: Annotated[
        str | None, typer.Option(help="The branch (default: main).", show_default=False, metavar="BRANCH")
    ] = None,
) -> None:
    """Upload a model to the Hugging Face hub, with its model card, and the results if the run has any.

    The token is HF_TOKEN, or that of `hf auth login`.

    - `elastic push models/small me/my-small`
    - `elastic push artifacts/train_extended/model me/my-family --public`
    """
    with clear_errors("stopped; the repository has what it had before"):
        from tasks.commands import find_family
        from tasks.commands.extract import push

        directory = find_family.find(directory)
        say(f"{directory}: uploaded to {push(directory, repository, not public, revision)}")


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on from; with --chat, what the user says.")],
    directory: Annotated[
        Path | None,
        typer.Option(
            "--model", "-m", metavar="DIR", help="The family, or an extracted model.", show_default="last run"
        ),
    ] = None,
    budget: BudgetOption = None,
    nearest: NearestOption = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Where to stop at the latest.")] = 100,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="0 takes the likeliest token, 1 the model's own spread.")
    ] = 0.0,
    chat: Annotated[
        bool, typer.Option("--chat", "-c", help="Write the prompt with the model's chat template.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="With --chat: the system message.", show_default=False)
    ] = None,
    think: Annotated[
        bool | None,
        typer.Option("--think/--no-think", help="With --chat: whether to think first.", show_default="the template's"),
    ] = None,
) -> None:
    """Print the continuation of a prompt by one member of the family, as it comes.

    The member is extracted for this one call. To use it often, extract it once with `elastic extract`, and name that
    directory here without a budget.

    - `elastic generate --budget small "In the beginning"`
    - `elastic generate --model models/small "In the beginning" --temperature 0.8`
    - `elastic generate --budget small --chat "What is six times seven?"`
    """
    with clear_errors("stopped"):
        if not chat and (system is not None or think is not None):
            name = "--system" if system is not None else "--think" if think else "--no-think"
            raise UserError(f"{name}: needs --chat, which writes the prompt with the model's chat template")
        if nearest and budget is None:
            raise UserError("--nearest: needs --budget, to which the model is the nearest")
        from tasks.commands import find_family

        directory = find_family.find(directory)
        print(f"{directory}{f', budget {budget}' if budget else ''}", file=sys.stderr)
        from tasks.commands.generate import Chat, generate

        generate(directory, budget, prompt, max_new_tokens, temperature, Chat(system, think) if chat else None, nearest)


def inspect(
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR", help="A family, an extracted model, a parent, or a run.", show_default="last run"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Show what a model directory holds: sizes, budgets, layers and where it comes from.

    It reads only the headers of the files, and checks them against config.json, so it is quick for every size. In a
    pattern, M is a Mamba-2 layer, * attention, - an MLP, E experts, L a Llama layer, and · a dropped layer of the
    parent.
    """
    with clear_errors("stopped"):
        from tasks.commands import find_family
        from tasks.commands.inspect import inspect_checkpoint

        description = inspect_checkpoint(find_family.find(directory))
        if as_json:
            say(json.dumps(description, indent=1))
        else:
            from flows.cli.show_inspect import show

            show(description)
