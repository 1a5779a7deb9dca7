"""The docs say what the code says: generated pages are current, links lead somewhere, pages are in the site."""

import importlib.util
import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml

from pipeline.monitoring.event_kinds import StepRecord
from tests.command_line import call

ROOT = Path(__file__).resolve().parents[3]
FILES = {  # of whoever runs the commands of docs/troubleshooting.md
    "noverifier.jsonl": '{"id": 1, "prompt": "1+1=", "answer": "2"}\n',
    "bad.jsonl": '{"id": 1, "question": "1+1=", "answer": "2"}\n{"id": 2, "prompt": "1"\n',
    "broken.yaml": "name: x\nsteps: [\n",
    "gpt2/config.json": '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}',
    "run1/events.jsonl": "{}",
}
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")] + DOCS


def test_every_command_is_in_the_page():
    tool = runpy.run_path(str(ROOT / "tools" / "make_commands_docs.py"))
    assert tool["PAGE"].read_text() == tool["page"](), "run: python tools/make_commands_docs.py"


def test_every_family_is_in_the_page_of_models():
    tool = runpy.run_path(str(ROOT / "tools" / "make_models_docs.py"))
    assert tool["unknown"]() == set(), "add its line to KNOWN in tools/make_models_docs.py"
    assert tool["PAGE"].read_text() == tool["page"](), "run: python tools/make_models_docs.py"


def test_every_field_of_a_step_is_in_the_page_of_events():
    page = (ROOT / "docs" / "events.md").read_text()
    assert [name for name in StepRecord.__dataclass_fields__ if f"`{name}`" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Files of the repository; anchors are checked by the site's strict build."""
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text())
    made = {"contributing.md"}  # of CONTRIBUTING.md, by tools/docs_hooks.py
    assert [link for link in links if link not in made and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_wrapped(page):
    """At 120 columns; tables and code have lines of their own length."""
    code = False
    long = []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        code ^= line.strip().startswith("```")
        if len(line) > 120 and not code and not line.startswith(("|", "    ", "!")) and "](" not in line:
            long.append(number)
    assert long == []


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_paragraphs_of_a_list_are_indented_by_four(page):
    """The site's Markdown takes fewer for the end of the list, and a block of code there for a paragraph."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    assert re.findall(r"\n\n( {1,3}\S.*| {5,7}\S.*)", text) == []
    assert re.findall(r"\n\n    .*(?:\n    .*)*\n(\d+\. .*)", text) == []  # the next item needs a blank line before it


def test_every_page_is_in_the_site():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = re.findall(r"[\w]+\.md", str(nav))
    assert sorted(listed) == sorted([page.name for page in DOCS] + ["contributing.md"])


BLOCKS = re.findall(r"```text\n\$ isentrope (.*)\n((?:.*\n)*?)```", (ROOT / "docs" / "troubleshooting.md").read_text())
MISSING = {"sglang": "sglang", "wandb": "wandb", "transformer_engine": "transformer_engine"}


def test_troubleshooting_has_the_twenty_most_likely():
    assert len(BLOCKS) >= 20


@pytest.mark.parametrize(("words", "printed"), BLOCKS, ids=[words for words, _ in BLOCKS])
def test_errors_are_printed_as_the_page_has_them(capsys, monkeypatch, tmp_path, words, printed):
    missing = next((package for word, package in MISSING.items() if word in words), None)
    if missing and importlib.util.find_spec(missing):
        pytest.skip(f"{missing} is installed")
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, *shlex.split(words))
    assert code == 2
    said = err.replace(str(tmp_path), "/home/me").replace(str(ROOT), "/home/me/isentrope")
    assert said.strip() == printed.strip()
