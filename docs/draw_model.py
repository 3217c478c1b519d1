"""Draws the pictures of the model, from the presets: `python docs/draw_model.py` writes docs/images/*.svg.

Names are those of the code, so the pictures serve readers of every language.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works without installing the package

from minimind.config import PRESETS, ModelConfig

IMAGES = Path(__file__).resolve().parent / "images"
INK, PALE, LINE = "#1f2937", "#6b7280", "#94a3b8"
WEIGHTS, PLAIN, NORM, SUM = (
    "#dbeafe",
    "#f1f5f9",
    "#fef3c7",
    "#ffffff",
)  # has weights; has none; norm; addition
CHOSEN = "#bfdbfe"
STYLE = f"""
  text {{ font: 13px -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", Arial, sans-serif; fill: {INK};
         text-anchor: middle; dominant-baseline: central }}
  .title {{ font-size: 17px; font-weight: 600 }}
  .name, .shape {{ font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace }}
  .shape {{ font-size: 11.5px; fill: {PALE} }}
  .left {{ text-anchor: start }}
  .line {{ fill: none; stroke: {LINE}; stroke-width: 1.6 }}
"""


class Drawing:
    """An SVG that grows by boxes and arrows; x is the middle of a box, y its top."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.parts: list[str] = []

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>')

    def frame(self, x: float, y: float, width: float, height: float, title: str = "") -> None:
        """A dashed border around a part, its left upper corner at (x, y)."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="12" fill="none" '
            f'stroke="{LINE}" stroke-width="1.4" stroke-dasharray="6 5"/>'
        )
        if title:
            self.text(x + 14, y + 20, title, "name left")

    def box(
        self, x: float, y: float, width: float, name: str, note: str = "", colour: str = WEIGHTS
    ) -> float:
        """A box with a name, and what it is under it. Returns the y of its lower edge."""
        height = 46 if note else 32
        self.parts.append(
            f'<rect x="{x - width / 2:g}" y="{y:g}" width="{width:g}" height="{height}" rx="7" '
            f'fill="{colour}" stroke="{LINE}"/>'
        )
        self.text(x, y + 16, name, "name")
        if note:
            self.text(x, y + 33, note, "shape")
        return y + height

    def plus(self, x: float, y: float, sign: str = "+") -> float:
        """A circle with a sign in it. Returns the y of its lower edge."""
        self.parts.append(f'<circle cx="{x:g}" cy="{y + 12:g}" r="12" fill="{SUM}" stroke="{LINE}"/>')
        self.text(x, y + 12, sign, "name")
        return y + 24

    def arrow(self, *points: tuple[float, float], label: str = "") -> None:
        """A line through `points` that ends in a head; the label stands right of its last stretch."""
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path class="line" d="{path}" marker-end="url(#head)"/>')
        if label:
            (_, above), (x, below) = points[-2:]
            self.text(x + 9, (above + below) / 2 - 1, label, "shape left")

    def svg(self) -> str:
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" role="img">',
                f"<style>{STYLE}</style>",
                '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
                'markerHeight="7" orient="auto">',
                f'<path d="M0 0 L10 5 L0 10 z" fill="{LINE}"/></marker></defs>',
                f'<rect width="{self.width}" height="{self.height}" rx="14" fill="#ffffff"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def dense(config: ModelConfig, name: str) -> str:
    """The whole decoder, and beside it what is inside attention and MLP."""
    d = Drawing(1120, 866)
    hidden, width = config.hidden_size, config.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    stream = f"(B, T, {hidden})"
    stack(d, config, name, stream)

    # Attention
    left, middle, right = 540, 740, 940
    d.frame(440, 60, 640, 420, "self_attn")
    d.arrow((middle, 78), (middle, 112), label=stream)
    d.parts.append(f'<path class="line" d="M{left} 112 H{right}"/>')
    columns = ((left, "q_proj", heads, "N"), (middle, "k_proj", groups, "K"), (right, "v_proj", groups, "K"))
    for x, projection, count, letter in columns:
        d.arrow((x, 112), (x, 134))
        d.box(x, 134, 150, projection, f"{hidden} → {count} · {width}")
        d.text(x + 9, 200, f"(B, {letter}={count}, T, D={width})", "shape left")
        d.arrow((x, 180), (x, 302 if projection == "v_proj" else 222))
    for x in (left, middle):
        d.box(x, 222, 150, "rotate", "RoPE, position_ids", PLAIN)
        d.arrow((x, 268), (x, 302))
    score = f"softmax(Q · Kᵀ / √{width} + mask) · V"
    d.box(
        middle, 302, 560, "attend", f"{score};  {heads // groups} query heads share a key/value head", PLAIN
    )
    d.arrow((middle, 348), (middle, 388), label=f"(B, N={heads}, T, D={width})")
    d.box(middle, 388, 150, "o_proj", f"{heads} · {width} → {hidden}")
    d.arrow((middle, 434), (middle, 468), label=stream)

    swiglu(d, config, middle, 520, 640, "mlp", f"(B, T, {config.intermediate_size})")
    return d.svg()


def stack(d: Drawing, config: ModelConfig, name: str, stream: str) -> None:
    """The decoder from token ids to logits, on the left."""
    x, around = 215, 355
    d.text(x, 30, f"{name}: {config.num_hidden_layers} × DecoderLayer", "title")
    d.text(x, 72, "input_ids  (B, T)", "name")
    d.arrow((x, 84), (x, 104))
    d.box(x, 104, 230, "embed_tokens", f"{config.vocab_size} × {config.hidden_size}")
    d.arrow((x, 150), (x, 214))
    d.text(x + 9, 163, stream, "shape left")
    d.frame(40, 178, 350, 434, f"DecoderLayer × {config.num_hidden_layers}")
    y = 214
    for norm, part, note in (
        ("input_layernorm", "self_attn", "grouped-query attention"),
        ("post_attention_layernorm", "mlp", "SwiGLU"),
    ):
        branch = y - 8
        bottom = d.box(x, y, 230, norm, "RMSNorm", NORM)
        d.arrow((x, bottom), (x, bottom + 22))
        bottom = d.box(x, bottom + 22, 230, part, note)
        d.arrow((x, bottom), (x, bottom + 22))
        d.plus(x, bottom + 22)
        d.arrow((x, branch), (around, branch), (around, bottom + 34), (x + 12, bottom + 34))
        if part == "self_attn":
            d.arrow((x, bottom + 46), (x, bottom + 88), label=stream)
            y = bottom + 88
    d.arrow((x, bottom + 46), (x, 650))
    d.text(x + 9, 630, stream, "shape left")
    d.box(x, 650, 230, "norm", "RMSNorm", NORM)
    d.arrow((x, 696), (x, 724))
    d.box(x, 724, 230, "lm_head", "= embed_tokens.weight")
    d.arrow((x, 770), (x, 806), label=f"(B, T, {config.vocab_size})")
    d.text(x, 822, "logits", "name")


def swiglu(d: Drawing, config: ModelConfig, x: float, y: float, width: float, title: str, inner: str) -> None:
    """down_proj(silu(gate_proj(x)) * up_proj(x)), in a frame whose upper edge is at y."""
    hidden, wide = config.hidden_size, config.intermediate_size
    d.frame(x - width / 2 + 20, y, width, 320, title)
    left, right = x - 120, x + 120
    d.arrow((x, y + 18), (x, y + 46), label=f"(B, T, {hidden})")
    d.parts.append(f'<path class="line" d="M{left:g} {y + 46:g} H{right:g}"/>')
    for place, name in ((left, "gate_proj"), (right, "up_proj")):
        d.arrow((place, y + 46), (place, y + 68))
        d.box(place, y + 68, 150, name, f"{hidden} → {wide}")
    d.arrow((left, y + 114), (left, y + 150), label=inner)
    d.box(left, y + 150, 150, "silu", colour=PLAIN)
    d.arrow((left, y + 182), (left, y + 202), (x - 12, y + 202))
    d.arrow((right, y + 114), (right, y + 202), (x + 12, y + 202))
    d.text(right + 9, y + 131, inner, "shape left")
    d.plus(x, y + 190, "×")
    d.arrow((x, y + 214), (x, y + 238))
    d.box(x, y + 238, 150, "down_proj", f"{wide} → {hidden}")
    d.arrow((x, y + 284), (x, y + 312), label=f"(B, T, {hidden})")


def mixture(config: ModelConfig, name: str) -> str:
    """A mixture-of-experts layer: what takes the MLP's place."""
    d = Drawing(1080, 512)
    hidden, wide = config.hidden_size, config.intermediate_size
    experts, chosen = config.num_experts, config.num_experts_per_tok
    d.text(560, 30, f"{name}: mlp = MoE, {config.num_hidden_layers} ×", "title")
    d.arrow((560, 50), (560, 92), label=f"x  (B, T, {hidden})")
    d.parts.append('<path class="line" d="M120 92 H960"/>')

    # The router
    d.arrow((120, 92), (120, 118))
    d.box(120, 118, 180, "gate", f"{hidden} → {experts}, fp32")
    d.arrow((120, 164), (120, 200), label=f"(B, T, E={experts})")
    d.box(120, 200, 180, "softmax", colour=PLAIN)
    d.arrow((120, 232), (120, 268))
    d.box(120, 268, 180, f"top {chosen}", "weights / their sum", PLAIN)
    d.arrow((120, 314), (120, 353), (434, 353))
    d.text(150, 338, f"top_scores, top_experts  (B, T, {chosen})", "shape left")
    d.arrow((30, 216), (14, 216), (14, 449), (28, 449))
    d.box(120, 426, 180, "balance", "balance_loss  (B,)", PLAIN)

    # The experts: the ones that a token was sent to are darker
    d.frame(262, 112, 546, 144)
    for i in range(experts):
        x = 335 + i * 133
        d.arrow((x, 92), (x, 134))
        picked = i in (1, 3)
        d.box(x, 134, 118, f"experts.{i}", f"{hidden}→{wide}→{hidden}", CHOSEN if picked else PLAIN)
        if picked:
            d.arrow((x, 180), (x, 330))
    d.text(601, 212, f"each token visits {chosen} of {experts}")
    d.text(601, 232, "index_select → experts → index_add", "shape")
    d.box(601, 330, 330, "Σ weight · expert(x)", f"(B, T, {hidden})", PLAIN)

    # Those that every token visits
    d.arrow((960, 92), (960, 134))
    d.box(960, 134, 190, "shared_experts.0", f"{hidden}→{wide}→{hidden}", CHOSEN)
    d.text(960, 200, "every token")
    d.arrow((960, 216), (960, 424), (614, 424))
    d.arrow((601, 376), (601, 411))
    d.plus(601, 412)
    d.arrow((601, 436), (601, 474), label=f"(B, T, {hidden})")
    d.text(601, 488, "y", "name")
    return d.svg()


def pictures() -> dict[str, str]:
    return {
        "model.svg": dense(PRESETS["small"], "small"),
        "moe.svg": mixture(PRESETS["moe"], "moe"),
    }


if __name__ == "__main__":
    for file, svg in pictures().items():
        (IMAGES / file).write_text(svg, encoding="utf-8")
