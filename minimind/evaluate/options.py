"""What all `minimind eval …` share: which weights, how they compute, and where results go.

Results go to standard output, all else to standard error; `--json FILE` has them for programs. What is wrong
with flags and files is said before PyTorch is imported.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minimind.chat.loading import LoadOptions, check_positions, description
from minimind.config import ModelConfig
from minimind.errors import UserError
from minimind.files import check_ending, check_writable, write_text
from minimind.flags import flag
from minimind.runs import read_run

if TYPE_CHECKING:
    from minimind.model import MiniMind
    from minimind.tokenizer import Tokenizer
    from minimind.train.parallel import Parallel

UNTRAINED_LENGTH = 512  # assumed of weights that came without their run.json
INTERRUPTED = 130  # exit code of Ctrl-C


class Loaded(NamedTuple):
    """A model to be evaluated."""

    model: MiniMind
    tokenizer: Tokenizer
    parallel: Parallel
    path: Path  # of the weights, a file or a transformers directory
    stage: str
    adapters: list[str]
    max_seq_len: int

    @property
    def answers(self) -> bool:
        """Whether it was trained to answer; pretrained weights only continue texts."""
        return self.stage != "pretrain"

    @property
    def dtype(self) -> str:
        return str(self.parallel.dtype).removeprefix("torch.")

    def table(self) -> dict[str, Any]:
        """What a reader of results must know of the model, for JSON."""
        digest = hashlib.sha256()  # of a directory's files one after the other
        for path in sorted(self.path.glob("*.safetensors")) if self.path.is_dir() else [self.path]:
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
        return {
            "weights": str(self.path),
            "weights_sha256": digest.hexdigest(),
            "adapters": self.adapters,
            "parameters": self.model.num_parameters,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "device": str(self.parallel.device),
            "dtype": self.dtype,
            "max_seq_len": self.max_seq_len,
        }


@dataclass(frozen=True)
class EvalOptions(LoadOptions):
    max_seq_len: int | None = flag(
        None, f"most tokens to read at once; without it as the weights were trained, else {UNTRAINED_LENGTH}"
    )
    dtype: str = flag(
        "auto", "precision of matrix products", choices=("auto", "bfloat16", "float16", "float32")
    )
    json: Path | None = flag(None, "file to write the results to, for programs")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ending("--json", self.json, ".json")
        most = ModelConfig.max_position_embeddings
        if self.max_seq_len is not None and not 8 <= self.max_seq_len <= most:
            raise UserError(f"--max_seq_len is {self.max_seq_len}; it must be 8 to {most}")

    def load(self) -> Loaded:
        """The weights that the flags name, on the device, as `eval_model.py` would take them.

        Raises: UserError when they are missing, damaged, or do not fit the flags or the tokenizer.
        """
        path = self.find_weights(sys.stderr)
        if self.json:  # before the work, not after it
            if self.json.exists() and not self.json.is_file():
                raise UserError(f"--json {self.json} is no plain file; name another")
            check_writable(self.json.parent, "--json")
        from minimind.train.parallel import Parallel, choose_device, choose_dtype, keep_freed_memory

        tokenizer = self.load_tokenizer()
        model = self.load_model(path, self.adapters, tokenizer)
        length = self.max_seq_len or min(trained_length(path), model.config.max_position_embeddings)
        check_positions(model.config, "max_seq_len", length)
        if model.device.type == "cpu":
            keep_freed_memory()
        parallel = Parallel(choose_device(self.device), choose_dtype(self.dtype, model.device))
        loaded = Loaded(
            model,
            tokenizer,
            parallel,
            path,
            self.stage,
            self.adapters,
            length,
        )
        say(f"{description(' + '.join([path.name, *self.adapters]), model)}, {loaded.dtype}")
        return loaded

    def write_json(self, loaded: Loaded, results: dict[str, Any]) -> None:
        if self.json:
            write_text(self.json, json.dumps({"model": loaded.table()} | results, ensure_ascii=False))
            say(f"results: {self.json}")


def trained_length(weights: Path) -> int:
    """The `max_seq_len` that a run trained its weights with, as its `run.json` says."""
    options = read_run(weights).get("options")
    length = options.get("max_seq_len") if isinstance(options, dict) else None
    return length if isinstance(length, int) else UNTRAINED_LENGTH


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, if that is a terminal; yields what to tell the count so far."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def say(message: str) -> None:
    """To standard error: standard output is for results."""
    print(message, file=sys.stderr, flush=True)
