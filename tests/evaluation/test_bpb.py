"""`minimind eval bpb` from the outside."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch

from evaluation.conftest import write_jsonl
from minimind.cli import main
from minimind.errors import UserError
from minimind.tokenizer import Tokenizer
from minimind.train import losses
from minimind.weights import load_model

TEXTS = ["春眠不觉晓，处处闻啼鸟。", "An English text, about as long as the Chinese one.", "一"]


@pytest.fixture
def texts(tmp_path):
    return write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture
def chats(tmp_path):
    records = [
        {"conversations": [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]}
        for text in TEXTS
    ]
    return write_jsonl(tmp_path / "chats.jsonl", records)


def nats(model, ids: list[int], mask: list[int]) -> float:
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(logps[i - 1, ids[i]].item() for i in range(1, len(ids)) if mask[i])


def test_texts_and_answers_by_the_equation(texts, chats, out, flags, tmp_path, capsys):
    path = tmp_path / "results.json"
    assert main(["eval", "bpb", str(texts), str(chats), *flags, "--json", str(path)]) == 0
    found = json.loads(path.read_text())["bits_per_byte"]
    assert [entry["kind"] for entry in found] == ["pretrain", "conversation"]
    model, tokenizer = load_model(out / "full_sft_64.pth", "").eval(), Tokenizer.load()
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    documents = [tokenizer.encode_document(text) for text in TEXTS]
    expected = sum(nats(model, ids, [1] * len(ids)) for ids in documents)
    assert found[0]["bits_per_byte"] == pytest.approx(expected / math.log(2) / num_bytes, rel=1e-4)
    assert found[0]["bytes"] == num_bytes
    assert found[0]["tokens"] == sum(len(ids) - 1 for ids in documents)
    conversations = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in TEXTS
    ]
    expected = sum(nats(model, *tokenizer.encode_chat(messages)) for messages in conversations)
    assert found[1]["bits_per_byte"] == pytest.approx(expected / math.log(2) / num_bytes, rel=1e-4)
    shown = capsys.readouterr().out
    assert f"{texts}: {found[0]['bits_per_byte']:.4f} bits per byte" in shown


def test_a_transformers_directory_gives_what_the_weights_in_it_give(texts, chats, flags, tmp_path):
    folder, results = tmp_path / "hf", []
    assert main(["export", "hf", str(folder), *flags[:2]]) == 0
    for more in ([], ["--hf_dir", str(folder)]):
        path = tmp_path / "results.json"
        assert main(["eval", "bpb", str(texts), str(chats), *flags, *more, "--json", str(path)]) == 0
        results.append(json.loads(path.read_text()))
    assert results[1]["bits_per_byte"] == results[0]["bits_per_byte"]
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert results[1]["model"]["weights_sha256"] == sha256
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 100}))
    assert main(["eval", "bpb", str(texts), *flags, "--hf_dir", str(folder), "--json", str(path)]) == 0
    assert json.loads(path.read_text())["model"]["max_seq_len"] == 100
    with pytest.raises(UserError, match="--max_seq_len 200 is more than the 100 positions"):
        main(["eval", "bpb", str(texts), *flags, "--hf_dir", str(folder), "--max_seq_len", "200"])


def test_a_file_whose_kind_cannot_be_told_names_the_command_that_tells_more(flags, tmp_path):
    path = write_jsonl(tmp_path / "odd.jsonl", [{"txt": "春天"}])
    with pytest.raises(UserError, match=f"`minimind data check {path} --kind …` names its flaws"):
        main(["eval", "bpb", str(path), *flags])


def test_conversations_that_are_cut_are_told(chats, flags, capsys):
    assert main(["eval", "bpb", str(chats), *flags, "--max_seq_len", "24"]) == 0
    assert (
        "of 3 records 2 are longer than --max_seq_len 24: 0 count in part, 2 not at all"
        in capsys.readouterr().err
    )


def test_the_length_is_that_of_the_training_run(texts, out, flags, tmp_path):
    run = out / "runs" / "full_sft_64" / "run.json"
    run.parent.mkdir(parents=True)
    run.write_text('{"options": {"max_seq_len": 77}}')
    path = tmp_path / "results.json"
    main(["eval", "bpb", str(texts), *flags, "--json", str(path)])
    run.write_text("[]")
    assert json.loads(path.read_text())["model"]["max_seq_len"] == 77
    main(["eval", "bpb", str(texts), *flags, "--json", str(path)])
    run.unlink()
    assert json.loads(path.read_text())["model"]["max_seq_len"] == 512


def test_ctrl_c_says_how_far_it_got(tmp_path, flags, monkeypatch, capsys):
    path = write_jsonl(tmp_path / "many.jsonl", [{"text": f"第{i}篇" * 10} for i in range(40)])
    calls = []

    def interrupted(model, batch):
        calls.append(len(batch.input_ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return at_targets(model, batch)

    at_targets = losses.at_targets
    monkeypatch.setattr(losses, "at_targets", interrupted)
    more = ["--max_seq_len", "64", "--batch_size", "2"]
    with pytest.raises(KeyboardInterrupt):
        main(["eval", "bpb", str(path), *flags, *more])
    assert f"stopped after 4 of {len_rows(path)} rows of {path}" in capsys.readouterr().err


def len_rows(path) -> int:
    from minimind.data.prepare import prepare
    from minimind.train.datasets import rows_of

    tokenizer = Tokenizer.load()
    return rows_of(prepare(path, "pretrain", tokenizer), tokenizer, 64).num_rows


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ('{"question": "x"}', [], "the first record has no field text"),
        ('{"text": "x"}\n{"text": 3}', [], ":2: text: expected `str`, got `int`"),
        ('{"text": "x"}', ["--batch_size", "0"], "--batch_size is 0"),
        ('{"text": "x"}', ["--dtype", "float16"], "--dtype float16 does not work on a CPU"),
    ],
)
def test_mistakes_are_told(tmp_path, flags, content, more, message):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        main(["eval", "bpb", str(path), *flags, *more])
    assert message in str(caught.value)


def test_no_file_is_a_usage_error(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["eval", "bpb", *flags])
    assert ended.value.code == 2
    assert "FILES" in capsys.readouterr().err
