"""Chat templates: ChatML, which every tokenizer of ours has, and the marks around answers.

`{% generation %}` … `{% endgeneration %}` encloses what an assistant writes. transformers turns these marks
into `assistant_masks`, by which TRL and others know the tokens to train on; they are those of our own mask
(see `tokenizer.py`). Here, and in programs that do not know these tags, templates run without them.
"""

from __future__ import annotations

import re

# ChatML. Jinja eats a newline after a block's end, hence the quoted ones.
MESSAGE = """\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
"""
MARKED_MESSAGE = """\
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{% generation %}
{{ message['content'] + '<|im_end|>' }}
{%- endgeneration %}
{% else %}
{{ message['content'] + '<|im_end|>' }}
{%- endif %}
{{ '\\n' }}
"""
CHAT_TEMPLATE = f"""\
{{% for message in messages %}}
{MARKED_MESSAGE}{{%- endfor %}}
{{% if add_generation_prompt %}}
{{{{ '<|im_start|>assistant\\n' }}}}
{{%- endif %}}
"""

# What known templates write for an answer, without marks and with them. The second is MiniMind2's.
MARKS = (
    (MESSAGE, MARKED_MESSAGE),
    (
        "{{ content + '<|im_end|>' + '\\n' }}",
        "{% generation %}{{ content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}",
    ),
)


def with_marks(template: str) -> str:
    """`template` with its answers marked, if it is one whose answers are known; else as it is."""
    for plain, marked in MARKS:
        template = template.replace(plain, marked)
    return template


def without_marks(template: str) -> str:
    """`template` in plain Jinja. It renders the same, white space included."""
    for plain, marked in MARKS:
        template = template.replace(marked, plain)
    template = re.sub(r"({%[-+]?\s*)generation(\s*[-+]?%})", r"\1if true\2", template)
    return re.sub(r"({%[-+]?\s*)endgeneration(\s*[-+]?%})", r"\1endif\2", template)


def compile_template(template: str):
    """The Jinja template in the sandbox, with the whitespace settings that transformers uses.

    Raises: jinja2.TemplateError when it is broken.
    """
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = _refuse_messages
    return environment.from_string(without_marks(template))


def _refuse_messages(reason: str):
    """`raise_exception` of chat templates."""
    from jinja2 import TemplateError

    raise TemplateError(reason)
