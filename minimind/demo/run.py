"""Run the training scripts as a person would, and ask the models they leave."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from minimind.chat.options import SamplingOptions
from minimind.paths import ROOT

Answer = Callable[[list[str]], list[str]]  # a batch of questions → as many answers, in order


def run_script(console: Console, script: str, argv: Sequence[str]) -> None:
    """Run a training script, showing the command: what the demo does is what a person would type."""
    console.print(f"[dim]$ python trainer/{script} {' '.join(argv)}[/]")
    code = subprocess.run([sys.executable, ROOT / "trainer" / script, *argv], check=False).returncode
    if code:
        raise SystemExit(code)


def answerer(weights: Path, adapters: Sequence[Path] = (), max_new_tokens: int = 120) -> Answer:
    """A function that answers questions greedily with the model in `weights`, and LoRA adapters on it."""
    from minimind.chat.generate import generate_batch
    from minimind.chat.inference import InferenceModel
    from minimind.lora import load_adapters
    from minimind.tokenizer import Tokenizer
    from minimind.weights import load_model

    tokenizer = Tokenizer.load()
    model = load_model(weights, "make demo").eval()
    load_adapters(model, adapters, "make demo STAGES=all")
    inference_model = InferenceModel(model)
    sampling = replace(SamplingOptions(), temperature=0.0, max_new_tokens=max_new_tokens)

    def answer(questions: list[str]) -> list[str]:
        prompts = [
            tokenizer.encode_chat([{"role": "user", "content": q}], add_generation_prompt=True)[0]
            for q in questions
        ]
        return [tokenizer.decode(ids) for ids in generate_batch(inference_model, prompts, sampling)]

    return answer
