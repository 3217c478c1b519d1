"""This side of `litgpt_worker.py`: starts it and asks for its steps."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.side_by_side import Work
from minimind.config import PRESETS, ModelConfig
from minimind.data.prepare import prepare
from minimind.errors import UserError
from minimind.tokenizer import Tokenizer

WORKER = Path(__file__).with_name("litgpt_worker.py")


def check_python(python: Path) -> None:
    """Raises: UserError when this is no Python in which litgpt is installed."""
    mend = f"make a virtual environment and install {WORKER.parents[1] / 'litgpt.txt'} into it"
    try:
        subprocess.run([python, "-c", "import litgpt"], check=True, capture_output=True)
    except OSError:
        raise UserError(f"--litgpt_python {python} is no Python; {mend}") from None
    except subprocess.CalledProcessError:
        raise UserError(f"--litgpt_python {python} has no litgpt; {mend}") from None


def litgpt_steps(
    python: Path,
    preset: str,
    path: Path,
    max_seq_len: int,
    rows: int,
    passes: int,
    compiled: bool,
    folder: Path,
) -> Work:
    """Optimizer steps of `litgpt pretrain` on the tokens of a pretraining file, in a process of its own."""
    tokens = folder / "litgpt.npy"
    np.save(tokens, prepare(path, "pretrain", Tokenizer.load()).tokens)
    setting = {
        "model": litgpt_config(PRESETS[preset], max_seq_len),
        "tokens": str(tokens),
        "out_dir": str(folder / "litgpt"),
        "max_seq_len": max_seq_len,
        "rows": rows,
        "passes": passes,
        "compile": compiled,
    }
    log = (folder / "litgpt.log").open("w+", encoding="utf-8")
    pipe = subprocess.PIPE
    worker = subprocess.Popen([python, "-P", WORKER], stdin=pipe, stdout=pipe, stderr=log, text=True)
    print(json.dumps(setting), file=worker.stdin, flush=True)

    def step() -> int:
        try:
            print("step", file=worker.stdin, flush=True)
            return int(worker.stdout.readline())
        except (BrokenPipeError, ValueError):
            log.seek(0)
            raise UserError(f"litgpt ended before its step was done:\n{log.read()[-2000:]}") from None

    return step


def litgpt_config(config: ModelConfig, max_seq_len: int) -> dict[str, Any]:
    """The same dense Llama in litgpt's words."""
    return {
        "block_size": max_seq_len,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.vocab_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_query_groups": config.num_key_value_heads,
        "n_embd": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "mlp_class_name": "LLaMAMLP",
        "norm_class_name": "RMSNorm",
        "norm_eps": config.rms_norm_eps,
        "rope_base": int(config.rope_theta),
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
    }
