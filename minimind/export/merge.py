"""`minimind merge`: adapters added to the weights they were trained beside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minimind.errors import UserError
from minimind.export.options import ModelOptions
from minimind.flags import flag, parse_flags
from minimind.stages import SCRIPTS
from minimind.stages.lora import check_names


@dataclass(frozen=True)
class MergeOptions(ModelOptions):
    lora_name: tuple[str, ...] = flag(("lora_medical",), "adapters to add, one name or several")
    from_weight: str = flag("full_sft", "stage whose weights they are added to")
    output_dir: Path | None = flag(None, "folder of the result; without it merged/ in out_dir")
    tokenizer_path: Path | None = flag(None, "folder of another tokenizer.json; without it the shipped one")


def main(argv: Sequence[str] | None = None) -> int:
    """Add adapters to a model's weights.

    The result is a weight file like any other, in a folder of its own under the name of the weights it came
    from: every command takes that folder as its --out_dir.
    """
    options = parse_flags(MergeOptions, argv, main.__doc__)
    check_names(options.lora_name)
    import torch

    from minimind import lora
    from minimind.files import atomic_write
    from minimind.tokenizer import Tokenizer
    from minimind.weights import check_tokenizer, load_model

    tokenizer = Tokenizer.load(options.tokenizer_path)
    config = options.config(tokenizer.vocab_size)
    base = options.out_dir / f"{options.from_weight}_{config.name}.pth"
    target = (options.output_dir or options.out_dir / "merged") / base.name
    if target.exists():
        raise UserError(f"{target} exists already; choose another --output_dir or move it")
    script = SCRIPTS.get(options.from_weight)
    model = load_model(
        base, options.command(script) if script else f"a stage that writes {base.name}", config
    )
    check_tokenizer(base, tokenizer)
    adapters = [options.adapter_path(name) for name in options.lora_name]
    lora.load_adapters(model, adapters, options.command(SCRIPTS["lora"]), tokenizer)
    lora.merge(model)

    # Kept in fp32: sums rounded to fp16 would move logits by more than 1e-5.
    atomic_write(target, lambda file: torch.save(model.state_dict(), file))
    run = {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "merged": [str(path) for path in (base, *adapters)],
    }
    atomic_write(
        target.parent / "runs" / target.stem / "run.json",
        lambda file: file.write(json.dumps(run, indent=2, ensure_ascii=False).encode()),
    )
    names = ", ".join(options.lora_name)
    print(f"{target}: {base.name} with {names}; other commands find it with --out_dir {target.parent}")
    return 0
