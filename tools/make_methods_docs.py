"""Write the table of methods in docs/methods.md: ``python tools/make_methods_docs.py``. A test keeps it up to date."""

from __future__ import annotations

import textwrap
from pathlib import Path

from pipeline.methods import EVIDENCE, all_methods

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
BEGIN = "<!-- methods: written by tools/make_methods_docs.py from the methods' files -->"
END = "<!-- end of methods -->"


def page() -> str:
    """The whole page, with the table as it must be."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n{END}{after}"


def table() -> str:
    """Markdown of the table and of what is not offered."""
    rows = ["| name | kind | source | rule | known from | switched on by |", "|---|---|---|---|---|---|"]
    for method in all_methods().values():
        if method.overrides:
            switch = " ".join(f"`{word}`" for word in method.overrides)
            cells = [f"`{method.name}`", method.kind, method.source, method.rule, method.evidence, switch]
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    absent: dict[str, list[str]] = {}
    for method in all_methods().values():
        if method.missing:
            absent.setdefault(method.missing, []).append(f"`{method.name}`")
    known = "; ".join(f"{name}: {meaning}" for name, meaning in EVIDENCE.items())
    rows += ["", _wrapped(f"Known from: {known}."), "", "Not offered, and not imitated:", ""]
    return "\n".join(rows + [_wrapped(f"- {', '.join(names)}: {why}.", "  ") for why, names in absent.items()]) + "\n"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
