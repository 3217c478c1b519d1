"""The flags that all training stages share, under the names the original's users know."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from minimind.config import PRESETS, ModelConfig
from minimind.data.records import OnBadRecord
from minimind.errors import UserError
from minimind.flags import WORD, flag
from minimind.paths import OUT_DIR
from minimind.train.loggers import LOGGERS

BATCH_SIZE = "rows in one forward and backward pass of one device, at most; auto: what a trial says it holds"


@dataclass(frozen=True)
class TrainOptions:
    """What a training run is told. A stage subclasses this to set its own defaults."""

    LEARNING_RATES: ClassVar[dict[str, float]] = {"muon": 5e-4, "adamw": 5e-4}
    EMBEDDING_RATE: ClassVar[float] = 1.0  # of the embeddings beside Muon, times the learning rate

    # Data and results
    data_path: Path | None = flag(None, "JSONL file to train on, plain or .gz")
    eval_path: Path | None = flag(None, "JSONL file to evaluate on; without it 1% of data_path is held out")
    out_dir: Path = flag(OUT_DIR, "folder of the weight files and of runs/")
    tokenizer_path: Path | None = flag(None, "folder of another tokenizer.json; without it the shipped one")
    on_bad_record: OnBadRecord = flag("stop", "what to do about a broken record", choices=("stop", "skip"))

    # Model
    preset: str | None = flag(None, "published model size", choices=tuple(PRESETS))
    hidden_size: int | None = flag(None, "width of the model; without preset and size: 512")
    num_hidden_layers: int | None = flag(None, "number of layers")
    use_moe: bool | None = flag(None, "train a mixture of experts")
    max_seq_len: int = flag(512, "length of a row in tokens")
    from_weight: str | None = flag(
        None,
        "start from the weights of this stage (pretrain, full_sft, …), or none; without it as the stage does",
    )

    # Optimisation
    epochs: int = flag(1, "passes over the data")
    batch_size: int = flag(128, BATCH_SIZE, word="auto")
    accumulation_steps: int = flag(1, "batches of batch_size in one optimizer step, over all devices")
    global_batch_size: int | None = flag(None, "rows in one optimizer step, instead of accumulation_steps")
    optimizer: str = flag(
        "auto",
        "muon: Muon for matrices, AdamW for the rest; auto: muon, under ZeRO adamw",
        choices=("auto", "muon", "adamw"),
    )
    learning_rate: float | None = flag(None, "highest learning rate; without it 0.0005")
    warmup_iters: int | None = flag(None, "steps of linear warm-up; without it 1/20 of the run, at most 100")
    weight_decay: float = flag(0.1, "decoupled weight decay of matrices")
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 turns clipping off")
    max_steps: int | None = flag(None, "stop after so many optimizer steps; the schedule ends there too")
    seed: int = flag(42, "seed of initial weights and data order")

    # Machine
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = flag(
        "auto", "precision of matrix products", choices=("auto", "bfloat16", "float16", "float32")
    )
    parallel: str | None = flag(
        None,
        "several processes: ddp (the default), fsdp to share out one model, zero for DeepSpeed's ZeRO (the "
        "default under its launcher)",
        choices=("ddp", "fsdp", "zero"),
    )
    zero_stage: int | None = flag(None, "ZeRO splits 1: optimizer state, 2: gradients too, 3: weights too")
    deepspeed_config: Path | None = flag(None, "JSON file of further DeepSpeed settings")
    compile: str = flag(
        "auto", "torch.compile, and CUDA graphs with it: auto where it pays", choices=("auto", "0", "1")
    )
    num_workers: int | None = flag(None, "processes that tokenise; without it one a core")
    hang_timeout: float = flag(
        600.0, "several processes: seconds without progress until the one that hangs is named and all end"
    )
    local_rank: int = flag(-1, "set by launchers; leave it alone")

    # While it runs
    from_resume: bool = flag(False, "continue the run whose checkpoint is in out_dir")
    log_interval: int = flag(10, "steps between log lines")
    save_interval: int = flag(100, "steps between checkpoints")
    keep_last: int = flag(2, "newest checkpoints to keep")
    skip_limit: int = flag(
        5,
        "steps left out in a row, their loss not finite or leaping, before the run goes back to its last "
        "checkpoint at half the learning rate",
    )
    eval_interval: int | None = flag(None, "steps between evaluations; without it ten in the run")
    logger: tuple[str, ...] = flag(("none",), "where to log as well", choices=(*LOGGERS, "none"))
    use_wandb: bool = flag(False, "the same as --logger wandb")
    wandb_project: str = flag("MiniMind", "project name in wandb and swanlab")
    price_per_hour: float | None = flag(None, "¥ an hour for all devices, to say what the run costs")

    def __post_init__(self) -> None:
        if self.batch_size < 1 and not self.fits_batch_size:
            raise UserError(f"--batch_size is {self.batch_size}; it must be at least 1, or auto")
        counts = ("epochs", "accumulation_steps", "log_interval", "save_interval", "keep_last", "skip_limit")
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        most = ModelConfig.max_position_embeddings
        if not 8 <= self.max_seq_len <= most:
            raise UserError(f"--max_seq_len is {self.max_seq_len}; it must be 8 to {most}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed is {self.seed}; it must be 0 to {2**32 - 1}")
        for name in (
            "max_steps",
            "global_batch_size",
            "eval_interval",
            "hidden_size",
            "num_hidden_layers",
            "num_workers",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.zero_stage not in (None, 1, 2, 3):
            raise UserError(f"--zero_stage is {self.zero_stage}; it must be 1, 2 or 3")
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise UserError(f"--learning_rate is {self.learning_rate}; it must lie between 0 and 1")
        if not 1 <= self.hang_timeout < 1e6:
            raise UserError(f"--hang_timeout is {self.hang_timeout}; it must be 1 to 1,000,000 seconds")
        for name in ("weight_decay", "grad_clip", "warmup_iters", "price_per_hour"):
            if not 0 <= (getattr(self, name) or 0) < float("inf"):  # refuses NaN too
                raise UserError(f"--{name} is {getattr(self, name)}; it must be 0 or more")

    def settled(self, zero_stage: int) -> Self:
        """With the optimizer and learning rate that the stage takes where none is named.

        Raises: UserError for Muon under ZeRO.
        """
        if zero_stage and self.optimizer == "muon":
            raise UserError(
                "--optimizer muon needs whole matrices, but ZeRO cuts them to pieces; use --optimizer adamw, "
                "or --parallel fsdp, where muon works"
            )
        optimizer = self.optimizer
        if optimizer == "auto":
            optimizer = "adamw" if zero_stage else "muon"
        rate = self.LEARNING_RATES[optimizer] if self.learning_rate is None else self.learning_rate
        return replace(self, optimizer=optimizer, learning_rate=rate)

    @property
    def fits_batch_size(self) -> bool:
        """`--batch_size auto`"""
        return self.batch_size == WORD

    @property
    def rows_per_step(self) -> int:
        """Rows in one optimizer step, over all devices; what `batch_size` is cannot change it under auto."""
        batch_size = type(self).batch_size if self.fits_batch_size else self.batch_size
        return self.global_batch_size or batch_size * self.accumulation_steps

    @property
    def loggers(self) -> list[str]:
        """What --logger and --use_wandb name, each once."""
        named = {*self.logger, "wandb"} if self.use_wandb else {*self.logger}
        return [name for name in LOGGERS if name in named]
