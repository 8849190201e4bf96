"""The tuning database and what fills it, with fakes in the GPU's place: keys, files, choices, bounds, processes."""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from dataclasses import astuple, fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvc_compile import timings
from kvc_compile.cli import tune as command
from kvc_compile.layout import Codec, Layout
from kvc_compile.lowering import candidates as cand
from kvc_compile.lowering import general, tuned, tuning
from kvc_compile.lowering.decoding import Tiles
from kvc_compile.lowering.general import Blocks
from kvc_compile.lowering.tuned import Problem
from kvc_compile.request import OptionError, Request
from kvc_compile.spec import Spec
from kvc_compile.timings import Database, Entry, Key, TimingsError

ROOT = Path(__file__).parent.parent
GPU = torch.device("cuda", 0)
KL = Layout(Codec("int", 4, (64, 1), True), 8, 128, "float16", 4, 64, 64, 16)
VL = Layout(Codec("int", 4, (1, 128), True), 8, 128, "float16", 4, 32, 1, 16)
DECODE = Problem(KL, VL, 4, 1, torch.float16, 8, 32800)
GENERAL = replace(DECODE, dtype=torch.float32, k=replace(KL, dtype="float32"), v=replace(VL, dtype="float32"))
KEY = Key("0123456789abcdef", "decode", KL.key, VL.key, 8, "float16", 64, 32768, "Test GPU", "3.6.0")


@pytest.fixture
def database(tmp_path, monkeypatch) -> Database:
    """This process's database, in a folder of its own, on a GPU that is not there."""
    made = Database(tmp_path / "tuning", tmp_path / "shipped")
    monkeypatch.setattr(tuned, "database", lambda: made)
    monkeypatch.setattr(tuned, "device_name", lambda device: "Test GPU")
    monkeypatch.setattr(tuned, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(tuned, "shared_memory", lambda device: 227 << 10)
    monkeypatch.setattr(timings, "_warned", set())
    tuned.chosen.cache_clear()
    yield made
    tuned.chosen.cache_clear()


class FakeBench:
    """Microseconds by formula; counts what is asked of it."""

    def __init__(self, us=lambda c: 100.0, broken=(), unfit=(), cost=lambda: None):
        self.us, self.broken, self.unfit, self.cost = us, broken, unfit, cost
        self.compiled, self.timed = [], []

    def compile(self, c):
        self.compiled.append(c)
        if c in self.broken:
            raise RuntimeError("PassManager::run failed")

    def time(self, c):
        self.timed.append(c)
        self.cost()
        if c in self.unfit:
            raise tuning.Unfit("out of shared memory")
        return self.us(c)


def entry_of(p: Problem, us) -> Entry:
    return Entry(p.key(GPU), tuple((astuple(c), us(c)) for c in p.candidates))


def run_tune(bench, problems=(DECODE,), **more):
    return tuning.tune(problems, GPU, lambda p, d: bench, **more)


# ---------------------------------------------------------------- keys


def test_the_key_is_frozen():
    """What is stored stays found: a change here is a new VERSION."""
    assert timings.VERSION == 1 and KEY.family == "03ed67bc18e665c1"
    assert [f.name for f in fields(Key)] == (
        ["source", "kernel", "k", "v", "rows", "dtype", "programs", "tokens", "device", "triton"]
    )
    assert list(timings.SIZES["decode"]) == [f.name for f in fields(Tiles)]
    assert list(timings.SIZES["attend"]) == [f.name for f in fields(Blocks)]


def test_every_part_of_the_key_counts():
    for f in fields(Key):
        old = getattr(KEY, f.name)
        other = replace(KEY, **{f.name: old * 2 if isinstance(old, int) else old + "x"})
        assert (other.family == KEY.family) == (f.name in ("programs", "tokens")), f.name


def test_keys_of_problems(database):
    key = DECODE.key(GPU)
    assert (key.kernel, key.rows, key.programs, key.tokens, key.device) == ("decode", 8, 64, 32768, "Test GPU")
    assert GENERAL.key(GPU).kernel == "attend"
    same = replace(DECODE, groups=7, batch=7, room=30000)
    assert same.key(GPU) == key
    for other in ({"groups": 16}, {"batch": 32}, {"room": 65536}, {"v": replace(VL, recent=33)}, {"n": 3}):
        assert replace(DECODE, **other).key(GPU) != key, other
    assert [timings.bucket(n) for n in (1, 2, 3, 5, 6, 32800, 46340, 46341)] == [1, 2, 4, 4, 8, 32768, 32768, 65536]


@pytest.mark.parametrize("kernel", tuned.SOURCES)
def test_the_digest_covers_all_that_a_kernel_is_made_of(kernel):
    """Every file of kernels/ that it imports, and so on."""
    found, todo = set(), [f"kernels/{kernel}.py"]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvc_compile.kernels"):
                module = node.module.removeprefix("kvc_compile.kernels").strip(".")
                todo += [f"kernels/{m}.py" for m in ([module] if module else [a.name for a in node.names])]
    assert found == {name for name in tuned.SOURCES[kernel] if name.startswith("kernels/")}


@pytest.mark.parametrize("kernel", tuned.SOURCES)
def test_the_digest_changes_with_each_file(kernel, tmp_path, monkeypatch):
    for name in ("kernels", "lowering"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    before = tuned.source(kernel)
    monkeypatch.setattr(tuned.resources, "files", lambda package: tmp_path)
    seen = {before}
    for name in tuned.SOURCES[kernel]:
        tuned.source.cache_clear()
        assert tuned.source(kernel) in seen
        with open(tmp_path / name, "a") as f:
            f.write("# another kernel\n")
        tuned.source.cache_clear()
        assert tuned.source(kernel) not in seen
        seen.add(tuned.source(kernel))
    tuned.source.cache_clear()


# ---------------------------------------------------------------- candidates and the choice


def test_candidates_are_few_and_the_rule_is_first():
    for p in (DECODE, GENERAL, replace(DECODE, n=40), replace(DECODE, k=replace(VL, recent=64))):
        variants = p.candidates[: len(p.candidates) // len(cand.SHARES)]
        assert 3 <= len(variants) <= cand.MOST and len(set(p.candidates)) == len(p.candidates)
        assert variants[0] == cand.candidates.__wrapped__(
            tuned.form(p.k), tuned.form(p.v), tuned.rows_bucket(p.rows), p.dtype
        )[0]  # fmt: skip
        for c in p.candidates:  # what is stored is accepted when it is read
            entry = Entry(replace(KEY, kernel="decode" if isinstance(c, Tiles) else "attend"), ((astuple(c), 1.5),))
            assert timings.parse(timings.text_of([entry]).encode()) == (entry,)


def test_rows_of_a_bucket_have_the_rules_own_sizes():
    """Tuning for the bucket is tuning for each of its numbers of rows."""
    for rows, dtype in itertools.product(range(1, 200), (torch.float16, torch.float32)):
        p = Problem(KL, VL, 1, rows, dtype, 1, 4096)
        rule = cand.decoding.tiles(tuned.form(KL), tuned.form(VL), rows, dtype)
        assert p.candidates[0] == (rule or cand.blocks(rows, 128, dtype.itemsize, True)), rows


def test_the_choice_is_deterministic():
    among = DECODE.candidates
    dice = random.Random(0)
    rows = [(astuple(c), 50.0 + i % 5) for i, c in enumerate(among)]
    for _ in range(20):
        dice.shuffle(rows)
        assert cand.best(rows, among) == among[0]  # the first of equals
    rows = [(astuple(among[3]), 9.0), (astuple(among[2]), None), (astuple(replace(among[0], CK=16)), 1.0)]
    assert cand.best(rows, among) == among[3]  # neither what failed nor what is no candidate
    assert cand.best(rows[1:], among) is None


def test_a_launch_takes_the_fastest(database):
    rule = DECODE.candidates[0]
    args = KL.key, VL.key, 4, 1, torch.float16, 8, 32800, GPU
    assert tuned.chosen(*args)[0] == rule
    want = DECODE.candidates[-1]
    tuned.save(entry_of(DECODE, lambda c: 10.0 if c == want else 20.0))
    sizes, splits = tuned.chosen(*args)
    assert sizes == want and splits == tuned.splits(want, DECODE, GPU)
    assert tuned.splits(replace(rule, waves=2), DECODE, GPU) > tuned.splits(rule, DECODE, GPU)


def test_a_prompt_on_a_gpu_with_less_shared_memory(database, monkeypatch):
    args = KL.key, VL.key, 4, 4096, torch.float16, 1, 8192, GPU
    assert tuned.chosen(*args)[0] == Blocks(128, 64, 8, 3)  # 128 KiB, as Triton says
    assert general.shared_bytes(Blocks(128, 64, 8, 3), 128, 128, 2) == 128 << 10
    for kib, stages in ((163, 3), (99, 2), (48, 1)):
        monkeypatch.setattr(tuned, "shared_memory", lambda device, kib=kib: kib << 10)
        tuned.chosen.cache_clear()
        assert tuned.chosen(*args)[0] == Blocks(128, 64, 8, stages)


def test_a_warm_lookup_reads_no_file(database, monkeypatch):
    tuned.save(entry_of(DECODE, lambda c: 10.0))
    database.families.clear()
    room = DECODE.room
    first = tuned.chosen(KL.key, VL.key, 4, 1, torch.float16, 8, room, GPU)

    def fail(*args, **kwargs):
        raise AssertionError("a file is read")

    for name in ("open", "stat", "listdir", "scandir"):
        monkeypatch.setattr(os, name, fail)
    monkeypatch.setattr("builtins.open", fail)
    assert tuned.chosen(KL.key, VL.key, 4, 1, torch.float16, 8, room, GPU) is first
    for other in range(room, 4 * room, 256):  # a cache that grows
        assert tuned.chosen(KL.key, VL.key, 4, 1, torch.float16, 8, other, GPU)[0] == first[0]


# ---------------------------------------------------------------- where entries come from


def entry(programs: int, tokens: int, us: float, key: Key = KEY) -> Entry:
    return Entry(replace(key, programs=programs, tokens=tokens), ((astuple(DECODE.candidates[0]), us),))


def test_the_nearest_bucket(tmp_path):
    first = Database(tmp_path)
    for programs, tokens in ((8, 4096), (64, 4096), (256, 32768), (64, 131072)):
        first.save(entry(programs, tokens, 1.0))
    first.save(entry(64, 32768, 1.0, replace(KEY, device="Another GPU")))
    first.save(entry(64, 32768, 1.0, replace(KEY, rows=16)))
    for base in (first, Database(tmp_path)):
        near = [(e.key.programs, e.key.tokens) for e in base.ranked(KEY)]
        assert near == [(256, 32768), (64, 131072), (64, 4096), (8, 4096)]  # 2 steps: the one of fewer tokens first
        assert base.find(KEY) is None


def test_precedence(tmp_path):
    (tmp_path / "my-spec.yaml").write_text("kvc: 1\n")
    beside = timings.beside(Spec.load(tmp_path / "my-spec.yaml"))
    assert beside == tmp_path / "my-spec.tuning.json"
    assert timings.beside(Spec.load("int4")) is None and timings.beside(Spec.load({"kvc": 1})) is None
    base = Database(tmp_path / "user", tmp_path / "shipped")
    found = []
    timings.write(tmp_path / "shipped" / "h100.json", timings.text_of([entry(64, 32768, 1.0), entry(64, 65536, 9.0)]))
    found.append(base.find(KEY).timings[0][1])
    base.save(entry(64, 32768, 2.0))
    found.append(base.find(KEY).timings[0][1])
    assert not base.use(beside)
    timings.write(beside, timings.text_of([entry(64, 32768, 3.0)]))
    assert base.use(beside) and not base.use(beside)
    found.append(base.find(KEY).timings[0][1])
    assert found == [1.0, 2.0, 3.0]
    assert [e.timings[0][1] for e in base.ranked(KEY)] == [3.0, 2.0, 1.0, 9.0]


def test_the_users_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("KVC_TUNING_DIR", str(tmp_path / "mine"))
    assert timings.user_folder() == tmp_path / "mine"
    monkeypatch.delenv("KVC_TUNING_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert timings.user_folder() == tmp_path / "kvc_compile" / "tuning"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard says to ignore it
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert timings.user_folder() == tmp_path / "home" / ".cache" / "kvc_compile" / "tuning"


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(timings, "_warned", set())
    (tmp_path / "file").write_text("not a folder")
    base = Database(tmp_path / "file")
    base.save(entry(64, 32768, 2.0))
    assert base.find(KEY) is not None and "cannot be stored" in caplog.text
    with base.alone(KEY, 0):
        pass


# ---------------------------------------------------------------- files from strangers


GOOD = timings.text_of([entry(8, 4096, 10.5), entry(64, 32768, 20.25)])


def test_the_text_reads_well_and_back():
    assert json.loads(GOOD)["entries"][0]["timings"][0]["us"] == 10.5
    assert timings.text_of(reversed(timings.parse(GOOD.encode()))) == GOOD
    assert max(map(len, GOOD.splitlines())) < 400 and len(GOOD.splitlines()) == 10


def damaged(path, value) -> bytes:
    data = json.loads(GOOD)
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return json.dumps(data).encode()


PATHS = [("version",), ("entries",), ("entries", 0), ("entries", 0, "key"), ("entries", 1, "cut_short")]
PATHS += [("entries", 0, "key", f.name) for f in fields(Key)] + [
    ("entries", 1, "timings"),
    ("entries", 1, "timings", 0),
]
PATHS += [("entries", 1, "timings", 0, name) for name in (*timings.SIZES["decode"], "us")]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=300) | st.just(10**400),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.binary(max_size=300) | st.integers(0, len(GOOD)).map(lambda n: GOOD[:n].encode())
       | st.tuples(st.sampled_from(PATHS), JSON).map(lambda x: damaged(*x)))  # fmt: skip
def test_any_file_is_read_or_refused(data):
    """What is accepted is within the limits, and written back reads as the same."""
    try:
        entries = timings.parse(data)
    except TimingsError as error:
        assert "found" in str(error) and "allowed" in str(error) and str(error).isprintable()
        return
    assert timings.parse(timings.text_of(entries).encode()) == tuple(sorted(entries, key=lambda e: e.key))
    for e in entries:
        for sizes, us in e.timings:
            limits = timings.SIZES[e.key.kernel].values()
            assert all(low <= x <= high for x, (low, high) in zip(sizes, limits, strict=True))
            assert us is None or 0 < us <= timings.MAX_US


@pytest.mark.parametrize(
    "path, value, said",
    [
        (("version",), 2, "version: found 2, allowed: 1"),
        (("entries", 0, "timings", 0, "CK"), 48, "entries[0].timings[0].CK: found 48, allowed: powers of two"),
        (("entries", 0, "timings", 0, "BM"), True, "BM: found true"),
        (("entries", 0, "timings", 0, "warps"), 2.0, "warps: found 2.0"),
        (("entries", 0, "timings", 0, "stages"), 10**400, "stages: found an integer beyond 64 bits"),
        (("entries", 0, "timings", 0, "us"), float("nan"), "us: found nan, allowed: microseconds, or null"),
        (("entries", 0, "timings", 0, "us"), -1, "us: found -1"),
        (("entries", 0, "timings", 0, "code"), "x", "timings[0]: found a mapping with"),
        (("entries", 0, "key", "kernel"), "os.system", "kernel: found 'os.system', allowed: decode, attend"),
        (("entries", 0, "key", "device"), "\x1b[2J", "device: found '\\x1b[2J'"),
        (("entries", 0, "key", "tokens"), 3, "tokens: found 3"),
        (("entries", 0, "key", "v"), "v" * 201, "v: found"),
        (("entries", 0, "timings"), [{}] * 300, "timings: found a list of 300, allowed: a list of up to 256"),
    ],
)
def test_a_bad_file_says_what_is_wrong(path, value, said):
    with pytest.raises(TimingsError) as error:
        timings.parse(damaged(path, value))
    assert said in str(error.value)


def test_large_and_deep_files_are_refused(tmp_path):
    for data in (b" " * (timings.MAX_BYTES + 1), b"[" * 100_000, b'{"version": ' + b"9" * 5000 + b"}", b"\xff"):
        with pytest.raises(TimingsError):
            timings.parse(data)
    with pytest.raises(TimingsError, match="regular file"):
        timings.read(tmp_path)


def test_bad_files_are_skipped_with_one_warning_and_kept(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(timings, "_warned", set())
    base = Database(tmp_path)
    base.save(entry(64, 32768, 5.0))
    folder = tmp_path / KEY.family
    bad = {"8x4096.json": b"{", "8x8192.json": GOOD[:-40].encode(), "16x4096.json": b"\0" * 10}
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    (folder / "notes.txt").write_text("mine")
    (folder / ".64x32768.json.abc").write_text("half wri")  # what a killed process leaves
    for _ in range(2):
        assert [e.timings[0][1] for e in Database(tmp_path).ranked(KEY)] == [5.0]
    assert sorted(r.args[0].name for r in caplog.records) == sorted(bad)
    assert all((folder / name).read_bytes() == data for name, data in bad.items()) and len(list(folder.iterdir())) == 6


# ---------------------------------------------------------------- tuning


class Ticks:
    """A clock that moves by itself as far as it is told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def step(self, seconds):
        self.now += seconds


def test_all_is_timed_once_and_reused(database):
    fastest = DECODE.candidates[4]
    bench = FakeBench(lambda c: 50.0 if c == fastest else 60.0 + c.waves)
    (found,) = run_tune(bench)
    variants = DECODE.candidates[: len(DECODE.candidates) // len(cand.SHARES)]
    assert set(bench.compiled) == set(variants) and bench.timed[: len(variants)] == list(variants)
    assert len(bench.timed) == len(variants) + tuning.LEADERS * (len(cand.SHARES) - 1)
    assert not found.cut_short and cand.best(found.timings, DECODE.candidates) == fastest
    assert {c.waves for c in bench.timed} == {share * DECODE.candidates[0].waves for share in cand.SHARES}
    again = FakeBench()
    assert run_tune(again) == [found] and not again.compiled and not again.timed
    assert Database(database.folder).find(DECODE.key(GPU)) == found  # another process


def test_what_fails_is_noted_and_not_chosen(database):
    variants = DECODE.candidates[: len(DECODE.candidates) // len(cand.SHARES)]
    bench = FakeBench(lambda c: 1.0 if c in variants[1:3] else 30.0, broken=variants[1:2], unfit=variants[2:3])
    (found,) = run_tune(bench)
    assert dict(found.timings)[astuple(variants[1])] is None and dict(found.timings)[astuple(variants[2])] is None
    assert cand.best(found.timings, DECODE.candidates) == variants[0] and variants[1] not in bench.timed


def test_time_is_bounded(database):
    """It stops after the candidate at which the time runs out, and stores what it has: the rule first of all."""
    clock = Ticks()
    bench = FakeBench(cost=lambda: clock.step(10))
    (found,) = run_tune(bench, now=clock)
    assert clock.now == tuning.SECONDS and found.cut_short and len(found.timings) == 6
    assert bench.timed[0] == DECODE.candidates[0]
    more = FakeBench()
    assert run_tune(more) == [found] and not more.timed  # a compile takes what there is
    (whole,) = run_tune(more, finish=True)  # `kvc tune` goes on from there
    assert not whole.cut_short and not set(more.timed) & set(bench.timed)
    assert dict(found.timings).items() <= dict(whole.timings).items()


def test_many_problems_share_the_time(database):
    clock = Ticks()
    problems = [replace(DECODE, room=1024 << i) for i in range(6)]
    bench = FakeBench(cost=lambda: clock.step(5))
    found = run_tune(bench, problems, now=clock)
    assert len(found) == 6 and all(e.timings and e.cut_short for e in found) and clock.now <= tuning.SECONDS + 5


def test_a_compiler_that_hangs_is_left_behind(database):
    variants = DECODE.candidates[: len(DECODE.candidates) // len(cand.SHARES)]
    never = threading.Event()

    class Hanging(FakeBench):
        def compile(self, c):
            if c != variants[0]:
                never.wait(60)

    bench = Hanging()
    try:
        (found,) = run_tune(bench, seconds=1.0)
    finally:
        never.set()
    assert found.cut_short and set(bench.timed) <= {
        c for c in DECODE.candidates if replace(c, waves=variants[0].waves) == variants[0]
    }


def test_without_time_or_memory_nothing_is_stored(database, caplog):
    def no_memory(p, device):
        raise torch.OutOfMemoryError

    assert run_tune(FakeBench(), seconds=0) == []
    assert tuning.tune([DECODE], GPU, no_memory) == [] and "no memory" in caplog.text
    assert run_tune(FakeBench(unfit=DECODE.candidates)) == []
    assert not list(database.folder.rglob("*.json"))


def test_one_line_if_it_takes_long(database, capsys):
    clock = Ticks()
    run_tune(FakeBench(), now=clock)
    assert capsys.readouterr().err == ""
    run_tune(FakeBench(cost=lambda: clock.step(0.9)), [GENERAL], now=clock)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "kvc: tuning attention over int4 by 64x1 / int4 by 1x128, 8 x 32800 tokens" in err


# ---------------------------------------------------------------- processes


PRELUDE = """
import os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
from kvc_compile.timings import Database, Entry, Key
KEY = Key("0123456789abcdef", "decode", "k", "v", 8, "float16", 64, 32768, "Test GPU", "3.6.0")
SIZES = (8, 64, 16, 64, 64, 1, 3, 1.0)
def entry(programs, tokens, us):
    many = tuple(((*SIZES[:6], s, w), us) for s in range(1, 9) for w in (0.25, 0.5, 1.0, 2.0, 4.0))
    return Entry(replace(KEY, programs=programs, tokens=tokens), many)
folder = Path(sys.argv[1])
"""


def start(code: str, *args: object) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-P", "-c", PRELUDE + code, *map(str, args)], **pipes)


def test_eight_processes_share_one_database(tmp_path):
    """All start to write at once, each 20 buckets of its own and one that is everyone's."""
    code = """
me = int(sys.argv[2])
base = Database(folder)
print("ready", flush=True)
sys.stdin.readline()
for i in range(20):
    base.save(entry(1 << me, 1 << i, 1.0 + me))
    base.save(entry(1 << 10, 1, 1.0 + me))
"""
    running = [start(code, tmp_path, me) for me in range(8)]
    for p in running:
        assert p.stdout.readline() == "ready\n"
    for p in running:
        p.stdin.write("go\n")
        p.stdin.flush()
    for p in running:
        _, err = p.communicate(timeout=60)
        assert p.returncode == 0 and not err, err
    key = replace(KEY, k="k", v="v")
    found = {e.key: e for e in Database(tmp_path).ranked(key)}
    assert len(found) == 8 * 20 + 1
    for me, i in itertools.product(range(8), range(20)):
        assert {us for _, us in found[replace(key, programs=1 << me, tokens=1 << i)].timings} == {1.0 + me}
    assert len({us for _, us in found[replace(key, programs=1 << 10, tokens=1)].timings}) == 1  # one writer's, whole


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_killed_at_any_moment_leaves_it_readable(tmp_path):
    """100 writers are killed after a random while; each time every file is whole and holds what one of them wrote."""
    code = """
Database(folder).save(entry(1, 1, 0.5))
dice, killed = random.Random(0), 0
while killed < 100:
    child = os.fork()
    if not child:
        base, i = Database(folder), 0
        while True:
            i += 1
            base.save(entry(1 << i % 4, 1, float(i)))
    time.sleep(dice.uniform(0.002, 0.02))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    killed += 1
    found = Database(folder).ranked(KEY)
    assert 1 <= len(found) <= 4, found
    assert all(len(e.timings) == 40 and len({us for _, us in e.timings}) == 1 for e in found)
    names = {p.name for p in (folder / KEY.family).iterdir() if not p.name.startswith(".")}
    assert names == {f"{e.key.programs}x1.json" for e in found}, names
print(killed, len(list((folder / KEY.family).iterdir())))
"""
    out, err = start(code, tmp_path).communicate(timeout=120)
    assert out.startswith("100 ") and not err, err


@pytest.mark.skipif(timings.fcntl is None, reason="no locks here")
def test_one_process_tunes_at_a_time(database, tmp_path):
    """A second one waits, and uses what the first has stored; if that is killed, it goes on."""
    code = """
from kvc_compile import timings
base = Database(folder)
with base.alone(replace(KEY, device="Test GPU"), 0):
    print("locked", flush=True)
    sys.stdin.readline()
"""
    holder = start(code, database.folder)
    assert holder.stdout.readline() == "locked\n"
    bench = FakeBench()
    assert run_tune(bench, seconds=0.2) == [] and not bench.timed  # in vain
    stored = entry_of(DECODE, lambda c: 7.0)
    timer = threading.Timer(0.3, lambda: (Database(database.folder).save(stored), holder.kill()))
    timer.start()
    assert run_tune(bench, seconds=60) == [stored] and not bench.timed
    timer.join()
    holder.communicate()


# ---------------------------------------------------------------- in a compile


def graph_of(q=(2, 32, 1, 128), room=1000, device="cuda", dtype=torch.float16):
    """A rewritten graph: one attention, as the backend sees it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from kvc_compile.lowering import ops  # noqa: F401

    graph = torch.fx.Graph()
    with FakeTensorMode(allow_non_fake_inputs=True):
        new = torch.empty(q[0], 8, q[2], 128, dtype=dtype, device=device)
        k, v = (torch.empty(q[0], x.row_bytes(room), dtype=torch.uint8, device=device) for x in (KL, VL))
        values = [torch.empty(*q, dtype=dtype, device=device), k, v, new, new]
    nodes = []
    for i, x in enumerate(values):
        nodes.append(graph.placeholder(f"x{i}"))
        nodes[-1].meta["example_value"] = x
    for _ in range(2):  # two layers
        out = graph.call_function(
            torch.ops.kvc.attend.default, (*nodes, None, None, True, 0.1, KL.key, VL.key)
        )  # fmt: skip
    graph.output((out,))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def test_what_a_graph_will_run():
    from kvc_compile.tune import problems_of

    ((p, device),) = problems_of(graph_of())
    assert device == GPU and (p.k, p.v, p.groups, p.n, p.batch) == (KL, VL, 4, 1, 2)
    assert 1000 < p.room <= 1000 + VL.unit + VL.flush + 1
    assert problems_of(graph_of(device="cpu")) == []


def test_a_compile_tunes_unless_told_otherwise(database, monkeypatch, tmp_path):
    from kvc_compile import tune
    from kvc_compile.lowering import replay

    asked = []

    class Bench(FakeBench):
        def __init__(self, p, device):
            super().__init__(lambda c: 1.0 + p.candidates.index(c))
            asked.append(p)

    monkeypatch.setattr(replay, "GraphBench", Bench)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("KVC_TUNE", raising=False)
    gm = graph_of()
    tune.tune(graph_of(device="cpu"), Request.of({"kvc": 1}))
    tune.tune(gm, Request.of({"kvc": 1, "tune": False}))
    monkeypatch.setenv("KVC_TUNE", "0")
    tune.tune(gm, Request.of({"kvc": 1, "tune": True}))
    monkeypatch.delenv("KVC_TUNE")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    tune.tune(gm, Request.of({"kvc": 1}))
    assert not asked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tune.tune(gm, Request.of({"kvc": 1}))
    assert len(asked) == 1 and database.find(asked[0].key(GPU)) is not None
    tune.tune(gm, Request.of({"kvc": 1}))
    assert len(asked) == 1

    database.families.clear()  # another machine, which has the exported file
    shutil.move(database.folder / asked[0].key(GPU).family / "16x1024.json", tmp_path / "s.tuning.json")
    (tmp_path / "s.yaml").write_text("kvc: 1\n")
    tune.tune(gm, Request.of(str(tmp_path / "s.yaml")))
    assert len(asked) == 1


def test_a_failure_to_tune_is_a_warning(database, monkeypatch, caplog):
    from kvc_compile import tune
    from kvc_compile.lowering import replay

    monkeypatch.setattr(replay, "GraphBench", lambda p, d: (_ for _ in ()).throw(RuntimeError("CUDA error: launch")))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("KVC_TUNE", raising=False)
    tune.tune(graph_of(), Request.of({"kvc": 1}))
    assert "tuning failed" in caplog.text and "CUDA error" in caplog.text


def test_the_option():
    assert Request.of("int4").tune and not Request.of({"spec": "int4", "tune": False}).tune
    assert not Request.of({"kvc": 1, "tune": False}).tune
    with pytest.raises(OptionError, match="'tune' is 'off': true or false is allowed"):
        Request.of({"spec": "int4", "tune": "off"})


# ---------------------------------------------------------------- scratch caches


@pytest.mark.parametrize("codec", [Codec("raw"), Codec("fp", 8), Codec("fp", 8, (64, 1)), KL.codec, VL.codec])
def test_scratch_caches_hold_finite_numbers(codec):
    from kvc_compile.kernels import reference
    from kvc_compile.lowering import replay

    layout = Layout(codec, 2, 64, "bfloat16", 4, 64, max(codec.block[0], 1), 16)
    before = torch.get_rng_state()
    data = replay.scratch(2, 500, layout, torch.device("cpu"), torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert reference.lengths(reference.views(data, layout))[0] == 500
    x = reference.read(data, layout, 0, 500)
    assert x.isfinite().all() and (x.float().std((2, 3)) > 1e-3).all()


def test_scratch_caches_fit_the_memory():
    from kvc_compile.lowering import replay

    whole = replay.shrunk(DECODE, 1 << 40)
    assert whole[:2] == (8, DECODE.room - 1)
    for budget in (whole[2] * 2, whole[2], 100 << 20, 8 << 20):
        batch, tokens, nbytes = replay.shrunk(DECODE, budget)
        assert 2 * nbytes <= budget and (batch == 8 or tokens < 2 * replay.LEAST_TOKENS)
    with pytest.raises(torch.OutOfMemoryError):
        replay.shrunk(DECODE, 1000)


# ---------------------------------------------------------------- kvc tune


def kvc(*words: str) -> int:
    parser = argparse.ArgumentParser("kvc")
    command.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(words)
    return int(args.run(args))


@pytest.fixture
def gpu(database, monkeypatch):
    """`kvc tune` on a made-up GPU: the fifth candidate is the fastest."""
    from kvc_compile.lowering import replay

    def make(p, device):
        made = FakeBench(lambda c: 80.0 if c == p.candidates[4] else 100.0, unfit=p.candidates[2:3])
        asked.append((p, made))
        return made

    asked: list = []
    monkeypatch.setattr(replay, "GraphBench", make)
    monkeypatch.setattr(command, "gpu", lambda: GPU)
    return asked


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert kvc("tune", "int4") == 2
    assert "found no CUDA device" in capsys.readouterr().err
    assert kvc("tune", "int4", "--json") == 2
    assert "found no CUDA device" in json.loads(capsys.readouterr().out)["error"]


def test_kvc_tune(gpu, capsys):
    assert kvc("tune", "int4", "--batch", "1,8", "--tokens", "4096,32768") == 0
    out = capsys.readouterr().out
    assert len(gpu) == 4 and out.count("x1.25  chosen") == 4 and out.count("x1.00  rule") == 4
    assert "cannot be used" in out and max(map(len, out.splitlines())) <= 100
    assert gpu[0][0].dtype == torch.bfloat16 and gpu[0][0].rows == 4
    assert kvc("tune", "int4", "--batch", "1", "--tokens", "4096", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert len(gpu) == 4 and data["ok"]
    rows = data["shapes"][0]["candidates"]
    assert rows[0]["us"] == 80 and rows[0]["chosen"] and sum(r["rule"] for r in rows) == 1


def test_kvc_tune_exports(gpu, database, tmp_path, capsys):
    """Next to the spec, where a compile finds it; what another GPU's owner put there stays."""
    spec = tmp_path / "s.yaml"
    spec.write_text("kvc: 1\nbits: 4\n")
    file = tmp_path / "s.tuning.json"
    timings.write(file, timings.text_of([entry(64, 32768, 1.0)]))
    assert kvc("tune", str(spec), "--export") == 0
    assert str(file) in capsys.readouterr().out
    (mine,) = [e for e in timings.read(file) if e.key != entry(64, 32768, 1.0).key]
    assert mine.key == gpu[0][0].key(GPU) and len(timings.read(file)) == 2
    fresh = Database(None)
    assert fresh.use(timings.beside(Spec.load(spec))) and fresh.find(mine.key) == mine

    assert kvc("tune", "int4", "--export") == 2 and "needs a FILE" in capsys.readouterr().err
    file.write_text("precious")
    assert kvc("tune", str(spec), "--export") == 2 and "not replaced" in capsys.readouterr().err
    assert file.read_text() == "precious"


def test_the_shape_of_a_model(gpu, tmp_path, capsys):
    pytest.importorskip("transformers")
    config = {"model_type": "llama", "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 384,
              "num_hidden_layers": 4, "dtype": "float16"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert kvc("tune", "int8", "--model", str(tmp_path)) == 0
    p = gpu[0][0]
    assert (p.groups, p.k.heads, p.k.channels, p.dtype) == (3, 2, 64, torch.float16)
    assert kvc("tune", "int8", "--model", str(tmp_path), "--heads", "7") == 2
    assert "do not share" in capsys.readouterr().err
    assert kvc("tune", "int8", "--model", str(tmp_path / "none")) == 2
