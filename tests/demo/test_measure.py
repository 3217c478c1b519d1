"""The demo's scores: what counts as a right answer, and as a loop."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.demo.data import DemoData, Problem, Question
from minimind.demo.measure import character_f1, final_number, measure, metrics_table
from minimind.evaluate.repetition import ends_in_loop


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("85", 85),
        ("37+48：个位7+8=15，写5进1；十位3+4+1=8，所以37+48=85。", 85),
        ("52-17=35", 35),
        ("52-17", 17),  # the minus of a subtraction is no sign
        ("结果是-5。", -5),
        ("我不知道", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


@given(st.integers(10, 99), st.integers(10, 99))
def test_worked_answers_end_with_the_result_and_every_step_in_them_is_true(a, b):
    for problem in (Problem(a, b, "+"), Problem(max(a, b), min(a, b), "-")):
        assert final_number(problem.worked()) == problem.result
        for step in problem.worked().replace("。", "").replace("所以", "，").replace("位", "，").split("，"):
            left, equals, right = step.partition("；")[0].partition("：")[0].partition("=")
            if equals:
                assert eval(left) == int(right)


def test_worked_answers_read_as_at_school():
    assert Problem(37, 48, "+").worked() == "37+48：个位7+8=15，写5进1；十位3+4+1=8，所以37+48=85。"
    assert Problem(12, 34, "+").worked() == "12+34：个位2+4=6；十位1+3=4，所以12+34=46。"
    assert Problem(52, 17, "-").worked() == "52-17：个位2-7不够减，借1，12-7=5；十位5-1-1=3，所以52-17=35。"
    assert Problem(52, 51, "-").worked() == "52-51：个位2-1=1；十位5-5=0，所以52-51=1。"


def test_character_f1():
    assert character_f1("形容很高兴。", "形容，很高兴") == 1
    assert character_f1("天", "地") == 0
    assert character_f1("", "地") == 0
    assert character_f1("甲乙", "乙丙") == pytest.approx(0.5)
    assert character_f1("甲", "甲甲甲") == pytest.approx(0.5)  # characters count as often as they occur


@given(st.text(), st.text())
def test_character_f1_is_symmetric_and_a_share(one, other):
    assert 0 <= character_f1(one, other) <= 1
    assert character_f1(one, other) == character_f1(other, one)
    assert character_f1(one, one) == 1


@pytest.mark.parametrize(
    "text",
    [
        "很" * 16,
        "我是我是我是我是我是我是我是我是",
        "今天天气很好，" * 4,
        "开头不同。" + "今天天气很好，" * 4 + "今天天",  # cut by the token limit
        "a lot of " * 5 + "\n\n",
        "一二三四五六七八九十甲乙丙丁戊己庚辛壬癸" * 4,
    ],
)
def test_loops(text):
    assert ends_in_loop(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "哈哈哈哈",
        "等一下……",
        "今天天气很好，" * 3,
        "今天天气很好，" * 4 + "所以我们出去玩。",  # it found its way out
        "37+48：个位7+8=15，写5进1；十位3+4+1=8，所以37+48=85。",
        "一二三四五六七八九十甲乙丙丁戊己庚辛壬癸子" * 4,  # a unit of 21
    ],
)
def test_no_loops(text):
    assert not ends_in_loop(text)


@given(
    st.text(st.characters(exclude_categories=("Z", "C")), min_size=1, max_size=20),
    st.integers(16, 30),
    st.text(),
)
def test_whatever_comes_before_a_loop_does_not_hide_it(unit, times, before):
    assert ends_in_loop(before + unit * times)


def questions() -> DemoData:
    arithmetic = [Question("37加48等于多少？", "85"), Question("52-17=?", "35")]
    return DemoData(
        *(None,) * 3, arithmetic, [Question("你是谁啊？", "MiniMind")], [Question("一心一意", "很专心")], {}
    )


def test_measure_scores_each_skill_on_its_own():
    answers = {
        "37加48等于多少？": "85",
        "52-17=?": "=34",
        "你是谁啊？": "我是minimind",
        "一心一意": "专心" * 20,
    }
    metrics = measure(lambda batch: [answers[question] for question in batch], questions())
    assert [metric.value for metric in metrics] == pytest.approx([100, 0, 100, 4 / 43, 25], abs=1e-6)
    assert [metric.passed for metric in metrics] == [True, False, True, False, False]
    assert metrics[1].examples == [("52-17=?", "=34", "35", 0.0)]
    assert [example.question for example in metrics[-1].examples] == ["一心一意"]
    assert metrics_table(metrics).row_count == 5


def test_measure_keeps_the_worst_and_the_best_answers():
    data = questions()
    data.arithmetic[:] = [Question(f"{n}+{n}=?", str(2 * n)) for n in range(10, 30)]
    answers = {q.question: q.answer if n < 10 else "0" for n, q in enumerate(data.arithmetic)}
    addition = measure(lambda batch: [answers.get(question, "") for question in batch], data)[0]
    assert addition.value == 50
    assert [example.score for example in addition.examples] == [0, 0, 0, 1, 1, 1]
