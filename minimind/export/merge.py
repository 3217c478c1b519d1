"""`minimind merge`: adapters added to the weights they were trained beside."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minimind.chat.loading import MODES
from minimind.export.options import WeightOptions
from minimind.files import atomic_write, refuse_to_replace, write_text
from minimind.flags import flag, parse_flags
from minimind.runs import RUN, read_run, run_folder


@dataclass(frozen=True)
class MergeOptions(WeightOptions):
    lora_name: tuple[str, ...] = flag(("lora_medical",), "adapters to add, one name or several")
    from_weight: str = flag("full_sft", "stage whose weights they are added to", choices=MODES)
    merged_dir: Path | None = flag(None, "folder of the result; without it merged/ in out_dir")


def main(argv: Sequence[str] | None = None) -> int:
    """Add adapters to a model's weights.

    The result is a weight file like any other, in a folder of its own under the name of the weights it came
    from: every command takes that folder as its --out_dir.

        minimind merge --lora_name lora_identity                     writes out/merged/full_sft_512.pth
        minimind merge --lora_name lora_medical lora_identity --from_weight rlhf
    """
    options = parse_flags(MergeOptions, argv, inspect.getdoc(main))
    base = options.weights
    target = (options.merged_dir or options.out_dir / "merged") / base.name
    refuse_to_replace(target, "choose another --merged_dir or move it")
    import torch

    model, tokenizer = options.load()
    # Kept in fp32: sums rounded to fp16 would move logits by more than 1e-5.
    atomic_write(target, lambda file: torch.save(model.state_dict(), file))
    adapters = [options.adapter_path(name, model.config) for name in options.lora_name]
    run = {
        "options": read_run(base).get("options", {}),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "merged": [str(path) for path in (base, *adapters)],
    }
    write_text(run_folder(target) / RUN, json.dumps(run, indent=2, ensure_ascii=False))
    names = ", ".join(options.lora_name)
    print(f"{target}: {base.name} with {names}; other commands find it with --out_dir {target.parent}")
    return 0
