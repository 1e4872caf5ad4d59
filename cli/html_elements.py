"""The HTML of `llmc report`: elements whose text is always escaped, tables, and bars in SVG.

Names and figures come from a bundle, which is not trusted. They enter the page as text only: `element`
escapes strings that are not `Html`, and the page's content security policy allows no scripts and no requests.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from llmc.cli.errors import one_line

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1f2328; --quiet: #59636e; --line: #d1d9e0;
  --panel: #f6f8fa; --bar: #0969da; --more: #bf8700; --good: #1a7f37; --bad: #9a6700; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1117; --text: #f0f6fc; --quiet: #9198a1; --line: #3d444d;
    --panel: #151b23; --bar: #4493f8; --more: #d29922; --good: #3fb950; --bad: #d29922; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 3rem; background: var(--page);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2 { line-height: 1.25; margin: 0 0 .5rem; }
h2 { margin-top: 2.5rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); font-size: 1.3rem; }
p { margin: .5rem 0; }
.quiet, footer { color: var(--quiet); }
.good { color: var(--good); }
.bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem;
  margin: 1.25rem 0; }
.tile { padding: .75rem; border: 1px solid var(--line); border-radius: .5rem; background: var(--panel); }
.tile b { display: block; font-size: 1.25rem; line-height: 1.3; }
code { white-space: nowrap; }
.wide { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
.facts th { width: 10rem; color: var(--quiet); font-weight: 400; }
.grid td { white-space: nowrap; }
.grid th { overflow-wrap: normal; }
.grid td, .grid thead th + th { text-align: right; }
.grid .name { overflow-wrap: anywhere; min-width: 6rem; }
.grid :last-child { padding-right: 0; }
.bars th { width: 40%; font-weight: 400; }
.bars td:last-child { width: 10rem; text-align: right; white-space: nowrap; padding-right: 0; }
.bars td { vertical-align: middle; }
svg { display: block; width: 100%; height: .8rem; border-radius: .2rem; }
rect { fill: var(--line); }
.bar { fill: var(--bar); }
.more { fill: var(--more); }
.columns { height: 4.5rem; border-bottom: 1px solid var(--line); border-radius: 0; }
.columns .back { fill: var(--panel); }
figure { margin: 1.25rem 0; }
figcaption { margin-bottom: .25rem; }
.ends { display: flex; justify-content: space-between; font-size: .9rem; }
.legend span { margin-right: 1.5rem; white-space: nowrap; }
.legend svg { display: inline-block; width: .8rem; margin-right: .4rem; vertical-align: middle; }
summary { cursor: pointer; margin-top: 1rem; }
footer { margin-top: 3rem; font-size: .9rem; }
@media (max-width: 36rem) {
  .facts tr, .bars tr { display: block; padding: .4rem 0; border-bottom: 1px solid var(--line); }
  .facts th, .facts td, .bars th, .bars td, .bars td:last-child { display: block; width: auto; padding: 0;
    border: 0; text-align: left; } }
"""


class Html(str):
    """A string that is valid HTML and is not escaped."""


def element(tag: str, *children: str, **attributes: str) -> Html:
    """Return an element. Children that are not Html, and the values of attributes, are escaped.

    attributes: the names are those of HTML, with `_` for `-` and `class_` for `class`
    """
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    attribute_text = "".join(f' {names[name]}="{_escaped(value)}"' for name, value in attributes.items())
    inside = "".join(child if isinstance(child, Html) else _escaped(child) for child in children)
    return Html(f"<{tag}{attribute_text}>{inside}</{tag}>")


def page(title: str, body: Iterable[Html]) -> str:
    """Return the whole document."""
    head = element(
        "head",
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", title),
        element("style", Html(_STYLE)),
    )
    return f'<!doctype html>\n<html lang="en">\n{head}\n{element("body", *_lines(body))}\n</html>\n'


def section(title: str, *parts: Html) -> Html:
    """Return a section with a heading."""
    return element("section", element("h2", title), *_lines(parts))


def paragraph(*text: str) -> Html:
    """Return a paragraph of explanation."""
    return element("p", *text, class_="quiet")


def tiles(facts: Iterable[tuple[str, str, str]]) -> Html:
    """Return boxes with the most important facts.

    facts: (name, value, colour); the colour is "good", "bad" or ""
    """
    boxes = (
        element("div", element("b", value, class_=colour), name, class_="tile")
        for name, value, colour in facts
    )
    return element("div", *boxes, class_="tiles")


def fact_table(facts: Iterable[tuple[str, str]]) -> Html:
    """Return a table of (name, value) rows."""
    rows = (element("tr", element("th", name, scope="row"), element("td", value)) for name, value in facts)
    return element("table", *_lines(rows), class_="facts")


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """Return a table of figures, which scrolls if it is too wide. Each row begins with its name."""
    head = element("tr", *(element("th", cell, scope="col") for cell in header))
    lines = (
        element(
            "tr",
            element("th", first, scope="row", class_="name"),
            *(element("td", cell) for cell in cells),
        )
        for first, *cells in rows
    )
    table = element("table", element("thead", head), element("tbody", *_lines(lines)), class_="grid")
    return element("div", table, class_="wide", tabindex="0")  # the arrow keys scroll it


def bars(rows: Iterable[tuple[str, Sequence[float], str]], full: float) -> Html:
    """Return a chart with a bar for each row.

    rows: (name, the lengths of one or two parts of the bar, the figure as text)
    full: the length that fills the bar
    """
    lines = (
        element("tr", element("th", name, scope="row"), element("td", _bar(parts, full)), element("td", text))
        for name, parts, text in rows
    )
    return element("table", *_lines(lines), class_="bars")


def columns(
    name: str, about: str, heights: Sequence[tuple[str, float]], full: float, ends: tuple[str, str]
) -> Html:
    """Return a chart with a column for each value, as wide as the page allows.

    name: what is shown
    about: the chart in words, for readers who do not see it
    heights: (the value in words, shown at the column; its height)
    full: the height that fills the chart
    ends: the names of the first and the last column
    """
    drawn = [element("rect", width=f"{len(heights)}", height="100", class_="back")]
    for place, (text, value) in enumerate(heights):
        height = max(0.5, 100 * min(1.0, value / full)) if full > 0 else 0.5
        drawn.append(
            element(
                "rect",
                element("title", text),
                x=f"{place + 0.1:g}",
                y=f"{100 - height:.1f}",
                width="0.8",
                height=f"{height:.1f}",
                class_="bar",
            )
        )
    chart = element(
        "svg",
        element("title", f"{name}: {about}"),
        *_lines(drawn),
        role="img",
        viewBox=f"0 0 {len(heights)} 100",
        preserveAspectRatio="none",
        class_="columns",
    )
    caption = element("figcaption", element("b", name), f" {about}")
    between = element("div", *(element("span", end) for end in ends), class_="ends quiet", aria_hidden="true")
    return element("figure", caption, chart, between)


def legend(first: str, second: str) -> Html:
    """Return a legend with the meaning of the two colours of `bars`."""
    keys = (
        element("span", element("svg", element("rect", width="100%", height="100%", class_=colour)), name)
        for colour, name in (("bar", first), ("more", second))
    )
    return element("p", *keys, class_="quiet legend")


def folded(summary: str, inside: Html) -> Html:
    """Return a section that is collapsed until the reader opens it."""
    return element("details", element("summary", summary), inside)


def _bar(parts: Sequence[float], full: float) -> Html:
    """Return a bar with `parts` next to each other. Widths are percentages of `full`."""
    drawn, start = [element("rect", width="100%", height="100%")], 0.0
    for colour, part in zip(("bar", "more"), parts, strict=False):
        width = min(max(0.0, 100 * part / full), 100 - start) if full > 0 else 0.0
        drawn.append(element("rect", x=f"{start:.2f}%", width=f"{width:.2f}%", height="100%", class_=colour))
        start += width
    return element("svg", *drawn, aria_hidden="true")


def _escaped(text: str) -> str:
    return html.escape(one_line(text))


def _lines(parts: Iterable[Html]) -> Iterable[Html]:
    """Yield each part on a new line, so that the page's source can be read."""
    for part in parts:
        yield Html("\n")
        yield part
