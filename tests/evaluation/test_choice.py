"""`minimind eval choice` from the outside."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
from test_lora import randomise
from test_model import random_model

from evaluation.conftest import SHAPE, make_questions, write_jsonl
from minimind.cli import main
from minimind.errors import UserError
from minimind.evaluate import choice
from minimind.evaluate.choice import Results
from minimind.evaluate.questions import read_questions
from minimind.lora import attach, save_lora
from minimind.tokenizer import Tokenizer
from minimind.weights import load_model


def run(questions, flags, tmp_path, *more: object) -> dict:
    """Run the command and read what it wrote for programs."""
    path = tmp_path / "results.json"
    assert main(["eval", "choice", str(questions), *flags, "--json", str(path), *map(str, more)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def by_hand(model, tokenizer: Tokenizer, prompt: list[int], ending: str) -> float:
    ids = prompt + tokenizer.encode(ending)
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logps[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))


def test_scores_are_the_equations(questions, out, flags, tmp_path, capsys):
    answers = run(questions, flags, tmp_path)["choice"]["answers"]
    model, tokenizer = load_model(out / "full_sft_64.pth", "").eval(), Tokenizer.load()
    asked = read_questions(questions)
    right = {"letter": 0, "text": 0, "text per byte": 0}
    for question, found in zip(asked, answers, strict=True):
        listed = "".join(f"\n{x}. {o}" for x, o in zip("ABCD", question.options, strict=True))
        expected = {}
        for way, content, endings in (
            ("letter", question.text + listed, "ABCD"),
            ("text", question.text, question.options),
        ):
            messages = [{"role": "user", "content": content}]
            prompt = tokenizer.encode_chat(messages, add_generation_prompt=True)[0] + tokenizer.encode(
                "答案："
            )
            expected[way] = [by_hand(model, tokenizer, prompt, f" {ending}") for ending in endings]
            assert found[f"log_likelihood_{way}"] == pytest.approx(expected[way], abs=1e-3)
        per_byte = [x / len(o.encode()) for x, o in zip(expected["text"], question.options, strict=True)]
        for score, values in (
            ("letter", expected["letter"]),
            ("text", expected["text"]),
            ("text per byte", per_byte),
        ):
            assert found[score] == "ABCD"[values.index(max(values))]
            right[score] += found[score] == "ABCD"[question.answer]
    shown = capsys.readouterr().out
    for score, count in right.items():
        assert f"{score + ':':<15}{100 * count / len(asked):.1f} [" in shown


def test_the_report_of_a_run(questions, flags, tmp_path, capsys):
    results = run(questions, flags, tmp_path)
    shown = capsys.readouterr().out
    assert results["choice"]["subjects"]["virology"]["questions"] == 15
    assert results["choice"]["chat"] is True
    assert results["model"]["dtype"] == "float32"
    assert len(results["model"]["weights_sha256"]) == 64
    for text in ("agronomy", "virology", "chance: 25.0 %", "Wilson", "indistinguishable from chance"):
        assert text in shown
    assert sum(results["choice"]["letters_chosen"].values()) == pytest.approx(1)


def test_pretrained_weights_are_asked_without_the_template(questions, flags, tmp_path):
    plain = run(questions, flags, tmp_path, "--model_mode", 0)
    templated = run(questions, flags, tmp_path, "--model_mode", 0, "--chat", 1)
    assert plain["choice"]["chat"] is False
    assert plain["model"]["weights"].endswith("pretrain_64.pth")
    first, second = (r["choice"]["answers"][0]["log_likelihood_letter"] for r in (plain, templated))
    assert first != pytest.approx(second, abs=1e-3)


def test_examples_come_first_and_are_of_the_subject(questions, examples, flags, tmp_path):
    none = run(questions, flags, tmp_path)
    some = run(questions, flags, tmp_path, "--shots", 2, "--examples_path", examples)
    assert some["choice"]["examples_mean"] == 2
    assert none["choice"]["answers"][0] != some["choice"]["answers"][0]


def test_limit_takes_the_first_of_each_subject(questions, flags, tmp_path):
    results = run(questions, flags, tmp_path, "--limit", 2)["choice"]
    assert {s: table["questions"] for s, table in results["subjects"].items()} == {
        "agronomy": 2,
        "virology": 2,
    }
    assert [answer["line"] for answer in results["answers"]] == [1, 2, 16, 17]


def test_several_files(questions, examples, flags, tmp_path):
    path = tmp_path / "results.json"
    assert main(["eval", "choice", str(questions), str(examples), *flags, "--json", str(path)]) == 0
    assert json.loads(path.read_text())["choice"]["questions"] == 36


def test_adapters_count(questions, out, flags, tmp_path):
    model = random_model(SHAPE)
    attach(model, 2)
    randomise(model, 3)
    save_lora(model.state_dict(), out / "lora" / "law_64.pth")
    without = run(questions, flags, tmp_path)
    beside = run(questions, flags, tmp_path, "--lora_name", "law")
    assert beside["model"]["adapters"] == ["law"]
    first, second = (r["choice"]["answers"][0]["log_likelihood_text"] for r in (without, beside))
    assert first != pytest.approx(second, abs=1e-3)


def test_a_model_that_knows_is_told_from_chance(flags, out, tmp_path, capsys):
    """Weights that find one token likelier than all others, whatever came before."""
    model = random_model(SHAPE)
    for parameter in model.parameters():
        parameter.data.zero_()
    b = Tokenizer.load().encode(" B")
    model.model.embed_tokens.weight.data[:, 0] = 1.0
    model.model.embed_tokens.weight.data[b[-1], 0] = 2.0
    model.model.norm.weight.data.fill_(1.0)
    from minimind.weights import save_weights

    save_weights(model, tmp_path / "full_sft_64.pth")
    records = [record | {"answer": "B"} for record in make_questions(10, 5)]
    path = write_jsonl(tmp_path / "q.jsonl", records)
    flags = [*flags[2:], "--out_dir", str(tmp_path)]
    results = run(path, flags, tmp_path)["choice"]
    assert results["all"]["letter"]["accuracy"] == 1
    assert results["all"]["letter"]["verdict"] == "better than chance"
    assert results["letters_chosen"] == {"A": 0, "B": 1, "C": 0, "D": 0}
    assert "better than chance" in capsys.readouterr().out


def test_what_is_no_better_than_a_rule_is_told(tmp_path):
    """100 questions whose right options are the longest 60 times; a model that takes the longest 50 times."""
    records = [
        {
            "question": "?",
            "A": "很长很长",
            "B": "短",
            "C": "中等",
            "D": "中等",
            "answer": "A" if i < 60 else "C",
        }
        for i in range(100)
    ]
    results = Results(read_questions(write_jsonl(tmp_path / "q.jsonl", records)))
    likely = {True: [-4.0, -5.0, -5.0, -5.0], False: [-5.0, -4.0, -5.0, -5.0]}
    results.log_likelihoods = {way: {i: likely[i < 50] for i in range(100)} for way in ("letter", "text")}
    unread = {rule: share.value for rule, share in results.unread().items()}
    assert unread == {"the longest option": 0.6, "the shortest option": 0.0, "always A": 0.6}
    assert results.accuracy("text", results.answered).value == 0.5
    assert results.verdict("text") == "better than chance, but not than the longest option"
    for i in range(60, 100):
        results.log_likelihoods["letter"][i] = [-5.0, -5.0, -4.0, -5.0]
    assert results.accuracy("letter", results.answered).value == 0.9
    assert results.verdict("letter") == "better than chance"


def test_ties_go_to_the_first_as_in_lm_eval(questions):
    results = Results(read_questions(questions))
    results.log_likelihoods = {"letter": {0: [-1.0] * 4}, "text": {0: [-3.0, -2.0, -2.0, -3.0]}}
    assert (results.choice("letter", 0), results.choice("text", 0)) == (0, 1)


def test_ctrl_c_says_how_far_it_got(questions, flags, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        yield next(choice_likelihoods(*arguments))
        raise KeyboardInterrupt

    choice_likelihoods = choice.log_likelihoods
    monkeypatch.setattr("minimind.evaluate.endings.POSITIONS", {"cpu": 600})
    monkeypatch.setattr(choice, "log_likelihoods", interrupted)
    path = tmp_path / "results.json"
    assert main(["eval", "choice", str(questions), *flags, "--json", str(path)]) == 130
    shown = capsys.readouterr()
    assert "stopped after " in shown.err
    assert "of 30 questions" in shown.err
    assert "is not written" in shown.err
    assert not path.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shots", "5"], "needs --examples_path"),
        (["--shots", "-1"], "--shots is -1"),
        (["--limit", "0"], "--limit is 0"),
        (["--model_mode", "3"], "no reason weights"),
        (["--max_seq_len", "4"], "--max_seq_len is 4"),
        (["--hidden_size", "128"], "no full_sft weights of the shape asked for"),
        (["--lora_name", "nowhere"], "there is no adapter at"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--json", "/proc/none/results.json"], "--json /proc/none cannot be written to"),
        (["--json", "/tmp"], "is no plain file"),
        (["--json", "/dev/null"], "is no plain file"),
    ],
)
def test_mistakes_are_one_sentence(questions, flags, more, message):
    with pytest.raises(UserError) as caught:
        main(["eval", "choice", str(questions), *flags, *more])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mode_that_there_is_not(questions, flags, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["eval", "choice", str(questions), *flags, "--model_mode", "9"])
    assert ended.value.code == 2
    assert "--model_mode: invalid choice: 9 (choose from 0, 1, 2, 3, 4)" in capsys.readouterr().err


def test_mistakes_in_the_file_are_told_before_pytorch_loads(tmp_path, out):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "x"}\n')
    command = [sys.executable, "-X", "importtime", "-m", "minimind", "eval", "choice", str(path)]
    start = time.perf_counter()
    done = subprocess.run([*command, "--out_dir", str(out)], capture_output=True, text=True, check=False)
    assert time.perf_counter() - start < 5
    assert done.returncode == 1
    assert f"error: {path}:1: A: missing" in done.stderr
    assert " torch" not in done.stderr
