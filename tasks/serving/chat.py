"""`elastic chat`: a conversation in a terminal, whose turns may use different budgets."""

from __future__ import annotations

import queue
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from elastic_core.errors import UserError
from tasks.serving.engine import Engine
from tasks.serving.family import Budget, Family
from tasks.serving.jobs import Failure, Job
from tasks.serving.metrics import Metrics
from tasks.serving.quiet import quiet
from tasks.serving.sampling import Chooser, Settings
from tasks.serving.serve import limits_of, load

HELP = """\
/budget small      answer with this budget from now on (a name, 0.8 or 9B); without one, show all
/hand-over on|off  let a smaller budget go on from what a larger one has read (faster, other words)
/system TEXT       a new conversation with this system message
/new               a new conversation with the same system message
/undo              forget the last question and its answer
/help              this list
/quit              the end; so is Ctrl-D. Ctrl-C ends an answer."""


@dataclass
class Talk:
    """A conversation and how it is continued."""

    family: Family
    engine: Engine
    budget: Budget
    settings: Settings
    max_new_tokens: int
    options: dict  # variables of the chat template
    hand_over: bool = False
    messages: list[dict] = field(default_factory=list)

    def ask(self, question: str) -> Iterator[str]:
        """The pieces of the answer. The question and what was read of the answer become part of the conversation.

        Raises UserError, and leaves the conversation as it is, if the question cannot be asked.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt = self.family.chat_tokens(messages, **self.options)
        left = self.engine.limits.context - len(prompt)
        if left < 1:
            most = self.engine.limits.context
            raise UserError(f"the conversation has {len(prompt)} tokens; allowed: fewer than {most}; start a /new one")
        found, num_new = queue.SimpleQueue(), min(left, self.max_new_tokens)
        chooser = Chooser(self.budget.model, self.settings, prompt, num_new)
        stop_ids = self.family.stop_ids()
        job = Job(self.budget, chooser, num_new, found.put, stop_ids=stop_ids, hand_over=self.hand_over)
        self.engine.submit([job])
        answer = ""
        try:
            while True:
                piece = found.get()
                if isinstance(piece, Failure):
                    raise UserError(f"no answer: {piece.reason}")
                answer += piece.text
                yield piece.text
                if piece.finish is not None:
                    return
        finally:
            self.engine.cancel([job])
            if answer:
                self.messages = [*messages, {"role": "assistant", "content": answer}]

    def command(self, line: str) -> str:
        """Follow a line that starts with /, and return what to print. Raises UserError for a wrong one."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name == "budget" and rest:
            self.budget = self.family.budget(rest)
            return f"{self.budget.label}: {self.budget.num_parameters:,} parameters"
        if name == "budget":
            return "\n".join(f"{known}: {b.num_parameters:,} parameters" for known, b in self.family.budgets.items())
        if name == "hand-over" and rest in ("on", "off"):
            self.hand_over = rest == "on"
            return f"hand-over is {rest}"
        if name in ("new", "system") and bool(rest) == (name == "system"):
            kept = [message for message in self.messages if message["role"] == "system"]
            self.messages = [{"role": "system", "content": rest}] if rest else kept
            return "a new conversation"
        if name == "undo" and not rest:
            return self._undo()
        if name == "help":
            return HELP
        raise UserError(f"got {line!r}; allowed:\n{HELP}")

    def _undo(self) -> str:
        questions = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not questions:
            raise UserError("/undo: nothing was asked yet")
        self.messages = self.messages[: questions[-1]]
        return "forgotten"


def chat(
    directory: Path,
    budget: str | None,
    system: str | None = None,
    think: bool | None = None,
    temperature: float = 0.0,
    seed: int | None = None,
    max_new_tokens: int = 512,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Talk to the family in `directory`: lines of stdin are questions and commands, answers go to stdout.

    budget: of the first turn; None takes the largest. think: None leaves it to the chat template. Raises UserError.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: got {max_new_tokens}; allowed: 1 or more")
    if not 0 <= temperature <= 100:
        raise UserError(f"--temperature: got {temperature}; allowed: 0 (always the most likely token) to 100")
    options = {} if think is None else {"enable_thinking": think}
    messages = [] if system is None else [{"role": "system", "content": system}]
    with quiet():
        family = load(directory, dtype, device)
        first = family.budget(budget) if budget else max(family.budgets.values(), key=lambda one: one.num_parameters)
        family.chat_tokens([*messages, {"role": "user", "content": "?"}], **options)  # before the first question
        engine = Engine(family, limits_of(directory), Metrics())
        settings = Settings(temperature, seed=seed)
        engine.start()
        try:
            _loop(Talk(family, engine, first, settings, max_new_tokens, options, messages=messages))
        finally:
            engine.stop()


def _loop(talk: Talk) -> None:
    """Read a line, print the answer, until the end of the input."""
    asks = sys.stdin.isatty()
    if asks:
        print("/help lists the commands", file=sys.stderr)
    while True:
        try:
            line = input(f"{talk.budget.label}> " if asks else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                print(talk.command(line), file=sys.stderr)
            elif line:
                _print_answer(talk, line)
        except UserError as error:
            print(error.report(), file=sys.stderr)


def _print_answer(talk: Talk, question: str) -> None:
    pieces = talk.ask(question)
    try:
        for text in pieces:
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
    print(flush=True)
