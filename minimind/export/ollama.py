"""A folder for `ollama create`: the model as a GGUF file, and a Modelfile that says how to talk to it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from minimind.chat.options import SamplingOptions
from minimind.chat.sampling import PENALTY_WINDOW
from minimind.errors import UserError
from minimind.export.gguf import gguf_writer, write
from minimind.files import atomic_folder
from minimind.model import MiniMind
from minimind.tokenizer import IM_END, IM_START, Tokenizer

GGUF = "model.gguf"

# ChatML in ollama's words, a Go template. An answer that the request begins is left open, to be gone on with.
TEMPLATE = """\
{{- range $i, $message := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 -}}
<|im_start|>{{ $message.Role }}
{{ $message.Content }}{{ if not (and $last (eq $message.Role "assistant")) }}<|im_end|>
{{ end }}
{{- if and $last (ne $message.Role "assistant") }}<|im_start|>assistant
{{ end }}
{{- end }}"""


def write_ollama(folder: Path, model: MiniMind, tokenizer: Tokenizer, dtype: str, name: str) -> None:
    """Write `folder` as a whole or not at all.

    Raises: UserError as `gguf_writer` does, or when the chat template is not ChatML or a write fails.
    """
    text = modelfile(tokenizer)
    writer = gguf_writer(model, tokenizer, dtype, name)
    with atomic_folder(folder) as building:
        write(writer, building / GGUF)
        (building / "Modelfile").write_text(text, encoding="utf-8")


def modelfile(tokenizer: Tokenizer) -> str:
    """The template, what ends an answer, and how our own chat draws one."""
    options = SamplingOptions()
    parameters: dict[str, Sequence[object]] = {
        "stop": [f'"{IM_START}"', f'"{IM_END}"'],
        "temperature": [options.temperature],
        "top_p": [options.top_p],
        "top_k": [options.top_k or 0],  # 0: no limit
        "repeat_penalty": [options.repetition_penalty],
        "repeat_last_n": [PENALTY_WINDOW],
        "num_predict": [options.max_new_tokens],
    }
    lines = [f"FROM ./{GGUF}", f'TEMPLATE """{TEMPLATE}"""']
    if system := default_system(tokenizer):
        lines.append(f'SYSTEM """{system}"""')
    lines += [f"PARAMETER {name} {value}" for name, values in parameters.items() for value in values]
    return "\n".join(lines) + "\n"


def default_system(tokenizer: Tokenizer) -> str:
    """What the chat template says before a conversation that has no system message; mostly nothing.

    Raises: UserError for a template that is not ChatML.
    """
    rendered = tokenizer.render_chat([{"role": "user", "content": "?"}], add_generation_prompt=True)
    turn = re.escape(f"{IM_START}user\n?{IM_END}\n{IM_START}assistant\n")
    chatml = re.fullmatch(rf"(?s)({re.escape(IM_START)}system\n(.*){re.escape(IM_END)}\n)?{turn}", rendered)
    if not chatml:
        raise UserError(
            f"ollama can be told of ChatML alone, and the chat template in {tokenizer.path} is not"
        )
    return chatml[2] or ""
