"""`minimind eval repetition` from the outside."""

from __future__ import annotations

import json

import pytest

from evaluation.conftest import write_jsonl
from minimind.chat.engine import Engine
from minimind.cli import main
from minimind.errors import UserError
from minimind.evaluate.repetition import ends_in_loop


@pytest.fixture
def chats(tmp_path):
    records = [
        {
            "conversations": [
                {"role": "system", "content": "简短回答"},
                {"role": "user", "content": f"{i}是什么？"},
                {"role": "assistant", "content": "数"},
            ]
        }
        for i in range(6)
    ]
    return write_jsonl(tmp_path / "chats.jsonl", records)


def test_shares_of_loops_and_of_answers_without_end(chats, flags, tmp_path, capsys):
    path = tmp_path / "results.json"
    more = ["--temperature", "0", "--repetition_penalty", "1", "--max_new_tokens", "40", "--limit", "5"]
    assert main(["eval", "repetition", str(chats), *flags, *more, "--json", str(path)]) == 0
    found = json.loads(path.read_text(encoding="utf-8"))["repetition"]
    assert [answer["prompt"] for answer in found["answers"]] == [f"{i}是什么？" for i in range(5)]
    loops = [ends_in_loop(answer["text"]) for answer in found["answers"]]
    assert found["loops"]["share"] == sum(loops) / 5
    assert found["cut"]["share"] == sum(answer["cut"] for answer in found["answers"]) / 5
    assert found["cut"]["share"] > 0  # random weights do not know how to end
    shown = capsys.readouterr().out
    assert f"{100 * found['loops']['share']:.1f} [" in shown
    assert "of 5 answers end in a loop" in shown


def test_the_seed_makes_it_repeatable(chats, flags, tmp_path):
    texts = []
    for i, seed in enumerate(("1", "1", "2")):
        path = tmp_path / f"{i}.json"
        more = ["--max_new_tokens", "8", "--seed", seed, "--json", str(path)]
        assert main(["eval", "repetition", str(chats), *flags, *more]) == 0
        texts.append([a["text"] for a in json.loads(path.read_text())["repetition"]["answers"]])
    assert texts[0] == texts[1] != texts[2]


def test_pretrained_weights_go_on_with_beginnings(flags, tmp_path):
    data = write_jsonl(
        tmp_path / "texts.jsonl", [{"text": "从前有座山，山里有座庙，庙里有个老和尚在讲故事。"}]
    )
    path = tmp_path / "results.json"
    more = ["--model_mode", "0", "--max_new_tokens", "4", "--json", str(path)]
    assert main(["eval", "repetition", str(data), *flags, *more]) == 0
    (answer,) = json.loads(path.read_text())["repetition"]["answers"]
    assert answer["prompt"] == "从前有座山，山里有座庙，庙里有个老和尚在"


def test_ctrl_c_says_how_far_it_got(chats, flags, monkeypatch, capsys):
    steps = []

    def interrupted(engine):
        steps.append(engine)
        if len(steps) == 12:
            raise KeyboardInterrupt
        return step(engine)

    step = Engine.step
    monkeypatch.setattr(Engine, "step", interrupted)
    monkeypatch.setattr("minimind.evaluate.repetition_cli.ROWS", 2)
    assert main(["eval", "repetition", str(chats), *flags, "--max_new_tokens", "4"]) == 130
    shown = capsys.readouterr()
    assert "stopped after 4 of 6 answers" in shown.err
    assert "of 4 answers" in shown.out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--limit", "0"], "--limit is 0"),
        (["--temperature", "-1"], "temperature must be"),
        (["--min_p", "2"], "min_p must be"),
        (["--max_seq_len", "4"], "--max_seq_len is 4"),
    ],
)
def test_mistakes_are_told(chats, flags, more, message):
    with pytest.raises(UserError) as caught:
        main(["eval", "repetition", str(chats), *flags, *more])
    assert message in str(caught.value)


def test_the_file_must_be_named(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["eval", "repetition", *flags])
    assert ended.value.code == 2
    assert "the following arguments are required: DATA" in capsys.readouterr().err
