"""What Weights & Biases, SwanLab and TensorBoard wrote, read back; and what their failures cost."""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from minimind.errors import UserError
from minimind.flags import parse_flags
from minimind.stages.pretrain import PretrainOptions
from minimind.train import loggers, loop
from minimind.train.checkpoint import list_checkpoints
from minimind.train.monitor import Monitor

from .conftest import PRETRAIN, metrics, run
from .test_stability import Diverges, one_pass
from .wandb_server import WandbServer

History = dict[int, dict[str, float]]  # step → what was logged at it


@pytest.fixture(autouse=True)
def no_login(tmp_path, monkeypatch) -> Iterator[None]:
    """A machine on which nobody is logged in anywhere."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("WANDB_", "SWANLAB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path / "swanlab"))
    yield
    if wandb := sys.modules.get("wandb"):
        wandb.teardown()  # it reads the environment once


def wandb_folders(trainer) -> list[Path]:
    return sorted((trainer.run_dir / "wandb").glob("offline-run-*"))


def read_wandb(folder: Path) -> tuple[str, dict, History]:
    """Id, settings and history from the `.wandb` file: protobuf records in the framing of LevelDB's log."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its process writes the end of the file
    data = next(folder.glob("*.wandb")).read_bytes()
    run_id, settings, history, at, body = "", {}, {}, 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits into the rest of a block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        body += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, body = Record.FromString(body), b""
            if record.HasField("run"):
                run_id = record.run.run_id
                settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                assert record.history.step.num not in history
                items = (("/".join(i.nested_key) or i.key, i.value_json) for i in record.history.item)
                values = {name: json.loads(value) for name, value in items if name[0] != "_"}
                history[record.history.step.num] = values
    return run_id, settings, history


def read_swanlab(folder: Path) -> tuple[str, dict, History]:
    import yaml
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    reader, history, run_id = DataStoreReader(), {}, ""
    reader.open(next(folder.glob("*.swanlab")))
    for record in map(Record.FromString, reader):
        if record.HasField("start"):
            run_id = record.start.id
        if record.HasField("scalar") and not record.scalar.key.startswith("__swanlab__"):  # of the machine
            values = history.setdefault(record.scalar.step, {})
            assert record.scalar.key not in values
            values[record.scalar.key] = record.scalar.value.number
    reader.close()
    config = yaml.safe_load((folder / "files" / "config.yaml").read_text(encoding="utf-8"))
    return run_id, {name: item["value"] for name, item in config.items()}, history


def read_tensorboard(folder: Path) -> tuple[dict, History]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    history: History = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            values = history.setdefault(event.step, {})
            assert name not in values
            values[name] = event.value
    text = events.Tensors("settings/text_summary")[-1]
    return json.loads(text.tensor_proto.string_val[0].decode().strip("`").removeprefix("json")), history


def expected(trainer) -> History:
    history: History = {}
    for line in (trainer.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        history.setdefault(values.pop("step"), {}).update(values)
    return history


def assert_same(history: History, trainer, rel: float = 1e-9) -> None:
    wanted = expected(trainer)
    assert history.keys() == wanted.keys()
    for step, values in wanted.items():
        assert history[step] == pytest.approx(values, rel=rel)


def stop_after(step: int, monkeypatch, number: int = signal.SIGTERM) -> None:
    monitor_step = loop.Monitor.step

    def step_and_stop(self, done, values):
        monitor_step(self, done, values)
        if done == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(loop.Monitor, "step", step_and_stop)


def test_wandb_and_tensorboard_hold_the_whole_of_a_resumed_run(options, monkeypatch, capsys):
    options = replace(options, use_wandb=True, logger=("tensorboard",))
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        first = run(options)
    assert "wandb: there is no login here; `wandb login` makes one; logging to" in capsys.readouterr().out
    run_id, settings, history = read_wandb(*wandb_folders(first))
    assert run_id == first.run_id
    assert settings["options"]["learning_rate"] == options.learning_rate
    assert_same(history, first)
    assert list(history) == [1, 2, 3, 4]
    time.sleep(1)  # the folder's name is the second

    resumed = run(replace(options, from_resume=True))
    assert metrics(resumed)[:4] == [values["loss"] for values in history.values()]
    run_id, _, history = read_wandb(wandb_folders(resumed)[-1])
    assert run_id == first.run_id == json.loads((first.run_dir / "run.json").read_bytes())["run_id"]
    assert_same(history, resumed)
    assert list(history) == [1, 2, 3, 4, 5, 6, 7]
    settings, history = read_tensorboard(resumed.run_dir / "tensorboard")
    assert settings["parameters"] == resumed.model.num_parameters
    assert_same(history, resumed, rel=1e-6)

    another = run(replace(options, max_steps=2, use_wandb=False))
    assert another.run_id != first.run_id
    assert_same(read_tensorboard(another.run_dir / "tensorboard")[1], another, rel=1e-6)


def test_steps_that_were_taken_back_are_in_no_log_twice(options):
    given = one_pass(options, max_steps=8, logger=("tensorboard",))
    trainer = run(given, replace(PRETRAIN, objective=Diverges(at=5, times=1)))
    assert trainer.stability.rollbacks == 1
    assert_same(read_tensorboard(trainer.run_dir / "tensorboard")[1], trainer, rel=1e-6)


def test_swanlab_holds_the_whole_of_a_resumed_run_and_leaves_ctrl_c_alone(options, monkeypatch):
    options = replace(options, logger=("swanlab",))
    with monkeypatch.context() as patch:
        stop_after(4, patch, signal.SIGINT)
        first = run(options)
    assert first.exit_code == 128 + signal.SIGINT
    assert [p.name for p in list_checkpoints(first.run_dir / "checkpoints")] == ["step_00000004"]
    resumed = run(replace(options, from_resume=True))
    folders = sorted((resumed.run_dir / "swanlab").glob("run-*"))
    assert len(folders) == 2
    for folder in folders:
        run_id, settings, history = read_swanlab(folder)
        assert run_id == first.run_id
        assert settings["options"]["learning_rate"] == options.learning_rate
    assert_same(history, resumed, rel=1e-6)
    assert list(history) == [1, 2, 3, 4, 5, 6, 7]


def test_wandb_online_gets_what_it_lacks_of_a_resumed_run_and_nothing_twice(options, monkeypatch):
    server = WandbServer()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    first = run(replace(options, use_wandb=True))
    assert server.run_id == first.run_id
    everything = [json.loads(line)["_step"] for line in server.history]
    assert everything == [1, 2, 3, 4, 5, 6, 7]
    del server.history[3:]  # they were still on their way when the process was killed
    resumed = run(replace(options, use_wandb=True, from_resume=True))
    server.shutdown()
    assert server.run_id == first.run_id
    history = {values["_step"]: values for values in map(json.loads, server.history)}
    assert list(history) == everything
    assert len(server.history) == 7
    assert [values["loss"] for values in history.values()] == pytest.approx(metrics(resumed))


def test_without_a_network_wandb_goes_offline(options, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(loggers, "INIT_SECONDS", 1)
    trainer = run(replace(options, use_wandb=True, max_steps=2))
    assert "wandb: " in (out := capsys.readouterr().out)
    assert "`wandb sync` sends it later" in out
    assert_same(read_wandb(*wandb_folders(trainer))[2], trainer)


def test_a_run_killed_before_its_first_checkpoint_keeps_its_id(options, monkeypatch):
    def killed(*_):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "save", killed)
        with pytest.raises(SystemExit):
            run(options)
    run_id = json.loads((options.out_dir / "runs" / "pretrain_64" / "run.json").read_bytes())["run_id"]
    assert run(replace(options, from_resume=True)).run_id == run_id
    assert run(options).run_id != run_id


def test_a_start_by_mistake_does_not_take_the_id_of_the_run_whose_checkpoints_are_there(options, monkeypatch):
    first = run(options)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(options)
    mistaken_id = json.loads((first.run_dir / "run.json").read_bytes())["run_id"]
    assert run(replace(options, from_resume=True)).run_id == first.run_id != mistaken_id


@pytest.mark.parametrize("breaks_in", ["init", "log", "finish"])
def test_a_logger_that_fails_is_dropped_and_training_goes_on(options, monkeypatch, capsys, breaks_in):
    calls = []

    class Broken:
        modes = ("online", "offline")

        def __init__(self, *_):
            self.call("init")

        def log(self, *_):
            self.call("log")

        def finish(self):
            self.call("finish")

        def call(self, name):
            calls.append(name)
            if name == breaks_in:
                raise ConnectionError("the network is down\nand more")

    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", Broken)
    trainer = run(replace(options, logger=("tensorboard",), max_steps=3))
    assert trainer.exit_code == 0
    assert len(metrics(trainer)) == 3
    assert calls.count(breaks_in) == (2 if breaks_in == "init" else 1)
    assert calls[-1] == breaks_in
    out = capsys.readouterr().out
    assert out.count("tensorboard: the network is down; the training goes on without it\n") == 1


def test_swanlab_gives_up_a_last_transfer_that_never_ends(monkeypatch):
    class Endless:
        def finish(self):
            time.sleep(30)

    logger = object.__new__(loggers.SwanLab)
    logger.run = Endless()
    monkeypatch.setattr(loggers, "FINISH_SECONDS", 0.1)
    with pytest.raises(TimeoutError):
        logger.finish()


def test_only_the_main_process_logs(tmp_path):
    with Monitor(tmp_path, is_main=False, total_steps=1, first_step=0, log_interval=1) as monitor:
        monitor.start_loggers(["tensorboard"], loggers.RunInfo("id", "name", "project", tmp_path, {}))
        monitor.write(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", loggers.LOGGERS)
def test_a_missing_package_is_a_sentence_before_anything_is_done(options, monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=f"pip install {name}$"):
            run(replace(options, logger=(name,)))
    assert not list(options.out_dir.rglob("run.json"))


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ([], []),
        (["--use_wandb"], ["wandb"]),
        (["--logger", "none"], []),
        (["--logger", "tensorboard", "wandb", "--use_wandb", "1"], ["wandb", "tensorboard"]),
    ],
)
def test_flags_name_the_loggers(argv, names):
    assert parse_flags(PretrainOptions, argv, "").loggers == names
