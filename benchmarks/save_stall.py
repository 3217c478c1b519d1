"""How long training stands still for a checkpoint: the copy in memory, and the steps while it is written.

    python -m benchmarks.save_stall --data_dir dataset

Trains the default model on rows of real text, and saves after every fifth step. The share is given for the
steps as measured, and for the default step (128 rows) and interval (100 steps).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from benchmarks.side_by_side import write_results
from minimind.config import PRESETS
from minimind.errors import run_cli
from minimind.flags import flag, parse_flags
from minimind.paths import DATASET_DIR, ROOT


@dataclass(frozen=True)
class BenchmarkOptions:
    data_dir: Path = flag(DATASET_DIR, "folder of pretrain_hq.jsonl")
    preset: str = flag("small", "model size", choices=[*PRESETS])
    rows: int = flag(4, "rows of 512 tokens in a step")
    saves: int = flag(5, "checkpoints")
    json: Path = flag(ROOT / "benchmarks/results/save_stall.json", "where the results are written")


STEPS_BETWEEN = 5


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(BenchmarkOptions, argv, __doc__)

    from minimind.data.batches import prefetch
    from minimind.stages import pretrain
    from minimind.train.loop import Trainer
    from minimind.train.parallel import setup
    from minimind.train.signals import StopSignals
    from minimind.train.step import optimizer_step

    with tempfile.TemporaryDirectory() as folder:
        training = pretrain.PretrainOptions(
            data_path=options.data_dir / "pretrain_hq.jsonl",
            out_dir=Path(folder),
            preset=options.preset,
            batch_size=options.rows,
            accumulation_steps=1,
            compile="0",
        )
        trainer = Trainer(pretrain.stage(training), training, setup("auto", "auto"))
        trainer.peak_rate = 1.0  # nobody reads the MFU
        usual, blocked, after = [], [], []
        with closing(prefetch(trainer.step_batches(0))) as steps:
            for step, batches in enumerate(steps):
                began = time.perf_counter()
                optimizer_step(trainer, step, batches, StopSignals())
                seconds = time.perf_counter() - began
                in_round = step % STEPS_BETWEEN
                if in_round == STEPS_BETWEEN - 1:
                    began = time.perf_counter()
                    trainer.save(step + 1)
                    blocked.append(time.perf_counter() - began)
                    if len(blocked) == options.saves:
                        break
                elif in_round < 2 and blocked:  # the checkpoint may still be being written
                    after.append(seconds)
                elif in_round >= 2:
                    usual.append(seconds)
        began = time.perf_counter()
        trainer.finish_saving()
        written = time.perf_counter() - began
        size = sum(path.stat().st_size for path in trainer.checkpoints.folder.glob("step_*/*")) / 2

    step = statistics.median(usual)
    stall = statistics.median(blocked) + 2 * max(0.0, statistics.fmean(after) - step)
    default = pretrain.PretrainOptions()
    default_step = step * default.rows_per_step / options.rows
    results = {
        "checkpoint_mb": size / 1e6,
        "step_s": step,
        "copy_s": statistics.median(blocked),
        "write_s": statistics.median(blocked) + written,
        "stall_s": stall,
        "stall_share_every_100_such_steps": stall / (100 * step),
        "stall_share_at_defaults": stall / (default.save_interval * default_step),
    }
    write_results(options.json, options, results)
    shares = (results["stall_share_every_100_such_steps"], results["stall_share_at_defaults"])
    print(f"a checkpoint of {size / 1e6:.0f} MB is written in {results['write_s']:.2f} s")
    print(f"training stands still for {stall:.2f} s: {shares[0]:.2%} of 100 steps of {options.rows} rows")
    print(f"({step:.2f} s each), {shares[1]:.3%} of 100 steps of {default.rows_per_step} rows")
    return 0


if __name__ == "__main__":
    run_cli(main)
