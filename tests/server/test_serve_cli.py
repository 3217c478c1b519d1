"""`minimind serve` from the outside: what it serves, how it refuses, how it stops."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from chat.models import random_model

from minimind import cli as minimind
from minimind.chat.generate import generate
from minimind.chat.inference import InferenceModel
from minimind.chat.options import SamplingOptions
from minimind.cli import COMMANDS
from minimind.errors import UserError
from minimind.lora import attach, save_lora
from minimind.paths import ROOT
from minimind.server import cli
from minimind.weights import load_model, save_weights

from .live import ASK, CHAT, CONFIG, TOKENIZER, chat_ids, eventually, shown

SERVE = ("-m", "minimind", "serve")
BROKEN = """
import sys
from minimind.chat.engine import Engine
from minimind.server import cli

def broken(_):
    raise RuntimeError("out of luck")

Engine.warm_up, Engine.step = lambda _: None, broken
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    save_weights(random_model(CONFIG), folder / "full_sft_64.pth")
    for seed, name in enumerate(("lora_a", "lora_b")):
        model = random_model(CONFIG)
        attach(model, rank=2)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.5)
        save_lora(model.state_dict(), folder / "lora" / f"{name}_64.pth")
    return folder


@pytest.fixture
def serve(out):
    """Start the command; returns its process and address."""
    started = []

    def start(*flags: str, program: Sequence[str] = SERVE) -> tuple[subprocess.Popen, str]:
        own = ["--out_dir", str(out), "--port", "0", "--device", "cpu", "--max_seq_len", "8192"]
        process = subprocess.Popen(
            [sys.executable, *program, *own, *flags],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        for line in process.stdout:
            if line.startswith("page: "):
                return process, line.split()[1].rstrip("/")
        raise AssertionError(f"it ended with {process.wait()}")

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_each_adapter_is_added_alone(out):
    options = cli.ServeOptions(
        out_dir=out, lora_name=("lora_a", "lora_b"), device="cpu", weights="fp32", rows=3, max_seq_len=100
    )
    models = cli.load_models(out / "full_sft_64.pth", options, TOKENIZER)
    assert [(m.name, m.adapter) for m in models] == [
        ("minimind", None),
        ("minimind:lora_a", "lora_a"),
        ("minimind:lora_b", "lora_b"),
    ]
    assert {(m.engine.rows, m.engine.max_length, m.stage) for m in models} == {(3, 100, "full_sft")}
    sampling = SamplingOptions(temperature=0, max_new_tokens=20)
    answers = [tuple(generate(m.engine.model, chat_ids(ASK), sampling)) for m in models]
    assert len(set(answers)) == 3


def test_threads_that_wait_leave_the_cores_to_others(tmp_path, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that what is set here ends with the test
        monkeypatch.delenv(name)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(UserError, match="has no full_sft weights"),
    ):
        cli.serve(cli.ServeOptions(out_dir=tmp_path, device="cpu"), listener, None)
    assert os.environ["GOMP_SPINCOUNT"] == "1000"


def test_the_models_are_loaded_in_a_thread_that_ends(out, monkeypatch):
    """The helpers that OpenMP gives it would slow down those of the engines' thread."""
    loaders = []

    def load_models(*_):
        loaders.append(threading.current_thread())
        raise UserError("enough")

    monkeypatch.setattr(cli, "wait_briefly", lambda: None)
    monkeypatch.setattr(cli, "load_models", load_models)
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(UserError, match="enough"):
        cli.serve(cli.ServeOptions(out_dir=out, hidden_size=64, device="cpu"), listener, None)
    [loader] = loaders
    assert loader is not threading.current_thread()
    loader.join(5)
    assert not loader.is_alive()


def test_a_transformers_directory_is_served(out, serve, tmp_path):
    folder = tmp_path / "hf"
    shape = ("--hidden_size", "64", "--num_hidden_layers", "2", "--dtype", "float32")
    assert minimind.main(["export", "hf", str(folder), "--out_dir", str(out), *shape]) == 0
    assert cli.ServeOptions(hf_dir=folder).load_tokenizer().path == folder
    chosen = ("--load", "1", "--hf_dir", str(folder), "--out_dir", str(tmp_path), "--weights", "fp32")
    _, url = serve(*chosen)
    greedy = {"messages": ASK, "temperature": 0, "repetition_penalty": 1, "max_tokens": 20}
    answer = httpx.post(url + CHAT, json=greedy, timeout=30).json()["choices"][0]["message"]["content"]
    model = InferenceModel(load_model(out / "full_sft_64.pth", "…"), "fp32")
    sampling = SamplingOptions(temperature=0, repetition_penalty=1, max_new_tokens=20)
    assert answer == shown(generate(model, chat_ids(ASK), sampling))


def stream_text(url: str, **more) -> str:
    """All of a stream; greedily, this model never ends by itself."""
    body = {"messages": ASK, "stream": True, "temperature": 0, "repetition_penalty": 1} | more
    return httpx.post(url + CHAT, json=body, timeout=60).text


def begin(threads: ThreadPoolExecutor, url: str, **more):
    """A stream under way in a thread of its own."""
    future = threads.submit(stream_text, url, **more)
    gauge = 'minimind_answers_running{model="minimind"} 1.0'
    assert eventually(lambda: gauge in httpx.get(f"{url}/metrics").text)
    return future


def test_sigterm_lets_answers_end(serve):
    process, url = serve("--grace", "60")
    with ThreadPoolExecutor(1) as threads:
        stream = begin(threads, url, max_tokens=8000)
        process.send_signal(signal.SIGTERM)
        assert eventually(lambda: refuses(url))
        assert not stream.done()
    assert stream.result().endswith('"finish_reason":"length"}]}\n\ndata: [DONE]\n\n')
    assert process.wait(10) == 0


def refuses(url: str) -> bool:
    try:
        httpx.get(f"{url}/health", timeout=1)
    except httpx.TransportError:
        return True
    return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_after_the_time_of_grace_it_leaves_all_the_same(serve, number, code, capfd):
    process, url = serve("--grace", "1")
    with ThreadPoolExecutor(1) as threads:
        stream = begin(threads, url)
        began = time.monotonic()
        process.send_signal(number)
        text = stream.result()
        assert process.wait(10) == code
        assert time.monotonic() - began < 8
    assert text.endswith(
        '"message":"the server is being stopped","type":"server_error","param":null,"code":null}}\n\n'
    )
    assert "Traceback" not in capfd.readouterr().err


def test_a_second_ctrl_c_leaves_at_once(serve, capfd):
    process, url = serve("--grace", "60")
    with ThreadPoolExecutor(1) as threads:
        stream = begin(threads, url)
        process.send_signal(signal.SIGINT)
        assert eventually(lambda: refuses(url))
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    assert "the server is being stopped" in stream.result()
    assert "Traceback" not in capfd.readouterr().err


def test_a_broken_engine_ends_the_command_with_1(serve):
    process, url = serve(program=("-c", BROKEN))
    assert httpx.post(url + CHAT, json={"messages": ASK}, timeout=30).status_code == 503
    assert process.wait(30) == 1


def test_a_taken_port_is_said(out):
    with cli.bind("127.0.0.1", 0, None) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(UserError, match=rf"127\.0\.0\.1 port {port}.* choose another --port"):
            cli.main(["--out_dir", str(out), "--port", port])


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_others_may_ask_only_with_a_key(host, monkeypatch):
    monkeypatch.delenv(cli.KEY, raising=False)
    with pytest.raises(UserError, match="needs a key: put one into the environment as MINIMIND_API_KEY"):
        cli.main(["--host", host, "--port", "0"])
    with cli.bind("0.0.0.0", 0, "key") as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "70000"], "--port is 70000"),
        (["--rows", "0"], "--rows is 0; it must be 1 to"),
        (["--queue", "-1"], "--queue is -1"),
        (["--max_seq_len", "1"], "--max_seq_len is 1"),
        (["--grace", "-1"], "--grace is -1"),
        (["--api_key", "a b"], "visible ASCII"),
        (["--api_key", "钥匙"], "visible ASCII"),
        (["--host", "no.such.host.invalid"], "is no address"),
        (["--max_seq_len", "100000"], "--max_seq_len 100000 is more than the 32768 positions"),
        (["--rows", "4096", "--max_seq_len", "32768"], "lower --rows or --max_seq_len"),
        (["--lora_name", "poems"], "no adapter at"),
        (["--load", "1"], "--load 1 reads a transformers directory; name it with --hf_dir"),
        (["--hf_dir", "/tmp/no such folder"], "is no directory; `minimind export hf FOLDER` writes one"),
        (["--hf_dir", "tests/server"], "tests/server/tokenizer.json"),
        (["--model_mode", "2"], "make them with: python trainer/train_dpo.py"),
    ],
)
def test_wrong_flags_are_named(out, flags, words):
    with pytest.raises(UserError) as error:
        cli.main(["--out_dir", str(out), "--port", "0", "--device", "cpu", *flags])
    assert words in str(error.value)


def test_a_mode_that_there_is_not(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--port", "0", "--model_mode", "9"])
    assert ended.value.code == 2
    assert "--model_mode: invalid choice: 9 (choose from 0, 1, 2, 3, 4)" in capsys.readouterr().err


def test_what_is_missing_is_said_with_its_mend(monkeypatch):
    monkeypatch.setattr(cli, "NEEDED", ("fastapi", "no_such_package"))
    with pytest.raises(UserError, match=r"needs no_such_package: pip install -e '/.*\[serve\]'"):
        cli.main(["--port", "0"])


def test_the_key_may_come_from_the_environment(serve, monkeypatch):
    monkeypatch.setenv(cli.KEY, "from-the-environment")
    _, url = serve()
    assert httpx.get(f"{url}/v1/models").status_code == 401
    key = {"Authorization": "Bearer from-the-environment"}
    (model,) = httpx.get(f"{url}/v1/models", headers=key).json()["data"]
    assert model["minimind"] == {
        "stage": "full_sft",
        "adapter": None,
        "max_length": 8192,
        "reasoning": False,
    }
    assert model["created"] > 1.7e9


def test_help_does_not_wait_for_torch():
    command = [sys.executable, "-X", "importtime", "-m", "minimind", "serve", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "--max_seq_len" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "fastapi", "uvicorn"}
    assert "serve" in COMMANDS
