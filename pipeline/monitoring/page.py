"""The parts of self-contained HTML pages: one document with its style and theme, tables and lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from pipeline.monitoring.charts import theme

CSS = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1f2328; --muted: #5b646e; --line: #dde1e6;
  --card: #f6f8fa; --good: #1a7f4b; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --ink: #e6e8eb; --muted: #9aa4af; --line: #343a42; --card: #1c2026; --good: #4cc38a; }
}
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 1120px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p, li { max-width: 52rem; } .muted { color: var(--muted); }
figure { margin: 0; } svg { width: 100%; height: auto; display: block; } svg text { fill: var(--ink); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--muted); font-weight: 600; }
"""


def document(title: str, body: str, css: str = "") -> str:
    """A whole page. ``title`` is text, ``body`` HTML; ``css`` is added to what all pages share."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{theme()}{CSS}{css}</style></head>\n"
        f"<body>{body}</body></html>\n"
    )


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls by itself where it is too wide. ``header`` is text, the cells are HTML."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def html_list(items: Iterable[str]) -> str:
    """A bulleted list; the items are HTML."""
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"
