"""`fewbits chat`: talk to a model.

A line is a turn. Ctrl-C ends an answer and keeps what there is of it; the end of the input (Ctrl-D) leaves. A model
without a chat template was made to continue texts, so that is what it does: what is typed goes on where the text is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fewbits.cli._print import error
from fewbits.cli._writing import Clock, add_arguments, figures, opened, say, settings
from fewbits.errors import RequestError

if TYPE_CHECKING:
    from fewbits.engine import Engine

COMMANDS = "/reset forgets the conversation, /system TEXT says what the model is to be, /exit or Ctrl-D leaves"


@dataclass(frozen=True)
class Message:
    """What somebody said: system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """What was said since the last /reset."""

    model: str
    messages: tuple[Message, ...]


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model",
        description=f"Talk to a model, a line a turn. {COMMANDS}; Ctrl-C ends an answer. With --json the conversation "
        "is printed when it is over.",
    )
    add_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is to be")
    parser.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> Conversation:
    with suppress(ImportError):  # a platform without it has no history of lines
        import readline  # noqa: F401

    engine = opened(args)
    talk = _Talk(engine, settings(args), quiet=args.json)
    talk.note(COMMANDS)
    if engine.text.template is None:
        talk.note("this model has no chat template: it continues the text, and what you type goes on where that stands")
    if args.system is not None:
        talk.set_system(args.system)
    while (line := _line(talk)) is not None:
        try:
            if not talk.hear(line):
                break
        except RequestError as problem:
            error(str(problem))
    return Conversation(args.out, tuple(talk.messages))


def show(result: Conversation, _: Console) -> None:
    """All has been shown."""


class _Talk:
    """A conversation: its messages, and what a line does to them."""

    def __init__(self, engine: Engine, settings: dict[str, Any], *, quiet: bool) -> None:
        self.messages: list[Message] = []
        self.quiet = quiet
        self._engine, self._settings = engine, settings

    def note(self, text: str) -> None:
        """Something about the program rather than of the model; to stderr."""
        if not self.quiet:
            Console(stderr=True, highlight=False).print(text, style="dim", markup=False, soft_wrap=True)

    def hear(self, line: str) -> bool:
        """Do what a line says; False where it says to leave. Raises RequestError, and then nothing has changed."""
        command, _, rest = line.strip().partition(" ")
        actions: dict[str, Callable[[], None]] = {"/reset": self._reset, "/system": lambda: self.set_system(rest)}
        if command == "/exit":
            return False
        if command in actions:
            actions[command]()
        elif command.startswith("/"):
            self.note(f"{command} is no command; {COMMANDS}")
        elif line.strip():
            self._turn(line)
        return True

    def set_system(self, text: str) -> None:
        """The system message, in place of the one before."""
        if self._engine.text.template is None:
            raise RequestError("this model has no chat template, so there is no place for a system message")
        self._reset()
        self.messages += [Message("system", text)] if text else []

    def _reset(self) -> None:
        """Keep the system message alone."""
        self.messages = [message for message in self.messages if message.role == "system"]

    def _turn(self, line: str) -> None:
        asked = [*self.messages, Message("user", line)]
        sequence = self._engine.sequence(self._prompt(asked), **self._settings)
        pieces, clock, answer = self._engine.pieces(sequence), Clock(), list[str]()
        try:
            for piece in clock.watched(pieces):
                answer.append(piece.text)
                self._say(piece.text)
        except KeyboardInterrupt:
            self.note("\ninterrupted")
        finally:
            pieces.close()
        self._say("\n")
        self.messages = [*asked, Message("assistant", "".join(answer))]
        self.note(figures(sequence.prompt, clock, reused=sequence.reused))

    def _say(self, text: str) -> None:
        if not self.quiet:
            say(text)

    def _prompt(self, messages: list[Message]) -> Any:
        if self._engine.text.template is None:
            return "".join(message.content for message in messages)
        return [{"role": message.role, "content": message.content} for message in messages]


def _line(talk: _Talk) -> str | None:
    """The next line that is typed; None where there are no more."""
    prompt = "> " if sys.stdin.isatty() and not talk.quiet else ""
    while True:
        try:
            return input(prompt)
        except EOFError:
            return None
        except KeyboardInterrupt:
            talk.note(f"\n{COMMANDS}")
