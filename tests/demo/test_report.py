"""The report: one safe, self-contained page that holds everything it was given."""

import json
import re

from minimind.evaluate.report import Example, Metric, write_report


def metrics_log(path):
    steps = [{"step": s, "epoch": 0, "tokens": s * 2048, "loss": 3 - s / 500} for s in range(10, 600, 10)]
    measured = [{"step": s, "eval_bpb": 2 - s / 500, "eval_loss": 2.5} for s in range(100, 600, 100)]
    path.write_text("".join(json.dumps(line) + "\n" for line in steps + measured))
    return path


def report(folder, **changes):
    log = metrics_log(folder / "metrics.jsonl")
    given = {
        "title": "MiniMind 演示",
        "runs": [("Pretraining", log), ("Fine-tuning", log)],
        "metrics": [
            Metric("Addition", 97.5, 90, "%", [Example("1+1=?", "<script>evil()</script>", "2", 0.0)]),
            Metric("Loops", 2.5, 1, "%", lower_is_better=True),
            Metric("F1", 0.8432, 0.8, ""),
        ],
        "samples": [("你好", "<script>alert(1)</script>"), ("再见", "一\n二")],
        "tables": {
            "环境 · Environment": {"processor": "two <cores>"},
            "cost": {"time": "9 minutes", "tokens": 3_000_000},
        },
    }
    write_report(folder / "deep" / "report.html", **(given | changes))
    return (folder / "deep" / "report.html").read_text(encoding="utf-8")


def test_the_report_holds_everything_it_was_given(tmp_path):
    page = report(tmp_path)
    expected = ["MiniMind 演示", "Pretraining", "Fine-tuning", "你好", "一\n二", "2 of 3 goals met"]
    expected += ["Addition", "97.5 %", "≥ 90 %", "2.5 %", "≤ 1 %", "0.843", "1+1=?"]
    expected += ["9 minutes", "3000000", "processor"]
    assert [text for text in expected if text not in page] == []
    assert page.count("<svg") == 4
    assert page.count("✓ met") == 2
    assert page.count("✗ missed") == 1


def test_the_report_is_safe_and_self_contained(tmp_path):
    page = report(tmp_path)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;script&gt;evil()&lt;/script&gt;" in page
    assert "two &lt;cores&gt;" in page
    assert not re.search(r"(?:src|href)=|url\(|@import|https?://", page)


def test_empty_parts_are_left_out(tmp_path):
    page = report(tmp_path, runs=[], metrics=[], samples=[])
    assert "<svg" not in page
    assert "Samples" not in page
    assert "goals met" not in page


def test_the_same_training_gives_the_same_page(tmp_path):
    assert report(tmp_path) == report(tmp_path)
