"""`python eval_model.py`: talk to a trained model in the terminal, or answer `--prompt`s for a script.

torch is imported only once the arguments are known to be good, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from minimind.chat.loading import AnswerOptions, check_positions, description
from minimind.chat.options import SamplingOptions
from minimind.chat.questions import questions_for
from minimind.chat.session import ChatSession
from minimind.chat.talk import Talk
from minimind.environment import wait_briefly
from minimind.flags import Parser, add_flags, flag, part_of

DESCRIPTION = """Talk to a model that MiniMind trained.

    python eval_model.py --model_mode 1                       a conversation with out/full_sft_512.pth
    python eval_model.py --model_mode 1 --prompt 你好          one answer on stdout, for a script
    python eval_model.py --lora_name lora_medical             with an adapter
"""


@dataclass(frozen=True)
class HowItAnswers(SamplingOptions):
    history_cnt: int = flag(0, "earlier messages to keep in mind, an even number")
    max_seq_len: int = flag(8192, "tokens of prompt and answer together")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv` (default: the command line), load the model, answer. Returns the exit code.

    Raises: UserError for anything the user can mend.
    """
    arguments = argument_parser().parse_args(argv)
    which, how = part_of(arguments, AnswerOptions), part_of(arguments, HowItAnswers)
    wait_briefly()
    notes = sys.stderr if arguments.prompt else sys.stdout
    path = which.find_weights(notes)
    tokenizer = which.load_tokenizer()
    session = ChatSession(
        tokenizer,
        history_cnt=how.history_cnt,
        max_seq_len=how.max_seq_len,
        max_new_tokens=how.max_new_tokens,
        chat=which.stage != "pretrain",
    )
    model = which.load_model(path, which.adapters, tokenizer)
    check_positions(model.config, "max_seq_len", how.max_seq_len)
    print(description(" + ".join([path.name, *which.adapters]), model), file=notes)

    from minimind.chat.engine import Engine
    from minimind.chat.inference import InferenceModel

    engine = Engine(InferenceModel(model, which.weights), rows=1, max_length=how.max_seq_len)
    engine.warm_up()
    questions = questions_for(which.stage, which.adapters)
    talk = Talk(engine, session, how, notes, questions, reasons=which.stage == "reason")
    if arguments.prompt:
        for text in arguments.prompt:
            talk.answer(text)
    else:
        talk.interactively()
    return 0


def argument_parser() -> Parser:
    # The full list of flags is below the usage anyway.
    parser = Parser(DESCRIPTION, usage="%(prog)s [--model_mode 0|1|2|3|4] [--prompt TEXT] …")
    alone = "answer this alone on stdout, and leave; may be repeated"
    parser.add_argument("--prompt", action="append", help=alone)
    add_flags(parser.add_argument_group("which model"), AnswerOptions)
    add_flags(parser.add_argument_group("how it answers"), HowItAnswers)
    return parser
