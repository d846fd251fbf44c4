"""Parts of HTML pages that are one file: style, tables, charts as SVG. No network, no script."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #16202c; --dim: #5b6876; --line: #d8dee6;
  --soft: #f3f6f9; --a: #2563eb; --b: #c2410c; --c: #047857; --d: #7e22ce; --bad: #b42318;
  --a-ink: #ffffff }
@media (prefers-color-scheme: dark) { :root { --page: #11161d; --ink: #e7ecf2; --dim: #a2aebb;
  --line: #323c48; --soft: #1a212b; --a: #6ea2ff; --b: #ff9a5c; --c: #4ccf9b; --d: #cf9bff;
  --bad: #ff8f85; --a-ink: #0b1016 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem } h3 { font-size: 1rem; margin: 1.5rem 0 .25rem }
p { margin: .25rem 0 .75rem; max-width: 46rem } .dim, figcaption { color: var(--dim) }
code, pre { font: .85rem/1.45 ui-monospace, monospace } pre { overflow: auto; padding: .75rem;
  background: var(--soft); border-radius: .4rem }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem;
  margin: 1rem 0; padding: 0; list-style: none }
.cards li { background: var(--soft); border-radius: .5rem; padding: .7rem .9rem }
.cards b { display: block; font-size: 1.5rem; line-height: 1.3 }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100%;
  font-variant-numeric: tabular-nums } th, td { padding: .3rem .5rem; text-align: right;
  border-bottom: 1px solid var(--line); vertical-align: middle } th { font-weight: 600 }
td { white-space: nowrap } td:has(code) { white-space: normal; text-align: left }
thead th { color: var(--dim); font-weight: 400; font-size: .85rem }
th[scope=row] { overflow-wrap: anywhere }
th[scope=row], thead th:first-child { font-weight: 400; min-width: 8rem; width: 24%;
  line-height: 1.25; text-align: left }
thead th:nth-child(2) { text-align: left }
td.bar { width: 42%; min-width: 10rem; padding: .2rem .5rem }
svg { display: block; width: 100%; font: 12px system-ui, sans-serif; fill: var(--ink) }
.axis { stroke: var(--line) } .mark { stroke: var(--dim); stroke-dasharray: 3 2 }
.whisker { stroke: var(--ink); stroke-width: 1.5 } .a { fill: var(--a) } .b { fill: var(--b) }
.c { fill: var(--c) } .d { fill: var(--d) } .band { fill: var(--a); opacity: .18 }
.curve { fill: none; stroke: var(--a); stroke-width: 2 }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em }
.key.a { background: var(--a) } .key.b { background: var(--b) } .key.c { background: var(--c) }
.key.d { background: var(--d) } .bad { color: var(--bad) }
.chart { max-width: 46rem; margin: 0; overflow-x: auto } .chart svg { min-width: 27rem }
.clips { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(13rem, 45%), 1fr)) }
.clips figure { margin: 0 } video { width: 100%; aspect-ratio: 1; object-fit: contain;
  background: #000; border-radius: .4rem; image-rendering: pixelated }
.short { max-width: 32rem } .short thead th:nth-child(2) { text-align: right }
.told { display: grid; gap: .75rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)) }
.told figure { margin: 0; padding: .6rem; background: var(--soft); border-radius: .4rem;
  border-left: 3px solid var(--line); display: flex; gap: .75rem; align-items: flex-start }
.told .right { border-color: var(--c) } .told .wrong { border-color: var(--bad) }
.told img { width: 5rem; flex: none; image-rendering: pixelated; border-radius: .25rem }
dl { margin: 0 } dt { color: var(--dim); font-size: .75rem } dd { margin: 0 0 .25rem;
  color: var(--ink); overflow-wrap: anywhere }
figcaption { font-size: .85rem; overflow-wrap: anywhere } figcaption b { color: var(--ink) }
summary { cursor: pointer } details { margin: .5rem 0 }
@media (max-width: 40rem) { .extra { display: none } th, td { padding: .25rem .3rem }
  td.bar { min-width: 7rem } }
@media print { body { max-width: none; padding: 0; font-size: 10pt }
  .cards li, pre { border: 1px solid var(--line) } tr, figure, .cards li { break-inside: avoid }
  .clips { display: none }
  .a, .b, .c, .d, .key, .band { print-color-adjust: exact; -webkit-print-color-adjust: exact } }
"""
SERIES = "abcd"
"""Classes of the colours of results that stand side by side."""


def text(value: Any) -> str:
    """Return a value as the text of an element or attribute."""
    return html.escape(str(value))


def page(title: str, parts: Iterable[str]) -> str:
    """Return a whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        # without an icon of its own, a browser would ask the server for one
        '<link rel="icon" href="data:,"/>\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def cards(figures: Sequence[tuple[str, str]]) -> str:
    """Return figures in large print, each over what it means."""
    items = (f"<li><b>{text(figure)}</b> {text(about)}</li>" for figure, about in figures)
    return f'<ul class="cards">{"".join(items)}</ul>'


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], extra: Sequence[int] = ()) -> str:
    """Return a table; the first cell of a row names it.

    Args:
        headings: text of each column.
        rows: HTML of each cell; a cell that begins with an SVG is a bar.
        extra: columns that a narrow screen does without.
    """

    def attributes(column: int, cell: str = "") -> str:
        names = ["bar"] * cell.startswith("<svg") + ["extra"] * (column in extra)
        return f' class="{" ".join(names)}"' if names else ""

    head = "".join(f'<th scope="col"{attributes(i)}>{text(h)}</th>' for i, h in enumerate(headings))
    body = "\n".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td{attributes(i, cell)}>{cell}</td>" for i, cell in enumerate(row) if i)
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def pairs(values: Mapping[str, Any]) -> str:
    """Return a table of names and values."""
    rows = [(text(k), f"<code>{text(plain(v))}</code>") for k, v in values.items()]
    return table(("", ""), rows)


def plain(value: Any) -> str:
    """Return a setting in few words."""
    if isinstance(value, Mapping) and value:
        shown = {k: plain(v) for k, v in value.items()}
        if all("/" in k for k in shown):  # tasks, of which many are alike
            alike = {v: [k for k in shown if shown[k] == v] for v in shown.values()}
            return "; ".join(f"{v} ({', '.join(names)})" for v, names in alike.items())
        return ", ".join(f"{k}: {v}" for k, v in shown.items())
    return "-" if value is None or value == {} else str(value)


def percent(part: float | None) -> str:
    """Return a normalised score as text."""
    return "-" if part is None else f"{100 * part:.0f}%"


def interval(ends: Sequence[float] | None) -> str:
    """Return an interval of normalised scores as text."""
    return "-" if not ends else f"{100 * ends[0]:.0f} to {100 * ends[1]:.0f}"


class Scale:
    """Where normalised scores lie on bars of one page; those beyond its ends are cut."""

    WIDTH = 300.0

    def __init__(self, values: Iterable[float]) -> None:
        found = [*values, 0.0, 1.0]
        self.low = max(-0.5, min(found)) - 0.05
        self.high = min(2.0, max(found)) + 0.05

    def __call__(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        return round(self.WIDTH * (inside - self.low) / (self.high - self.low), 2)


def bar(
    task: str, scale: Scale, scores: Sequence[tuple[float | None, Sequence[float] | None]]
) -> str:
    """Return the bars of a task, one per result, with marks of random and of the expert.

    Args:
        task: its id.
        scale: of the page.
        scores: per result, the normalised mean and its interval.
    """
    height = 12 * len(scores) + 6
    drawn, told = [], []
    for i, (value, ends) in enumerate(scores):
        top = 3 + 12 * i
        if value is None:
            told.append("no score")
            continue
        told.append(f"{percent(value)} of expert" + (f" ({interval(ends)})" if ends else ""))
        a, b = sorted((scale(0.0), scale(value)))
        drawn.append(
            f'<rect class="{SERIES[i % 4]}" x="{a}" y="{top}" width="{max(b - a, 1):.2f}" '
            'height="10" rx="1"/>'
        )
        if ends:
            a, b, middle = scale(ends[0]), scale(ends[1]), top + 5
            path = f"M{a} {middle}H{b}M{a} {middle - 3}V{middle + 3}M{b} {middle - 3}V{middle + 3}"
            drawn.append(f'<path class="whisker" d="{path}"/>')
        if value > scale.high or value < scale.low:
            end = scale(value) - 8 if value > scale.high else 2
            drawn.append(f'<text x="{end}" y="{top + 9}">{"»" if value > 0 else "«"}</text>')
    marks = "".join(
        f'<path class="mark" d="M{scale(at)} 0V{height}"><title>{name}</title></path>'
        for at, name in ((0.0, "random"), (1.0, "expert"))
    )
    label = text(f"{task}: {'; '.join(told)}")
    return (
        f'<svg role="img" class="task" data-task="{text(task)}" aria-label="{label}" '
        f'viewBox="0 0 {scale.WIDTH:.0f} {height}">{"".join(drawn)}{marks}</svg>'
    )


def curve(lines: Sequence[Mapping[str, Any]], about: str) -> str:
    """Return the share of tasks at or above each part of the expert's score (Gato, figure 5).

    Args:
        lines: as `statistics.Stratified.curve` gives them.
        about: what the picture tells, for those who do not see it.
    """
    left, top, width, height = 44, 10, 500, 220

    def place(x: float, y: float) -> str:
        return f"{left + width * x:.1f},{top + height * (1 - y):.1f}"

    parts = []
    for part in (0, 0.25, 0.5, 0.75, 1):
        x, y = left + width * part, top + height * (1 - part)
        parts.append(
            f'<path class="axis" d="M{left} {y}H{left + width}M{x} {top}V{top + height}"/>'
        )
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{part:.0%}</text>')
        under = top + height + 18
        parts.append(f'<text x="{x}" y="{under}" text-anchor="middle">{part:.0%}</text>')
    for i, line in enumerate(lines):
        colour = f"var(--{SERIES[i % 4]})"
        at, low, high = line["of_expert"], line["low"], line["high"]
        if low is not None and high is not None:
            edge = [place(x, y) for x, y in zip(at, high, strict=True)]
            edge += [place(x, y) for x, y in zip(at, low, strict=True)][::-1]
            parts.append(f'<polygon class="band" style="fill:{colour}" points="{" ".join(edge)}"/>')
        points = " ".join(place(x, y) for x, y in zip(at, line["share"], strict=True))
        parts.append(f'<polyline class="curve" style="stroke:{colour}" points="{points}"/>')
    middle = left + width / 2
    parts.append(
        f'<text x="{middle}" y="{top + height + 38}" text-anchor="middle">part of the expert\'s '
        "score, random = 0</text>"
    )
    return (
        f'<svg role="img" aria-label="{text(about)}" viewBox="0 0 {left + width + 20} '
        f'{top + height + 46}">{"".join(parts)}</svg>'
    )
