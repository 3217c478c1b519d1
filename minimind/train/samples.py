"""What a trained model says, and the page about its run: the last things a run leaves in its folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from minimind.errors import UserError
from minimind.evaluate.run_report import SAMPLES, write_run_report
from minimind.files import write_text
from minimind.train.memory import is_out_of_memory

if TYPE_CHECKING:
    from minimind.train.loop import Trainer

PROMPTS, TOKENS = 4, 64  # a second or two with 26 M parameters on two cores


def conclude(trainer: Trainer) -> None:
    """Write `samples.jsonl` and `report.html`. Both can be had later too, so nothing is worth failing for."""
    try:
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples(trainer)]
        write_text(trainer.run_dir / SAMPLES, "".join(lines))
        trainer.say(f"report: {write_run_report(trainer.run_dir)}")
    except UserError as error:
        trainer.say(f"no report: {error}; later: minimind report {trainer.run_dir}")


def samples(trainer: Trainer) -> list[dict[str, str]]:
    """Answers to a few of the questions that `eval_model.py` asks a model of this stage.

    None where no process has the whole model, or the memory does not hold it once more.
    """
    if trainer.parallel.sharded:
        return []
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
        model = InferenceModel(trainer.model)
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
