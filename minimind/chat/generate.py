"""From a prompt to an answer, one token at a time: the sampler, written out by hand.

`generate` streams one answer, `generate_batch` answers many prompts at once; both are the loop in `decode`.

Shapes: B rows, T prompt positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from minimind.chat.options import SamplingOptions
from minimind.model import KVCache, MiniMind

CONTROL_IDS = (0, 1, 2)  # <|endoftext|> (also padding), <|im_start|>, <|im_end|>
STOP_IDS = (0, 2)  # what may end an answer; the other control ids are never drawn
PENALTY_WINDOW = 64  # tokens; in a longer answer common words such as "的" must come again
NUCLEUS_GUESS = 256  # tokens; nearly every nucleus is smaller, and this is far cheaper than to sort V
GREEDY_BELOW = 1e-4  # temperature; dividing by less overflows, and there is nothing left to chance anyway


def generate(
    model: MiniMind,
    prompt_ids: Sequence[int],
    options: SamplingOptions,
    stop_ids: Collection[int] = STOP_IDS,
) -> Iterator[int]:
    """Stream the ids of one answer; it ends before a stop id, or after `options.max_new_tokens`."""
    prompt = torch.tensor([prompt_ids], dtype=torch.long, device=model.device)  # (1, T)
    for _, token in decode(model, prompt, options, stop_ids, random_generator(model, options)):
        yield token


def generate_batch(
    model: MiniMind,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    stop_ids: Collection[int] = STOP_IDS,
    batch_size: int = 64,
) -> list[list[int]]:
    """The answers to many prompts, in their order, each as `generate` would give it alone when greedy.

    Prompts of equal length share a batch of up to `batch_size` rows, so there is no padding to mask.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    generator = random_generator(model, options)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for _, same_length in groupby(by_length, key=lambda i: len(prompts[i])):
        group = list(same_length)
        for start in range(0, len(group), batch_size):
            chunk = group[start : start + batch_size]
            batch = torch.tensor([prompts[i] for i in chunk], dtype=torch.long, device=model.device)  # (B, T)
            for row, token in decode(model, batch, options, stop_ids, generator):
                answers[chunk[row]].append(token)
    return answers


@torch.inference_mode()
def decode(
    model: MiniMind,
    prompts: Tensor,
    options: SamplingOptions,
    stop_ids: Collection[int],
    generator: torch.Generator,
) -> Iterator[tuple[int, int]]:
    """The loop: continue `prompts` (B, T) and yield (row, id) for every token of every answer.

    The prompt goes through the model once; after that each step feeds one token a row, and the cache
    remembers the rest. A row that has ended leaves the batch.
    """
    if prompts.shape[1] == 0:
        raise ValueError("a prompt needs at least one token")
    cache_length = prompts.shape[1] + options.max_new_tokens
    cache = KVCache(model.config, len(prompts), cache_length, model.device, model.lm_head.weight.dtype)
    never = [i for i in CONTROL_IDS if i not in stop_ids]
    rows = list(range(len(prompts)))  # the prompt that each row of the shrinking batch belongs to
    said = prompts[:, :0]  # (B, up to PENALTY_WINDOW) the answers' latest tokens; the prompt is not punished
    inputs = prompts

    for _ in range(options.max_new_tokens):
        last = torch.arange(1, len(rows) + 1, device=model.device) * inputs.shape[1] - 1
        logits = model(inputs, cache=cache, logits_at=last).logits.float()  # (B, V)
        logits[:, never] = -torch.inf
        logits = penalize_repetition(logits, said, options.repetition_penalty)
        token = sample(logits, options, generator)  # (B,)

        ids = token.tolist()
        going = [i for i, token_id in enumerate(ids) if token_id not in stop_ids]
        yield from ((rows[i], ids[i]) for i in going)
        if not going:
            return
        if len(going) < len(rows):
            rows, token, said = [rows[i] for i in going], token[going], said[going]
            keep_rows(cache, going)
        said = torch.cat((said, token[:, None]), dim=1)[:, -PENALTY_WINDOW:]
        inputs = token[:, None]  # (B, 1)


def penalize_repetition(logits: Tensor, said: Tensor, penalty: float) -> Tensor:
    """Make the tokens in `said` (B, W) less likely in `logits` (B, V), each once however often it was said.

    CTRL (Keskar et al. 2019, arXiv:1909.05858, 4.1) divides their logits by the penalty. That would raise a
    negative logit, so those are multiplied.
    """
    if penalty == 1 or said.shape[1] == 0:
        return logits
    scores = logits.gather(-1, said)  # (B, W)
    return logits.scatter(-1, said, torch.where(scores > 0, scores / penalty, scores * penalty))


def sample(logits: Tensor, options: SamplingOptions, generator: torch.Generator) -> Tensor:
    """Draw one id a row, (B,), from `logits` (B, V): temperature first, then top-k, then top-p."""
    if options.temperature < GREEDY_BELOW:
        return logits.argmax(-1)
    probabilities = (logits / options.temperature).softmax(-1)  # (B, V)
    if options.top_k is None and options.top_p == 1:
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    probabilities, ids = likeliest(probabilities, options)  # (B, C), falling
    before = probabilities.cumsum(-1) - probabilities  # (B, C) share of the tokens that are likelier
    nucleus = probabilities.masked_fill(before >= options.top_p, 0)
    return ids.gather(-1, torch.multinomial(nucleus, 1, generator=generator))[:, 0]


def likeliest(probabilities: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor]:
    """The falling probabilities (B, C) and ids of the top k, or of enough tokens to hold the nucleus."""
    vocab_size = probabilities.shape[-1]
    if options.top_k is not None:
        values, ids = probabilities.topk(min(options.top_k, vocab_size))
        return values / values.sum(-1, keepdim=True), ids
    values, ids = probabilities.topk(min(NUCLEUS_GUESS, vocab_size))
    if (values.sum(-1) < options.top_p).any():
        values, ids = probabilities.sort(descending=True)
    return values, ids


def keep_rows(cache: KVCache, rows: list[int]) -> None:
    """Move `rows` to the front of the cache, filled positions only, and drop the others."""
    cache.buffer[:, :, : len(rows), :, : cache.length] = cache.buffer[:, :, rows, :, : cache.length]
    cache.buffer = cache.buffer[:, :, : len(rows)]


def random_generator(model: MiniMind, options: SamplingOptions) -> torch.Generator:
    generator = torch.Generator(model.device)
    if options.seed is None:
        generator.seed()
    else:
        generator.manual_seed(options.seed)
    return generator
