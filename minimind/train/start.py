"""Before the first step of a run: the weights it starts from, or the checkpoint it goes on from.

A run goes on only as the run it was: `identity` is all that decides its results.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minimind.data.epochs import ORDER_VERSION
from minimind.errors import UserError
from minimind.model import MiniMind
from minimind.runs import read_settings
from minimind.stages import SCRIPTS, command
from minimind.train.checkpoint import (
    list_checkpoints,
    load_state,
    load_tensors,
    newest_checkpoint,
    set_random_state,
)
from minimind.train.compiling import fault_of_compiled
from minimind.train.memory import check_weights_fit
from minimind.train.options import TrainOptions
from minimind.weights import check_tokenizer, load_model

if TYPE_CHECKING:
    from minimind.train.loop import Trainer

# Options that decide what a run computes, as do those of a stage's own: a resumed run must have the same.
FIXED_IN_A_RUN = (
    "max_seq_len",
    "epochs",
    "optimizer",
    "learning_rate",
    "warmup_iters",
    "weight_decay",
    "grad_clip",
    "max_steps",
    "seed",
    "from_weight",
)


def initial_model(trainer: Trainer) -> tuple[MiniMind, Path | None]:
    """Random weights, or those of the stage that comes before this one, and then their file."""
    options, config = trainer.options, trainer.config
    check_weights_fit(config, trainer.parallel.device)
    has_checkpoint = options.from_resume and list_checkpoints(trainer.run_dir / "checkpoints")
    from_weight = options.from_weight
    names = (from_weight,) if from_weight else trainer.stage.starts_from
    if names in ((), ("none",)) or has_checkpoint:
        return MiniMind(config), None
    paths = {options.out_dir / f"{name}_{config.name}.pth": name for name in names}
    path = next((p for p in paths if p.is_file()), list(paths)[-1])
    script = SCRIPTS.get(paths[path])
    if not script and not path.is_file():
        tail = f"_{config.name}.pth"
        found = sorted(p.name.removesuffix(tail) for p in options.out_dir.glob(f"*{tail}"))
        there = ", ".join(found) or "none of this size"
        raise UserError(f"--from_weight {from_weight}: there is no {path}; there are: {there}")
    same = ("preset", "hidden_size", "num_hidden_layers", "use_moe", "tokenizer_path")
    given = {name: v for name in same if (v := getattr(options, name)) not in (None, False)}
    how_to_make = command(script or "…", given, options.out_dir)
    model = load_model(path, how_to_make, expected=config)
    check_tokenizer(path, trainer.tokenizer)
    return model, path


def check_compiled(trainer: Trainer) -> None:
    """Go on without the compiler if it fails here, or what it made is wrong."""
    trainer.say("compiling for this CPU, which takes longest the first time")
    rows = trainer.shares.rows_at_once
    batch = trainer.data.batch(0, 0, rows, min_rows=rows)
    fault = fault_of_compiled(trainer.model, batch, trainer.parallel)
    if fault:
        trainer.compiled = False
        torch.compiler.set_stance("force_eager")
        trainer.say(f"torch.compile does not work on this machine ({fault}); going on without it")


def resume(trainer: Trainer) -> int:
    """Load the newest whole checkpoint, if asked to; returns the number of finished steps."""
    folder = trainer.checkpoints.folder
    before = read_settings(trainer.run_dir)  # it may have been killed before its first save
    # A launcher that starts a run again gives the flags of the first time.
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    again = trainer.parallel.from_main(again and before.get("launcher") == os.getppid())
    if not (trainer.options.from_resume or again):
        if list_checkpoints(folder):
            trainer.say(
                f"starting anew (--from_resume 1 would go on from the checkpoints in {folder}); at the "
                f"first save they and their weight file move to {trainer.run_dir / 'previous'}"
            )
        return 0
    path = last_checkpoint(trainer)
    state = load_state(path) if path else None
    # A run that was started again before its first save finds the checkpoints of the run before it.
    others = state and not trainer.options.from_resume and state["run_id"] != before.get("run_id")
    if path is None or state is None or others:
        trainer.run_id = before.get("run_id", trainer.run_id)
        trainer.say(f"there is no checkpoint of this run in {folder}; starting at the first step")
        return 0
    check_same_run(trainer, state["run"])
    trainer.run_id = state["run_id"]
    trainer.seconds_before, trainer.tokens = state["spent"]
    restore(trainer, path, state)
    trainer.say(f"resumed at step {state['step']} of {trainer.total_steps}")
    return state["step"]


def last_checkpoint(trainer: Trainer) -> Path | None:
    """The main process looks, so that all go on from the same."""
    main = trainer.parallel.is_main
    return trainer.parallel.from_main(
        newest_checkpoint(trainer.checkpoints.folder, trainer.say) if main else None
    )


def restore(trainer: Trainer, path: Path, state: dict[str, Any]) -> None:
    """Put everything that training changes back to what it was in a checkpoint."""
    load_tensors(path, state, trainer.engine)
    trainer.engine.scaler.load_state_dict(state["scaler"])
    trainer.stability.load_state_dict(state["stability"])
    trainer.objective.load_state_dict(state["objective"], trainer.datasets())
    set_random_state(state["random"])


def identity(trainer: Trainer) -> dict[str, Any]:
    """What makes a run this run: all that decides its results, the scores of its evaluations included."""
    shared = {item.name for item in dataclasses.fields(TrainOptions)}
    own = {item.name for item in dataclasses.fields(trainer.options)} - shared
    options = {name: getattr(trainer.options, name) for name in (*FIXED_IN_A_RUN, *sorted(own))}
    # Of files the content counts, wherever they are.
    options = {name: value for name, value in options.items() if not isinstance(value, Path)}
    data = {
        "data (its content)": trainer.data_sha256,
        "data to evaluate on (its content)": trainer.datasets()[-1].store.meta["content_sha256"],
        "rows to train on": trainer.data.num_rows,
        "order of rows (its version)": ORDER_VERSION,
        "rows of an optimizer step": trainer.shares.rows_per_step,
        "tokenizer": trainer.tokenizer.fingerprint,
    }
    return (
        options
        | data
        | trainer.objective.identity()
        | {"dtype": str(trainer.parallel.dtype)}
        | dataclasses.asdict(trainer.config)
    )


def check_same_run(trainer: Trainer, saved: dict[str, Any]) -> None:
    changed = differences(saved, identity(trainer), ("was", "is"))
    if changed:
        raise UserError(
            f"the checkpoint belongs to another run: {changed}. Give the same flags and data, or start "
            "anew with --from_resume 0"
        )


def check_same_as_main(trainer: Trainer) -> None:
    """Processes on other machines read their own copy of the data, and have their own command line."""
    own = identity(trainer)
    changed = differences(trainer.parallel.from_main(own), own, ("in process 0 is", "in this one"))
    if changed:
        raise UserError(
            f"process {trainer.parallel.rank} on {socket.gethostname()} differs: {changed}. Start all "
            "processes with the same flags and data"
        )


def differences(first: dict[str, Any], second: dict[str, Any], verbs: tuple[str, str]) -> str:
    """Where the identities of two runs differ, in words."""
    return "; ".join(
        f"{name} {verbs[0]} {first.get(name)}, {verbs[1]} {value}"
        for name, value in second.items()
        if first.get(name) != value
    )
