"""Published ways to select tokens, each written from its description, for one query of one sequence.

Independent of the package. Shapes: q [Hq, D], k [H, n, D], the visible tokens; `first` is the slot of the first one,
for pages. Each gives for every KV head the sorted tokens that the query reads. Ties go to the earlier one.
"""

from __future__ import annotations

import paper
import torch


def tidaldecode(q, k, scale, budget, first=0, sink=0, recent=0):
    """The best tokens by softmax weights among those that compete, the mean of a group."""
    return double_sparsity(q, k, scale, budget, [list(range(k.shape[2]))] * len(k), first, sink, recent)


def double_sparsity(q, k, scale, budget, channels, first=0, sink=0, recent=0):
    """Scores of a few channels of each head."""

    def score(h):
        body = paper.middle(k.shape[1], sink, recent)
        out = torch.zeros(k.shape[1], dtype=q.dtype)
        c = channels[h]
        out[body] = weights(q[:, c], k[h][body][:, c], h, len(k), scale).mean(0)
        return out

    return tokens(score, k, budget, sink, recent)


def hata(q, k, scale, budget, w, first=0, sink=0, recent=0):
    """Bits of hashes that agree, summed over a group."""

    def score(h):
        codes = k[h] @ w[h] >= 0
        return sum(((x @ w[h] >= 0) == codes).sum(-1) for x in group(q, h, len(k)))

    return tokens(score, k, budget, sink, recent)


def quest(q, k, scale, budget, size, first=0, sink=0, recent=0):
    """Pages by the largest score that their least and largest keys allow, the largest weight of a group."""
    units = pages(k.shape[1], first, size, sink, recent)
    found = []
    for h in range(len(k)):
        low = torch.stack([k[h][u].min(0).values for u in units]) if units else k[h][:0]
        high = torch.stack([k[h][u].max(0).values for u in units]) if units else k[h][:0]
        x = group(q, h, len(k))[:, None]
        bound = torch.maximum(x * low, x * high).sum(-1)
        score = (bound * scale).softmax(-1).max(0).values
        found.append(paper.with_regions(best(score, units, budget), k.shape[1], sink, recent))
    return found


def shadowkv(q, k, scale, budget, size, pin, first=0, sink=0, recent=0):
    """Pages by their mean key, and the `pin` ones with the key least like it."""
    units = pages(k.shape[1], first, size, sink, recent)
    found = []
    for h in range(len(k)):
        mean = [k[h][u].mean(0) for u in units]
        least = [min(paper.cos(k[h, t], m) for t in u) for u, m in zip(units, mean)]
        pinned = sorted(range(len(units)), key=lambda i: (least[i], i))[:pin]
        rest = [i for i in range(len(units)) if i not in pinned]
        chosen = [t for i in pinned for t in units[i]]
        if rest:
            landmarks = torch.stack([mean[i] for i in range(len(units))])
            score = (group(q, h, len(k)) @ landmarks.T * scale).softmax(-1).max(0).values
            chosen += best(score[rest], [units[i] for i in rest], budget)
        found.append(paper.with_regions(chosen, k.shape[1], sink, recent))
    return found


def clusterkv(q, k, scale, budget, share, iters, first=0, sink=0, recent=0):
    """Clusters of alike keys, the largest weight of a group, whole until the budget and the last one cut."""
    body = paper.middle(k.shape[1], sink, recent)
    found = []
    for h in range(len(k)):
        count = min(max(1, k.shape[1] // share), len(body))
        centroid, member = kmeans(k[h][body], count, iters)
        used = sorted(set(member.tolist()))
        score = (group(q, h, len(k)) @ centroid[used].T * scale).softmax(-1).max(0).values if used else []
        chosen = []
        for i in sorted(range(len(used)), key=lambda i: (-float(score[i]), i)):
            chosen += [body[t] for t in range(len(body)) if member[t] == used[i]]
        found.append(paper.with_regions(chosen[:budget], k.shape[1], sink, recent))
    return found


def kmeans(k, clusters, iters):
    """From evenly spaced tokens, by cosine; a cluster without tokens keeps its centroid."""
    centroid = k[[i * len(k) // clusters for i in range(clusters)]]
    unit = k / k.norm(dim=-1, keepdim=True)
    for step in range(iters + 1):
        member = (unit @ (centroid / centroid.norm(dim=-1, keepdim=True)).T).argmax(-1)
        if step < iters:
            own = [k[member == c] for c in range(clusters)]
            centroid = torch.stack([x.mean(0) if len(x) else old for x, old in zip(own, centroid)])
    return centroid, member


def group(q, h, heads):
    """The query heads of KV head h."""
    return q.unflatten(0, (heads, -1))[h]


def weights(q, k, h, heads, scale):
    return (group(q, h, heads) @ k.T * scale).softmax(-1)


def tokens(score, k, budget, sink, recent):
    n = k.shape[1]
    return [paper.by_score(score(h), n, budget, sink, recent) for h in range(len(k))]


def pages(n, first, size, sink=0, recent=0):
    """Pages of `size` slots of a row that starts at slot `first`: tokens outside the regions."""
    out = {}
    for t in paper.middle(n, sink, recent):
        out.setdefault((first + t) // size, []).append(t)
    return list(out.values())


def best(score, units, budget):
    chosen, left = [], budget
    for i in sorted(range(len(units)), key=lambda i: (-float(score[i]), i)):
        if len(units[i]) > left:
            break
        chosen += units[i]
        left -= len(units[i])
    return chosen
