"""How an answer is drawn: the knobs of the sampler. Free of torch, so that `--help` need not wait for it."""

from __future__ import annotations

from dataclasses import dataclass

from minimind.errors import UserError
from minimind.flags import flag

WEIGHTS = ("half", "int8", "fp32")  # how an answering model can hold its weights, see `projections.py`


@dataclass(frozen=True)
class SamplingOptions:
    """The knobs of `generate`. A value that makes no sense is a UserError.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token every time (greedy).
        top_p: draw from the fewest tokens that hold this share of the probability, in (0, 1]
            (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751).
        top_k: draw from the k likeliest tokens only; None: no such limit.
        min_p: draw only tokens that are at least this share as likely as the likeliest, 0 for all
            (Nguyen et al. 2024, arXiv:2407.01082).
        repetition_penalty: how much a token suffers that the answer has lately used, 1 for not at all
            (Keskar et al. 2019, arXiv:1909.05858).
        max_new_tokens: an answer that has not ended by itself is cut here.
        seed: makes the draw repeatable; None: another answer every time.
    """

    temperature: float = flag(0.85, "0: always the likeliest token")
    top_p: float = flag(0.85, "share of the probability to draw from")
    top_k: int | None = flag(None, "draw from the k likeliest tokens; without it all")
    min_p: float = flag(0.0, "draw none less likely than this share of the likeliest")
    repetition_penalty: float = flag(1.05, "1: none")
    max_new_tokens: int = flag(1024, "tokens of an answer")
    seed: int | None = flag(None, "makes answers repeatable")

    def __post_init__(self) -> None:
        # Written so that NaN, which compares as False, is refused too.
        if not 0 <= self.temperature <= 100:
            raise UserError(f"temperature must be 0 (greedy) to 100, not {self.temperature}")
        if not 1e-6 <= self.top_p <= 1:
            raise UserError(f"top_p must be 0.000001 to 1 (no limit), not {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, not {self.top_k}; leave it out for no limit")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be 0 (no limit) to 1, not {self.min_p}")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UserError(
                f"repetition_penalty must be 0.01 to 100 (1 is none), not {self.repetition_penalty}"
            )
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be 0 or more and fit 63 bits, not {self.seed}")
