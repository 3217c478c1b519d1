"""Model shapes: one plain dataclass, and the four presets that the project trains and publishes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from minimind.errors import UserError


@dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension (Peng et al. 2023, arXiv:2309.00071).

    A model trained on `original_max_position_embeddings` positions is stretched to `factor` times as many.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-style decoder. `num_experts == 0` means a dense model."""

    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    vocab_size: int = 6400
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6
    rope_scaling: YarnScaling | None = None
    rms_norm_eps: float = 1e-5
    num_experts: int = 0
    num_experts_per_tok: int = 2
    num_shared_experts: int = 1
    router_aux_loss_coef: float = 0.1

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of the {self.num_attention_heads} "
                f"attention heads; choose a multiple of {2 * self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise UserError(
                f"hidden_size {self.hidden_size} gives heads of odd width {self.head_dim}, which rotary "
                f"positions cannot use; choose a multiple of {2 * self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError("num_attention_heads must be a multiple of num_key_value_heads")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        """Width of the SwiGLU: 8/3 of the hidden size, rounded up to a multiple of 64."""
        return 64 * -(-8 * self.hidden_size // (3 * 64))

    @property
    def num_parameters(self) -> int:
        """Of the model that has this shape; the tied embeddings count once."""
        h = self.hidden_size
        attention = 2 * h * h + 2 * h * self.num_key_value_heads * self.head_dim
        mlps = self.num_experts + self.num_shared_experts if self.num_experts else 1
        layer = attention + self.num_experts * h + mlps * 3 * h * self.intermediate_size + 2 * h
        return self.vocab_size * h + self.num_hidden_layers * layer + h

    @property
    def name(self) -> str:
        """The tail of weight files: `512`, `640_moe`."""
        return f"{self.hidden_size}{'_moe' if self.num_experts else ''}"


PRESETS = {
    "tiny": ModelConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4),  # 4.59 M: the CPU demo
    "small": ModelConfig(hidden_size=512, num_hidden_layers=8),  # 25.83 M
    "moe": ModelConfig(hidden_size=640, num_hidden_layers=8, num_experts=4),  # 145.03 M
    "base": ModelConfig(hidden_size=768, num_hidden_layers=16),  # 104.03 M
}


def model_config(
    preset: str | None = None,
    hidden_size: int | None = None,
    num_hidden_layers: int | None = None,
    use_moe: bool | None = None,
    vocab_size: int = 6400,
) -> ModelConfig:
    """The shape that the command line asks for.

    Without a preset, `hidden_size` and `use_moe` choose the published one they belong to; what is given
    explicitly then replaces the preset's value.
    """
    if preset is None:
        by_width = {c.hidden_size: name for name, c in PRESETS.items() if not c.num_experts}
        preset = "moe" if use_moe and hidden_size is None else by_width.get(hidden_size or 512, "small")
    config = replace(PRESETS[preset], vocab_size=vocab_size)
    if hidden_size is not None and hidden_size != config.hidden_size:
        config = replace(config, hidden_size=hidden_size)
    if num_hidden_layers is not None:
        config = replace(config, num_hidden_layers=num_hidden_layers)
    if use_moe is not None:
        config = replace(config, num_experts=PRESETS["moe"].num_experts if use_moe else 0)
    return config
