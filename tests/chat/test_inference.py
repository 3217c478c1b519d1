"""The model made ready to answer against the model that was trained, and against transformers."""

from __future__ import annotations

import pytest
import torch
from test_model import in_transformers

from minimind.chat.generate import generate
from minimind.chat.inference import InferenceModel
from minimind.chat.network import Stretch
from minimind.chat.operations import Operations
from minimind.chat.options import WEIGHTS, SamplingOptions
from minimind.errors import UserError
from minimind.lora import attach
from minimind.model import MiniMind

from .models import SHAPES, random_model

GREEDY = SamplingOptions(temperature=0, repetition_penalty=1, max_new_tokens=24)
NEAR = {"fp32": 1e-5, "half": 0.02, "int8": 0.5}  # logits have a standard deviation near 1


def logits_of(model: InferenceModel, rows: torch.Tensor, read: list[int]) -> torch.Tensor:
    """Logits (B, T - sum(read), V): stretches of the lengths `read` first, then one token after another."""
    cache = model.cache(len(rows), rows.shape[1])
    start = 0
    for length in read:
        parts = rows[:, start : start + length].tolist()
        model.read([Stretch(row, start, ids) for row, ids in enumerate(parts)], cache)
        start += length
    return torch.stack(
        [
            model.next_logits(rows[:, position].tolist(), [position] * len(rows), cache)
            for position in range(sum(read), rows.shape[1])
        ],
        dim=1,
    )


# Not int8 with experts: random routers are near a draw, and its rounding sends tokens to other experts.
@pytest.mark.parametrize(
    ("shape", "weights"), [(s, w) for s in SHAPES for w in WEIGHTS if (s, w) != ("moe", "int8")]
)
def test_logits_are_the_models(shape, weights):
    model = random_model(SHAPES[shape])
    ids = torch.randint(3, 300, (3, 30))
    with torch.no_grad():
        expected = model(ids).logits
    ready = InferenceModel(model, weights)
    for read in ([], [1], [11], [7, 1, 9]):
        error = logits_of(ready, ids, read) - expected[:, sum(read) :]
        assert error.abs().max() <= NEAR[weights]


@pytest.mark.parametrize(
    ("shape", "weights", "tolerance"),
    [*((shape, "fp32", 1e-5) for shape in SHAPES), ("dense", "half", 0.2), ("yarn", "half", 0.2)],
)
def test_operations_of_a_gpu_give_them_too(shape, weights, tolerance):
    """`half` is bf16 there, for activations too."""
    model = random_model(SHAPES[shape])
    ids = torch.randint(3, 300, (3, 30))
    with torch.no_grad():
        expected = model(ids).logits
    ready = InferenceModel(model, weights)
    ready.network = Operations(model, weights)
    for read in ([], [11], [7, 1, 9]):
        found = logits_of(ready, ids, read)
        assert found.dtype == torch.float32
        assert (found - expected[:, sum(read) :]).abs().max() <= tolerance


def test_rows_of_different_lengths_share_a_step():
    model = random_model()
    ready, ids = InferenceModel(model, "fp32"), torch.randint(3, 300, (3, 30))
    lengths = [4, 29, 11]
    cache = ready.cache(5, 30)
    ready.read([Stretch(row, 0, ids[row, :length].tolist()) for row, length in enumerate(lengths)], cache)
    found = ready.next_logits([int(ids[row, n]) for row, n in enumerate(lengths)], lengths, cache)
    with torch.no_grad():
        expected = model(ids).logits
    for row, length in enumerate(lengths):
        assert (found[row] - expected[row, length]).abs().max() <= 1e-5


def test_the_model_stays_as_it_is():
    model = random_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ready = {weights: InferenceModel(model, weights) for weights in WEIGHTS}
    answers = {weights: list(generate(one, [1, 5], GREEDY)) for weights, one in ready.items()}
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():  # and trained on, it takes nothing with it
        for parameter in model.parameters():
            parameter.zero_()
    assert answers == {weights: list(generate(one, [1, 5], GREEDY)) for weights, one in ready.items()}


@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_adapters_are_merged(shape):
    model = random_model(SHAPES[shape])
    ids = torch.randint(3, 300, (2, 12))
    with torch.no_grad():
        plain = model(ids).logits
        attach(model, rank=2)
        for name, parameter in model.named_parameters():
            if ".lora." in name:
                torch.nn.init.normal_(parameter, std=0.3)
        expected = model(ids).logits
    assert (expected - plain).abs().max() > 0.1
    assert (logits_of(InferenceModel(model, "fp32"), ids, [5]) - expected[:, 5:]).abs().max() <= 1e-4
    assert any(".lora." in name for name in model.state_dict())


@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_greedy_answers_are_those_of_transformers(shape, tmp_path):
    model = random_model(SHAPES[shape])
    ready, reference = InferenceModel(model, "fp32"), in_transformers(model, tmp_path)
    for length in (1, 6, 40):
        ids = torch.randint(3, 300, (1, length))
        expected = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            suppress_tokens=[0, 1, 2],
            eos_token_id=None,
            pad_token_id=0,
        )
        assert list(generate(ready, ids[0].tolist(), GREEDY, stop_ids=())) == expected[0, length:].tolist()


def test_int8_elsewhere_than_on_a_cpu_is_refused():
    with torch.device("meta"):
        model = MiniMind(SHAPES["dense"])
    with pytest.raises(UserError, match="--weights int8 is for a CPU"):
        InferenceModel(model, "int8")
