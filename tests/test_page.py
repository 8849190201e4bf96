"""The page of a dump: whole, harmless, the same every time, and readable on any screen."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from random import Random

import pytest
import tiny_zoo
import torch
from test_dump import TOKENS, WIDTH, Tiny

import kvc_compile as kvc
from kvc_compile import backend
from kvc_compile.page import Dumped, page
from kvc_compile.plan import Plan
from kvc_compile.request import Request
from kvc_compile.sidebyside import Line, aligned, lines_of, pieces, words
from kvc_compile.sites import Declined, Uncached

VOID = {"meta", "input", "br", "hr", "img", "link", "base", "embed", "source"}
EVIL = """</style><script>alert('1')</script><img src=x onerror="alert(2)">&amp;"""


class Read(HTMLParser):
    """A page as a browser sees it, one that forgives nothing.

    cells: class and text of every td, and of every pre.
    """

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[tuple[str, str]] = []
        self.text = self.style = ""

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), "an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)
        if tag in ("td", "pre"):
            self.cells.append((dict(attrs).get("class") or tag, ""))

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "style" in self.stack:
            self.style += data
            return
        self.text += data
        if "td" in self.stack or "pre" in self.stack:
            kind, text = self.cells.pop()
            self.cells.append((kind, text + data))

    def ids(self) -> list[str]:
        return [a["id"] or "" for _, a in self.tags if "id" in a]

    def side(self, *kinds: str) -> set[str]:
        """The lines of cells of these classes, and of what is folded. A class c is that of comments."""
        found = {text for kind, text in self.cells if set(kind.split()) - {"c"} <= {*kinds}}
        return found | {line for kind, text in self.cells if kind == "pre" for line in text.split("\n")}


def read(html: str) -> Read:
    reader = Read()
    reader.feed(html)
    reader.close()
    assert not reader.stack, "tags left open"
    return reader


class Three(torch.nn.Module):
    """One attention that is fused, one that is read back, one that is declined."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = Tiny(), Tiny(), Tiny()

    def forward(self, x, k1, v1, k2, v2, k3, v3, positions, mask):
        x = self.a(x, k1, v1, positions, mask)
        x = self.b(x, k2, v2, positions, mask)
        k3.mul_(2)
        x = self.c(x, k3, v3, positions, mask)
        k3.mul_(2)
        return x + k2.sum()


def three(folder: Path) -> None:
    torch.manual_seed(0)
    caches = [torch.zeros(1, 1, TOKENS, WIDTH) for _ in range(6)]
    positions = torch.tensor([3])
    mask = (torch.arange(TOKENS) <= positions[:, None])[None, None]
    spec = {"kvc": 1, "name": EVIL, "bits": 4}
    kvc.explain(Three(), {"spec": spec, "dump": str(folder)}, torch.randn(1, 1, 2 * WIDTH), *caches, positions, mask)


def zoo(name: str):
    def dump(folder: Path) -> None:
        kvc.explain(tiny_zoo.build(name, "sdpa"), {"spec": "kivi-4bit", "dump": str(folder)})

    return dump


MODELS = {"llama": zoo("llama"), "deepseek_v3": zoo("deepseek_v3"), "three": three}


@pytest.fixture(scope="module")
def dumps(tmp_path_factory) -> dict[str, list[Path]]:
    """The folders of every graph of every model."""
    found = {}
    for name, dump in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        dump(folder)
        found[name] = sorted(folder.iterdir())
    return found


@pytest.fixture(params=MODELS)
def folders(request, dumps) -> list[Path]:
    return dumps[request.param]


def numbered(n: int, layer: str) -> str:
    """`layer` for each of n layers, in a forward, as a graph is printed."""
    body = "\n".join(layer.replace("@", str(i)) for i in range(n))
    params = ", ".join(f'L_w{i}_: "f32[64, 64][64, 1]cpu"' for i in range(n))
    return f"class GraphModule(torch.nn.Module):\n    def forward(self, {params}):\n{body}\n        return (x,)\n"


def declined(*reasons: str) -> Plan:
    return Plan(tuple(Declined(i, f"o{i}", reason, "model.py:3 in forward") for i, reason in enumerate(reasons)))


def made(plan: Plan, captured: str, rewritten: str = "", spec=None) -> str:
    return page(Dumped("0123456789ab", "Model", plan, Request.of(spec or {"bits": 4}), 1024, captured, rewritten))


# ---------------------------------------------------------------- the page as text


def test_whole_and_without_references_to_the_outside(folders):
    for folder in folders:
        html = (folder / "index.html").read_text()
        found = read(html)
        ids = found.ids()
        assert html.startswith("<!doctype html>") and len(ids) == len(set(ids))
        names = {tag for tag, _ in found.tags}
        assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "svg", "video"}
        for tag, attributes in found.tags:
            assert not set(attributes) & {"src", "srcset", "action", "background", "data", "poster"}, tag
            assert not any(a.startswith("on") for a in attributes), attributes
            if "href" in attributes:
                assert (attributes["href"] or "").removeprefix("#") in ids, "a link leads to this page"
        assert not re.search(r"url\(|@import|https?:|expression", found.style)
        policy = next(a["content"] for t, a in found.tags if t == "meta" and "http-equiv" in a)
        assert policy == "default-src 'none'; style-src 'unsafe-inline'", "and the browser is told so"


def test_every_attention_and_every_changed_line(folders):
    for folder in folders:
        found = read((folder / "index.html").read_text())
        plain = " ".join(found.text.split())
        for site in json.loads((folder / "sites.json").read_text()):
            assert f"site-{site['index']}" in found.ids()
            reason = site.get("reason") or site.get("note") or ""
            assert reason.replace("`", "") in plain
            assert site["where"].split(" in ")[0] in plain and f"Attention {site['index']}" in plain
        old, new = found.side("td", "d"), found.side("r", "a")
        for line in (folder / "rewrite.diff").read_text().splitlines()[2:]:
            text = line[1:].strip()
            side = old if line.startswith("-") else new
            if line.startswith(("-", "+")) and text:
                parts = re.split(r"(?<=,) (?=\w+: )", text) if text.startswith("def ") else [text]
                assert all(p in side for p in parts), line


def test_what_it_says_of_three_attentions(dumps):
    (folder,) = dumps["three"]
    found = read((folder / "index.html").read_text())
    compressed, dense = json.loads((folder / "plan.json").read_text())["bytes"].values()
    said = " ".join(found.text.split())
    assert "Compressed1 " in said and "Read back1 " in said and "Declined1 " in said
    assert f"{compressed / 1024:.1f} KiB instead of {dense / 1024:.1f} KiB" in said
    assert "L['k3'] is written 3 times" in said and "L['k2'] is also used by sum" in said
    assert (folder / "spec.yaml").read_text().rstrip() in found.text
    sections = [a for t, a in found.tags if t == "section" and (a.get("id") or "").startswith("site")]
    assert [a["id"] for a in sections] == ["site-0", "site-1", "site-2"]


def test_nothing_of_a_spec_or_a_graph_becomes_markup():
    captured = numbered(1, f"        # File: m.py:1 in forward, code: {EVIL}\n        o0 = f('{EVIL}')")
    plan = Plan((Declined(0, "o0", f"`{EVIL}` and {EVIL}", f"{EVIL}:3 in {EVIL}"),))
    clean = read(made(declined("no"), numbered(1, "        # File\n        o0 = f()")))
    spec = {"kvc": 1, "name": EVIL, "description": EVIL, "bits": 4}
    html = page(Dumped("id", EVIL, plan, Request.of(spec), 1024, captured, captured + "        # " + EVIL))
    found = read(html)
    assert {t for t, _ in found.tags} <= {t for t, _ in clean.tags} | {"td", "tbody", "code"}
    assert html.count("<style>") == html.count("</style>") == 1 and EVIL not in html
    assert found.text.count(EVIL) > 8


def test_the_same_every_time(tmp_path):
    for n in (1, 2):
        three(tmp_path / str(n))
    one, two = ([(p.parent.name, p.read_bytes()) for p in sorted(tmp_path.glob(f"{n}/*/index.html"))] for n in (1, 2))
    assert one == two and len(one) == 1
    assert str(tmp_path).encode() not in one[0][1]


def test_a_graph_that_was_not_rewritten(tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "rewrite", lambda *args: 1 / 0)
    model = Tiny()
    model.compile(backend=backend.kvc, options={"spec": "int8", "dump": str(tmp_path)}, dynamic=False)
    cache = torch.zeros(2, 1, 1, TOKENS, WIDTH)
    with pytest.raises(Exception, match="division by zero"), torch.no_grad():
        model(torch.randn(1, 1, 2 * WIDTH), *cache, torch.tensor([0]), torch.ones(1, 1, 1, TOKENS, dtype=torch.bool))
    (html,) = (p.read_text() for p in tmp_path.glob("*/index.html"))
    found = read(html)
    assert "stopped before" in found.text and "site-0" in found.ids() and not {k for k, _ in found.cells} & {"d", "a"}


def test_graphs_with_little_in_them():
    for plan, said in ((Plan(()), "No attention was found"), (declined("no"), "Nothing is compressed")):
        found = read(made(plan, "x = 1\n", "x = 1\n"))
        assert said in found.text and "Nothing changed" in found.text
    assert "None was found" in read(made(Plan(()), "")).text
    assert "site-0" in read(made(declined("its node is not in the text"), "x = 1\n")).ids()


def test_an_attention_without_a_cache_is_not_declined():
    plan = Plan((Uncached(0, "o0", "there is no cache", "model.py:3 in forward"),))
    found = read(made(plan, numbered(1, "        o0 = attend(x)")))
    assert "No cache1 " in found.text and "Declined0 " in found.text and "o0 no cache" in found.text


def test_changes_that_return_to_an_attention_have_no_second_name():
    lines = "o0 = attend(a)\n" + "y = x\n" * 20 + "o1 = attend(b)\n" + "y = x\n" * 20
    found = read(made(declined("one", "two"), f"{lines}z = o0 + 1\n", f"{lines}z = o0 + 2\n"))
    assert found.ids().count("site-0") == 1 and found.text.count("Attention 0") == 2


def test_many_layers_stay_readable():
    filler = "\n".join(f'        y@_{i}: "f32[1, 64][64, 1]cpu" = x * L_w@_;  x = None' for i in range(100))
    old = numbered(30, f"{filler}\n        o@ = attend(keys_@, y@_0)\n        z@ = o@ + 1")
    new = old.replace("attend(keys", "kvc.attend(arena")
    html = made(declined(*[f"reason of o{i}" for i in range(30)]), old, new)
    found = read(html)
    assert len(html) < 1_000_000 and html.count("names and sizes excepted") == 1
    assert "Attentions 1-29 change as above" in found.text
    assert all(f"o{i} = kvc.attend(arena_{i}, y{i}_0)" in found.side("a") for i in range(30))
    assert found.text.count("reason of o") == 31, "once in the table, and once for each"


# ---------------------------------------------------------------- side by side


def shown(old: str, new: str) -> list[str]:
    """Rows as `kind left | right`."""
    rows = aligned(lines_of(old), lines_of(new))
    return [f"{r.kind[0]} {r.left.core if r.left else ''} | {r.right.core if r.right else ''}" for r in rows]


def test_lines_of_a_graph():
    signature = 'def forward(self, a: "f32[2, 3][3, 1]cpu", b: "i64[]"):'
    lines = lines_of(f'class G:\n    {signature}\n\n        x: "f32[2][1]cpu" = a;  a = None\n')
    assert [(x.number, x.core, x.part, x.name) for x in lines] == [
        (1, "class G:", True, ""),
        (2, "def forward(self,", True, ""),
        (2, 'a: "f32[2, 3]",', True, "a"),
        (2, 'b: "i64[]"):', True, "b"),
        (4, 'x: "f32[2]" = a', False, "x"),
    ]
    assert lines[-1].text == 'x: "f32[2][1]cpu" = a;  a = None'


def test_what_became_of_what_stands_beside_it():
    old = "# one\na = f(x)\n# two\nb = write(keys, a)\nc = h(b)\nd = c + 1"
    new = "# one\na = f(x);  x = None\n# two\nn = read(keys)\nb = write(n, a)\nm = append(keys, a)\nc = h(b)\ne = 0"
    assert shown(old, new) == [
        "s # one | # one",
        "q a = f(x) | a = f(x)",
        "s # two | # two",
        "c  | n = read(keys)",
        "c b = write(keys, a) | b = write(n, a)",
        "c  | m = append(keys, a)",
        "s c = h(b) | c = h(b)",
        "c d = c + 1 | e = 0",
    ]


def test_no_line_is_lost_or_moved():
    chance = Random(0)
    for _ in range(200):
        picks = ([chance.randrange(12) for _ in range(chance.randrange(14))] for _ in range(2))
        old, new = (
            lines_of("\n".join(f"# {n}" if n < 3 else f"a{n} = f(b{n % 4});  d = None" for n in p)) for p in picks
        )
        rows = aligned(old, new)
        assert [r.left for r in rows if r.left] == old and [r.right for r in rows if r.right] == new
        assert all(r.left and r.right and r.left.core == r.right.core for r in rows if r.kind != "changed")
        assert [r for p in pieces(rows, {0}) for r in p.rows] == rows


def test_words_of_a_line():
    left, right = words("a = f(x, y)", "a = g(x, y, z)")
    assert "".join(t for t, _ in left) == "a = f(x, y)" and "".join(t for t, _ in right) == "a = g(x, y, z)"
    assert [t for t, new in left if new and t] == ["f"] and [t for t, new in right if new and t] == ["g", ", z"]


def test_a_graph_that_is_replaced_as_a_whole_takes_no_time():
    old, new = ([Line(n, f"{side}{n} = f({side})", f"{side}{n} = f({side})") for n in range(3000)] for side in "xy")
    assert len(aligned(old, new)) == 3000


# ---------------------------------------------------------------- the page in a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
]
PROBE = """<script>
const found = {refused: [], errors: []}
addEventListener("securitypolicyviolation", e => found.refused.push(e.violatedDirective))
addEventListener("error", e => found.errors.push(String(e.message)), true)
addEventListener("load", () => {
  const root = document.documentElement
  const size = () => [innerWidth, root.scrollWidth]
  found.folded = size()
  const last = document.querySelector("td:first-child a:last-child")
  if (last) {
    last.click()
    found.shown = document.querySelector(last.getAttribute("href")).getClientRects().length > 0
  }
  found.wide = getComputedStyle(document.querySelector(".diff td") || root).display
  for (const d of document.querySelectorAll("details")) d.open = true
  const full = document.getElementById("full")
  if (full) full.checked = true
  found.open = size()
  found.loaded = performance.getEntriesByType("resource").map(e => e.name)
  parent.document.body.textContent = JSON.stringify(found)
})
</script>"""


def probed(html: str, width: int, folder: Path) -> dict:
    """What a browser makes of a page in a frame of this width: a window of its own may not be this narrow."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert html.count(policy) == 1
    allowed = html.replace(policy, f"{policy}; script-src 'unsafe-inline'")
    inside = escape(allowed.replace("<title>", f"{PROBE}<title>", 1))
    frame = f'<!doctype html><body><iframe srcdoc="{inside}" style="border:0;width:{width}px;height:900px"></iframe>'
    (folder / "frame.html").write_text(frame)
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", "--dump-dom"]
    url = (folder / "frame.html").as_uri()
    done = subprocess.run([*command, url], capture_output=True, text=True, timeout=120, check=True)
    body = re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)
    assert body, done.stderr
    read_back = Read()
    read_back.feed(body[1])
    return json.loads(read_back.text) | {"console": re.findall(r"CONSOLE.*", done.stderr)}


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(dumps, width, tmp_path):
    for name, graphs in dumps.items():
        found = probed((graphs[0] / "index.html").read_text(), width, tmp_path)
        assert found["refused"] == found["errors"] == found["loaded"] == found["console"] == [], name
        assert found["folded"] == found["open"] == [width, width], f"{name} scrolls sideways"
        assert found["shown"], "a link opens what is folded around its target"
        assert found["wide"] == ("table-cell" if width == 1280 else "block"), "side by side, or one below the other"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_browser_would_tell(tmp_path):
    evil = '<p style="width:700px">wide</p><img src="https://example.invalid/x.png"><script>f(</script>'
    html = made(declined("no"), "x = 1\n").replace("<main>", f"<main>{evil}")
    found = probed(html, 400, tmp_path)
    assert found["refused"] == ["img-src"] and found["errors"] and found["console"] and found["folded"][1] > 400
