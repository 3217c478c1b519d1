"""The documentation against the project: its commands run, its site builds, its pictures are current."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
from documented import PAGES, Command, Wrong, block_commands, check, documented_commands, kind, own_main
from test_lora import randomise
from test_model import random_model

from minimind.cli import COMMANDS
from minimind.completion import parser_of
from minimind.config import ModelConfig
from minimind.errors import UserError
from minimind.lora import attach, save_lora
from minimind.paths import ROOT
from minimind.train import loop
from minimind.weights import save_weights

SIZE = "--hidden_size 64 --num_hidden_layers 2 --out_dir out"
TRAIN = f"{SIZE} --max_steps 2 --device cpu --num_workers 1"
SHORT = {"--batch_size": "2", "--accumulation_steps": "1", "--max_seq_len": "64", "--compile": "0"}
EVAL = f"{SIZE} --device cpu"
CHAT = f"{EVAL} --max_new_tokens 2"

# How a documented command of each kind is run: with these flags in the end, on the files of `world`.
RUN = {
    "train pretrain": f"{TRAIN} --data_path dataset/pretrain_hq.jsonl",
    "train sft": f"{TRAIN} --data_path dataset/sft_mini_512.jsonl",
    "train lora": f"{TRAIN} --data_path dataset/lora_identity.jsonl",
    "train dpo": f"{TRAIN} --data_path dataset/dpo.jsonl",
    "train reason": f"{TRAIN} --data_path dataset/r1_mix_1024.jsonl",
    "train distill": f"{TRAIN} --data_path dataset/sft_mini_512.jsonl --teacher_path out/full_sft_64.pth",
    "estimate": "",  # the flags of its stage
    "chat": CHAT,
    "merge": SIZE,
    "export hf": SIZE,
    "import hf": "--out_dir imported",
    "import pth": "--out_dir imported",
    "export gguf": SIZE,
    "export ollama": SIZE,
    "export peft": SIZE,
    "import peft": f"{SIZE} --lora_name theirs --peft_dir peft",
    "eval bpb": EVAL,
    "eval choice": EVAL,
    "eval repetition": f"{CHAT} --limit 2",
    "report": "--out_dir out",
    "data check": "",
    "data stats": "--picture lengths.png",
    "data convert": "",
    "tokenizer": "--vocab_size 300 --out_dir out/tokenizer",
    "doctor": "",
    "completion": "",
    "minimind.cli": "",
}
# Kinds of commands that other tests run, as they take processes or machines of their own.
RUN_BY = {
    "torchrun": "train/test_parallel.py",
    "deepspeed": "train/test_deepspeed.py",
    "serve": "server/test_limits.py",
    "data download": "data/test_download.py",
    "faults": "train/test_faults.py",
    "benchmarks.train_speed": "benchmarks/test_train_speed.py",
    "benchmarks.growth": "benchmarks/test_growth.py",
    "benchmarks.prepare_speed": "benchmarks/test_prepare_speed.py",
    "benchmarks.startup": "benchmarks/test_startup.py",
    "benchmarks.stage_peers": "benchmarks/test_stage_peers.py",
    "benchmarks.time_to_quality": "benchmarks/test_time_to_quality.py",
}
ALL = list(dict.fromkeys(documented_commands()))
UNMARKED = [command for command in ALL if not command.marked]


def to_run() -> dict[str, Command]:
    """Each different command that is run here, by its name."""
    mine = (command for command in UNMARKED if command.whole and kind(command) in RUN)
    return {f"{kind(command)}: {' '.join(own_main(command)[1])}": command for command in mine}


# ---- Commands ----


@pytest.mark.parametrize("page", sorted({command.page for command in ALL}))
def test_the_commands_of_a_page_exist_and_take_their_flags(page):
    wrong = []
    for command in (command for command in ALL if command.page == page):
        try:
            check(command)
        except (Wrong, UserError) as error:
            wrong.append(f"{' '.join(command.words)}: {error}")
    assert not wrong


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("python trainer/train_nothing.py", "there is no"),
        ("minimind train sft --epoch 3", "unrecognized arguments: --epoch"),
        ("minimind train sft --epochs many", "invalid int value"),
        ("minimind pretrian", "there is no command"),
        ("minimind train sft --zero_stage 1 --optimizer best", "invalid choice"),
        ("minimind estimate sft --gpu 1", "invalid choice"),
        ("torchrun --nproc_per_node 2 trainer/train_dpo.py --betta 1", "unrecognized arguments"),
        ("python -m benchmarks.nothing", "No module named"),
        ("python -m benchmarks.growth --nothing 1", "unrecognized arguments"),
        ("python eval_model.py --model_mode 9", "invalid choice"),
        ("make nothing", "the Makefile has no nothing"),
        ("curl http://localhost", "say what it needs"),
        ("pip install -e '.[doc]'", "no extra doc"),
        ("pip install 'minimind[docs]'", "the package index has another project of that name"),
        ("cd trainer && python train_dpo.py --nope", "unrecognized arguments"),
    ],
)
def test_a_wrong_command_is_noticed(line, message):
    *_, last = block_commands("page", line)
    with pytest.raises(Wrong, match=re.escape(message)):
        check(last)


def test_a_value_that_options_refuse_is_noticed():
    with pytest.raises(UserError, match="it must be 1, 2 or 3"):
        check(next(block_commands("page", "minimind train sft --zero_stage 5")))


def test_how_commands_are_read():
    block = (
        "# needs a GPU\ncurl x | head > file\ncurl y  # 需要网络\n"
        "A=1 make demo && cd trainer\npython \\\n  train_dpo.py …\n"
    )
    commands = list(block_commands("page", block))
    assert [(c.words, c.marked, c.whole) for c in commands] == [
        (("curl", "x"), True, True),
        (("head",), True, True),
        (("curl", "y"), True, True),
        (("make", "demo"), False, True),
        (("cd", "trainer"), False, True),
        (("python", "train_dpo.py"), False, False),
    ]
    assert commands[-1].folder == ROOT / "trainer"
    console = list(block_commands("page", '$ echo "a\nb"\nprinted\n$ make test\n', is_console=True))
    assert [c.words for c in console] == [("echo", "a\nb"), ("make", "test")]


def test_every_command_is_run_or_marked():
    """What to do when this fails: add the kind to RUN (or RUN_BY), or say in a comment what it needs."""
    own = {kind(command): command for command in UNMARKED if command.whole and own_main(command)}
    launched = {kind(command) for command in UNMARKED} & {"torchrun", "deepspeed"}
    assert {*own, *launched} - {*RUN, *RUN_BY} == set()
    for name, test in RUN_BY.items():
        text = (ROOT / "tests" / test).read_text(encoding="utf-8")
        assert name.split(".")[-1] in text, f"{test} does not run {name}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The files that commands start from: data of every kind, weights of every stage, adapters."""
    folder = tmp_path_factory.mktemp("made")
    talk = [
        {"role": "user", "content": "3加4？"},
        {"role": "assistant", "content": "<think>\n算\n</think>\n<answer>\n7\n</answer>"},
    ]
    records = {
        "pretrain_hq": {"text": "春天来了，太阳出来了。" * 3},
        "sft_mini_512": {"conversations": talk},
        "lora_identity": {"conversations": talk},
        "r1_mix_1024": {"conversations": talk},
        "dpo": {"chosen": talk, "rejected": [talk[0], talk[1] | {"content": "不知道"}]},
    }
    question = {"question": "1加1？", **dict(zip("ABCD", "1234", strict=True)), "answer": "B"}
    records |= {"pretrain_val": records["pretrain_hq"], "cmmlu_test": question, "cmmlu_dev": question}
    (folder / "dataset").mkdir()
    for name, record in records.items():
        line = json.dumps(record, ensure_ascii=False)
        lines = [line.replace("春", str(i)).replace("3加", f"{i}加") for i in range(60)]
        (folder / f"dataset/{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pairs = (folder / "dataset/dpo.jsonl").read_bytes()
    (folder / "dataset/dpo.jsonl.gz").write_bytes(gzip.compress(pairs))
    (folder / "alpaca_zh.json").write_text('[{"instruction": "你好", "output": "好"}]', encoding="utf-8")
    config = ModelConfig(hidden_size=64, num_hidden_layers=2)
    for stage in ("pretrain", "full_sft", "rlhf", "reason", "full_dist"):
        save_weights(random_model(config), folder / f"out/{stage}_64.pth")
    for name in ("lora_medical", "lora_identity"):
        model = random_model(config)
        attach(model, 2)
        randomise(model, 0)
        save_lora(model.state_dict(), folder / f"out/lora/{name}_64.pth")
    shutil.copy(folder / "out/full_sft_64.pth", folder / "full_sft_512.pth")
    from minimind.export import hf_cli, peft_cli

    flags = [*SIZE.split(), "--out_dir", f"{folder}/out"]
    peft_cli.export([*flags, "--lora_name", "lora_medical", "--peft_dir", f"{folder}/peft"])
    hf_cli.export([f"{folder}/exported", *flags])
    run_folder = folder / "out/runs/full_sft_64"
    run_folder.mkdir(parents=True)
    (run_folder / "metrics.jsonl").write_text('{"step": 1, "loss": 8.8}\n')
    return folder


@pytest.fixture
def world(made, tmp_path, monkeypatch):
    """A copy of them to work in."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "matmul_rate", lambda *_: 1e10)
    monkeypatch.setattr(sys, "stdin", io.StringIO("你好\n"))
    monkeypatch.setattr(sys, "argv", ["minimind"])
    return tmp_path


@pytest.mark.parametrize("name", to_run())
def test_a_documented_command_runs(name, world, capsys):
    command = to_run()[name]
    main, arguments = own_main(command)
    arguments = without(arguments, "--preset", "--teacher_preset")  # of models too large for a test
    if "--help" in arguments:
        assert run(main, arguments) == 0
        assert "usage: " in capsys.readouterr().out
        return
    flags = RUN[f"train {arguments[0]}" if kind(command) == "estimate" else kind(command)].split()
    if kind(command).startswith(("train", "estimate")):
        flags += [word for pair in SHORT.items() if pair[0] not in arguments for word in pair]
    if kind(command) == "import hf":
        (world / "exported").rename(world / "hf")
    assert run(main, [*arguments, *flags]) == 0


def run(main, arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as ended:
        return ended.code


def without(arguments: list[str], *flags: str) -> list[str]:
    """`arguments` without these flags and their values."""
    kept = [i for i, word in enumerate(arguments) if word not in flags]
    return [arguments[i] for i in kept if i == 0 or arguments[i - 1] not in flags]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_by_example(name):
    module, function = COMMANDS[name].function.split(":")
    main = getattr(__import__(module, fromlist=[function]), function)
    examples = re.findall(
        r"^ {4}((?:minimind|python|torchrun) .*?)(?: {2,}.*)?$", parser_of(main).description, re.M
    )
    commands = [command for line in examples for command in block_commands(name, line)]
    assert name in map(kind, commands)
    for command in commands:
        check(command)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_table_of_commands_has_them_all(language):
    page = (ROOT / f"docs/{language}/commands.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"`minimind {name}`" not in page] == []


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_python_in_the_api_page_runs(language, world, capsys):
    (world / "out/full_sft_64.pth").rename(world / "out/full_sft_512.pth")
    page = (ROOT / f"docs/{language}/api.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    exec(code.replace("SamplingOptions()", "SamplingOptions(max_new_tokens=3)"), {})
    assert capsys.readouterr().out


# ---- The site ----


def test_every_page_is_in_both_languages():
    pages = {language: {p.name for p in (ROOT / "docs" / language).glob("*.md")} for language in ("zh", "en")}
    assert pages["zh"] == pages["en"]


def test_the_pinned_versions_can_be_had_on_any_machine():
    """A local version (2.13.0+cpu) is on no public index: with it, `make` could install nothing."""
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert pins
    assert not [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)]


def test_the_pictures_are_those_that_the_script_draws():
    drawn = runpy.run_path(str(ROOT / "docs/draw_model.py"))["pictures"]()
    for name, svg in drawn.items():
        assert (ROOT / "docs/images" / name).read_text(encoding="utf-8") == svg


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if not all(map(find_spec, ("mkdocs", "material", "mkdocstrings", "latex2mathml"))):
        pytest.skip("building the site takes pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    for config, where in (("mkdocs.yml", folder), ("mkdocs.en.yml", folder / "en")):
        subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "-f", ROOT / config, "-d", where],
            check=True,
            cwd=ROOT,
            env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        )
    return folder


def test_the_site_has_every_page_and_asks_nobody(site):
    for page in PAGES:
        if page.is_relative_to(ROOT / "docs"):
            language, name = page.relative_to(ROOT / "docs").parts
            text = (site / ("en" if language == "en" else "") / name).with_suffix(".html").read_text("utf-8")
            assert not re.findall(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=.?(?:https?:)?//[^>]+", text)
            assert "arithmatex" not in text  # every equation became MathML


@pytest.mark.parametrize(("page", "words"), [("index.html", "蒸馏"), ("en/index.html", "distillation")])
def test_the_search_works_in_a_site_opened_as_a_file(site, browser, page, words):
    with browser.new_context(offline=True) as context:
        tab = context.new_page()
        tab.goto((site / page).as_uri())
        tab.locator(".md-search__input").click()
        tab.keyboard.type(words)
        tab.keyboard.press("End")  # the search heeds keys, and Chinese is typed without
        tab.locator(".md-search-result__link").first.wait_for()


def test_the_site_shows_code_and_numbers_as_they_are(site):
    stages = (site / "stages.html").read_text("utf-8")
    assert "<math" in stages
    assert "logsigmoid" in stages  # of `dpo_loss`
    result = json.loads((ROOT / "benchmarks/results/stage_speed.json").read_bytes())
    speed = f"<td>{result['stages']['pretrain']['tokens_per_s']:,.0f}</td>"
    assert speed in (site / "en/costs.html").read_text("utf-8")


def test_links_between_the_languages_lead_somewhere(site):
    for page in site.rglob("*.html"):
        for target in re.findall(r'href="([^":#]+\.html)', page.read_text("utf-8")):
            assert page.name == "404.html" or (page.parent / target).is_file(), f"{page}: {target}"


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    return runpy.run_path(str(ROOT / "docs/hooks.py"))


def test_what_a_link_that_stands_alone_becomes(hooks, tmp_path, monkeypatch):
    shown, zh = hooks["shown"], ROOT / "docs/zh"
    code = shown(zh, "../../minimind/moe.py", "MoE.forward")
    assert code.splitlines()[1].startswith("def forward(self, x: Tensor")
    assert re.match(r'```python title="minimind/moe.py" linenums="\d+"\n', code)
    assert '"base": ModelConfig(' in shown(zh, "../../minimind/config.py", "PRESETS")
    result = {"rates": {"one": {"a": [3, 1, 2], "b": 1234.5}}, "flat": {"x": 0.12345}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    monkeypatch.setitem(shown.__globals__, "ROOT", tmp_path)
    assert "| | a | b |\n|---|---|---|\n| one | 2 | 1,234 |" in shown(tmp_path, "result.json", "rates/a,b")
    assert "| x | 0.123 |" in shown(tmp_path, "result.json", "flat")


@pytest.mark.parametrize(
    ("target", "anchor", "message"),
    [
        ("../../minimind/moe.py", "MoE.backward", "has no MoE.backward any more"),
        ("../../minimind/moe.py", None, "name what to show of it"),
        ("../../README.md", "x", "name what to show of it"),
    ],
)
def test_what_cannot_be_shown_stops_the_build(hooks, target, anchor, message):
    with pytest.raises(Exception, match=message):
        hooks["shown"](ROOT / "docs/zh", target, anchor)
