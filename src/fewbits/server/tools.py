"""Calls of tools, as models write them: each family has a form, which its own chat template teaches and shows.

    hermes    <tool_call>{"name": …, "arguments": {…}}</tool_call>, once for each     Hermes, Qwen 2.5 and 3, SmolLM3
    mistral   [TOOL_CALLS][{"name": …, "arguments": {…}}, …]                          Mistral's up to Nemo
    llama3    {"name": …, "parameters": {…}} alone, perhaps behind <|python_tag|>     Llama 3.1 to 3.3

Which form it is stands in the template: it puts the tools into the prompt, and shows earlier calls, so what the model
is asked to write is there word for word. What does not have its form is given as text, as it is.

A call that is required is not asked for but begun: what the form begins with goes behind the prompt, and a schema made
of the tools holds what follows (`constraint`).
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fewbits.engine.streaming import overlap
from fewbits.server.problems import Problem

LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Call:
    """A call of a function; arguments as the text of a JSON object, as OpenAI has them."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: "".join(secrets.choice(LETTERS) for _ in range(9)), compare=False)
    """Nine letters and digits: Mistral's templates want them so, others take anything."""


@dataclass(frozen=True)
class Form:
    """How a family writes calls.

    begin: what the first call begins with, "" where a text that is a call has nothing else in it. end: what a call ends
    with, where there may be another one behind it. arguments: the key. listed: whether calls stand in a list. signs:
    special tokens that are part of it. teaches: what the templates that use it have in them, one of these; other: what
    those of other forms have that look like it.
    """

    name: str
    begin: str
    end: str
    arguments: str
    listed: bool
    signs: tuple[str, ...]
    teaches: tuple[str, ...]
    other: tuple[str, ...] = ()

    @property
    def opening(self) -> str:
        """What goes behind a prompt, so that a call is what follows."""
        return f"{self.begin}\n" if self.end else self.begin

    def taught_by(self, template: str) -> bool:
        return any(sign in template for sign in self.teaches) and not any(sign in template for sign in self.other)

    def schema(self, functions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Of a call of one of these functions, each with its `name` and `parameters`."""
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": one["name"]}, self.arguments: one.get("parameters") or ANYTHING},
                "required": ["name", self.arguments],
                "additionalProperties": False,
            }
            for one in functions
        ]
        call = calls[0] if len(calls) == 1 else {"anyOf": calls}
        return {"type": "array", "items": call, "minItems": 1, "maxItems": 1} if self.listed else call

    def calls(self, text: str) -> list[Call] | None:
        """The calls in what stands between begin and end; None where it has not the form."""
        try:
            found = json.loads(text)
        except ValueError:
            return None
        listed = found if isinstance(found, list) else [found]
        calls = [self._call(one) for one in listed]
        return [call for call in calls if call is not None] if calls and None not in calls else None

    def _call(self, found: Any) -> Call | None:
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            return None
        arguments = found.get(self.arguments)
        if not isinstance(arguments, dict):
            return None
        return Call(found["name"], json.dumps(arguments, ensure_ascii=False))


ANYTHING: dict[str, Any] = {"type": "object"}
HERMES = Form(
    "hermes",
    begin="<tool_call>",
    end="</tool_call>",
    arguments="arguments",
    listed=False,
    signs=("<tool_call>", "</tool_call>"),
    teaches=("<tool_call>",),
    other=("<function=", "<arg_key>"),  # Qwen 3 Coder, GLM 4
)
MISTRAL = Form(
    "mistral",
    begin="[TOOL_CALLS]",
    end="",
    arguments="arguments",
    listed=True,
    signs=("[TOOL_CALLS]",),
    teaches=("[TOOL_CALLS]",),
)
LLAMA3 = Form(
    "llama3",
    begin="",
    end="",
    arguments="parameters",
    listed=False,
    signs=("<|python_tag|>",),
    teaches=('"parameters"', "<|python_tag|>"),
)
FORMS = (HERMES, MISTRAL, LLAMA3)


def form_of(template: str | None) -> Form:
    """The form that a chat template teaches. Raises Problem where it has no place for tools, or none of the forms."""
    if template is None or "tools" not in template:
        message = "the model's chat template has no place for tools, so the model was not trained to call them"
        raise Problem(400, message, code="unsupported_model", param="tools")
    for form in FORMS:
        if form.taught_by(template):
            return form
    known = ", ".join(form.name for form in FORMS)
    message = f"the model's template teaches calls of tools in a form that this server does not read; it reads {known}"
    raise Problem(400, message, code="unsupported_model", param="tools")


class CallReader:
    """Text in as it comes, text and calls out, in order. inside: what begins the first call has been given already.

    parallel: whether there may be several calls; if not, those behind the first are left out.
    """

    def __init__(self, form: Form, *, inside: bool = False, parallel: bool = True) -> None:
        self._form, self._inside, self._parallel = form, inside, parallel
        self._held = ""
        self._behind = False  # a call, so that white space means nothing
        self.called = 0

    def push(self, text: str) -> list[str | Call]:
        """What is certain by now."""
        self._held += text
        found: list[str | Call] = []
        while (more := self._inner() if self._inside else self._outer()) is not None:
            found += more
        return found

    def flush(self) -> list[str | Call]:
        """The rest, when the text has ended."""
        held, self._held = self._held, ""
        return self._read(held, "") if self._inside else [held.lstrip() if self._behind else held]

    def _outer(self) -> list[str | Call] | None:
        """Text up to where a call begins, or may begin; None where nothing is certain."""
        if not self._form.begin:
            return self._first()
        if self._behind:
            self._held = self._held.lstrip()
            self._behind = not self._held
        before, begin, rest = self._held.partition(self._form.begin)
        if begin:
            self._held, self._inside = rest, True
            return [before]
        return self._given(len(self._held) - overlap(self._held, self._form.begin))

    def _first(self) -> list[str | Call] | None:
        """Whether a text of a form without a beginning is a call shows in its first character, or sign."""
        start = self._held.lstrip()
        if start.startswith(("{", *self._form.signs)):
            self._inside = True
            return []
        begun = any(sign.startswith(start) for sign in self._form.signs)
        return None if begun else self._given(len(self._held))

    def _given(self, count: int) -> list[str | Call] | None:
        given, self._held = self._held[:count], self._held[count:]
        return [given] if given else None

    def _inner(self) -> list[str | Call] | None:
        """The calls up to the end of one; None while it has not come."""
        inner, end, rest = self._held.partition(self._form.end) if self._form.end else (self._held, "", "")
        if not end:
            return None
        self._held, self._inside = rest, False
        return self._read(inner, end)

    def _read(self, inner: str, end: str) -> list[str | Call]:
        """Calls, or the text as it was where it has not the form of one."""
        bare = inner.strip()
        for sign in self._form.signs if not self._form.begin else ():
            bare = bare.removeprefix(sign)
        calls = self._form.calls(bare)
        if calls is None:
            return [f"{self._form.begin}{inner}{end}"]
        calls = calls if self._parallel else calls[: 1 - min(self.called, 1)]
        self.called += len(calls)
        self._behind = True
        return list(calls)
