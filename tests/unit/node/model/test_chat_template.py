"""Chat templates: what the environment offers, and that a template stays in its box."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from covey.node.model.chat_template import ChatTemplateError, render_chat
from support.tiny_models import TEMPLATE

HELLO = [{"role": "user", "content": "Hello"}]


def test_messages_become_a_prompt() -> None:
    prompt = render_chat(TEMPLATE, HELLO)
    assert prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_generation_prompt_can_be_left_out() -> None:
    assert render_chat(TEMPLATE, HELLO, add_generation_prompt=False).endswith("<|im_end|>\n")


def test_blocks_leave_no_white_space() -> None:
    template = (
        "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n{% endif %}\n{% endfor %}"
    )
    assert render_chat(template, HELLO) == "Hello\n"


def test_bos_eos_and_further_variables_are_seen() -> None:
    assert render_chat("{{ bos_token }}{{ x }}{{ eos_token }}", [], bos="<", eos=">", x=1) == "<1>"


def test_json_is_not_escaped_for_html() -> None:
    assert render_chat("{{ x | tojson }}", [], x={"ü": "<a>"}) == '{"ü": "<a>"}'


def test_the_clock_is_a_parameter() -> None:
    noon = datetime(2026, 5, 1, 12, tzinfo=UTC)
    assert render_chat("{{ strftime_now('%d %b %Y') }}", [], now=lambda: noon) == "01 May 2026"


def test_loop_controls_and_generation_blocks_are_known() -> None:
    template = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    marked = "{% generation %}" + template + "{% endgeneration %}"
    assert render_chat(marked, []) == "01"


def test_refusal_of_the_template_is_an_error_with_its_words() -> None:
    with pytest.raises(ChatTemplateError, match="refuses these messages: roles must alternate"):
        render_chat("{{ raise_exception('roles must alternate') }}", HELLO)


def test_broken_template_says_so() -> None:
    with pytest.raises(ChatTemplateError, match="chat template is broken"):
        render_chat("{% if %}", HELLO)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{{ range(10**9) | list }}",
        "{{ 1 / 0 }}",
        "{{ messages[5].content + 1 }}",
        "{{ raise_exception.__globals__.x }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_template_cannot_leave_its_box(template: str) -> None:
    with pytest.raises(ChatTemplateError):
        render_chat(template, HELLO)


@pytest.mark.parametrize("content", [object(), {1, 2}, b"x"])
def test_only_plain_values_reach_the_template(content: Any) -> None:
    with pytest.raises(ChatTemplateError):
        render_chat("{{ messages[0].content.x }}", [{"role": "user", "content": content}])


def test_enormous_template_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match="more than"):
        render_chat("x" * (2**20 + 1), HELLO)
