"""What torch.compile makes is used where it is right, and only there."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from minimind.config import ModelConfig
from minimind.errors import UserError
from minimind.model import MiniMind
from minimind.train import compiling, loop
from minimind.train.parallel import setup

from .conftest import PRETRAIN, metrics, run


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def compile_by(monkeypatch, backend):
    """In place of the C++ compiler."""
    own = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda part, options: own(part, backend=backend))


def compile_with(monkeypatch, change):
    """Graphs run as they are, and `change` their first output."""

    def backend(graph, _):
        def run_graph(*inputs):
            first, *others = graph(*inputs)
            return change(first), *others

        return run_graph

    compile_by(monkeypatch, backend)


def test_within_uncompiled_the_model_runs_as_written(monkeypatch):
    compile_with(monkeypatch, lambda x: x + 1)
    model = MiniMind(ModelConfig(hidden_size=64, num_hidden_layers=1))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        plain = model(ids).logits
        model.model.layers.compile(options=None)
        changed = model(ids).logits
        with compiling.uncompiled(model):
            torch.testing.assert_close(model(ids).logits, plain)
        torch.testing.assert_close(model(ids).logits, changed)
    assert (changed - plain).abs().max() > 0.01


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_a_compiled_run_is_the_plain_one(options, tmp_path, capsys):
    plain = run(replace(options, max_steps=3))
    compiled = run(replace(options, max_steps=3, compile="1", out_dir=tmp_path / "compiled"))
    assert compiled.compiled
    assert "without" not in capsys.readouterr().out
    assert metrics(compiled) == pytest.approx(metrics(plain), rel=1e-5)


def test_rows_one_by_one_have_the_outputs_and_gradients_of_all_together():
    torch.manual_seed(0)
    model = MiniMind(ModelConfig(hidden_size=64, num_hidden_layers=2))
    for matrix in (p for p in model.parameters() if p.dim() > 1):
        nn.init.normal_(matrix, std=0.1)
    positions = torch.arange(16).expand(3, -1)
    inputs = (torch.randint(6400, (3, 16)), positions, positions // 9)
    cpu = setup("cpu", "float32")
    together, alone = (compiling.outputs_and_gradients(model, inputs, cpu, rows) for rows in (3, 1))
    for a, b in zip(together, alone, strict=True):
        assert b.norm() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: x + 0.1, id="outputs"),
        pytest.param(lambda x: x + (x - x.detach()), id="gradients"),
        pytest.param(lambda x: x + 0 * (x - x.detach()).sqrt(), id="nan"),
    ],
)
def test_wrong_code_is_found_out_and_not_used(options, tmp_path, capsys, monkeypatch, change):
    plain = run(replace(options, max_steps=2))
    compile_with(monkeypatch, change)
    trainer = run(replace(options, max_steps=2, compile="1", out_dir=tmp_path / "wrong"))
    assert not trainer.compiled
    assert "(its code computes something else); going on without" in capsys.readouterr().out
    assert metrics(trainer) == metrics(plain)


def failing(graph, _):
    raise RuntimeError("C++ compile error\n\nOutput:\na.cpp:1: fatal error: Python.h: No such file")


def test_a_failing_compiler_is_done_without(options, tmp_path, capsys, monkeypatch):
    plain = run(replace(options, max_steps=2))
    compile_by(monkeypatch, failing)
    trainer = run(replace(options, max_steps=2, compile="1", out_dir=tmp_path / "failing"))
    assert not trainer.compiled
    said = "does not work on this machine (a.cpp:1: fatal error: Python.h: No such file); going on without"
    assert said in capsys.readouterr().out
    assert metrics(trainer) == metrics(plain)


def test_a_compiler_that_fails_in_the_first_step_is_named(options, monkeypatch):
    compile_by(monkeypatch, failing)
    monkeypatch.setattr(loop, "check_compiled", lambda _: None)  # as on a GPU
    with pytest.raises(UserError, match=r"Python.h: No such file\); --compile 0 trains without it"):
        loop.train(PRETRAIN, replace(options, max_steps=2, compile="1"))


@pytest.mark.parametrize(
    ("folder", "mended", "compiled"),
    [
        pytest.param("kept", True, True, id="made once more"),
        pytest.param("kept", False, False, id="broken again"),
        pytest.param("elsewhere", True, False, id="not what was compiled"),
    ],
)
def test_a_kept_library_that_was_cut_short_is_made_once_more(
    options, tmp_path, capsys, monkeypatch, folder, mended, compiled
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kept"))
    library = tmp_path / folder / "a.so"
    library.parent.mkdir()
    library.touch()

    def backend(graph, _):
        if library.exists() or not mended:
            raise ImportError("file too short", path=str(library))
        return graph

    compile_by(monkeypatch, backend)
    trainer = run(replace(options, max_steps=2, compile="1"))
    assert trainer.compiled is compiled
    assert library.exists() is (folder == "elsewhere")
    assert ("(file too short)" in capsys.readouterr().out) is not compiled


def test_a_processor_that_compilers_may_not_know_is_named(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert compiling.compiler_options("cpu") == {"cpp.march": "sapphirerapids"}
    assert compiling.compiler_options("cuda") is None
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert compiling.compiler_options("cpu") is None
