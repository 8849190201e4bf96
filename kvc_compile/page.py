"""The dump as one HTML page: what was found, what it saves, and the graph before and after, side by side.

    page(Dumped(...))           a pure function of what the dump holds anyway

The page loads nothing and runs nothing: its content policy forbids both, whatever a spec or a source line says. Folding
and the switch for strides are plain HTML and CSS. Layers that change in the same way are shown once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby, pairwise

from kvc_compile.layout import Layout
from kvc_compile.plan import Plan, SitePlan, bytes_of
from kvc_compile.policy import words_of
from kvc_compile.rendered import Kernels
from kvc_compile.report import words as in_words
from kvc_compile.request import Request
from kvc_compile.sidebyside import QUIET, Line, Piece, Row, aligned, likeness, lines_of, pieces, words
from kvc_compile.sites import Declined, Uncached
from kvc_compile.table import layers_text, mib, ratio

KINDS = {
    "born": "This graph makes its caches.",
    "static": "This graph is given static caches.",
    "grown": "This graph is given caches that grow.",
    "fresh": "This graph makes caches that grow.",
}

OPEN = 8  # changed parameters that are not folded

Entry = SitePlan | Declined


@dataclass(frozen=True)
class Dumped:
    """What there is to show of one graph. model: its class, "" if unknown. tokens: for which bytes are counted.
    rewritten: "" and kernels: None if the backend stopped before."""

    graph: str
    model: str
    plan: Plan
    request: Request
    tokens: int
    captured: str
    rewritten: str = ""
    kernels: Kernels | None = None


def page(d: Dumped) -> str:
    title = f"{d.model or f'Graph {d.graph}'}: {d.request.spec.name}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
{heading(d)}
{facts(d.plan, d.tokens)}
</header>
<main>
<section id="attentions">
<h2>Attentions</h2>
{site_table(d.plan, d.tokens)}
</section>
<section id="graph">
<h2>The graph before and after</h2>
{graphs(d)}
</section>
{kernels_section(d.kernels)}<section id="plan">
<h2>Plan and spec</h2>
{layout_table(d.plan, d.tokens)}
{options(d.request)}
</section>
</main>
<footer><p>Written by kvc_compile. Compiling the same model with the same spec gives the same page, byte for byte.</p>\
</footer>
</body>
</html>
"""


def text(s: str) -> str:
    """Text for HTML; for values of attributes there are only numbers and our own words."""
    return escape(s, quote=False)


def prose(s: str) -> str:
    """Text with `code`."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text(s))


# ---------------------------------------------------------------- what was found


def heading(d: Dumped) -> str:
    spec = d.request.spec
    compressed, dense = bytes_of(d.plan, d.tokens)
    kinds = dict.fromkeys(e.site.key.kind for e in d.plan.planned)
    said = [KINDS[k] for k in kinds if k in KINDS]
    if dense:
        said.append(
            f"With room for {d.tokens} tokens of one sequence, they take {mib(compressed)} instead of {mib(dense)}, "
            "scales and exact tokens included."
        )
    else:
        said.append("Nothing is compressed in this graph." if d.plan.entries else "No attention was found.")
    return f"""<p class="soft">kvc_compile, graph <code>{d.graph}</code></p>
<h1>{text(d.model or "A graph")} <span class="soft">with</span> {text(spec.name)}</h1>
<p>{text(" ".join(said))}</p>
<nav aria-label="On this page"><a href="#attentions">Attentions</a> <a href="#graph">Graph</a> \
{'<a href="#kernels">Kernels</a> ' if d.kernels else ""}<a href="#plan">Plan and spec</a></nav>"""


def facts(plan: Plan, tokens: int) -> str:
    back = sum(e.site.pattern == "read back" for e in plan.planned)
    compressed, dense = bytes_of(plan, tokens)
    cells = [
        ("Compressed", str(len(plan.planned) - back), "attend on the compressed cache"),
        ("Read back", str(back), "compressed, read in full each step"),
        ("Declined", str(len(plan.declined)), "left as they were"),
    ]
    if bare := sum(status(e) == "no cache" for e in plan.entries):
        cells.append(("No cache", str(bare), "nothing to compress"))
    if dense:
        cells += [
            ("Before", mib(dense), bar(100)),
            ("After", mib(compressed), bar(max(1, round(100 * compressed / dense)))),
            ("Ratio", ratio(dense, compressed), "before to after"),
        ]
    found = "".join(f"<div><dt>{name}</dt><dd><b>{value}</b> {note}</dd></div>" for name, value, note in cells)
    return f'<dl class="facts">{found}</dl>'


def bar(percent: int) -> str:
    return f'<span class="bar" aria-hidden="true"><span style="width:{percent}%"></span></span>'


def status(e: Entry) -> str:
    return "compressed" if isinstance(e, SitePlan) else "no cache" if isinstance(e, Uncached) else "declined"


def index(e: Entry) -> int:
    return e.site.index if isinstance(e, SitePlan) else e.index


def node(e: Entry) -> str:
    return e.site.node if isinstance(e, SitePlan) else e.node


def why(e: Entry) -> str:
    """Why the cache is read back, or is not compressed; "" if neither."""
    if isinstance(e, Declined):
        return e.reason
    said = [f"Read back in full each step: {e.site.note}"] if e.site.note else []
    return "; ".join([*said, *([f"all tokens stay: {e.stays}"] if e.stays else [])])


def cells_of(e: Entry, tokens: int) -> tuple[str, ...]:
    """Status, pattern, how it is stored, bytes, source line and reason of an attention, as HTML."""
    if isinstance(e, Declined):
        return status(e), "", "", "", where(e.where), prose(e.reason)
    k, v = in_words(e.key), in_words(e.value)
    stored = prose(k) if k == v else f"<p><b>keys</b> {prose(k)}</p><p><b>values</b> {prose(v)}</p>"
    stored += f"<p>{prose(words_of(e.keep.policy))}</p>" if e.keep else ""
    stored += f"<p>{prose(e.reading.words(e.site.layer))}</p>" if e.reading else ""
    after, before = e.bytes(tokens)
    size = f"{mib(before)} <span class='soft'>to</span> {mib(after)}"
    return status(e), text(e.site.pattern), stored, size, where(e.site.where), prose(why(e))


def where(source: str) -> str:
    place, _, function = source.partition(" in ")
    rest = f" <span class='soft'>in {text(function)}</span>" if function else ""
    return f"<code>{text(place)}</code>{rest}"


def alike(e: Entry, tokens: int) -> tuple[str, ...]:
    """The cells without the numbers that tell the names of one layer from those of the next."""
    *cells, reason = cells_of(e, tokens)
    return *cells, without_numbers(reason)


def without_numbers(s: str) -> str:
    return re.sub(r"[\d_]+", "", s)  # keys, keys_1; index_copy_, index_copy__1


def site_table(plan: Plan, tokens: int) -> str:
    """A row for each run of attentions that are treated alike."""
    if not plan.entries:
        return "<p>None was found in this graph.</p>"
    names = ("Attention", "Layer", "Status", "Pattern", "Stored as, or why not", f"Bytes, {tokens} tokens", "Source")
    head = "".join(f'<th role="columnheader" scope="col">{n}</th>' for n in names)
    rows = []
    for _, run in groupby(plan.entries, key=lambda e: alike(e, tokens)):
        group = list(run)
        state, pattern, stored, size, source, reason = cells_of(group[0], tokens)
        links = " ".join(link(e) for e in group)
        layers = layers_text([e.site.layer for e in group if isinstance(e, SitePlan)])
        if reason:
            stored += f'<p class="why">{reason}</p>'
        each = " each" if len(group) > 1 and size else ""
        cells = (links, layers, f'<b class="{state}">{state}</b>', pattern, stored, size + each, source)
        rows.append("".join(cell(n, c) for n, c in zip(names, cells, strict=True)))
    body = "".join(f'<tr role="row">{r}</tr>\n' for r in rows)
    shared = len({c.buffer for e in plan.planned for c in (e.site.key, e.site.value)}) < 2 * len(plan.planned)
    note = "<p class='soft'>Attentions that share a cache show it each; the totals count it once.</p>" if shared else ""
    return f"""<table role="table" class="sites">
<thead role="rowgroup"><tr role="row">{head}</tr></thead>
<tbody role="rowgroup">
{body}</tbody>
</table>{note}"""


def link(e: Entry) -> str:
    return f'<a href="#site-{index(e)}" aria-label="Attention {index(e)}">{index(e)}</a>'


def cell(name: str, content: str) -> str:
    """The roles keep it a table for a screen reader where the style of a narrow screen makes it a list."""
    return f'<td role="cell" data-name="{name}">{content}</td>' if content else '<td role="cell" class="none"></td>'


# ---------------------------------------------------------------- the graph before and after


@dataclass(frozen=True)
class Section:
    """Changes that belong together. owner: the position of an attention in the plan, or "Outputs". first: no section
    before has this owner. before: the unchanged lines in front."""

    owner: int | str
    first: bool
    before: tuple[Piece, ...]
    pieces: tuple[Piece, ...]


def graphs(d: Dumped) -> str:
    old = lines_of(d.captured)
    rows = aligned(old, lines_of(d.rewritten) if d.rewritten else old)
    inputs, body = ([row for row in rows if row.lines[0].part is part] for part in (True, False))
    marks = landmarks(d.plan, body)
    sections, rest = sections_of(d.plan, body, marks)
    headed = {s.owner for s in sections}
    ids = {row: n for n, row in marks.items() if n not in headed}
    missing = "".join(anchor(e) for n, e in enumerate(d.plan.entries) if n not in headed and n not in marks)
    said = "Before is <code>0_captured.py</code>, as Dynamo hands it over; after, <code>1_rewritten.py</code>."
    if not d.rewritten:
        said = "The backend stopped before it rewrote the graph: both sides show it as captured."
    elif all(row.kind == "same" for row in rows):
        said = "Nothing changed."
    return f"""<p>{said} Unchanged lines are folded, and layers that change in the same way.</p>
<p><label><input type="checkbox" id="full"> Show strides, devices, and where names are freed</label></p>
{missing}<div class="columns" aria-hidden="true"><span>Before</span><span>After</span></div>
{signature(inputs)}{"".join(rendered(d.plan, sections, ids))}{"".join(folded(p) for p in rest)}"""


def signature(rows: Sequence[Row]) -> str:
    """The parameters that changed, and folded those that did not; of many layers they are many."""
    same, changed = (tuple(r for r in rows if (r.kind == "changed") is k) for k in (False, True))
    found = folded(Piece(False, 0, same), "Other parameters: unchanged") if same else ""
    if changed:
        opened = " open" if len(changed) <= OPEN else ""
        said = f"<summary>{len(changed)} parameters change</summary>"
        found += f"<details class='inputs'{opened}>{said}\n{table(changed, -1, Plan(()), {})}</details>\n"
    return found


def anchor(e: Entry) -> str:
    return f'<span id="site-{index(e)}"></span>'


def landmarks(plan: Plan, rows: Sequence[Row]) -> dict[int, int]:
    """The row of each attention, by its position in the plan."""
    at = {row.left.name: n for n, row in enumerate(rows) if row.left is not None}
    return {n: at[node(e)] for n, e in enumerate(plan.entries) if node(e) in at}


def sections_of(plan: Plan, rows: Sequence[Row], marks: dict[int, int]) -> tuple[list[Section], list[Piece]]:
    """The sections in order, and the unchanged lines after the last."""
    found: list[Section] = []
    pending: list[Piece] = []
    for piece in pieces(rows, set(marks.values())):
        if not piece.shown:
            pending.append(piece)
            continue
        owner = owner_of(piece, plan, marks)
        if found and found[-1].owner == owner:
            found[-1] = replace(found[-1], pieces=(*found[-1].pieces, *pending, piece))
        else:
            first = all(s.owner != owner for s in found)
            found.append(Section(owner, first, tuple(pending), (piece,)))
        pending = []
    return found, pending


def owner_of(piece: Piece, plan: Plan, marks: dict[int, int]) -> int | str:
    """Of the attentions here, or else of all, the one whose names the changed lines have most; else the next one."""
    changed = [line for row in piece.rows if row.kind != "same" for line in row.lines if not line.comment]
    if changed and all(line.text.startswith("return") for line in changed):
        return "Outputs"
    said = {w for line in changed for w in re.findall(r"\w+", line.core)}
    here = [n for n, row in marks.items() if piece.start <= row < piece.start + len(piece.rows)]
    hits = {n: len(said & names_of(plan.entries[n])) for n in here or range(len(plan.entries))}
    if here or any(hits.values()):
        return max(hits, key=lambda n: hits[n])
    return next((n for n, row in marks.items() if row >= piece.start), "Outputs")


def names_of(e: Entry) -> set[str]:
    caches = (e.site.key, e.site.value) if isinstance(e, SitePlan) else ()
    return {node(e), *(name for c in caches for name in (c.buffer, c.append) if name)}


def rendered(plan: Plan, sections: Sequence[Section], ids: dict[int, int]) -> Iterator[str]:
    """Sections in order; a run of those that were seen before, names and sizes excepted, is folded."""
    seen: set[tuple] = set()
    again = []
    for s in sections:
        again.append(isinstance(s.owner, int) and shape(plan, s) in seen)
        seen.add(shape(plan, s))
    for repeated, group in groupby(zip(again, sections, strict=True), key=lambda pair: pair[0]):
        run = [s for _, s in group]
        if not repeated:
            yield from (section(plan, s, ids) for s in run)
            continue
        which = [index(plan.entries[s.owner]) for s in run if isinstance(s.owner, int)]
        name = f"Attention {which[0]} changes" if len(which) == 1 else f"Attentions {layers_text(which)} change"
        body = "".join(section(plan, s, ids) for s in run)
        yield f"<details class='again'><summary>{name} as above, names and sizes excepted</summary>\n{body}</details>\n"


def shape(plan: Plan, s: Section) -> tuple:
    kind = ""
    if isinstance(s.owner, int):
        e = plan.entries[s.owner]
        kind = f"{status(e)} {without_numbers(why(e))}"
    changed = (row for p in s.pieces for row in p.rows if row.kind == "changed")
    return kind, *(tuple(side and without_numbers(side.core) for side in (r.left, r.right)) for r in changed)


def section(plan: Plan, s: Section, ids: dict[int, int]) -> str:
    before = "".join(folded(p) for p in s.before)
    body = "".join(table(p.rows, p.start, plan, ids) if p.shown else folded(p) for p in s.pieces)
    if isinstance(s.owner, str):
        return f"{before}<section><h3>{s.owner}</h3>\n{body}</section>\n"
    e = plan.entries[s.owner]
    layer = f"layer {e.site.layer}, " if isinstance(e, SitePlan) else ""
    reason = f'<p class="why">{prose(why(e))}</p>' if why(e) else ""
    place = f'<span class="soft">{layer}<code>{text(node(e))}</code></span>'
    title = f'<h3>Attention {index(e)} {place} <b class="{status(e)}">{status(e)}</b></h3>'
    name = f' id="site-{index(e)}"' if s.first else ""
    return f"{before}<section{name}>{title}{reason}\n{body}</section>\n"


def table(rows: Sequence[Row], start: int, plan: Plan, ids: dict[int, int]) -> str:
    """A body for each run of lines that have no partner: in one column, all of the old come before all of the new."""
    found = []
    for apart, run in groupby(enumerate(rows, start), key=lambda pair: not together(pair[1])):
        body = []
        for n, row in run:
            mark = f' id="site-{index(plan.entries[ids[n]])}"' if n in ids else ""
            quiet = ' class="s"' if row.kind == "quiet" else ""
            body.append(f"<tr{mark}{quiet}>{''.join(sides(row))}</tr>\n")
        name = ' class="x"' if apart else ""
        found.append(f"<tbody{name}>\n{''.join(body)}</tbody>\n")
    head = '<thead><tr><th scope="col">Before</th><th scope="col">After</th></tr></thead>'  # only heard
    return f'<table class="diff">\n{head}\n{"".join(found)}</table>\n'


def together(row: Row) -> bool:
    """Whether both sides are the same line, changed or not."""
    return row.kind != "changed" or (len(row.lines) == 2 and likeness((None, row.left), (None, row.right)) > 0)


def sides(row: Row) -> Iterator[str]:
    """Both cells of a row. r: what the left says already, hidden where there is one column."""
    x, y = row.left, row.right
    if x is None or y is None or not together(row):
        for line, kind in ((x, "d"), (y, "a")):
            yield side(line, kind, code(line)) if line is not None else '<td class="e"></td>'
    elif row.kind == "same":
        yield side(x, "", code(x))
        yield side(y, "r", code(y))
    else:
        for line, kind, parts in zip((x, y), "da", words(x.text, y.text), strict=True):
            yield side(line, kind, code(line, parts))


def side(line: Line, kind: str, html: str) -> str:
    kinds = [*kind, "c"] if line.comment else [*kind]
    name = f' class="{" ".join(kinds)}"' if kinds else ""
    return f'<td{name} data-n="{line.number}">{html}</td>'


def code(line: Line, parts: Sequence[tuple[str, bool]] | None = None) -> str:
    """A line with its quiet parts in spans and the parts that are new marked."""
    quiet = [m.span() for m in QUIET.finditer(line.text)]
    found, at = [], 0
    for part, new in parts or [(line.text, False)]:
        end = at + len(part)
        cuts = sorted({at, end, *(c for span in quiet for c in span if at < c < end)})
        for a, b in pairwise(cuts):
            html = text(line.text[a:b])
            html = f"<mark>{html}</mark>" if new and html.strip() else html
            hidden = any(start <= a < stop for start, stop in quiet)
            found.append(f'<span class="q">{html}</span>' if hidden else html)
        at = end
    return "".join(found)


def folded(piece: Piece, said: str = "") -> str:
    """Unchanged lines, once; those that only free other names are shown as they are on both sides."""
    body = []
    for quiet, run in groupby(piece.rows, key=lambda row: row.kind == "quiet"):
        rows = list(run)
        if quiet:
            body.append(table(rows, -1, Plan(()), {}))
        else:
            lines = (code(r.left) for r in rows if r.left is not None)
            body.append("<pre>" + "\n".join(f"<i>{c}</i>" if c.startswith("#") else c for c in lines) + "</pre>\n")
    first, last = (row.left.number if row.left is not None else 0 for row in (piece.rows[0], piece.rows[-1]))
    but = ", but for names that are freed" if any(row.kind == "quiet" for row in piece.rows) else ""
    said = said or f"Lines {first} to {last}: unchanged{but}"
    return f'<details class="fold"><summary>{said}</summary>\n{"".join(body)}</details>\n'


# ---------------------------------------------------------------- plan and spec


def layout_table(plan: Plan, tokens: int) -> str:
    """Every layout of the plan, as the operators of the rewritten graph name it."""
    users: dict[Layout, dict[str, list[int]]] = {}
    for e in plan.planned:
        for role, layout in (("keys", e.key), ("values", e.value)):
            users.setdefault(layout, {}).setdefault(role, []).append(e.site.layer)
    if not users:
        return ""
    names = ("Layout", "In words", f"Bytes, {tokens} tokens", "Used for")
    head = "".join(f'<th role="columnheader" scope="col">{n}</th>' for n in names)
    body = ""
    for layout, roles in users.items():
        used = "; ".join(f"{role} of layers {layers_text(sorted(set(n)))}" for role, n in roles.items())
        cells = (f"<code>{text(layout.key)}</code>", prose(in_words(layout)), str(layout.row_bytes(tokens)), used)
        body += f'<tr role="row">{"".join(cell(n, c) for n, c in zip(names, cells, strict=True))}</tr>\n'
    return f"""<table role="table" class="sites">
<thead role="rowgroup"><tr role="row">{head}</tr></thead>
<tbody role="rowgroup">
{body}</tbody>
</table>"""


def kernels_section(kernels: Kernels | None) -> str:
    """Each kernel folded, in full: the page has no other file to lead to."""
    if kernels is None:
        return ""
    found = "".join(
        f"<details class='kernel'><summary><code>{text(f.name)}</code> {text(f.about)}, "
        f"{f.text.count(chr(10))} lines</summary>\n"
        f'<pre class="spec" tabindex="0" role="region" aria-label="{f.name}">{text(f.text)}</pre></details>\n'
        for f in kernels.files
    )
    return f"""<section id="kernels">
<h2>Kernels</h2>
<p>{prose(kernels.note)}</p>
{found}</section>
"""


def options(request: Request) -> str:
    said = [f"mode {request.mode}", "strict" if request.strict else "not strict"]
    said += ["verified"] if request.verify else []
    return f"""<p>Spec <code>{text(request.spec.digest)}</code>, in full; {text(", ".join(said))}:</p>
<pre class="spec" tabindex="0" role="region" aria-label="The spec">{text(request.spec.to_yaml().rstrip())}</pre>"""


STYLE = """
:root {
  --paper: #fdfdfc; --ink: #1c2024; --soft: #555d65; --rule: #dcdfe2; --wash: #f4f4f1; --link: #1b5b9b;
  --old: #fbeee2; --old-mark: #f2cba6; --old-ink: #85430f; --new: #e2f2ee; --new-mark: #a9dacd; --new-ink: #0f5f52;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181b; --ink: #e2e5e8; --soft: #a3abb3; --rule: #343a40; --wash: #1d2125; --link: #85b8ee;
    --old: #35271b; --old-mark: #6b441e; --old-ink: #eeb482; --new: #16322d; --new-mark: #1d5d51; --new-ink: #7ed0bf;
  }
}
* { box-sizing: border-box }
html { color-scheme: light dark; scroll-padding-top: 3rem; -webkit-text-size-adjust: 100%; text-size-adjust: 100% }
body {
  margin: 0 auto; max-width: 1440px; padding: 2.5rem clamp(1rem, 3vw, 2.5rem); background: var(--paper);
  color: var(--ink); overflow-wrap: anywhere;
  font: 15px/1.5 -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", Helvetica, Arial, sans-serif;
}
p { margin: .4rem 0; max-width: 46rem }
code, pre, .diff { font-family: var(--mono); font-size: .86em }
.soft { color: var(--soft); font-weight: normal }
h1 { font-size: 1.9rem; line-height: 1.2; margin: .2rem 0 .6rem; letter-spacing: -.01em }
h2 { font-size: 1.25rem; margin: 3rem 0 .6rem; padding-top: .7rem; border-top: 1px solid var(--rule) }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem }
a { color: var(--link); text-underline-offset: .15em }
nav a { margin-right: 1rem }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px }
.compressed { color: var(--new-ink) } .declined { color: var(--old-ink) }
td b, h3 b { font-size: .93rem; font-weight: 600 }
.why { color: var(--old-ink) }
.facts { display: flex; flex-wrap: wrap; gap: 1.2rem 2.5rem; margin: 1.6rem 0 0 }
.facts div { width: 9.5rem } .facts dt { color: var(--soft) }
.facts dd { margin: 0; color: var(--soft); font-size: .8rem; line-height: 1.35 }
.facts b { display: block; color: var(--ink); font-size: 1.45rem; font-weight: 600; line-height: 1.35 }
.facts, .sites { font-variant-numeric: tabular-nums }
.bar { display: block; height: 6px; margin-top: .35rem; background: var(--wash); box-shadow: 0 0 0 1px var(--rule) }
.bar span { display: block; height: 100%; background: var(--soft) }

.sites { width: 100%; border-collapse: collapse; margin: .8rem 0 }
.sites th { text-align: left; white-space: nowrap; font-weight: normal; color: var(--soft) }
.sites th, .sites td { padding: .5rem 1.2rem .5rem 0; vertical-align: top }
.sites th, .sites td { border-bottom: 1px solid var(--rule); overflow-wrap: break-word }
.sites td a { display: inline-block; min-width: 1.2em }
.sites code { overflow-wrap: anywhere }
.sites td p { margin: 0 0 .2rem }

.columns { position: sticky; top: 0; z-index: 1; display: flex; background: var(--paper) }
.columns { border-bottom: 1px solid var(--rule) }
.columns span { flex: 1; padding: .35rem 0 .35rem 4.2rem; color: var(--soft) }
.diff thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
.diff { width: 100%; border-collapse: collapse; table-layout: fixed; font-size: 12px; line-height: 1.5 }
.diff td { position: relative; width: 50%; padding: .1rem .6rem .1rem 5.4rem; vertical-align: top }
.diff td { text-indent: -1.2rem }
.diff td, .fold pre { white-space: pre-wrap; tab-size: 4 }
.diff td::before, .diff td::after { position: absolute; top: .1rem; text-indent: 0 }
.diff td::before { content: attr(data-n); left: 0; width: 2.6rem; text-align: right }
.diff td::before, .diff .c, .q, .fold i { color: var(--soft); font-style: normal }
.diff td + td { border-left: 1px solid var(--rule) }
.diff .e { background: var(--wash) }
.diff .d { background: var(--old) } .diff .a { background: var(--new) }
.diff .d::after { content: "\\2212"; color: var(--old-ink) } .diff .a::after { content: "+"; color: var(--new-ink) }
.diff .d::after, .diff .a::after { left: 3.1rem; font-weight: bold }
mark { color: var(--ink) } .d mark { background: var(--old-mark) } .a mark { background: var(--new-mark) }
summary { cursor: pointer; color: var(--soft) }
.fold { margin: .2rem 0; background: var(--wash) } .fold summary { padding: .15rem .8rem; font-size: .85rem }
.fold pre { margin: 0; padding: .3rem .6rem .5rem 4.2rem; font-size: 12px; line-height: 1.5 }
.kernel { margin: .2rem 0 } .kernel .spec { font-size: 12px; line-height: 1.5 }
.kernel summary { padding: .15rem 0 } .kernel summary code { color: var(--ink) }
.again, .inputs { margin: 1.2rem 0 } .again > summary, .inputs > summary { padding: .5rem 0; color: var(--link) }
.again[open] { border-left: 3px solid var(--rule); padding-left: 1rem }
.spec { overflow-x: auto; padding: .8rem 1rem; background: var(--wash); white-space: pre; overflow-wrap: normal }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem }

body:not(:has(#full:checked)) .q { display: none }
body:not(:has(#full:checked)) .s td { background: none }
body:not(:has(#full:checked)) .s td::after { content: none }

@media (max-width: 760px) {
  .facts { display: grid; grid-template-columns: 1fr 1fr 1fr; gap: 1.2rem 1rem } .facts div { width: auto }
  .facts b { font-size: 1.15rem }
  .sites thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
  .sites td a { padding: .2rem; margin: -.2rem 0 -.2rem -.2rem }
  .sites, .sites tbody, .sites tr, .sites td { display: block }
  .sites tr { border-bottom: 1px solid var(--rule); padding: .6rem 0 }
  .sites td { display: flow-root; border: 0; padding: .15rem 0 .15rem 6.5rem }
  .sites td::before { content: attr(data-name); float: left; margin-left: -6.5rem; width: 6rem; color: var(--soft) }
  .sites .none { display: none }
  .columns { display: none }
  .diff, .diff tbody, .diff tr, .diff td { display: block; width: auto }
  .diff td { padding-left: 2.4rem } .diff td + td { border: 0 } .diff td::before { content: none }
  .diff .d::after, .diff .a::after { left: .3rem }
  .diff .x { display: flex; flex-direction: column } .diff .x tr { display: contents } .diff .x .a { order: 1 }
  .diff .r, .diff .e { display: none } .fold pre { padding-left: 1.2rem }
  body:not(:has(#full:checked)) .s .a { display: none }
}
@media print { .columns { position: static } }
"""
