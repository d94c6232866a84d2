"""Putting a web page together: one file without scripts, light and dark, on a phone, on paper."""

import re
from collections.abc import Iterable, Sequence
from html import escape

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --panel: #f6f8fa; --ink: #1f2933; --faint: #5b6673;
  --grid: #dfe4ea; --first: #2f6db0; --second: #c8541e; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #14181d; --panel: #1d232a; --ink: #e6eaef;
  --faint: #9aa5b1; --grid: #333c46; --first: #6ea8e0; --second: #f08a5b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1.2rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: .94rem/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 1.6rem 0 .7rem; }
p, li { max-width: 48rem; }
p.lead { color: var(--faint); margin: 0 0 1rem; max-width: none; }
ul { padding-left: 1.2rem; margin: .4rem 0; }
li { margin: .3rem 0; }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; }
.tiles > div { flex: 1 1 min(15.2rem, 40%); background: var(--panel); border-radius: .5rem; padding: .7rem .9rem; }
.tiles b { display: block; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--faint); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--panel); border-radius: .5rem; padding: .8rem .8rem .4rem; break-inside: avoid; }
figcaption { font-weight: 600; font-size: .92rem; margin: 0 0 .4rem .2rem; }
figcaption small { display: block; font-weight: 400; color: var(--faint); }
figure svg { display: block; width: 100%; max-width: 30rem; height: auto; margin: 0 auto; }
.flag { white-space: nowrap; }
.wide { overflow-x: auto; margin-top: .8rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--grid);
  white-space: pre-wrap; }
th:last-child, td:last-child { padding-right: 0; } thead th:last-child { white-space: nowrap; }
th + td, td + td { overflow-wrap: anywhere; } td + td:last-child:not(.number) { min-width: 6rem; }
th { font-weight: 600; } tbody th { font-weight: 400; color: var(--faint); width: 13rem; min-width: 7rem; }
td.number, th.number { text-align: right; white-space: nowrap; }
code, pre { font: .87em/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
pre { background: var(--panel); border-radius: .5rem; padding: .7rem .9rem; margin: .8rem 0; white-space: pre-wrap;
  overflow-wrap: anywhere; }
@media screen and (max-width: 36rem) { tbody th, tbody th + td { display: block; padding-right: 0; }
  tbody th { width: auto; border: 0; padding-bottom: 0; } tbody th + td { padding-top: 0; }
  thead th, td { padding-right: .5rem; } thead + tbody, thead { font-size: .85rem; } }
@media print { html { font-size: 11px; } body { padding: 0; } p, li { max-width: none; }
  h2 { break-after: avoid; margin-top: 1.4rem; }
  tr, li, pre, .tiles > div { break-inside: avoid; } .tiles > div { flex-basis: 30%; }
  .charts { grid-template-columns: repeat(2, 1fr); } }
""".strip()


def page(title: str, parts: Iterable[str]) -> str:
    """Return a whole page; `parts` are HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Return a section; nothing if it has no part."""
    inside = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{inside}\n</section>" if inside else ""


def tiles(values: Iterable[tuple[str, str]]) -> str:
    """Return large figures, (figure, what it is) each."""
    shown = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in values)
    return f'<div class="tiles">{shown}</div>'


def figure(title: str, chart: str, said: str = "") -> str:
    """Return a chart with its title, and a line below the title."""
    small = f"<small>{escape(said)}</small>" if said else ""
    return f"<figure><figcaption>{escape(title)}{small}</figcaption>{chart}</figure>"


def figures(charts: Sequence[str]) -> str:
    """Return charts side by side, as many as there is room for."""
    return '<div class="charts">' + "\n".join(charts) + "</div>" if charts else ""


def facts(values: Iterable[tuple[str, str]]) -> str:
    """Return a table of (name, value); a name without a value is left out."""
    shown = ((escape(name), escape(value)) for name, value in values if value)
    rows = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in shown)
    return f'<div class="wide"><table><tbody>{rows}</tbody></table></div>' if rows else ""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """Return a table with heads; the last `numbers` columns are set to the right. Nothing without rows."""
    if not rows:
        return ""
    first = len(heads) - numbers

    def cells(values: Sequence[str], tag: str) -> str:
        kinds = (' class="number"' if i >= first else "" for i in range(len(values)))
        return "".join(f"<{tag}{kind}>{escape(value)}</{tag}>" for kind, value in zip(kinds, values, strict=True))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells(heads, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def points(sentences: Iterable[str]) -> str:
    """Return sentences as a list."""
    shown = "".join(f"<li>{_text(sentence)}</li>" for sentence in sentences)
    return f"<ul>{shown}</ul>" if shown else ""


def heading(text: str) -> str:
    """Return the page's own title."""
    return f"<h1>{escape(text)}</h1>"


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph, of a `kind` in the style."""
    return f'<p class="{kind}">{_text(text)}</p>' if kind else f"<p>{_text(text)}</p>"


def preformatted(text: str) -> str:
    """Return text that keeps its lines."""
    return f"<pre>{_text(text)}</pre>"


def _text(text: str) -> str:
    """Return running text as HTML, in which no flag is broken at its hyphens."""
    return FLAG.sub(r'<span class="flag">\g<0></span>', escape(text))
