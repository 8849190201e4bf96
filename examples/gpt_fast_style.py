"""A hand-written model in the style of gpt-fast: the cache is a pair of buffers in each attention module, written by
`k_out[:, :, input_pos] = k_val`, and the decode loop is a plain Python loop. Nothing in it knows of kvc_compile.

    python examples/gpt_fast_style.py [PRESET]
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvc_compile as kvc


@dataclass
class ModelArgs:
    vocab_size: int = 512
    n_layer: int = 4
    n_head: int = 8
    n_local_heads: int = 2
    dim: int = 256
    head_dim: int = 32
    block_size: int = 1024


class KVCache(nn.Module):
    def __init__(self, batch_size: int, max_seq_length: int, n_heads: int, head_dim: int):
        super().__init__()
        shape = (batch_size, n_heads, max_seq_length, head_dim)
        self.register_buffer("k_cache", torch.zeros(shape))
        self.register_buffer("v_cache", torch.zeros(shape))

    def update(self, input_pos: Tensor, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        k_out = self.k_cache
        v_out = self.v_cache
        k_out[:, :, input_pos] = k_val
        v_out[:, :, input_pos] = v_val
        return k_out, v_out


class Attention(nn.Module):
    def __init__(self, c: ModelArgs):
        super().__init__()
        self.c = c
        self.wqkv = nn.Linear(c.dim, (c.n_head + 2 * c.n_local_heads) * c.head_dim, bias=False)
        self.wo = nn.Linear(c.n_head * c.head_dim, c.dim, bias=False)
        self.kv_cache: KVCache | None = None

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        c, (bsz, seqlen, _) = self.c, x.shape
        kv_size = c.n_local_heads * c.head_dim
        q, k, v = self.wqkv(x).split([c.n_head * c.head_dim, kv_size, kv_size], dim=-1)
        q = apply_rotary_emb(q.view(bsz, seqlen, c.n_head, c.head_dim), freqs_cis)
        k = apply_rotary_emb(k.view(bsz, seqlen, c.n_local_heads, c.head_dim), freqs_cis)
        v = v.view(bsz, seqlen, c.n_local_heads, c.head_dim)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.kv_cache is not None:
            k, v = self.kv_cache.update(input_pos, k, v)
        k = k.repeat_interleave(c.n_head // c.n_local_heads, dim=1)
        v = v.repeat_interleave(c.n_head // c.n_local_heads, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        return self.wo(y.transpose(1, 2).contiguous().view(bsz, seqlen, -1))


class Block(nn.Module):
    def __init__(self, c: ModelArgs):
        super().__init__()
        self.attention = Attention(c)
        self.up, self.down = nn.Linear(c.dim, 4 * c.dim), nn.Linear(4 * c.dim, c.dim)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(c.dim), nn.RMSNorm(c.dim)

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs_cis, mask, input_pos)
        return h + self.down(F.silu(self.up(self.ffn_norm(h))))


class Transformer(nn.Module):
    def __init__(self, c: ModelArgs):
        super().__init__()
        self.c = c
        self.tok_embeddings = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm, self.output = nn.RMSNorm(c.dim), nn.Linear(c.dim, c.vocab_size, bias=False)

    def setup_caches(self, batch_size: int, max_seq_length: int) -> None:
        for b in self.layers:
            b.attention.kv_cache = KVCache(batch_size, max_seq_length, self.c.n_local_heads, self.c.head_dim)
        self.register_buffer("causal_mask", torch.tril(torch.ones(max_seq_length, max_seq_length, dtype=torch.bool)))
        self.register_buffer("freqs_cis", precompute_freqs_cis(max_seq_length, self.c.head_dim))

    def forward(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        mask = self.causal_mask[None, None, input_pos]
        freqs_cis = self.freqs_cis[input_pos]
        x = self.tok_embeddings(idx)
        for layer in self.layers:
            x = layer(x, freqs_cis, mask, input_pos)
        return self.output(self.norm(x))


def precompute_freqs_cis(seq_len: int, n_elem: int, base: int = 10000) -> Tensor:
    freqs = 1.0 / (base ** (torch.arange(0, n_elem, 2).float() / n_elem))
    angles = torch.outer(torch.arange(seq_len).float(), freqs)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    a, b = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = (t[None, :, None] for t in freqs_cis.unbind(-1))
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(3).type_as(x)


@torch.no_grad()
def generate(model: nn.Module, prompt: Tensor, max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """Greedy tokens and the logits that they were taken from."""
    logits = [model(prompt, torch.arange(prompt.shape[1]))[:, -1]]
    tokens = [logits[-1].argmax(-1, keepdim=True)]
    input_pos = torch.tensor([prompt.shape[1]])
    for _ in range(max_new_tokens - 1):
        logits.append(model(tokens[-1], input_pos)[:, -1])
        tokens.append(logits[-1].argmax(-1, keepdim=True))
        input_pos = input_pos + 1
    return torch.cat(tokens, dim=1), torch.stack(logits, dim=1)


def main(preset: str = "kivi-4bit") -> None:
    torch.manual_seed(0)
    model = Transformer(ModelArgs()).eval()
    model.setup_caches(batch_size=1, max_seq_length=model.c.block_size)
    prompt = torch.randint(0, model.c.vocab_size, (1, 300))

    compressed = copy.deepcopy(model)
    compiled = torch.compile(compressed, backend="kvc", options={"spec": preset, "strict": True}, fullgraph=True)

    want, full = generate(model, prompt, 64)
    got, logits = generate(compiled, prompt, 64)
    apart = (full.log_softmax(-1).exp() * (full.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()
    print(kvc.report(compressed))
    print(f"\n{(want == got).float().mean():.0%} of the greedy tokens agree; mean KL to the full cache {apart:.2g}")


if __name__ == "__main__":
    main(*sys.argv[1:])
