"""Published methods of keeping and selecting tokens, each written from its description, for one sequence.

Independent of the package: its own attention matrix, loops, Python sets. Shapes: q [Hq, n, D], k and v [H, n, D], query
head h belongs to KV head h // (Hq / H). Ties go to the earlier token.
"""

from __future__ import annotations

import math

import torch


def attention(q, k, scale=None):
    """The causal softmax matrix [Hq, n, n]."""
    group = q.shape[0] // k.shape[0]
    n = k.shape[1]
    out = torch.zeros(q.shape[0], n, n, dtype=q.dtype)
    for h in range(q.shape[0]):
        logits = q[h] @ k[h // group].T * (scale or q.shape[-1] ** -0.5)
        logits[torch.ones(n, n, dtype=torch.bool).triu(1)] = -math.inf
        out[h] = logits.softmax(-1)
    return out


def groups(x, heads):
    """The mean of [Hq, ..] over the query heads of each of `heads` KV heads."""
    return torch.stack([part.mean(0) for part in x.chunk(heads)])


def top(score, k, among):
    """The k best of the tokens `among`, sorted."""
    ranked = sorted(among, key=lambda t: (-float(score[t]), t))
    return sorted(ranked[: max(0, k)])


def middle(n, sink, recent):
    return list(range(min(sink, n), max(min(sink, n), n - recent)))


def with_regions(chosen, n, sink, recent):
    body = set(middle(n, sink, recent))
    return sorted((set(range(n)) - body) | set(chosen))


def by_score(score, n, budget, sink, recent):
    return with_regions(top(score, budget, middle(n, sink, recent)), n, sink, recent)


def streaming_llm(n, sink, window):
    return sorted(set(range(min(sink, n))) | set(range(max(0, n - window), n)))


def h2o_scores(q, k):
    return groups(attention(q, k).sum(1), k.shape[0])


def scissorhands_scores(q, k, window):
    """How often, of the last `window` queries, a token got less than an equal share; the fewer the better."""
    a = attention(q, k)
    n = k.shape[1]
    count = torch.zeros(q.shape[0], n, dtype=q.dtype)
    for h in range(q.shape[0]):
        for i in range(max(0, n - window), n):
            for t in range(i + 1):
                count[h, t] += float(a[h, i, t] < 1 / (i + 1))
    return -groups(count, k.shape[0])


def pool(row, kind, size):
    """Over a neighbourhood of `size` in a row of scores; what is beyond its ends counts as 0 in an average."""
    out = row.clone()
    for t in range(len(row)):
        near = [row[j] for j in range(t - size // 2, t - size // 2 + size) if 0 <= j < len(row)]
        out[t] = max(near) if kind == "max" else sum(near) / size
    return out


def snapkv_scores(q, k, window, kind="max", size=7):
    """Attention of the last `window` queries to what is before them, pooled."""
    n = k.shape[1]
    w = min(window, n)
    seen = attention(q, k)[:, n - w :].sum(1)
    out = groups(seen, k.shape[0])
    for h in range(k.shape[0]):
        out[h, : n - w] = pool(out[h, : n - w], kind, size)
    return out


def keyformer_scores(q, k, noise, tau):
    n, group = k.shape[1], q.shape[0] // k.shape[0]
    f = torch.zeros(q.shape[0], n, dtype=q.dtype)
    for h in range(q.shape[0]):
        x = q[h] @ k[h // group].T * q.shape[-1] ** -0.5
        for i in range(n):
            e = ((x[i, : i + 1] + noise[h, : i + 1]) / tau).exp()
            f[h, : i + 1] += e / e.sum()
    return groups(f, k.shape[0])


def zipcache_scores(q, k, queries):
    """Attention of some queries, divided by how many of them see the token."""
    a, n = attention(q, k), k.shape[1]
    out = torch.zeros(q.shape[0], n, dtype=q.dtype)
    for t in range(n):
        see = [i for i in queries if i >= t]
        if see:
            out[:, t] = sum(a[:, i, t] for i in see) / len(see)
    return groups(out, k.shape[0])


def lagkv_scores(k, v, sink, lag):
    """Place in its partition by the spread of normalised channels; 1 where no whole partition follows."""
    n = k.shape[1]
    out = torch.ones(k.shape[0], n, dtype=k.dtype)
    whole = (n - sink) // lag if n > sink else 0
    for h in range(k.shape[0]):
        for part in range(whole - 1):
            a = sink + part * lag
            total = 0
            for x in (k[h], v[h]):
                ref = x[a + lag : a + 2 * lag]
                low, high = ref.min(0).values, ref.max(0).values
                total = total + ((x[a : a + lag] - low) / (high - low)).std(-1).softmax(0)
            for place, t in enumerate(sorted(range(lag), key=lambda t: (float(total[t]), t))):
                out[h, a + t] = place / lag
    return out


def graphkv_scores(score, k, body, seeds, strength):
    out = score.clone()
    for h in range(k.shape[0]):
        best = top(score[h], seeds, body)
        for t in body:
            if t not in best:
                near = max(float(torch.cosine_similarity(k[h, t], k[h, s], dim=0)) for s in best)
                out[h, t] *= 1 - strength * max(0.0, near)
    return out


def kvcrush(score, n, budget, proxies, sink, recent):
    """budget - proxies tokens by score, and one of each of `proxies` groups of similar head codes."""
    body, heads = middle(n, sink, recent), score.shape[0]
    if budget >= len(body):
        return [list(range(n))] * heads
    code = {t: [float(score[h, t]) > float(score[h, body].mean()) for h in range(heads)] for t in body}
    distance = {t: sum(bit != (h % 2 == 1) for h, bit in enumerate(code[t])) for t in body}
    out = []
    for h in range(heads):
        chosen = set(top(score[h], budget - proxies, body))
        rest = sorted((t for t in body if t not in chosen), key=lambda t: (distance[t], t))
        for g in range(proxies):
            members = [t for i, t in enumerate(rest) if i * proxies // len(rest) == g]
            chosen |= set(top(score[h], 1, members))
        out.append(with_regions(chosen, n, sink, recent))
    return out


def windowkv(score, n, budget, chunk, sink, recent):
    """Whole windows by their mean score, as long as they fit."""
    body = middle(n, sink, recent)
    windows = [body[i : i + chunk] for i in range(0, len(body), chunk)]
    out = []
    for h in range(score.shape[0]):
        chosen, left = [], budget
        for w in sorted(windows, key=lambda w: (-float(score[h, w].mean()), w[0])):
            if len(w) > left:
                break
            chosen += w
            left -= len(w)
        out.append(with_regions(chosen, n, sink, recent))
    return out


def prefixkv_counts(scores, n, budget, sink, recent):
    """scores: [H, n] of each layer. One share p for all layers, by bisection."""
    body = middle(n, sink, recent)
    ordered = [sorted((float(s.mean(0)[t]) for t in body), reverse=True) for s in scores]

    def size(p):
        out = []
        for row in ordered:
            held = kept = 0
            while kept < len(row) and held / sum(row) < p:
                held += row[kept]
                kept += 1
            out.append(kept)
        return out

    low, high = 0.0, 1.0
    for _ in range(200):
        p = (low + high) / 2
        low, high = (p, high) if sum(size(p)) <= budget * len(scores) else (low, p)
    return size(low)


def adakv(score, n, budget, floor, sink, recent):
    """The heads of a layer compete for the budget; each keeps its own best `floor`."""
    body = middle(n, sink, recent)
    safe = [set(top(s, floor, body)) for s in score]
    pairs = [(h, t) for h in range(len(score)) for t in body if t not in safe[h]]
    pairs.sort(key=lambda x: (-float(score[x[0], x[1]]), x))
    for h, t in pairs[: budget * len(score) - sum(map(len, safe))]:
        safe[h].add(t)
    return [with_regions(s, n, sink, recent) for s in safe]


def dynamickv_counts(scores, n, budget, cap, sink, recent):
    """How many of the best (layer, head, token) of all lie in each layer, per head."""
    body, heads = middle(n, sink, recent), scores[0].shape[0]
    pairs = []
    for layer, s in enumerate(scores):
        for h in range(heads):
            pairs += [(-float(s[h, t]), layer, h, t) for t in top(s[h], cap, body)]
    best = sorted(pairs)[: budget * heads * len(scores)]
    return [sum(1 for x in best if x[1] == layer) // heads for layer in range(len(scores))]


def pyramid_counts(budget, layers, beta):
    """PyramidKV: the last layer has budget / beta, the first 2 budget - budget / beta, those between on a line."""
    last = budget / beta
    first = 2 * budget - last
    return [first - (first - last) * i / (layers - 1) for i in range(layers)]


def headkv_counts(share, budget, beta):
    """share: [L, H], adding up to 1."""
    layers, heads = share.shape
    return [
        [budget - budget // beta + round(float(share[i, h]) * (budget / beta) * layers * heads) for h in range(heads)]
        for i in range(layers)
    ]


def merged(k, v, kept, target, weights, own):
    """Weighted means: token t joins target[t] with weights[t], a kept token j weighs own[j]. [len(kept), D] of each."""
    out = []
    for x in (k, v):
        rows = []
        for j in kept:
            members = [t for t in target if target[t] == j]
            total = own[j] + sum(weights[t] for t in members)
            rows.append((own[j] * x[j] + sum((weights[t] * x[t] for t in members), torch.zeros_like(x[j]))) / total)
        out.append(torch.stack(rows))
    return out


def cos(a, b):
    return float(torch.dot(a, b) / (a.norm() * b.norm()))


def nearest(k, kept, n, least=-1.0):
    """The most similar kept key of each other token, if similar enough."""
    out = {}
    for t in sorted(set(range(n)) - set(kept)):
        best = max(kept, key=lambda j: (cos(k[t], k[j]), -j))
        if cos(k[t], k[best]) >= least:
            out[t] = best
    return out


def nearest_position(kept, n):
    return {t: min(kept, key=lambda j: (abs(j - t), j)) for t in sorted(set(range(n)) - set(kept))}


def runs(k, body, least):
    """KVMerger's sets: consecutive tokens, each similar to the one before."""
    out = []
    for t in body:
        if out and out[-1][-1] == t - 1 and cos(k[t], k[t - 1]) > least:
            out[-1].append(t)
        else:
            out.append([t])
    return out


def softmax(x):
    e = [math.exp(y - max(x)) for y in x]
    return [y / sum(e) for y in e]


def h2o_like(q, k, window):
    """Attention of the last `window` queries, not pooled."""
    return groups(attention(q, k)[:, max(0, k.shape[1] - window) :].sum(1), k.shape[0])
