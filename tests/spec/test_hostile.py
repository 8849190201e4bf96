"""Spec files come from strangers: whatever the text, the answer is a Spec or a SpecError, soon, and nothing is run."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import random
import string
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvc_compile.spec import LayerSpec, NotImplementedInSpec, Spec, SpecError, presets, source
from kvc_compile.spec.spec import preset_text

SECONDS = 1.0
CASES = 3000
ROWS = yaml.safe_load((Path(__file__).parent / "systems.yaml").read_text())
SEEDS = [preset_text(name) for name in presets()]
SEEDS += [yaml.safe_dump({"kvc": 1, **row}, sort_keys=False) for row in ROWS.values()]
SEEDS += [json.dumps({"kvc": 1, **row}) for row in ROWS.values()]
SEEDS += ['kvc: 1\nbits: {k: 4, v: 2}\nlayers: {"0,-1": {bits: 8}, "1..9 by 2": {tokens: {recent: 128}}}\n']


@pytest.fixture
def sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for spec files, in which nothing else may be opened, and nothing run or imported."""
    monkeypatch.chdir(tmp_path)
    real = builtins.open

    def guarded(file: Any, *args: Any, **kwargs: Any) -> Any:
        assert Path(file).parent == tmp_path and args in (("rb",), ("wb",)), f"opened {file}"
        return real(file, *args, **kwargs)

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"called with {args!r:.80}")

    for text in ("kvc: 1\nbits: 4\n", "kvc: 1\nbitz: 4\n"):  # lazy imports happen before the seal
        (tmp_path / "first.yaml").write_text(text)
        with contextlib.suppress(SpecError):
            use(Spec.load(tmp_path / "first.yaml"))
    (tmp_path / "first.yaml").unlink()
    monkeypatch.setattr(builtins, "open", guarded)
    for module, name in ((builtins, "eval"), (builtins, "exec"), (os, "system"), (os, "popen")):
        monkeypatch.setattr(module, name, forbidden)
    yield tmp_path
    monkeypatch.undo()


def load(folder: Path, data: bytes, name: str = "s.yaml") -> Spec | SpecError:
    """What comes of these bytes; anything but a Spec or a SpecError fails the test."""
    path = folder / name
    with open(path, "wb") as handle:
        handle.write(data)
    start = time.process_time()
    try:
        spec = Spec.load(path)
        use(spec)
        return spec
    except SpecError as error:
        assert str(error).replace("\n", "").isprintable()
        return error
    finally:
        taken = time.process_time() - start
        assert taken < SECONDS, f"{taken:.1f} s for {data[:200]!r}"
        assert os.listdir(folder) == [name]


def use(spec: Spec) -> None:
    """What holds for every spec that loads."""
    text = spec.to_yaml()
    assert Spec.load(yaml.safe_load(text)) == spec, text
    assert hash(spec) == hash(Spec.load(spec.expanded()))
    try:
        layer = spec.layer(0, 32)
    except NotImplementedInSpec as error:
        assert error.paths
    except SpecError as error:
        assert "32 layers" in str(error) or "of 32" in str(error) or error.path == "select.index.basis.table"
    else:
        assert isinstance(layer, LayerSpec)
        for tensor in (layer.k, layer.v):
            unit = tensor.codec.block[0] if tensor.codec.block else 1
            assert tensor.flush % unit == 0 and (tensor.recent >= tensor.flush or tensor.flush == 1)


BOMB = "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*{'a' if i == 0 else f'b{i - 1}'}, *a]\n" for i in range(40))
HOSTILE = {
    "empty": "",
    "only spaces": " \n\t\n",
    "only a comment": "#" * 60000,
    "alias bomb": BOMB,
    "anchor": "kvc: &x 1\n",
    "alias": "kvc: *x\n",
    "recursive alias": "&x {kvc: 1, k: *x}",
    "merge key": "kvc: 1\n<<: {bits: 4}\n",
    "merge key, quoted": "kvc: 1\n'<<': {bits: 4}\n",
    "python object": "!!python/object/apply:os.system ['touch pwned']",
    "python name": "kvc: !!python/name:os.system\n",
    "binary": "kvc: !!binary aGk=\n",
    "set": "!!set {kvc, bits}",
    "own tag": "kvc: !x 1\n",
    "empty tag": "kvc: ! 1\n",
    "tag directive": "%TAG ! tag:evil,2000:\n---\nkvc: 1\n",
    "yaml directive": "%YAML 1.2\n---\nkvc: 1\n",
    "huge yaml version": "%YAML 1." + "9" * 5000 + "\n---\nkvc: 1\n",
    "two documents": "kvc: 1\n---\nkvc: 1\n",
    "list": "[kvc, 1]",
    "scalar": "kvc",
    "complex key": "? {kvc: 1}\n: 1\n",
    "list key": "? [kvc]\n: 1\n",
    "null key": "~: 1\n",
    "float key": "1.5: 1\n",
    "deep list": "kvc: " + "[" * 30000,
    "deep mapping": "{k: " * 15000,
    "deep block": "".join(" " * i + "k:\n" for i in range(300)),
    "deep dashes": "- " * 30000,
    "deep keys": "? " * 30000,
    "many keys": "".join(f"k{i}: 1\n" for i in range(6000)),
    "many items": "kvc: [" + "1," * 30000 + "]",
    "duplicate": "kvc: 1\nkvc: 1\n",
    "duplicate, deep": 'kvc: 1\nk: {codec: {int: 4, "int": 8}}\n',
    "nan": "kvc: .nan\n",
    "inf": "kvc: -.INF\n",
    "overflow": "kvc: 1e999\n",
    "huge int": "kvc: " + "9" * 5000,
    "beyond 64 bits": "kvc: 9223372036854775808\n",
    "huge int in a call": "kvc: 1\nkeep: {when: chunk(" + "9" * 60 + "), budget: 1}\n",
    "hex": "kvc: 0x1\n",
    "octal": "kvc: 01\n",
    "underscore": "kvc: 1_0\n",
    "sexagesimal": "kvc: 1:30\n",
    "timestamp": "kvc: 2001-12-14t21:59:43.10-05:00\n",
    "bad timestamp": "kvc: 2001-99-99\n",
    "huge escape": 'kvc: "\\UFFFFFFFF"\n',
    "surrogate": 'name: "\\ud800"\nkvc: 1\n',
    "terminal escape": 'kvc: 1\n"\\e[31mred": 1\n',
    "terminal escape in a value": 'kvc: "\\e]0;title\\a"\n',
    "long key": "kvc: 1\n" + "k" * 5000 + ": 1\n",
    "long value": "kvc: 1\nname: " + "n" * 5000 + "\n",
    "long range": "kvc: 1\nlayers: {'" + ",".join(map(str, range(80))) + "': {bits: 4}}\n",
    "unclosed": "kvc: [1\n",
    "unclosed quote": "kvc: '1\n",
    "control characters": "kvc: \x01\n",
    "tabs": "kvc:\t1\n\tbits: 4\n",
    "too large": "kvc: 1\n" + "#" * 70000,
    "code as budget": "kvc: 1\nkeep: {budget: __import__('os').system('touch pwned')}\n",
    "code as an expression": "kvc: 1\nkeep: {budget: (n).__class__*1}\n",
    "power": "kvc: 1\nkeep: {budget: 9**9**9**9}\n",
    "brackets": "kvc: 1\nkeep: {budget: '" + "(" * 1900 + "'}\n",
    "slow pattern": "kvc: 1\nattend: {split: ['" + "a" * 1900 + "!']}\n",
    "slow call": "kvc: 1\nkeep: {budget: 1, when: 'chunk" + " " * 1900 + "x'}\n",
    "slow range": "kvc: 1\nlayers: {'" + "0..9" * 24 + "': {}}\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_refused(sealed: Path, name: str) -> None:
    for file in ("s.yaml", "s.json"):
        assert isinstance(load(sealed, HOSTILE[name].encode(), file), SpecError)
        os.remove(sealed / file)


@pytest.mark.parametrize(
    "data", [b"\xff\xfek\0", b"kvc: 1\0", b"\0", b"\x80", "kvc: 1".encode("utf-16"), b"kvc: \xed\xa0\x80"]
)
def test_hostile_bytes_are_refused(sealed: Path, data: bytes) -> None:
    assert isinstance(load(sealed, data), SpecError)


def test_many_layers_over_a_large_base(sealed: Path) -> None:
    rules = [{"budget": 1, "score": {"attn": {"probe": ["all"] * 60, "reduce": "sum"}}} for _ in range(8)]
    parts = [{"codec": {"int": 4, "planes": [4, 4]}}] * 16
    base = {"kvc": 1, "keep": rules, "kv": {"basis": {"map": "svd", "parts": parts}}}
    for change in ({}, {"bits": 4}, {"kv": {"basis": {"rank": 4}}}):
        layers = {str(i): change for i in range(2800 // (1 + 4 * len(change)))}
        load(sealed, json.dumps({**base, "layers": layers}).encode())


def test_limits_are_not_too_tight(sealed: Path) -> None:
    assert isinstance(load(sealed, b"\xef\xbb\xbfkvc: 1\n"), Spec)  # a byte order mark is no harm
    layers = {str(i): {"bits": 8 if i % 2 else 4} for i in range(128)}
    assert isinstance(load(sealed, json.dumps({"kvc": 1, "layers": layers}).encode()), Spec)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "loop"])
def test_files_that_are_none(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(SpecError):
        Spec.load(path)


def test_hostile_mappings() -> None:
    loop: dict[str, Any] = {"kvc": 1}
    loop["draft"] = {"gamma": 1, "spec": loop}
    wide: list[Any] = ["x"]
    for _ in range(40):
        wide = [wide, wide]
    for data in (
        loop,
        {"k": wide},
        {"kvc": 10**5000},
        {"kvc": float("nan")},
        {"kvc": object()},
        {1.5: 2},
        {None: 1},
        {"k": {"codec": {"int": 4}, 5: 1}},
        {"layers": {0: {}, "0": {}}},
        {"kvc": True},
        {(1, 2): 3},
        {"k": {1}},
        {"name": "\ud800"},
        {"name": b"x"},
        {"layers": {10**5000: {}}},
    ):
        start = time.process_time()
        with pytest.raises(SpecError):
            Spec.load(data)
        assert time.process_time() - start < SECONDS


NASTY = [
    "&a ", "*a", "!!python/object:os.x ", "!t ", "<<: ", "---\n", "...\n", "%YAML 1.1\n", "? ", "- ", ": ", "{", "}",
    ",", "'", '"', "|\n", ">\n", "#", "\t", "\n", "\0", "\x1b[0m", "\u2028", "\ufeff", "\ud7ff", "9" * 40, "1e400",
    "]", ".nan", "1_0", "~", "null", "true", "off", "yes", "-1", "0", "65537", "1.5", "101%", "-5%", "3/0", "1/16",
    "[", "0x7f", "n*n*", "(n", "__import__('os')", "last 0", "chunk(", "every(x)", "all", "../x.json", "/x.json",
    "x.pt",
    "[" * 200, "{a: " * 60, "k: {codec: {int: 4}}\n", "bits: 4\n", "kvc: 1\n", "tokens: {recent: 1}\n",
    "layers: {'0..3': {bits: 8}}\n",
]  # fmt: skip


def mutate(text: str, rng: random.Random) -> bytes:
    """One to four small damages to a text."""
    for _ in range(rng.randint(1, 4)):
        kind = rng.randrange(9)
        at = rng.randrange(len(text) + 1)
        lines = text.split("\n")
        if kind == 0:
            text = text[:at]
        elif kind == 1:
            text = text[:at] + rng.choice(NASTY) + text[at:]
        elif kind == 2:
            text = text[:at] + text[at + rng.randint(1, 8) :]
        elif kind == 3:
            text = text[:at] + rng.choice(string.printable) + text[at + 1 :]
        elif kind == 4:  # a line or another seed's line again: duplicate keys, keys in the wrong place
            other = rng.choice([text, rng.choice(SEEDS)]).split("\n")
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(other))
            text = "\n".join(lines)
        elif kind == 5:
            rng.shuffle(lines)
            text = "\n".join(lines)
        else:  # a word for a word: wrong types, keys swapped
            words = text.replace(":", " : ").replace(",", " , ").split(" ")
            a, b = rng.randrange(len(words)), rng.randrange(len(words))
            if kind == 6:
                words[a], words[b] = words[b], words[a]
            else:
                words[a] = rng.choice(NASTY)
            text = " ".join(words)
        text = text[:20000]
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    if data and rng.random() < 0.1:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def test_mutated_files(sealed: Path) -> None:
    rng = random.Random(0)
    good = 0
    for i in range(CASES):
        good += isinstance(load(sealed, mutate(SEEDS[i % len(SEEDS)], rng)), Spec)
    assert CASES * 0.02 < good < CASES * 0.9  # the damage is neither always fatal nor never


def leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from leaves(value, (*path, key))


def replaced(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = replaced(data[path[0]], path[1:], value)
    return copy


VALUES: list[Any] = [None, True, False, 0, 1, -1, 3, 2**70, 1.5, "", "x", "off", "4", "25%", "1/2", "n", [], [[]], {},
                     {"int": 4}, {"x": 1}, [1, 1], [32, 1], "all", {"k": 1, "v": 2}, "last 3"]  # fmt: skip


def test_wrong_values_everywhere() -> None:
    """Each value of each seed replaced by values of other kinds."""
    rng = random.Random(1)
    for text in SEEDS[: len(presets()) + len(ROWS)]:
        data = yaml.safe_load(text)
        for path in leaves(data):
            for value in rng.sample(VALUES, 3):
                bad = replaced(data, path, value)
                if not isinstance(bad, dict):
                    continue
                with contextlib.suppress(SpecError):
                    use(Spec.load(bad))


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.sampled_from(NASTY))
WORDS = sorted({str(key) for text in SEEDS for path in leaves(yaml.safe_load(text)) for key in path})
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(WORDS), inner, max_size=4)),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(WORDS), TREES, max_size=5))
def test_any_mapping(data: dict[str, Any]) -> None:
    with contextlib.suppress(SpecError):
        use(Spec.load(data))


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.one_of(st.text(max_size=300), st.lists(st.sampled_from([*NASTY, *WORDS]), max_size=30).map("".join)))
def test_any_text(text: str) -> None:
    with contextlib.suppress(SpecError):
        source.parse(text, None)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    bits=st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([1, 2, 3, 4, 8])),
    tokens=st.sampled_from([1, 16, 32, 64, 128]),
    channels=st.one_of(st.integers(1, 256), st.just("all")),
    zero=st.booleans(),
    region=st.tuples(st.integers(0, 64), st.integers(0, 100), st.integers(1, 4)),
)
def test_what_is_implemented_means_what_it_says(
    bits: tuple[int, int], tokens: int, channels: Any, zero: bool, region: tuple[int, int, int]
) -> None:
    sink, extra, blocks = region
    flush = tokens * blocks
    spec = Spec.load(
        {
            "k": {"codec": {"int": bits[0], "block": [tokens, channels], "zero": zero}},
            "v": {"codec": {"int": bits[1]}},
            "tokens": {"sink": sink, "recent": flush + extra, "flush": {"k": flush, "v": 1}},
        }
    )
    use(spec)
    layer = spec.layer(0, 1)
    assert (layer.k.codec.bits, layer.v.codec.bits, layer.k.codec.zero_point) == (*bits, zero)
    assert layer.k.codec.block == (tokens, None if channels == "all" else channels)
    assert (layer.k.sink, layer.k.recent, layer.k.flush, layer.v.flush) == (sink, flush + extra, flush, 1)
