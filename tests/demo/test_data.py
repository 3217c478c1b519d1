"""The demo's data: valid records, the same each time, and nothing of what it is measured with."""

import itertools
import json
import re

import pytest

from minimind.demo import data as demo_data
from minimind.demo import phrases, sources
from minimind.demo.data import bare, passages, write_demo_data
from minimind.demo.sources import Idiom, Sources, fetch, parse_conversations, read_sources
from minimind.errors import UserError

CHARACTERS = "春夏秋冬风花雪月山水日云"
IDIOMS = [
    Idiom("".join(word), f"形容第{'甲乙丙丁戊己庚辛'[i % 8]}种情形，十分少见。", "《书》", "这真是～。★某人")
    for i, word in enumerate(itertools.islice(itertools.permutations(CHARACTERS, 4), 1500))
]
SAMPLE = Sources(
    idioms=[*IDIOMS, Idiom("三心二意", "意思不专一◇形容犹豫”。", "", "")],
    small_talk=[["你好", "嗨", "再见"], ["你是谁?", "一个戴面具的人"], ["只有一句"]],
    novel=[[f"第{n}回", "话说天下大势，分久必合。" * 60] for n in range(60)],
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_demo_data(tmp_path_factory.mktemp("demo"), sources=SAMPLE)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_record_has_the_format_of_its_stage(written):
    for path in (written.pretrain, written.pretrain_val):
        for record in lines(path):
            assert list(record) == ["text"]
            assert record["text"].strip()
    for record in lines(written.sft):
        assert list(record) == ["conversations"]
        messages = record["conversations"]
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert messages
        assert all(list(m) == ["role", "content"] and m["content"].strip() for m in messages)


def test_the_counts_and_questions_are_those_of_the_files(written):
    folder = written.sft.parent
    assert {path.name for path in folder.glob("*.jsonl")} == set(written.records)
    for name, count in written.records.items():
        assert len(lines(folder / name)) == count
    for name in ("arithmetic", "identity", "idioms"):
        assert lines(folder / f"eval_{name}.jsonl") == [q._asdict() for q in getattr(written, name)]


def test_the_seed_decides_everything(written, tmp_path):
    same = write_demo_data(tmp_path / "same", sources=SAMPLE)
    other = write_demo_data(tmp_path / "other", sources=SAMPLE, seed=1)
    for name in written.records:
        assert (same.sft.parent / name).read_bytes() == (written.sft.parent / name).read_bytes()
    assert other.sft.read_bytes() != written.sft.read_bytes()
    assert other.arithmetic != written.arithmetic


def trained_lines(written):
    return [record["text"] for record in lines(written.pretrain)] + [
        message["content"] for record in lines(written.sft) for message in record["conversations"]
    ]


def test_held_out_operands_are_not_trained_in_either_order(written):
    def pair(text):
        return frozenset(re.findall(r"(?<!\d)\d\d(?!\d)", text)[:2])

    asked = {pair(question) for question, _ in written.arithmetic}
    assert len(asked) == demo_data.HELD_OUT_PAIRS
    trained = {pair(line) for line in trained_lines(written) if re.match(r"\D*\d\d\D+\d\d", line)}
    assert len(trained) > 3_000
    assert not asked & trained


def test_held_out_phrasings_are_not_trained(written):
    trained = {bare(line) for line in trained_lines(written)}
    assert bare(phrases.NAME_QUESTIONS[0]) in trained
    assert not trained & {bare(question) for question, _ in written.identity}
    assert len({bare(question) for question, _ in written.identity}) == len(written.identity)


def test_a_leak_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(phrases, "HELD_OUT_NAME_QUESTIONS", ("你是谁",))
    with pytest.raises(AssertionError, match="held-out phrasing"):
        write_demo_data(tmp_path, sources=SAMPLE)


def test_idioms_are_asked_in_a_phrasing_new_for_them_but_taught(written):
    taught = {
        (user["content"], answer["content"])
        for record in lines(written.sft)
        for user, answer in itertools.pairwise(record["conversations"])
    }
    meanings = {meaning for _, meaning in taught}
    assert len(written.idioms) == demo_data.ASKED_IDIOMS
    for question in written.idioms:
        assert tuple(question) not in taught
        assert question.answer in meanings


def test_every_answer_about_itself_gives_the_name():
    answers = (
        phrases.NAME_ANSWERS
        + phrases.NAME_ANSWERS_ENGLISH
        + phrases.MAKER_ANSWERS
        + phrases.MAKER_ANSWERS_ENGLISH
    )
    assert all("MiniMind" in answer for answer in answers)
    assert len(phrases.NAME_QUESTIONS + phrases.NAME_QUESTIONS_ENGLISH) >= 60


def test_small_talk_that_speaks_of_another_self_is_left_out(written):
    everything = "\n".join(trained_lines(written))
    assert "面具" not in everything
    assert "嗨" in everything


def test_the_dictionary_is_mended(written):
    everything = "\n".join(trained_lines(written))
    assert not re.search("[～★◇]", everything)
    assert "三心二意：意思不专一。后形容犹豫。" in everything


def test_passages_end_with_sentences_and_lose_nothing():
    paragraphs = ["第一回", "甲说：“好！”乙走了。丙呢？", "没有句号的一段"]
    cut = list(passages(paragraphs, 8))
    assert cut == ["第一回\n甲说：“好！”", "乙走了。丙呢？", "没有句号的一段"]


def test_conversations_are_read_from_their_yaml():
    text = """categories:
- greetings
conversations:
- - 你好
  - 'It''s 10: one
    o''clock'
  - "「好」"
- - 'x' marks it
  - |
"""
    assert parse_conversations(text) == [["你好", "It's 10: one o'clock", "「好」"], ["'x' marks it", "|"]]


def test_without_a_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    with pytest.raises(UserError, match="put the wheels into"):
        fetch(tmp_path)


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("downloads")
    try:
        return folder, read_sources(folder)
    except UserError as error:
        pytest.skip(f"needs the network: {error}")


def test_the_downloaded_texts_are_what_the_demo_expects(downloaded, tmp_path):
    _, texts = downloaded
    assert len(texts.idioms) == 30_895
    assert len(texts.novel) == 120
    assert texts.novel[0][0].startswith("第一回")
    assert len(texts.small_talk) > 100
    written = write_demo_data(tmp_path, sources=texts)
    assert written.records["sft.jsonl"] > 7_000
    assert written.records["pretrain.jsonl"] > 15_000


def test_conversations_read_as_a_yaml_library_reads_them(downloaded):
    yaml = pytest.importorskip("yaml")
    folder, texts = downloaded
    wheel = fetch(folder)["small_talk"]
    assert texts.small_talk == [
        conversation
        for language in ("chinese", "english")
        for topic in sources.SMALL_TALK_TOPICS
        for conversation in yaml.safe_load(
            sources._member(wheel, f"chatterbot_corpus/data/{language}/{topic}.yml")
        )["conversations"]
    ]


def test_a_damaged_download_is_fetched_again(downloaded):
    folder, _ = downloaded
    wheel = fetch(folder)["small_talk"]
    intact = wheel.read_bytes()
    wheel.write_bytes(intact[:1000])
    assert fetch(folder)["small_talk"].read_bytes() == intact
