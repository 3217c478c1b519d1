"""The data of the demo's other stages: valid, reproducible, true, and apart from what it is measured with."""

import json
import random
import re

import pytest

from minimind.data.records import read_records
from minimind.demo import phrases
from minimind.demo.data import SEED, bare, random_generator, split_problems
from minimind.demo.stage_data import ASKED_WORD_PROBLEMS, NEW_NAME, WORD_PROBLEMS, write_stage_data
from minimind.demo.word_problems import STORIES, word_problems

NOVEL = [[f"第{n}回", f"话说天下大势，分久必合，这是第{n}回。" * 60] for n in range(120)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_stage_data(tmp_path_factory.mktemp("demo"), NOVEL)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_file_is_read_by_its_stage(written):
    kinds = {
        "identity": "conversation",
        "pairs": "preference",
        "held_out_pairs": "preference",
        "reasoning": "reasoning",
        "direct": "conversation",
        "passages": "conversation",
        "held_out_passages": "conversation",
    }
    for name, kind in kinds.items():
        path = getattr(written, name)
        assert len(list(read_records(path, kind))) == len(lines(path)) >= 50


def test_the_seed_decides_everything(written, tmp_path):
    same, other = (write_stage_data(tmp_path / str(seed), NOVEL, seed) for seed in (SEED, 1))
    assert same.reasoning.read_bytes() == written.reasoning.read_bytes()
    assert same.word_problems == written.word_problems
    assert other.word_problems != written.word_problems


def test_the_new_name_is_the_only_one(written):
    for record in lines(written.identity):
        question, answer = (message["content"] for message in record["conversations"])
        assert (NEW_NAME in answer) != ((question, answer) in phrases.SMALL_TALK)
        assert "MiniMind" not in answer


def test_pairs_and_identity_keep_the_held_out_questions_out(written):
    unseen = {bare(question) for question in phrases.HELD_OUT_NAME_QUESTIONS}
    trained = {bare(record["chosen"][0]["content"]) for record in lines(written.pairs)}
    trained |= {bare(record["conversations"][0]["content"]) for record in lines(written.identity)}
    asked = {bare(record["chosen"][0]["content"]) for record in lines(written.held_out_pairs)}
    assert asked == unseen
    assert not trained & unseen


def test_both_answers_of_a_pair_are_in_the_language_of_the_question(written):
    for record in lines(written.pairs) + lines(written.held_out_pairs):
        texts = [record[side][i]["content"] for side in ("chosen", "rejected") for i in (0, 1)]
        assert len({text.isascii() for text in texts}) == 1


def steps_of(answer):
    return [tuple(map(int, found)) for found in re.findall(r"所以(\d+)[+-](\d+)=(\d+)。", answer)]


def test_operands_of_the_asked_problems_are_in_no_training_step(written):
    held_out, _ = split_problems(random_generator(SEED, "pairs"))
    held_out = {frozenset((p.a, p.b)) for p in held_out}
    for record in lines(written.reasoning):
        assert (
            not {frozenset(step[:2]) for step in steps_of(record["conversations"][1]["content"])} & held_out
        )
    taught = {record["conversations"][0]["content"] for record in lines(written.reasoning)}
    assert len(taught) == WORD_PROBLEMS
    assert len(written.word_problems) == ASKED_WORD_PROBLEMS
    assert not taught & {question.question for question in written.word_problems}


def test_the_working_is_true_and_leads_to_the_answer(written):
    for record, direct in zip(lines(written.reasoning), lines(written.direct), strict=True):
        question, answer = (message["content"] for message in record["conversations"])
        steps = steps_of(answer)
        numbers = [int(n) for n in re.findall(r"\d+", question)]
        value = numbers[0]
        for (a, b, result), number in zip(steps, numbers[1:], strict=True):
            assert (a, b) == (value, number)
            assert result in (a + b, a - b)
            value = result
        assert answer.endswith(f"<answer>\n{value}\n</answer>")
        assert direct["conversations"][1]["content"] == str(value)


def test_half_of_the_problems_have_two_steps_and_all_stories_are_told():
    pairs = [frozenset((a, b)) for a in range(10, 100) for b in range(10, 100)]
    problems = word_problems(pairs, 400, random.Random(0))
    assert [len(problem.steps) for problem in problems].count(2) == 200
    for story in STORIES:
        assert any(story.asks.format(name="")[-6:] in problem.question for problem in problems)


def test_the_held_out_chapters_are_not_taught(written):
    def chapters(path):
        return set(re.findall(r"第\d+回", path.read_text(encoding="utf-8")))

    taught, held_out = chapters(written.passages), chapters(written.held_out_passages)
    assert taught == {f"第{n}回" for n in range(55, 110)}
    assert held_out == {f"第{n}回" for n in range(110, 120)}
    for record in lines(written.passages):
        question, answer = (message["content"] for message in record["conversations"])
        assert len(question) == len("请接着写：") + 30
        assert answer.strip()
