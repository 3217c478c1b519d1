"""`eval_model.py` from the outside: what it asks and prints, and where."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from minimind.chat import cli, inference, questions
from minimind.chat.engine import Engine
from minimind.chat.inference import InferenceModel
from minimind.paths import ROOT
from minimind.tokenizer import Tokenizer

from .models import SHORT


@pytest.fixture
def talk(out, monkeypatch, capsys):
    """Run the interactive command on what a person types; returns what it printed."""

    def run(typed: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        assert cli.main(["--out_dir", str(out), *SHORT, *arguments]) == 0
        return capsys.readouterr().out

    return run


def say(monkeypatch, *answers: list[int] | type[BaseException]) -> list[list[int]]:
    """Replace the model by fixed answers, one a question; an exception type comes after one token.

    Returns a list that collects the prompts.
    """
    prompts, queue = [], list(answers)

    def fake(engine, prompt_ids, options):
        prompts.append(prompt_ids)
        answer = queue.pop(0)
        if isinstance(answer, list):
            yield from answer
        else:
            yield Tokenizer.load().encode("停")[0]
            raise answer

    monkeypatch.setattr(Engine, "stream", fake)
    return prompts


def bytes_as_tokens(text: str) -> list[int]:
    table = Tokenizer.load().token_bytes
    return [table.index(bytes([byte])) for byte in text.encode()]


def test_help_does_not_wait_for_torch():
    command = [sys.executable, "-X", "importtime", "eval_model.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for flag in ("--model_mode", "--lora_name", "--history_cnt", "--use_moe", "--load", "--prompt"):
        assert flag in done.stdout
    assert "| minimind.chat.loading" in done.stderr.replace("|   ", "| ")
    assert not any(line.split("|")[-1].strip() == "torch" for line in done.stderr.splitlines())


def test_a_mistake_is_one_sentence_and_no_trace(tmp_path):
    command = [sys.executable, "eval_model.py", "--out_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "trainer/train_full_sft.py" in done.stderr


def test_prompts_print_the_answers_alone(out, capsys):
    arguments = ["--out_dir", str(out), *SHORT, "--seed", "3", "--prompt", "你好", "--prompt", "再见"]
    assert cli.main(arguments) == 0
    first = capsys.readouterr()
    assert "tokens/s" in first.err
    assert "full_sft_64.pth" in first.err
    assert "tokens/s" not in first.out
    assert "full_sft" not in first.out
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == first.out
    assert cli.main([*arguments[:-2], "--temperature", "0"]) == 0
    assert first.out != capsys.readouterr().out


def test_waiting_threads_leave_the_cores_to_others(out, monkeypatch):
    arguments = ["--out_dir", str(out), *SHORT, "--prompt", "一"]
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    cli.main(arguments)
    assert os.environ["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    cli.main(arguments)
    assert "GOMP_SPINCOUNT" not in os.environ


def test_weights_choose_how_the_model_is_held(out, monkeypatch, capsys):
    held = []

    def ready(model, weights):
        held.append(weights)
        return InferenceModel(model, weights)

    monkeypatch.setattr(inference, "InferenceModel", ready)
    say(monkeypatch, [], [])
    arguments = ["--out_dir", str(out), "--device", "cpu", "--prompt", "一"]
    cli.main(arguments)
    cli.main([*arguments, "--weights", "int8"])
    assert held == ["half", "int8"]
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--weights", "int4"])


def test_answers_stand_on_lines_of_their_own(out, capsys, monkeypatch):
    say(monkeypatch, bytes_as_tokens("甲"), bytes_as_tokens("乙 b"))
    cli.main(["--out_dir", str(out), "--device", "cpu", "--prompt", "一", "--prompt", "二"])
    assert capsys.readouterr().out == "甲\n乙 b\n"


@pytest.mark.parametrize(
    ("mode", "stage"), [(0, "pretrain"), (1, "full_sft"), (2, "rlhf"), (3, "reason"), (4, "full_dist")]
)
def test_the_mode_chooses_weights_and_prompt(out, capsys, monkeypatch, mode, stage):
    prompts = say(monkeypatch, [])
    cli.main(["--out_dir", str(out), "--device", "cpu", "--model_mode", str(mode), "--prompt", "长城"])
    tokenizer = Tokenizer.load()
    chat = tokenizer.encode_chat([{"role": "user", "content": "长城"}], add_generation_prompt=True)[0]
    assert prompts == [[1, *tokenizer.encode("长城")] if mode == 0 else chat]
    assert capsys.readouterr().err.startswith(f"{stage}_64.pth, ")


def test_characters_are_printed_whole(out, monkeypatch):
    text = "猫🦉é。"
    say(monkeypatch, bytes_as_tokens(text) + bytes_as_tokens("尾")[:2])  # cut in the middle of a character
    written = []
    stdout = io.StringIO()
    stdout.write = written.append
    monkeypatch.setattr(sys, "stdout", stdout)
    cli.main(["--out_dir", str(out), "--device", "cpu", "--prompt", "?"])
    assert [piece for piece in written if piece.strip()] == list(text)


def test_typed_questions_keep_and_clear_their_history(talk, monkeypatch):
    prompts = say(monkeypatch, *[bytes_as_tokens("好")] * 4)
    printed = talk("1\n一\n\n  \n二\n/clear\n三\n四\n", "--history_cnt", "2")
    decode = Tokenizer.load().decode
    assert [decode(p).count("user") for p in prompts] == [1, 2, 1, 2]
    assert [mark in decode(prompts[3]) for mark in "一二三四"] == [False, False, True, True]
    assert printed.count("tokens/s") == 4
    assert printed.rstrip().endswith("bye")


def test_ctrl_c_stops_one_answer_and_keeps_the_session(talk, monkeypatch):
    prompts = say(monkeypatch, KeyboardInterrupt, bytes_as_tokens("好"))
    printed = talk("1\n一\n二\n", "--history_cnt", "2")
    assert "停\n[1 tokens" in printed
    assert "好\n[3 tokens" in printed
    assert "停" in Tokenizer.load().decode(prompts[1])


def test_ctrl_c_ends_a_script(out, monkeypatch):
    say(monkeypatch, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        cli.main(["--out_dir", str(out), "--device", "cpu", "--prompt", "一"])


MEDICAL, IDENTITY = questions.ABOUT["medical"], questions.ABOUT["identity"]


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--model_mode", "0"], questions.BEGINNINGS),
        ([], questions.GENERAL),
        (["--model_mode", "3"], questions.WORD_PROBLEMS),
        (["--lora_name", "lora_medical"], MEDICAL),
        (["--lora_name", "my_identity", "lora_medical"], MEDICAL + IDENTITY),
    ],
)
def test_the_automatic_test_asks_what_suits_the_model(talk, arguments, texts):
    printed = talk("0\n", *arguments)
    assert [
        line[len("你 / you> ") :] for line in printed.splitlines() if line.startswith("你 / you> ")
    ] == texts
    assert printed.count("tokens/s") == len(texts)


def test_a_reasoning_model_with_an_adapter_is_asked_about_what_that_learnt():
    assert questions.questions_for("reason", ["lora_medical"]) == MEDICAL
    assert questions.questions_for("reason", ["poems"]) == questions.WORD_PROBLEMS


@pytest.mark.parametrize("typed", ["", "1\n", "1"])
def test_nothing_typed_is_a_polite_end(talk, typed):
    assert talk(typed).rstrip().endswith("bye")


def test_words_with_a_slash_are_no_questions(talk):
    printed = talk("1\n/help\n/exit\n你好\n")
    assert printed.count("/exit 结束 ends") == 2
    assert "tokens/s" not in printed
    assert printed.rstrip().endswith("bye")


def test_a_question_instead_of_a_choice_is_answered(talk):
    assert talk("你好\n").count("tokens/s") == 1


def test_too_long_a_message_does_not_end_the_talk(talk):
    printed = talk(f"1\n{'很长' * 200}\n短\n", "--max_seq_len", "60")
    assert "--max_seq_len 60 leaves" in printed
    assert printed.count("tokens/s") == 1


@pytest.mark.parametrize(
    "arguments", [["--model_mode", "5"], ["--use_moe", "maybe"], ["--preset", "huge"], ["--top_p", "much"]]
)
def test_wrong_words_leave_with_a_code(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


REASONED = "<think>\n1+1\n</think>\n<answer>\n2\n</answer>"


def test_thoughts_and_answer_have_headings_in_a_talk(talk, monkeypatch):
    say(monkeypatch, bytes_as_tokens(REASONED), bytes_as_tokens("2"))
    printed = talk("1\n一\n二\n", "--model_mode", "3")
    assert "MiniMind> 思考 / thinking:\n1+1\n回答 / answer:\n2\n[" in printed
    assert "MiniMind> 回答 / answer:\n2\n[" in printed


def test_thoughts_are_dim_on_a_terminal(talk, monkeypatch):
    say(monkeypatch, Tokenizer.load().encode(REASONED))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    printed = talk("1\n一\n", "--model_mode", "3")
    assert "\x1b[2m1\x1b[0m\x1b[2m+\x1b[0m\x1b[2m1\x1b[0m\n回答 / answer:\n2\n[" in printed


def test_a_script_gets_the_answer_without_the_thoughts(out, capsys, monkeypatch):
    say(monkeypatch, bytes_as_tokens(REASONED), bytes_as_tokens("<think>1+1"))
    arguments = ["--out_dir", str(out), "--device", "cpu", "--model_mode", "3"]
    cli.main([*arguments, "--prompt", "一", "--prompt", "二"])
    printed = capsys.readouterr()
    assert printed.out == "2\n\n"  # a line for each prompt
    assert "思考 / thinking:\n1+1\n回答 / answer:\n[" in printed.err
    assert "思考 / thinking:\n1+1\nno answer: the thinking does not end\n[10 tokens" in printed.err


def test_thinking_that_is_stopped_is_kept_for_the_next_question(talk, monkeypatch):
    prompts = say(monkeypatch, bytes_as_tokens(REASONED), KeyboardInterrupt, [])
    printed = talk("1\n一\n二\n三\n", "--model_mode", "3", "--history_cnt", "4")
    assert "停\n[1 tokens" in printed
    assert REASONED in Tokenizer.load().decode(prompts[2])
