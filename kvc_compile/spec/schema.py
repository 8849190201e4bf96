"""The vocabulary of a spec, as data: the checker, `schema.json` and `docs/spec.md` all come from `SPEC`.

A key with done=True is implemented; every other key is checked and then refused by name (`Spec.require_implemented`).
To add a key: add a row here, run `python -m kvc_compile.spec.generate`.
"""

from __future__ import annotations

from typing import Any

from kvc_compile.policy import Unbuilt, query_of

from .grammar import (
    Apart,
    Bool,
    Call,
    Enum,
    Expr,
    File,
    Int,
    Key,
    List,
    Map,
    Num,
    OneOf,
    Pattern,
    Planned,
    Ratio,
    Ref,
    Resolved,
    Text,
    Tuple,
    Type,
)

VERSION = 1
BITS = (1, 2, 3, 4, 8)  # of an int codec
BLOCK_TOKENS = (1, 16, 32, 64, 128)  # tokens that can share one scale: the packing of 16-token tiles
SHORT_BITS = (*BITS, 16)
SHORT_BLOCKS = {"k": [32, 1], "v": [1, 64]}  # what `bits:` expands to: keys by channel, values by token (KIVI)
SHORT_SINGLE = [1, 32]  # of keys instead, where single tokens are replaced: as many bytes, but outliers share a scale
SHORT_TOKENS = {"sink": 4, "recent": {"k": 64, "v": 32}}  # what `bits:` adds where `tokens:` is absent
SHORT_PROBE = {"sink": 4, "recent": 32}  # what `budget:` adds where `tokens:` is absent (SnapKV's window)
BUILT_IN_LUTS = ("nf4",)
BUILT_IN_REGIONS = ("sink", "recent", "body", "rest")

PARTS: dict[str, Type] = {}  # named parts of the vocabulary; parts may contain each other


def part(name: str) -> Ref:
    return Ref(name, PARTS)


COUNT = Int(1, 1 << 24)
TOKENS = Int(0, 1 << 24)
INDEX = Int(-9999, 9999)
PERCENT = Pattern("25%", r"([0-9]{1,3}(?:\.[0-9]{1,6})?)%", "not a percentage", 100)
TIMES = Pattern("10x", r"([0-9]{1,4}(?:\.[0-9]{1,3})?)x", "not a multiple", 1e4)
UNITS = Pattern("64u", r"([0-9]{1,6})u", "not a number of units", 1e6)
NAME = Pattern("NAME", r"[A-Za-z_][A-Za-z0-9_-]{0,63}", "not a name (letters, digits, _ and -)")
RANGE = Pattern(
    "RANGE",
    r"-?[0-9]{1,4}(?:\.\.-?[0-9]{1,4}(?: by [1-9][0-9]{0,3})?)?"
    r"(?: ?, ?-?[0-9]{1,4}(?:\.\.-?[0-9]{1,4}(?: by [1-9][0-9]{0,3})?)?){0,63}",
    "not a range of layers",
)
CONDITION = Pattern(
    "name < number",
    r"[a-z_][a-z0-9_]{0,31} ?(?:<|<=|>|>=|==|!=) ?(?:[0-9]{1,9}(?:\.[0-9]{1,9})?|[a-z_][a-z0-9_]{0,31})",
    "not a comparison of a name with a number or a word",
)
AMOUNT = part("amount")
PARTS["amount"] = OneOf(
    TOKENS, PERCENT, Ratio(), Expr(("n",))
)  # of tokens, channels or dims, whichever the key is about
CELL = OneOf(Num(-1e6, 1e6), NAME)
TABLE = OneOf(File(), List(List(CELL, hi=1024), hi=1024))  # a row for each layer, an entry for each KV head


def just(key: str, kind: Type, doc: str) -> Map:
    """A mapping with this one key."""
    return Map({key: Key(kind, doc, required=True)})


WHEN = part("when")
PARTS["when"] = OneOf(
    Enum("prefill_end", "append", "decoded", "decode", "prefill", "prompt", "replay_end"),
    Call("chunk", COUNT),
    Call("every", COUNT),
    Call("decoded", Int(1, 1 << 16)),
    Map(
        {
            "full": Key(
                Map({"slack": Key(AMOUNT, "room left after the pass", required=True)}),
                "when the store is full",
                required=True,
            )
        }
    ),
)
WHENS = OneOf(WHEN, List(WHEN))
ALLOC = part("alloc")
PARTS["alloc"] = OneOf(
    Enum("uniform"),
    Map(
        {
            "pyramid": Key(Num(0, 1000), "linear over layers, with this ratio of first to last", True),
            "table": Key(TABLE, "shares of layers and heads"),
            "waterfill": Key(Enum("head", "layer", "model"), "one threshold over this scope", True),
            "mass": Key(Enum("layer"), "by the attention mass that a layer's best tokens hold", True),
            "softmax": Key(NAME, "softmax over layers of this statistic", True),
            "entropy": Key(Enum("layer"), "by the entropy of a layer's scores"),
            "beta": Key(Num(0, 1000), "with `table`: how far shares may differ"),
            "floor": Key(AMOUNT, "with `waterfill`: least share", True),
            "cap": Key(OneOf(AMOUNT, TIMES), "with `waterfill`: largest share", True),
        },
        one_of=("pyramid", "table", "waterfill", "mass", "softmax", "entropy"),
        need=True,
    ),
)

PROBE = part("probe")
PARTS["probe"] = OneOf(
    Enum("all", "step", "text"),
    Call("last", OneOf(COUNT, PERCENT), spaced=True),
    Call("rand", OneOf(COUNT, PERCENT), spaced=True),
    Call("replay", COUNT),
)
TAU = OneOf(Num(0, 1000), Tuple(Num(0, 1000), Num(0, 1000)))
PARTS["attention"] = Map(
    {
        "probe": Key(
            OneOf(PROBE, List(PROBE)),
            "which queries vote: all, the last ones, random ones, ..",
            required=True,
            done=True,
        ),
        "reduce": Key(
            OneOf(Enum("sum", "mean", "max"), Call("count_below", OneOf(Num(0, 1), Expr(("t", "n"))))),
            "over the probes",
            required=True,
            done=True,
        ),
        "weight": Key(
            just("gumbel", just("tau", TAU, "temperature, or [first, last]"), "Gumbel noise"), "of the logits"
        ),
        "pool": Key(
            OneOf(Call("max", Int(1, 1024), True), Call("avg", Int(1, 1024), True)), "over neighbouring tokens", True
        ),
        "gqa": Key(Enum("mean", "max", "sum"), "over the query heads that share a KV head", True),
        "heads": Key(Enum("mean", "sum"), "over KV heads", True),
        "across": Key(Enum("layers"), "accumulate over layers", True),
    }
)
GRAPH_DECAY = Map(
    {
        "seeds": Key(COUNT, "tokens that start", True),
        "lambda": Key(Num(0, 1), "decay of similar tokens", True),
        "rounds": Key(Int(1, 64), "of propagation", True),
    }
)
PARTS["score"] = OneOf(
    Enum("fifo", "same"),
    Map(
        {
            "attn": Key(
                OneOf(part("attention"), List(part("attention"), hi=8)), "attention weights that tokens receive", True
            ),
            "kv": Key(
                OneOf(Enum("norm", "diff"), Call("lag", COUNT), Call("deviation", Enum("k", "v"))),
                "from keys and values",
                True,
            ),
            "learned": Key(OneOf(File(), NAME), "a small trained scorer"),
            "in": Key(List(Enum("q", "k", "v"), hi=3), "inputs of the trained scorer"),
            "then": Key(
                OneOf(Call("mask", CONDITION), just("graph_decay", GRAPH_DECAY, "lower tokens like better ones")),
                "applied to the score",
                True,
            ),
            "combine": Key(Enum("max", "sum"), "of several attention scores", True),
            "order": Key(Enum("asc", "desc"), "asc: the lowest stay (default desc)", True),
        },
        one_of=("attn", "kv", "learned"),
        need=True,
    ),
)

CENTROID = Map({"iters": Key(Int(1, 1000), "k-means iterations")})
VQ = Map(
    {
        "dim": Key(Int(1, 1024), "numbers per vector", required=True),
        "codes": Key(Int(2, 1 << 20), "entries of the codebook", required=True),
        "metric": Key(NAME, "of the nearest code"),
        "grid": Key(NAME, "a fixed codebook, such as higgs"),
    }
)
PARTS["codec"] = Map(
    {
        "int": Key(
            Int(only=(1, 2, 3, 4, 5, 6, 7, 8), done=BITS),
            "bits per number; codes are affine: value = scale * (code - centre) + the block's middle",
            True,
        ),
        "fp": Key(Int(only=(4, 8, 16), done=(8, 16)), "8: float8 e4m3; 16: the model's own dtype (lossless)", True),
        "levels": Key(Int(2, 256), "this many levels, such as 3 for ternary"),
        "lut": Key(NAME, "non-uniform levels: nf4, or a name under `calib`"),
        "vq": Key(VQ, "vector quantisation"),
        "block": Key(
            Tuple(
                OneOf(Int(1, 1 << 16, done=BLOCK_TOKENS, name="tokens"), Planned(Enum("static", "all"))),
                OneOf(Int(1, 1 << 16, name="channels"), Enum("all")),
            ),
            "[tokens, channels] that share one scale; default [1, all] for int, none for fp",
            True,
        ),
        "zero": Key(Bool(), "true (default): the block's middle is stored too; false: symmetric around 0", True),
        "clip": Key(Num(0, 1), "scale by this share of the range"),
        "norm": Key(Enum("channel", "token"), "divide by this norm first"),
        "outliers": Key(
            Map({"frac": Key(PERCENT, "share of numbers"), "cap": Key(COUNT, "at most, per vector")}),
            "numbers kept exactly, as a sparse part",
        ),
        "residual": Key(
            Map({"rank": Key(COUNT, "of the factors", required=True), "iters": Key(Int(1, 64), "power iterations")}),
            "a low-rank part of the error",
        ),
        "sparse": Key(
            Map(
                {
                    "keep": Key(PERCENT, "share of numbers kept", required=True),
                    "along": Key(Enum("token", "channel"), "axis of the top-k", required=True),
                }
            ),
            "bitmap sparsity",
        ),
        "planes": Key(List(Int(1, 8), hi=8), "bits per plane, most significant first"),
        "refine": Key(just("if", CONDITION, "when to read the next plane"), "read lower planes on demand"),
    },
    one_of=("int", "fp", "levels", "lut", "vq"),
)
OVER = OneOf(Enum("head", "layer"), Call("heads", OneOf(Int(1, 1024), Enum("all"))), Call("layers", Int(1, 1024)))
STACK = List(Enum("q", "k", "v"), hi=3)
ONE_MAP = part("map")
PARTS["map"] = OneOf(
    Enum("hadamard", "random", "fft", "svd", "pca", "channels", "balance"),
    Call("pca", File()),
    Call("permute", File()),
    Map(
        {
            "pca": Key(just("stack", STACK, "what is stacked"), "PCA of several tensors together"),
            "channels": Key(
                Map({"by": Key(NAME, "statistic", required=True), "probe": Key(PROBE, "which queries")}),
                "choose channels",
            ),
        },
        one_of=("pca", "channels"),
        need=True,
    ),
    File(),
)
RANK = OneOf(
    AMOUNT,
    Map(
        {"energy": Key(Num(0, 1), "share of variance"), "table": Key(File(), "from a file")},
        one_of=("energy", "table"),
        need=True,
    ),
)
PARTS["basis"] = Map(
    {
        "map": Key(OneOf(ONE_MAP, List(ONE_MAP, hi=8)), "the linear map, or several in order"),
        "table": Key(File(), "with `map: channels`: which ones"),
        "rank": Key(RANK, "channels kept: a number, a share, an energy or a table"),
        "over": Key(OVER, "what the map mixes: channels of one head, of g heads, of a layer, of a group of layers"),
        "joint": Key(Enum("kv"), "one latent for keys and values; only under `kv`"),
        "fit": Key(Enum("calib", "prefill"), "where the map comes from (default calib)"),
        "absorb": Key(Enum("auto", "write", "both"), "fold the map into the model's weights"),
        "parts": Key(
            List(
                Map(
                    {
                        "map": Key(ONE_MAP, "a further map"),
                        "dims": Key(AMOUNT, "channels of the part"),
                        "codec": Key(part("codec"), "of the part", required=True),
                    }
                ),
                hi=16,
            ),
            "a codec for each group of channels",
        ),
    }
)
VIA = OneOf(Enum("copy"), Call("slerp", Num(0, 1)), Call("linear", File()))
PARTS["ref"] = Map(
    {
        "layer": Key(
            OneOf(INDEX, Enum("pair"), Call("group", Int(2, 1024))),
            "which layer predicts this one; -1: the one before it; group(n): the first of every n",
            required=True,
        ),
        "via": Key(VIA, "how (default copy)"),
        "also": Key(Enum("k"), "values may be predicted from keys too"),
        "keep_norm": Key(Bool(), "keep each vector's own norm"),
        "except": Key(PERCENT, "share of tokens stored on their own"),
    }
)
ROPE = part("rope")
PARTS["rope"] = OneOf(
    Enum("pre", "post"), Call("split", Int(1, 4096)), just("split", just("table", File(), "dims"), "by table")
)
REPR = Map(
    {
        "codec": Key(
            OneOf(part("codec"), Planned(List(part("codec"), hi=8))),
            "how numbers are stored (default: the model's dtype); a list: one for each age",
            True,
        ),
        "basis": Key(part("basis"), "linear map over channels, before the codec"),
        "ref": Key(part("ref"), "store the difference to another layer"),
        "rope": Key(ROPE, "keys are stored before or after the rotary embedding (default post)"),
        "tier": Key(Enum("gpu", "cpu", "disk"), "where the store lives (default gpu)"),
    }
)
PARTS["repr"] = REPR

ASSIGN = OneOf(Enum("nearest", "nearest_pos", "adjacent", "single"), Call("learned", File()))
MERGE = Map(
    {
        "assign": Key(ASSIGN, "into which token", required=True, done=True),
        "weight": Key(Enum("mean", "gauss", "exp_cos", "pivot", "count"), "of the merged token", True),
        "min_cos": Key(OneOf(Num(-1, 1), Call("ema", Num(0, 1))), "least cosine similarity", True),
        "zero_class": Key(Bool(), "tokens like no other are dropped", True),
        "slots": Key(COUNT, "merged tokens kept"),
    }
)
ELSE = OneOf(
    Enum("drop"),
    Map(
        {
            "merge": Key(MERGE, "into tokens that stay", True),
            "fold": Key(
                Map(
                    {
                        "map": Key(File(), "feature map", required=True),
                        "rank": Key(COUNT, "of the state", required=True),
                    }
                ),
                "into a linear-attention state",
            ),
            "demote": Key(part("repr"), "store at lower precision"),
        },
        one_of=("merge", "fold", "demote"),
        need=True,
    ),
)
REUSE = OneOf(Enum("pair"), Call("layers", Int(1, 1024)))
PARTS["rule"] = Map(
    {
        "of": Key(
            OneOf(Enum("prompt", "generated", "visual"), Call("tail", COUNT)), "region it is about (default all)"
        ),
        "when": Key(WHENS, "at which moments it runs", True),
        "budget": Key(
            OneOf(
                AMOUNT,
                TIMES,
                Enum("all"),
                Map({"mass": Key(Num(0, 1), "share of attention", required=True), "cap": Key(AMOUNT, "at most")}),
            ),
            "tokens kept per head, besides the regions",
            True,
        ),
        "score": Key(part("score"), "what makes a token worth keeping", True),
        "unit": Key(
            OneOf(
                Enum("token"),
                Map(
                    {
                        "chunk": Key(COUNT, "tokens", required=True),
                        "reduce": Key(Enum("mean", "max", "sum"), "over the chunk"),
                    }
                ),
            ),
            "what stays or goes together",
            True,
        ),
        "alloc": Key(ALLOC, "how the budget is shared by layers and heads", True),
        "protect": Key(just("newest", COUNT, "tokens"), "tokens that this pass does not touch", True),
        "diverse": Key(
            Map(
                {
                    "share": Key(PERCENT, "of the budget", required=True),
                    "sketch": Key(NAME, "of a token"),
                    "buckets": Key(NAME, "how sketches are grouped"),
                }
            ),
            "a share kept for variety",
            True,
        ),
        "reuse": Key(REUSE, "the same indices for a group of layers", True),
        "refresh": Key(WHEN, "when everything is computed again"),
        "else": Key(ELSE, "what becomes of the others (default drop)", True),
    }
)
# what of a rule does not run yet is found by `laws_tokens`, from its meaning
PARTS["keep"] = OneOf(Enum("off"), Apart(part("rule")), Apart(List(part("rule"), hi=8)))

INDEX_KEYS: dict[str, Key] = {
    "codec": Key(part("codec"), "of the sketch", done=True),
    "basis": Key(part("basis"), "of the sketch", done=True),
    "rope": Key(ROPE, "of the sketch"),
    "pool": Key(
        OneOf(Enum("mean", "minmax"), just("centroid", CENTROID, "k-means")), "one sketch for a unit", done=True
    ),
    "center": Key(Enum("mean"), "subtract first", done=True),
    "learned": Key(OneOf(File(), NAME), "a trained index"),
    "ann": Key(Enum("graph"), "approximate nearest neighbours"),
}
PARTS["query"] = Map(
    {
        "index": Key(
            OneOf(Enum("exact"), Map(INDEX_KEYS, one_of=("learned", "ann"))),
            "what queries are compared with: the keys, or a sketch of them",
            done=True,
            required=True,
        ),
        "unit": Key(
            OneOf(
                Enum("token"),
                Call("chunk", COUNT),
                Call("cluster", OneOf(COUNT, Ratio())),
                Call("segment", NAME),
                just("segment", just("token_in", NAME, "a set of tokens"), "segments end at these tokens"),
            ),
            "what is read together (default token)",
            done=True,
        ),
        "budget": Key(OneOf(AMOUNT, UNITS), "tokens (or units, 64u) that a query reads", done=True, required=True),
        "query": Key(OneOf(Enum("token"), Call("mean", NAME), Call("weighted", NAME)), "what asks"),
        "gqa": Key(Enum("max", "mean", "sum"), "over the query heads that share a KV head", done=True),
        "when": Key(WHENS, "at which moments"),
        "at": Key(List(Int(0, 9999), ascending=True), "layers that select", done=True),
        "reuse": Key(Enum("until_next"), "other layers read the same tokens", done=True),
        "alloc": Key(ALLOC, "how the budget is shared"),
        "estimator": Key(Enum("topk", "sample"), "exact top-k, or sampling"),
        "match": Key(
            just(
                "collide",
                Map(
                    {
                        "K": Key(Int(1, 64), "bits", required=True),
                        "L": Key(Int(1, 4096), "tables", required=True),
                        "min": Key(Int(1, 4096), "collisions needed"),
                    }
                ),
                "hash tables",
            ),
            "how the sketch is compared",
        ),
        "pin": Key(just("outliers", COUNT, "units"), "always read", done=True),
        "run": Key(Enum("gpu", "cpu"), "where attention over the rest runs"),
    }
)


def _selects(data: Any) -> None:
    query = query_of(data)
    if query is not None and query.index.kind == "hash" and query.index.file:
        raise Unbuilt("select.index: a hash that is read from a file")


PARTS["select"] = OneOf(Enum("off"), Resolved(part("query"), _selects))
ATTEND = Map(
    {
        "when": Key(WHEN, "in which phase"),
        "pos": Key(
            OneOf(
                Enum("original", "cache", "segment", "shift"),
                Map(
                    {
                        "window": Key(COUNT, "tokens", required=True),
                        "far": Key(Enum("const"), "beyond it", required=True),
                    }
                ),
            ),
            "positions that the rotary embedding sees",
        ),
        "mask": Key(OneOf(Enum("causal", "segments", "full", "kept"), Call("graph", NAME)), "who sees whom"),
        "split": Key(List(NAME, hi=16), "regions attended apart and merged by log-sum-exp"),
        "bias": Key(Enum("none", "count", "importance"), "added to the logits of merged tokens"),
        "schedule": Key(Enum("splitk", "streamk"), "of the decode kernel"),
    }
)
COS = just("cos", Tuple(Num(0, 1), Num(0, 1)), "share at the first and the last layer, cosine between")
SKIP = Map(
    {
        "max": Key(Int(1, 9999), "layers", required=True),
        "min": Key(Int(1, 9999), "layers", required=True),
        "warmup": Key(Int(0, 9999), "layers"),
        "by": Key(Enum("position"), "what decides"),
    }
)
FLOW = Map(
    {
        "at": Key(OneOf(INDEX, Enum("each")), "the layer after which fewer tokens flow"),
        "skip_layers": Key(just("schedule", SKIP, "layers per token"), "tokens skip layers"),
        "rebuild": Key(COUNT, "tokens computed again at each step"),
        "keep": Key(OneOf(AMOUNT, just("schedule", COS, "over layers")), "tokens that flow on"),
        "score": Key(part("score"), "which ones"),
        "heads": Key(Enum("sum"), "over heads"),
        "writes": Key(Enum("overwrite"), "computed keys and values replace the stored ones"),
    },
    one_of=("at", "skip_layers", "rebuild"),
    need=True,
)

BOTH = "; {k, v}: apart for keys and values"
TOKENS_MAP = Map(
    {
        "sink": Key(
            OneOf(Int(0, 1 << 16), Planned(Call("massive", COUNT)), Planned(Enum("init_prompt"))),
            "the first tokens, which stay in the model's dtype for ever (default 0)",
            True,
        ),
        "recent": Key(
            OneOf(
                Int(0, 1 << 16),
                Map({s: Key(Int(0, 1 << 16), f"of {n}", True, True) for s, n in (("k", "keys"), ("v", "values"))}),
                Apart(PERCENT),
                Planned(Enum("generated")),
            ),
            "at most this many newest tokens stay in the model's dtype (default: `flush` if above 1, else 0)" + BOTH,
            True,
        ),
        "flush": Key(
            OneOf(
                Int(1, 1 << 16),
                Map({s: Key(Int(1, 1 << 16), f"of {n}", True, True) for s, n in (("k", "keys"), ("v", "values"))}),
            ),
            "how many of the oldest are encoded at once, a multiple of the block's tokens (default: those)" + BOTH,
            True,
        ),
        "ages": Key(List(COUNT, ascending=True), "ages in tokens at which the next codec of a list takes over"),
    }
)
SHARE = Map(
    {"layers": Key(Int(2, 1024), "layers that share one cache"), "heads": Key(Int(2, 1024), "heads that share one")},
    one_of=("layers", "heads"),
    need=True,
)
SHORT_BIT = Int(only=SHORT_BITS)
SHORT = {
    "bits": Key(
        OneOf(SHORT_BIT, Map({s: Key(SHORT_BIT, f"of {n}", True, True) for s, n in (("k", "keys"), ("v", "values"))})),
        "short form: bits per number, 16 is lossless; {k, v}: apart for keys and values",
        True,
    ),
    "budget": Key(OneOf(COUNT, PERCENT), "short form: tokens kept per head", True),
    "rank": Key(OneOf(COUNT, PERCENT), "short form: channels kept per head"),
    "share": Key(SHARE, "short form: one cache for several layers or heads"),
}
FRAGMENT_KEYS: dict[str, Key] = {
    "tokens": Key(TOKENS_MAP, "which tokens are stored in the model's dtype: the first, the newest", True),
    "k": Key(part("repr"), "how keys are stored", True),
    "v": Key(part("repr"), "how values are stored", True),
    "kv": Key(part("repr"), "how keys and values are stored; `k` and `v` refine it", True),
    "keep": Key(part("keep"), "which tokens stay, and what becomes of the others (default off)", True),
    "select": Key(part("select"), "which stored tokens a query reads (default off: all)", True),
    "attend": Key(ATTEND, "positions, masks, regions, schedule"),
}
PARTS["fragment"] = Map({**SHORT, **FRAGMENT_KEYS})
REGION = Map({"shared": Key(Enum("batch"), "one copy for the batch"), **REPR.keys})
LAYERS = Map(
    {"kv_of": Key(List(Int(0, 9999), hi=10000), "for each layer, the layer whose cache it uses")},
    open=(
        RANGE,
        Key(part("fragment"), 'what differs in these layers: "0,1", "0..3", "16..31 by 2", "-1" is the last', True),
    ),
)
HEADS_TOP = OneOf(COUNT, PERCENT)
HEADS = Map(
    {
        "table": Key(TABLE, "by layer and KV head: the name of a class, or a score", required=True),
        "top": Key(
            Map(
                {}, open=(NAME, Key(OneOf(HEADS_TOP, Map({}, open=(NAME, Key(HEADS_TOP, "of one table")))), "how many"))
            ),
            "of scores: which class the best heads of the model are in, and how many they are; by several tables of "
            "a file: {CLASS: {TABLE: 14%}}",
        ),
    },
    open=(NAME, Key(part("fragment"), "what differs in the heads of this class")),
)
SPEC_KEYS: dict[str, Key] = {
    **FRAGMENT_KEYS,
    "flow": Key(FLOW, "which tokens later layers compute"),
    "regions": Key(Map({}, open=(NAME, Key(REGION, "a named region"))), "named regions with their own representation"),
    "layers": Key(LAYERS, "what differs by layer", True),
    "heads": Key(HEADS, "what differs by head"),
    "prefix": Key(
        Map(
            {
                "from": Key(OneOf(Call("store", NAME), Call("model", NAME)), "where from", required=True),
                "pos": Key(Enum("shift", "original"), "positions"),
                "via": Key(Call("linear", File()), "map"),
            }
        ),
        "keys and values computed elsewhere",
    ),
    "calib": Key(Map({}, open=(NAME, Key(File(), "an artefact"))), "names of artefacts"),
}
PARTS["draft"] = Map(
    {
        "spec": Key(part("body"), "the spec of the drafting pass", required=True),
        "gamma": Key(Int(1, 64), "tokens drafted", required=True),
        "inner": Key(
            Map({"model": Key(NAME, "a smaller model", required=True), **SHORT, **SPEC_KEYS}),
            "what drafts for the draft",
        ),
    }
)
PARTS["body"] = Map({**SHORT, **SPEC_KEYS})
SPEC = Map(
    {
        "kvc": Key(Int(only=(VERSION,)), "version of this vocabulary; required in a file", True),
        "name": Key(Text(80), "for reports (default: the file's name)", True),
        "description": Key(Text(200), "one line for people", True),
        **SHORT,
        **SPEC_KEYS,
        "draft": Key(part("draft"), "self-speculation with a lighter spec"),
    }
)
FORMATS: dict[str, Any] = {  # the strings with a form of their own, for the reference page
    "RANGE": 'layers, from 0, negative from the end: `"0,1"`, `"0..3"` (0 to 3), `"16..31 by 2"`, `"-1"`',
    "25%": "of the current length (tokens) or width (channels), at the moment the rule fires",
    "1/16": "a fraction, likewise",
    "0.25*n": "arithmetic (`+ - * /`, brackets) on numbers and n, the current length; parsed, never evaluated as code",
    "10x, 64u": "a multiple of the budget; a number of units",
    "FILE": "an artefact in the spec's folder or below: `.safetensors`, `.json` or `.tsv`; no `..`",
    "NAME": "letters, digits, `_` and `-`",
}
