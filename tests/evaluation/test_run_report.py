"""`minimind report`: the page of a run that is done, at work, killed, or not as it should be."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest

from minimind.cli import main
from minimind.errors import UserError

RUN = {
    "run_id": "1234abcd",
    "stage": "pretrain",
    "options": {"data_path": "/data/<b>texts</b>.jsonl", "epochs": 1, "logger": ["none"], "seed": None},
    "model": {"hidden_size": 256},
    "parameters": 4589824,
    "data_sha256": "5ha",
    "data_documents": 46464,
    "total_steps": 60,
    "environment": {"processor": "a <fast> one", "Python": "3.11"},
    "cost": {
        "seconds": 90,
        "tokens": 1_000_000,
        "tokens_per_s": 11111.1,
        "peak_memory": 2_000_000_000,
        "device": "CPU",
        "price_per_hour": 1.3,
        "money": 0.0325,
    },
}


@pytest.fixture(autouse=True)
def program_name(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["minimind"])


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "out" / "runs" / "pretrain_256"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(RUN))
    lines = [
        {
            "step": s,
            "loss": 3 - s / 60,
            "lr": 1e-3,
            "grad_norm": 0.5,
            "tokens": 2048.0,
            "tokens_per_s": 9e3 + s,
        }
        for s in range(1, 61)
    ] + [{"step": s, "eval_loss": 2.5, "eval_bpb": 2 - s / 60} for s in (30, 60)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample = {"run_id": "1234abcd", "prompt": "长城是", "answer": "<script>alert('坏')</script>"}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return folder


def page(folder) -> str:
    assert main(["report", str(folder)]) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


def test_it_shows_all_of_a_run(run_dir, capsys):
    html = page(run_dir)
    assert f"report: {run_dir / 'report.html'}" in capsys.readouterr().out
    expected = [
        "pretrain_256",
        "60 / 60",
        "1.0000",
        "122,880",
        "9,031",
        "1.5 min",
        "¥0.03",
        "2.00 GB",
        "46,464",
    ]
    expected += ["5ha", "4,589,824", "3.11", "长城是", "--epochs", "1234abcd"]
    assert [text for text in expected if text not in html] == []
    charts = ["Loss", "bits per byte", "Learning rate", "Gradient norm", "Tokens per second"]
    assert [c for c in charts if not re.search(rf'aria-label="[^"]*{c}', html)] == []
    assert html.count("<svg") == len(charts)
    assert "not finished" not in html
    assert "--seed" not in html  # it was given no value


def test_texts_of_others_stay_text_and_nothing_is_fetched(run_dir):
    html = page(run_dir)
    assert "<script" not in html
    assert "&lt;script&gt;alert(&#x27;坏&#x27;)&lt;/script&gt;" in html
    assert "&lt;b&gt;texts&lt;/b&gt;" in html
    assert "a &lt;fast&gt; one" in html
    assert not re.search(r"(?:src|href)=|url\(|@import|https?://", html)


def test_a_run_at_work_is_shown_as_far_as_it_is(run_dir):
    (run_dir / "run.json").write_text(
        json.dumps({k: v for k, v in RUN.items() if k != "cost"} | {"total_steps": 90})
    )
    (run_dir / "samples.jsonl").unlink()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')
    html = page(run_dir)
    assert "60 / 90" in html
    assert "not finished" in html
    assert "What it took" not in html
    assert "Samples" not in html


@pytest.mark.parametrize(
    "content", [b"", b"null\n[1]\n{}\n\xff\n", b'{"step": "x", "loss": 1}\n{"loss": 2}\n']
)
def test_a_log_without_steps(run_dir, content):
    (run_dir / "metrics.jsonl").write_bytes(content)
    html = page(run_dir)
    assert "<svg" not in html
    assert "0 / 60" in html


def test_odd_values_do_no_harm(run_dir):
    odd = {
        "total_steps": "many",
        "cost": [1],
        "options": 7,
        "environment": None,
        "model": "big",
        "parameters": "x",
    }
    (run_dir / "run.json").write_text(json.dumps(RUN | odd))
    (run_dir / "samples.jsonl").write_text('{"prompt": 1, "answer": null}\n[]\n7\n{"prompt"\n"\\ud800"\n')
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 61, "loss": "x", "new/metric": 1e29}\n{"step": 62, "new/metric": 1e308, "loss": true}\n'
            '{"step": 1e999, "loss": NaN}\n{"step": 63, "loss": Infinity, "lr": -Infinity}\n'
        )
    assert "new/metric" in page(run_dir)


def test_metrics_of_other_stages_are_drawn_too(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step in (61, 62):
            values = {
                "rewards/chosen": 0.1,
                "rewards/rejected": -0.1,
                "rewards/margins": 0.2,
                "balance_loss": 1.0,
            }
            values |= {f"expert_load/{i}": 0.25 for i in range(4)}
            file.write(json.dumps({"step": step} | values) + "\n")
    html = page(run_dir)
    for name in ("Rewards", "Expert load", "rewards/margins", "balance_loss"):
        assert re.search(rf'aria-label="[^"]*{name}', html)


def test_samples_of_an_earlier_run_are_not_shown(run_dir):
    (run_dir / "run.json").write_text(json.dumps(RUN | {"run_id": "another"}))
    assert "长城是" not in page(run_dir)


def test_without_a_folder_the_newest_run_is_taken(run_dir):
    older = run_dir.parent / "full_sft_256"
    older.mkdir()
    (older / "metrics.jsonl").write_text("")
    os.utime(older / "metrics.jsonl", (1, 1))
    assert main(["report", "--out_dir", str(run_dir.parent.parent)]) == 0
    assert (run_dir / "report.html").exists()
    assert not (older / "report.html").exists()


def test_another_place_for_the_page(run_dir, tmp_path):
    path = tmp_path / "新" / "页.html"
    assert main(["report", str(run_dir), "--output", str(path)]) == 0
    assert "pretrain_256" in path.read_text(encoding="utf-8")
    assert not (run_dir / "report.html").exists()


def test_mistakes_are_one_sentence(run_dir, tmp_path):
    with pytest.raises(UserError, match="holds no training run"):
        main(["report", str(tmp_path)])
    with pytest.raises(UserError, match="there is no such folder"):
        main(["report", str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="has no run"):
        main(["report", "--out_dir", str(tmp_path / "nowhere")])
    (run_dir / "run.json").write_text("[")
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        main(["report", str(run_dir)])


def test_a_slip_in_the_name_costs_no_weights(run_dir, tmp_path):
    weights = tmp_path / "full_sft_64.pth"
    weights.write_bytes(b"weights")
    with pytest.raises(UserError, match=r"--output .*full_sft_64.pth is there and ends in no .html"):
        main(["report", str(run_dir), "--output", str(weights)])
    assert weights.read_bytes() == b"weights"


def test_a_page_that_cannot_be_written(run_dir):
    for path in ("/proc/none/report.html", "/dev/null", str(run_dir)):
        with pytest.raises(UserError, match="could not write"):
            main(["report", str(run_dir), "--output", path])
