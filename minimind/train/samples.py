"""What a trained model says, and the page about its run: the last things a run leaves in its folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from torch import Tensor

from minimind.errors import UserError
from minimind.evaluate.run_report import SAMPLES, write_run_report
from minimind.files import write_text
from minimind.model import MiniMind
from minimind.train.memory import is_out_of_memory

if TYPE_CHECKING:
    from minimind.train.loop import Trainer

PROMPTS, TOKENS = 4, 64  # a second or two with 26 M parameters on two cores


def conclude(trainer: Trainer, weights: dict[str, Tensor] | None) -> None:
    """Write `samples.jsonl` and `report.html`. Both can be had later too, so nothing is worth failing for.

    Args: weights: the engine's `whole_weights`, where processes shared the model out.
    """
    try:
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples(trainer, weights)]
        write_text(trainer.run_dir / SAMPLES, "".join(lines))
        trainer.say(f"report: {write_run_report(trainer.run_dir)}")
    except UserError as error:
        trainer.say(f"no report: {error}; later: minimind report {trainer.run_dir}")


def samples(trainer: Trainer, weights: dict[str, Tensor] | None) -> list[dict[str, str]]:
    """Answers to a few of the questions that `eval_model.py` asks a model of this stage.

    None where the memory does not hold the model once more.
    """
    from minimind.chat.generate import generate_batch
    from minimind.chat.inference import InferenceModel
    from minimind.chat.options import SamplingOptions
    from minimind.chat.questions import questions_for
    from minimind.chat.session import ChatSession

    folder, _, name = trainer.stage.name.rpartition("/")
    asked = questions_for(trainer.stage.name, [name] if folder == "lora" else [])[:PROMPTS]
    session = ChatSession(trainer.tokenizer, chat=trainer.stage.name != "pretrain")
    options = SamplingOptions(max_new_tokens=TOKENS, seed=trainer.options.seed)
    try:
        model = InferenceModel(trainer.model if weights is None else whole_model(trainer, weights))
        answers = generate_batch(model, [session.prompt_ids(text) for text in asked], options, rows=PROMPTS)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return []
    texts = (trainer.tokenizer.decode(answer) for answer in answers)
    return [
        {"run_id": trainer.run_id, "prompt": prompt, "answer": answer}
        for prompt, answer in zip(asked, texts, strict=True)
    ]


def whole_model(trainer: Trainer, weights: dict[str, Tensor]) -> MiniMind:
    """A plain model with the weights of one that the processes share."""
    model = MiniMind(trainer.config)
    if trainer.stage.prepare:
        trainer.stage.prepare(model)
    model.load_state_dict(weights)
    return model.to(trainer.parallel.device)
