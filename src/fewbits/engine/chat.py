"""Messages as one text, by the template that comes with a model.

Templates are programs in Jinja's language, written for the environment that transformers gives them: sandboxed (a
template comes from a stranger), without the line break behind a block tag, with loop controls, `{% generation %}` tags
(which mark the model's own words for training, and change nothing here), a `tojson` that leaves HTML alone,
`raise_exception` and `strftime_now`. The special tokens are among the variables, under the names that
tokenizer_config.json has for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fewbits.errors import RequestError

Message = Mapping[str, Any]
"""`role` (system, user, assistant …) and `content`, a text; whatever else a template reads."""


class _Generation(Extension):
    """{% generation %} … {% endgeneration %} is what stands between, with variables of its own."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def rendered(template: str, messages: Sequence[Message], **variables: Any) -> str:
    """The text of a conversation. Raises RequestError where the template refuses it or is none."""
    try:
        return _compiled(template).render(messages=messages, **variables)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise RequestError(f"the model's chat template refuses these {len(messages)} messages: {error}") from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(template)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
