"""A model as one GGUF file, for llama.cpp and what is built on it.

A dense model is the architecture `llama`, a mixture of experts `granitemoe`. Written by the `gguf` package.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minimind.chat.network import interleave
from minimind.chat_template import without_marks
from minimind.config import ModelConfig
from minimind.errors import UserError
from minimind.model import MiniMind
from minimind.paths import pip_install
from minimind.tokenizer import WORD, Tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

# How text falls into words before BPE, and the name that llama.cpp has for it.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
PRE_TOKENIZERS = {
    "qwen2": [
        {"type": "Split", "pattern": {"Regex": WORD}, "behavior": "Isolated", "invert": False},
        BYTE_LEVEL | {"use_regex": False},
    ],
    "gpt-2": [BYTE_LEVEL | {"use_regex": True}],  # MiniMind2's
}
# llama.cpp's names for the matrices of a layer.
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
}
PROJECTIONS = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def gguf_writer(model: MiniMind, tokenizer: Tokenizer, dtype: str, name: str) -> GGUFWriter:
    """All that the file will hold.

    Args: dtype: f32, f16 or q8_0, of matrices: norms and routers are small and stay in fp32; name: what
        programs call the model.
    Raises: UserError when the gguf package is missing, llama.cpp does not know such a tokenizer, or `dtype`
        cannot hold a weight.
    """
    try:
        from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType
    except ImportError:
        raise UserError(f"GGUF files need the gguf package: {pip_install('export')}") from None
    writer = GGUFWriter(None, "granitemoe" if model.config.num_experts else "llama")
    writer.add_name(name)
    types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(LlamaFileType[types[dtype]])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    add_shape(writer, model.config)
    add_tokenizer(writer, tokenizer)
    for tensor_name, tensor in gguf_tensors(model):
        add_tensor(writer, tensor_name, tensor, dtype)
    return writer


def write(writer: GGUFWriter, path: Path) -> None:
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.flush()
    finally:
        with contextlib.suppress(OSError):  # of a full disk, which `flush` has told
            writer.close()


def add_shape(writer: GGUFWriter, config: ModelConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    if config.num_experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_shared_feed_forward_length(config.num_shared_experts * config.intermediate_size)
        writer.add_attention_scale(config.head_dim**-0.5)
        writer.add_embedding_scale(1.0)
        writer.add_residual_scale(1.0)
        writer.add_logit_scale(1.0)


def add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer) -> None:
    from gguf import TokenType

    content = json.loads(tokenizer.tokenizer_json)
    texts = {i: text for text, i in content["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, TokenType.NORMAL)
    for token in content["added_tokens"]:
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    merges = content["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(content, tokenizer.path))
    writer.add_token_list([texts[i] for i in range(tokenizer.vocab_size)])
    writer.add_token_types([kinds[i] for i in range(tokenizer.vocab_size)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(False)  # the chat template does
    if tokenizer.chat_template:
        writer.add_chat_template(without_marks(tokenizer.chat_template))


def pre_tokenizer_name(content: dict[str, Any], path: Path) -> str:
    """llama.cpp's name for the way in which a `tokenizer.json` of this content cuts text into words.

    Raises: UserError when it has none.
    """
    found = content["pre_tokenizer"] or {}
    parts = found["pretokenizers"] if found.get("type") == "Sequence" else [found]
    for name, wanted in PRE_TOKENIZERS.items():
        alike = len(parts) == len(wanted) and all(
            expected.items() <= part.items() for part, expected in zip(parts, wanted, strict=True)
        )
        if alike and content["model"]["type"] == "BPE" and not content["normalizer"]:
            return name
    raise UserError(
        f"llama.cpp has no name for the way in which the tokenizer in {path} cuts text into words; models "
        "with tokenizers of `minimind tokenizer` and with MiniMind2's can be exported"
    )


def gguf_tensors(model: MiniMind) -> Iterator[tuple[str, Tensor]]:
    """All tensors under llama.cpp's names. The output matrix is left out: the embedding stands in for it."""
    config, state = model.config, model.state_dict()

    def weight(name: str) -> Tensor:
        return state[f"{name}.weight"]

    yield "token_embd.weight", weight("model.embed_tokens")
    yield "output_norm.weight", weight("model.norm")
    for i in range(config.num_hidden_layers):
        layer, mlp, block = f"model.layers.{i}", f"model.layers.{i}.mlp", f"blk.{i}"
        for ours, name in NAMES.items():
            tensor = weight(f"{layer}.{ours}")
            if ours.endswith(("q_proj", "k_proj")):
                # llama.cpp turns neighbours (x[2i], x[2i + 1]) where we turn (x[i], x[i + D/2]).
                tensor = interleave(tensor, config.head_dim)
            yield f"{block}.{name}.weight", tensor
        if not config.num_experts:
            for part, name in PROJECTIONS.items():
                yield f"{block}.{name}.weight", weight(f"{mlp}.{part}")
            continue
        yield f"{block}.ffn_gate_inp.weight", weight(f"{mlp}.gate")
        for part, name in PROJECTIONS.items():
            routed = [weight(f"{mlp}.experts.{j}.{part}") for j in range(config.num_experts)]
            shared = [weight(f"{mlp}.shared_experts.{j}.{part}") for j in range(config.num_shared_experts)]
            yield f"{block}.{name}_exps.weight", torch.stack(routed)  # (E, out, in)
            # A sum of SwiGLUs is one as wide as all of them.
            yield f"{block}.{name}_shexp.weight", torch.cat(shared, dim=1 if part == "down_proj" else 0)


def add_tensor(writer: GGUFWriter, name: str, tensor: Tensor, dtype: str) -> None:
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[dtype.upper()]
    if tensor.dim() == 1 or "ffn_gate_inp" in name:
        kind = GGMLQuantizationType.F32
    elif dtype == "q8_0" and tensor.shape[-1] % 32:  # whole blocks only
        kind = GGMLQuantizationType.F16
    numbers = tensor.detach().float().contiguous().numpy()
    if kind != GGMLQuantizationType.F32 and abs(numbers).max() > 65504:
        raise UserError(f"--dtype {dtype} cannot hold a number in {name}; choose f32")
    writer.add_tensor(name, quants.quantize(numbers, kind), raw_dtype=kind)
