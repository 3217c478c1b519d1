"""What the tests of the data path share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from minimind.data import prepare as prepare_module
from minimind.paths import ROOT
from minimind.tokenizer import Tokenizer

SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load()


@pytest.fixture
def shared_data() -> Path:
    """The folder of real text, which is not part of the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real text in {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """Write a JSONL file. Lines are records, or bytes for a line as it is."""

    def write(*lines: object, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        raw = [
            line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode()
            for line in lines
        ]
        path.write_bytes(b"".join(line + b"\n" for line in raw))
        return path

    return write


@pytest.fixture
def builds(monkeypatch) -> list[Path]:
    """The stores that were built, not found."""
    built = []
    build = prepare_module._build
    monkeypatch.setattr(prepare_module, "_build", lambda *args: (built.append(args[2]), build(*args)))
    return built
