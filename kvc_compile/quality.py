"""How much a compressed cache changes what a model says.

The full cache is the reference; the text is Python's own documentation (`pydoc_data.topics`), at hand everywhere.

    score        logits through the cache against logits through the full one: perplexity, KL, top-1 agreement
    read         logits of a text: a prefill, then the rest in chunks, each of which reads the cache
    generate     the same through `model.generate`, one token at a time, with the text forced on it
    passkeys     a number hidden in a long text that is asked for at its end
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WINDOWS = (10_000, 50_000, 90_000)  # offsets in tokens into the joined topics
DEPTHS = {2048: (0.1, 0.3, 0.5, 0.7, 0.9), 4096: (0.1, 0.5, 0.9)}  # where the number is hidden, by length
NEEDLE = " The secret passcode is {code}. Remember it: {code} is the secret passcode. "
QUESTION = "\n\nWhat is the secret passcode mentioned in the text above?"
ANSWER_PREFIX = "The secret passcode is"
ANSWER_TOKENS = 6  # a space and five digits
MAX_DRAWS = 6  # contexts tried per depth until the full cache answers


def topic_tokens(tokenizer: Any) -> list[int]:
    """The tokens of all pydoc topics, in alphabetical order."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[k] for k in sorted(topics))
    return tokenizer(text, add_special_tokens=False).input_ids


# ---------------------------------------------------------------- one window of text


@dataclass(frozen=True)
class Score:
    """Of one window: mean negative log-likelihood of its tokens, mean KL(full || compressed) and how often both have
    the same most likely token."""

    tokens: int
    nll: float
    kl: float
    top1: float


def score(logits: Tensor, full: Tensor, targets: Tensor) -> Score:
    """logits, full [n, vocabulary]: through the cache and through the full one; targets [n]: the tokens that came."""
    lp, ref = logits.float().log_softmax(-1), full.float().log_softmax(-1)
    nll = -lp.gather(1, targets[:, None]).mean().item()
    kl = (ref.exp() * (ref - lp)).sum(-1).mean().item()
    return Score(len(targets), nll, kl, (ref.argmax(-1) == lp.argmax(-1)).float().mean().item())


def perplexity(scores: Iterable[Score]) -> float:
    """Over all tokens of some windows."""
    scores = list(scores)
    return math.exp(sum(s.nll * s.tokens for s in scores) / sum(s.tokens for s in scores))


def dynamic(ids: Tensor) -> Tensor:
    """`ids` [1, n] with a hint that n changes from call to call: one graph for all lengths of a prefill or a chunk."""
    if ids.shape[1] > 1:
        torch._dynamo.maybe_mark_dynamic(ids, 1)
    return ids


@torch.no_grad()
def read(model: Any, ids: Tensor, prefill: int, cache: Any, chunk: int) -> Tensor:
    """Logits [n - prefill, vocabulary] of the tokens after `prefill`, fed in chunks through the cache."""
    model(input_ids=dynamic(ids[:, :prefill].clone()), past_key_values=cache, logits_to_keep=1)
    parts = ids[:, prefill:].split(chunk, 1)
    return torch.cat([model(input_ids=dynamic(p.clone()), past_key_values=cache).logits[0].float() for p in parts])


@torch.no_grad()
def generate(model: Any, ids: Tensor, prefill: int, cache: Any, on_token: Callable[[], None] = lambda: None) -> Tensor:
    """Logits [n - prefill, vocabulary] as `read` gives them, but by `model.generate` with the text forced on it."""
    found: list[Tensor] = []

    def force(text: Tensor, logits: Tensor) -> Tensor:
        on_token()
        found.append(logits[0].float().clone())
        token = ids[0, text.shape[1]] if text.shape[1] < ids.shape[1] else ids[0, -1]
        return torch.full_like(logits, -math.inf).index_fill_(1, token[None], 0.0)

    more = ids.shape[1] - prefill + 1  # the first logits are those of the prefill's last token
    model.generate(
        ids[:, :prefill],
        attention_mask=torch.ones_like(ids[:, :prefill]),
        past_key_values=cache,
        logits_processor=[force],
        max_new_tokens=more,
        do_sample=False,
    )
    return torch.stack(found[1:])


def stored_bytes(cache: Any) -> int:
    """Bytes of the storages behind the tensors of a transformers cache object, found without help from the report."""
    storages = {}
    for layer in cache.layers:
        stack = [layer.keys, layer.values]
        while stack:
            t = stack.pop()
            if hasattr(t, "__tensor_flatten__"):
                stack += [getattr(t, name) for name in t.__tensor_flatten__()[0]]
            elif t is not None:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(storages.values())


# ---------------------------------------------------------------- retrieval


@dataclass(frozen=True)
class Passkey:
    """A long context with a number in it, and the question for the number."""

    length: int
    depth: float
    draw: int
    context: Tensor
    question: Tensor
    code: str


def _passkey(tokenizer: Any, tokens: list[int], length: int, depth: float, draw: int, rng: random.Random) -> Passkey:
    code = f"{rng.randrange(10_000, 100_000)}"
    needle = NEEDLE.format(code=code)
    offset = rng.randrange(0, len(tokens) - 2 * length)
    room = length - len(tokenizer(needle).input_ids) - 60
    hay = tokens[offset : offset + room]
    cut = int(room * depth)
    context = tokenizer.decode(hay[:cut]) + needle + tokenizer.decode(hay[cut:])
    mark = "\x00SPLIT\x00"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], add_generation_prompt=True, tokenize=False
    )
    head, tail = chat.split(mark)

    def encode(s: str) -> Tensor:
        return torch.tensor(tokenizer(s, add_special_tokens=False).input_ids)[None]

    return Passkey(length, depth, draw, encode(head + context), encode(QUESTION + tail + ANSWER_PREFIX), code)


def passkeys(
    model: Any, tokenizer: Any, tokens: list[int], length: int, draws: dict[float, int] | None = None
) -> Iterator[Passkey]:
    """One context for each depth, drawn until the uncompressed `model` itself answers: a small model misses many, which
    would say nothing of a cache. `draws`, by depth, are the draws that are known to be answered."""
    from transformers import DynamicCache

    rng = random.Random(length)
    for depth in DEPTHS[length]:
        known = (draws or {}).get(depth)
        for draw in range(1, MAX_DRAWS + 1):
            p = _passkey(tokenizer, tokens, length, depth, draw, rng)
            if draw == known:
                break
            if known is None and p.code in answer(model, tokenizer, p, DynamicCache(), chunk=512):
                break
        yield p


@torch.no_grad()
def answer(model: Any, tokenizer: Any, p: Passkey, cache: Any, chunk: int) -> str:
    """What the model answers, greedily, with the context prefilled into `cache` and the question read in chunks."""
    device = next(model.parameters()).device
    ids = torch.cat([p.context, p.question], 1).to(device)
    out = [int(read(model, ids, p.context.shape[1], cache, chunk)[-1].argmax())]
    while len(out) < ANSWER_TOKENS:
        step = torch.tensor([out[-1:]], device=device)
        out.append(int(model(input_ids=step, past_key_values=cache).logits[0, -1].argmax()))
    return tokenizer.decode(out)
