"""Messages to a prompt, by the Jinja template that comes with a model.

A template is foreign code: it runs in Jinja's immutable sandbox, sees nothing but what is passed
in, and can reach neither files nor attributes of Python. The environment is that of transformers
(trim_blocks, lstrip_blocks, loop controls, `raise_exception`, `tojson`, `strftime_now`), so that
prompts are equal to the byte. As there, a message may contain the text of special tokens, and
the tokenizer will read them as such; see `tokenizer.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import ModelError, printable

MAX_TEMPLATE_CHARS = 2**20  # the longest known is about 30,000


class ChatTemplateError(ModelError):
    """The template is broken, or refuses these messages; the text says which."""


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos: str = "",
    eos: str = "",
    now: Callable[[], datetime] = lambda: datetime.now(UTC).astimezone(),
    **extra: Any,
) -> str:
    """The prompt for `messages`.

    Args:
        template: Jinja source, `Tokenizer.chat_template`.
        messages: each with "role" and "content", plain JSON values only.
        add_generation_prompt: end with the beginning of the assistant's turn.
        bos: the text of the begin token, `Tokenizer.bos_token`.
        eos: the text of the end token, `Tokenizer.eos_token`.
        now: the clock of `strftime_now`.
        extra: further variables of the template, `tools` for one; plain JSON values.

    Raises:
        ChatTemplateError: the template is not valid Jinja, or calls `raise_exception`, or fails.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise ChatTemplateError(f"the chat template has more than {MAX_TEMPLATE_CHARS} characters")
    try:
        return _compile(template).render(
            **extra,
            messages=_plain(messages),
            add_generation_prompt=add_generation_prompt,
            bos_token=bos,
            eos_token=eos,
            strftime_now=lambda form: now().strftime(form),
        )
    except jinja2.TemplateSyntaxError as error:
        reason = printable(str(error.message))
        raise ChatTemplateError(f"the model's chat template is broken: {reason}") from error
    except _FAILURES as error:
        reason = printable(str(error)) or type(error).__name__
        raise ChatTemplateError(
            f"the model's chat template refuses these messages: {reason}"
        ) from error


# What evaluating a template can end in; anything else would be a bug of ours or of Jinja.
_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which marks the model's turns: just its body."""

    tags = {"generation"}  # noqa: RUF012 - a set by Jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    return environment.from_string(template)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _plain(value: object) -> Any:
    """A copy in plain JSON types, so that a template meets no object with methods of its own."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise ChatTemplateError(f"messages hold a {type(value).__name__}, expected JSON values")
