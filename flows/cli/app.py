"""`elastic`: the command line. It starts at once: a command imports what it needs when it runs."""

import typer

from flows.cli import clean, family, init, plan, run, serve

app = typer.Typer(
    name="elastic",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""One pretrained language model in, one elastic checkpoint out, with a nested model for every budget.

    `init` writes a profile for your parent and text, `plan` tells what training takes, `measure` times the layers on
    the device that is to serve, `run` trains a family, `compare` shows what differs between two runs or exports,
    `clean` shows and frees what runs have left, `inspect` shows a family's members, `generate` tries one, `serve`
    answers requests for all of them, `chat` talks to them here, `extract` writes one as a directory for other servers,
    `push` uploads it to the Hugging Face hub, `adopt` takes a nested checkpoint of another program, `up` starts the
    dashboard. Where no directory is named, the commands take the family of the last run.
    """,
)
app.command()(init.init)
app.command()(run.run)
app.command()(plan.plan)
app.command()(plan.measure)
app.command()(run.compare)
app.command()(run.up)
app.command(cls=family.LikeCp)(family.extract)
app.command()(family.push)
app.command()(family.generate)
app.command()(family.inspect)
app.command()(serve.serve)
app.command()(serve.chat)
app.command()(family.adopt)
app.command()(clean.clean)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
