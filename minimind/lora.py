"""LoRA: a frozen model learns a new task in two thin matrices beside each of its projections.

Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): W x becomes W x + B (A x), where only A (rank, in) and
B (out, rank) are trained. B starts at zero, so that training starts from the model as it was. The paper's
scale α/r is 1 here and has no other place in the file, as in the adapters that MiniMind2 published.
"""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minimind.errors import UserError
from minimind.files import atomic_write
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer
from minimind.weights import check_tokenizer, is_weight, load_state

BASE = "minimind.base"  # what `base_sample` goes by in the metadata of a file's state dict
SAME = 0.01  # relative difference up to which weights count as the same: bf16 rounds by less

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Adapter(nn.Module):
    """x (…, in) → B (A x) (…, out), for the projection `base`."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        like_base: dict[str, Any] = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.A = nn.Linear(base.in_features, rank, **like_base)
        self.B = nn.Linear(rank, base.out_features, **like_base)
        nn.init.normal_(self.A.weight, std=0.02)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.A(x))


class LoRALinear(nn.Linear):
    """A projection with an adapter beside it. It shares `base`'s weight, under the same name."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight
        self.lora = Adapter(base, rank)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora(x)


def attach(model: MiniMind, rank: int = 8, targets: Sequence[str] = TARGETS) -> None:
    """Freeze the model and put a new adapter beside each projection that `targets` names.

    In a mixture of experts that is every expert, shared ones too, but never the router.

    Raises: UserError for a rank below 1 and for targets that no layer has.
    """
    if rank < 1:
        raise UserError(f"--lora_rank is {rank}; it must be at least 1")
    unknown = [target for target in targets if target not in TARGETS]
    if unknown or not targets:
        named = ", ".join(map(repr, unknown)) or "nothing"
        raise UserError(f"--lora_targets names {named}; choose from {','.join(TARGETS)}")
    insert(model, {name: rank for name in projections(model) if name.split(".")[-1] in targets})


def projections(model: MiniMind) -> dict[str, nn.Linear]:
    """What an adapter can be put beside, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.split(".")[-1] in TARGETS
    }


def insert(model: MiniMind, ranks: dict[str, int]) -> None:
    """Freeze the model and give each projection named in `ranks` an adapter of that rank."""
    model.requires_grad_(False)
    for name, rank in ranks.items():
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        model.set_submodule(name, LoRALinear(base, rank))


def detach(model: MiniMind) -> None:
    """Take all adapters away again; every parameter of the model is then open to training."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            base = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            base.weight = module.weight
            model.set_submodule(name, base)
    model.requires_grad_(True)


@torch.no_grad()
def merge(model: MiniMind) -> None:
    """Add each adapter to its projection's weight, and take it away."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.weight.copy_(merged_weight(module))
    detach(model)


def merged_weight(linear: nn.Linear) -> Tensor:
    """The weight of a projection and of the adapter beside it, if there is one: W + B A in fp32."""
    weight = linear.weight.float()
    if isinstance(linear, LoRALinear):
        weight = weight + linear.lora.B.weight.float() @ linear.lora.A.weight.float()
    return weight


def lora_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapters of a state dict, fp32: `….lora.A.weight` (rank, in) and `….lora.B.weight` (out, rank)."""
    adapters = ((name, tensor) for name, tensor in state.items() if ".lora." in name)
    return {name: tensor.detach().to("cpu", torch.float32) for name, tensor in adapters}


def save_lora(state: dict[str, Tensor], path: Path) -> None:
    """Write the adapters in a state dict alone. They are small, so nothing is rounded.

    What weights they were trained beside stands in the metadata that every state dict of PyTorch's may have;
    who does not know of it reads the adapters as always.
    """
    adapters = OrderedDict(lora_state(state))
    vars(adapters)["_metadata"] = {BASE: base_sample(state)}
    atomic_write(path, lambda file: torch.save(adapters, file))


def base_sample(state: dict[str, Tensor]) -> Tensor:
    """Eight numbers of each matrix beside the adapters of a state dict, by which to know it again, (n,)."""
    base = (state[name] for name in sorted(state) if ".lora." not in name and state[name].dim() == 2)
    return torch.cat(
        [w.detach().flatten()[:: max(1, w.numel() // 8)][:8].to("cpu", torch.float32) for w in base]
    )


def load_adapters(
    model: MiniMind, paths: Sequence[Path], how_to_make: str, tokenizer: Tokenizer | None = None
) -> None:
    """Freeze the model and put the adapters in `paths` beside its projections; several are added up.

    B₁(A₁ x) + B₂(A₂ x) is one product with A₁ over A₂ and B₁ beside B₂: still one adapter a projection.

    Args: how_to_make and tokenizer: see `read_adapters`.
    Raises: UserError as `read_adapters` does; the model is then as it was.
    """
    states = [read_adapters(path, model, how_to_make, tokenizer) for path in paths]
    for path in paths:
        if not is_beside_its_base(load_state(path, how_to_make), model):
            print(
                f"note: {path} was trained beside other weights than it is added to here, and may answer "
                f"worse for it; to train it anew: {how_to_make} --lora_name {adapter_name(path, model)}",
                file=sys.stderr,
            )
    names = dict.fromkeys(name for state in states for name in state)
    joined = {
        name: torch.cat(
            [state[name] for state in states if name in state], dim=0 if ".lora.A." in name else 1
        )
        for name in names
    }
    insert(model, adapter_ranks(joined))
    model.load_state_dict(joined, strict=False)  # the rest of the model is missing in it


def is_beside_its_base(adapters: dict[str, Tensor], model: MiniMind) -> bool:
    """Whether a file's adapters were trained beside these weights, as far as the file tells: ours do."""
    metadata = getattr(adapters, "_metadata", None)
    trained_beside = metadata.get(BASE) if isinstance(metadata, dict) else None
    if not isinstance(trained_beside, Tensor) or not is_weight(BASE, trained_beside):
        return True
    here = base_sample(model.state_dict())
    if here.shape != trained_beside.shape:
        return False
    return bool((here - trained_beside.float()).norm() <= SAME * here.norm())


def adapter_ranks(state: dict[str, Tensor]) -> dict[str, int]:
    """The rank of each adapted projection, by the projection's name."""
    tail = ".lora.A.weight"
    return {name.removesuffix(tail): len(tensor) for name, tensor in state.items() if name.endswith(tail)}


def read_adapters(
    path: Path, model: MiniMind, how_to_make: str, tokenizer: Tokenizer | None = None
) -> dict[str, Tensor]:
    """The tensors of an adapter file, in fp32, found to fit `model`.

    Args:
        how_to_make: the command that makes such a file, for messages.
        tokenizer: the one in use, to be compared with the one that the file's run used.
    Raises: UserError when the file is missing (it then names those beside it) or damaged, holds anything but
        whole adapters that fit this model, or was trained with another tokenizer.
    """
    if not path.is_file():
        files = path.parent.glob(f"*_{model.config.name}.pth")
        there = ", ".join(sorted(adapter_name(file, model) for file in files)) or "none"
        raise UserError(
            f"there is no adapter at {path} (for this model there are: {there}); make one with: "
            f"{how_to_make} --lora_name {adapter_name(path, model)}"
        )
    state = {name: tensor.float() for name, tensor in load_state(path, how_to_make).items()}
    check_fits(state, model, path, how_to_make)
    if tokenizer:
        check_tokenizer(path, tokenizer)
    return state


def adapter_name(path: Path, model: MiniMind) -> str:
    """What --lora_name calls the file."""
    return path.name.removesuffix(f"_{model.config.name}.pth")


def check_fits(state: dict[str, Tensor], model: MiniMind, source: Path, how_to_make: str) -> None:
    """Raises: UserError, naming `source`, unless `state` is whole adapters of projections of `model`."""

    def misfit(reason: str) -> UserError:
        return UserError(
            f"{source} {reason}; use it with the model it was made for, or make one with: {how_to_make}"
        )

    places = projections(model)
    for name in state:
        match = re.fullmatch(r"(.+)\.lora\.[AB]\.weight", name)
        if not match:
            raise misfit(f"is no adapter file: it holds {name}")
        if match[1] not in places:
            layers = model.config.num_hidden_layers
            raise misfit(
                f"adapts {match[1]}, no projection of this model ({model.config.name}, {layers} layers)"
            )
    if not state:
        raise misfit("holds no adapters")
    for place in dict.fromkeys(name.split(".lora.")[0] for name in state):
        a, b = (state.get(f"{place}.lora.{part}.weight") for part in "AB")
        if a is None or b is None:
            raise misfit(f"has only one half of the adapter of {place}")
        rank = max(1, a.shape[0]) if a.dim() == 2 else 1
        inputs, outputs = places[place].in_features, places[place].out_features
        for part, tensor, wanted in (("A", a, (rank, inputs)), ("B", b, (outputs, rank))):
            if tensor.shape != wanted:
                sizes = f"{list(tensor.shape)}, but this model needs {list(wanted)}"
                raise misfit(f"holds {place}.lora.{part}.weight of size {sizes}")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise UserError(
                f"{source} holds weights that are not numbers: its training diverged; train it again with a "
                "lower --learning_rate"
            )
