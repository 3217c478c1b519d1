"""An exported folder as the input of other programs: TRL's SFT and DPO, PEFT's LoRA. A few steps of each."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from test_cli import logits
from test_tokenizer import CONVERSATION, MINIMIND2, needs_shared
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from minimind.chat_template import CHAT_TEMPLATE, MESSAGE, with_marks, without_marks
from minimind.export.folder import tokenizer_files
from minimind.lora import load_adapters
from minimind.paths import TOKENIZER_DIR
from minimind.tokenizer import CONTROL_TOKENS, Tokenizer
from minimind.weights import load_model

from .conftest import CONFIGS, DENSE, KNOWN, shape

TRAINING = {
    "max_steps": 8,
    "per_device_train_batch_size": 3,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
CHATS = Dataset.from_list(
    [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a[::-1]}]}
        for q, a in KNOWN.items()
    ]
)


@pytest.fixture
def exported(minimind, tmp_path):
    def export(config=DENSE):
        minimind("export hf", tmp_path / "hf", *shape(config), "--from_weight", "rlhf")
        return tmp_path / "hf"

    return export


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", CONFIGS)
def test_trl_fine_tunes_on_our_answers_and_the_result_comes_back(kind, exported, minimind, out, tmp_path):
    config = CONFIGS[kind]
    trainer = SFTTrainer(
        str(exported(config)),
        args=SFTConfig(tmp_path / "trl", assistant_only_loss=True, **TRAINING),
        train_dataset=CHATS,
    )
    tokenizer = Tokenizer.load()
    for row, chat in zip(trainer.train_dataset, CHATS, strict=True):
        ids, mask = tokenizer.encode_chat(chat["messages"])
        batch = trainer.data_collator([row])
        assert batch["input_ids"].tolist() == [ids]
        assert batch["labels"].tolist() == [[i if m else -100 for i, m in zip(ids, mask, strict=True)]]
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
    trainer.save_model(tmp_path / "tuned")
    minimind("import hf", tmp_path / "tuned", "--stage", "reason")
    ours = load_model(out / f"reason_{config.name}.pth", "")
    assert (logits(ours) - logits(trainer.model)).abs().max() <= 1e-5
    run = json.loads((out / f"runs/reason_{config.name}/run.json").read_text())
    assert run["tokenizer_fingerprint"] == tokenizer.fingerprint


def test_trl_trains_preferences(exported, tmp_path):
    pairs = [
        {
            "prompt": [{"role": "user", "content": q}],
            "chosen": [{"role": "assistant", "content": a[::-1]}],
            "rejected": [{"role": "assistant", "content": a}],
        }
        for q, a in KNOWN.items()
    ]
    trainer = DPOTrainer(
        str(exported()), args=DPOConfig(tmp_path / "trl", **TRAINING), train_dataset=Dataset.from_list(pairs)
    )
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: it starts from its own reference
    assert losses(trainer)[-1] < 0.2


def test_peft_trains_adapters_that_come_back(exported, minimind, out, tmp_path):
    folder = exported()
    trainer = SFTTrainer(
        str(folder),
        args=SFTConfig(tmp_path / "trl", assistant_only_loss=True, **TRAINING | {"learning_rate": 2e-2}),
        train_dataset=CHATS,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.3
    trainer.save_model(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    minimind("import peft", *shape(DENSE), "--lora_name", "theirs", "--peft_dir", tmp_path / "adapter")
    ours = load_model(out / "rlhf_64.pth", "")
    load_adapters(ours, [out / "lora/theirs_64.pth"], "")
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-5


# ---- The tokens that are trained on ----


@pytest.fixture(
    scope="module", params=[TOKENIZER_DIR, pytest.param(MINIMIND2, marks=needs_shared)], ids=["ours", "mm2"]
)
def both(request, tmp_path_factory):
    """Our tokenizer and transformers' from the files that we export."""
    ours, folder = Tokenizer.load(request.param), tmp_path_factory.mktemp("tokenizer")
    for name, text in tokenizer_files(ours).items():
        (folder / name).write_text(text)
    return ours, AutoTokenizer.from_pretrained(folder)


def masks(theirs, messages) -> tuple[list[int], list[int]]:
    found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return found["input_ids"], found["assistant_masks"]


contents = st.text(max_size=12) | st.lists(
    st.sampled_from(["你好", "🦜", "鱻", "𠮷", " ", "a", "7", "，", ".\n", "\t", "é", "<think>", "'s"]),
    max_size=9,
).map("".join)


@settings(max_examples=40)
@given(texts=st.lists(contents, min_size=1, max_size=5), system=st.none() | contents)
def test_marked_tokens_are_those_that_we_train_on(both, texts, system):
    """In any text but what runs into the template around it, which they encode as one and we never do."""
    ours, theirs = both
    assume(not any(token in text for text in [*texts, system or ""] for token in CONTROL_TOKENS))
    assume(all(not text[:1].isspace() for text in [*texts, system or ""]))
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    assert masks(theirs, messages) == ours.encode_chat(messages)


def test_marks_change_nothing_here(tmp_path):
    """Neither what is rendered nor the fingerprint, by which weights know their tokenizer."""
    plain = without_marks(CHAT_TEMPLATE)
    assert MESSAGE in plain
    assert "generation %}" not in plain
    assert with_marks(plain) == CHAT_TEMPLATE
    for name, template in (("plain", plain), ("marked", CHAT_TEMPLATE)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text((TOKENIZER_DIR / "tokenizer.json").read_text())
        (tmp_path / name / "chat_template.jinja").write_text(template)
    old, new = (Tokenizer.load(tmp_path / name) for name in ("plain", "marked"))
    assert old.fingerprint == new.fingerprint == Tokenizer.load().fingerprint
    assert new.fingerprint.startswith("430efd61d358d50e")  # of weights that are out there
    assert old.render_chat(CONVERSATION) == new.render_chat(CONVERSATION)
    assert tokenizer_files(old)["chat_template.jinja"] == CHAT_TEMPLATE


@pytest.mark.parametrize(
    "answer",
    ["{% generation %}{{ c }}!{% endgeneration %}", "{%- generation -%} {{ c }}! {%- endgeneration -%}\n"],
)
def test_marks_of_others_render_as_in_transformers(answer, tmp_path):
    template = (
        "{% for m in messages %}{% set c = m['content'] %}\n{{ '<|im_start|>' + m['role'] + '\\n' }}"
        f"{answer}<|im_end|>\n{{% endfor %}}"
    )
    (tmp_path / "tokenizer.json").write_text((TOKENIZER_DIR / "tokenizer.json").read_text())
    (tmp_path / "chat_template.jinja").write_text(template)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    rendered = Tokenizer.load(tmp_path).render_chat(CONVERSATION)
    assert rendered == theirs.apply_chat_template(CONVERSATION, tokenize=False)
    assert tokenizer_files(Tokenizer.load(tmp_path))["chat_template.jinja"] == template
    theirs.chat_template = without_marks(template)
    assert rendered == theirs.apply_chat_template(CONVERSATION, tokenize=False)


def test_a_tokenizer_that_filled_a_batch_is_the_same_still(tmp_path):
    theirs = AutoTokenizer.from_pretrained(TOKENIZER_DIR)
    theirs(["你好", "a longer text"], padding="max_length", truncation=True, max_length=4)
    theirs.save_pretrained(tmp_path)
    assert '"max_length": 4' in (tmp_path / "tokenizer.json").read_text()
    text = "a text that is longer than four tokens"
    assert Tokenizer.load(tmp_path).encode(text) == Tokenizer.load().encode(text)
    assert len(Tokenizer.load(tmp_path).encode("a")) == 1
