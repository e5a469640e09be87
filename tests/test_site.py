"""The documentation site as it is built: nothing of it stands there as markup that was not rendered."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ANYWHERE = {
    "heading": r"(?m)^ *##+ ",
    "table": r"(?m)^ *\|.*\|$|\| ?-{3,}",
    "role": r":(class|mod|meth|func|data|attr|exc|obj|const|ref):",
    "directive": r"(?m)^ *:::|!!! ",
    "backtick": r"`",
}
"""Markup that no page may show, in a code block neither: a docstring that cannot be dedented becomes one."""
IN_PROSE = {"heading": r"(?m)^ *# ", "emphasis": r"\*\*", "link": r"\]\(|\]\["}
"""Markup that code may hold."""
BLOCKS = {"p", "li", "td", "th", "div", "pre", "h1", "h2", "h3", "h4", "h5", "h6"}


class _Texts(HTMLParser):
    """Collects what a reader sees of a page's article: all of it, and without code."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.prose = "", ""
        self._depth = {"article": 0, "pre": 0, "code": 0}

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in self._depth:
            self._depth[tag] += 1
        if tag in BLOCKS:
            self.text, self.prose = f"{self.text}\n", f"{self.prose}\n"

    def handle_endtag(self, tag: str) -> None:
        if tag in self._depth:
            self._depth[tag] -= 1

    def handle_data(self, data: str) -> None:
        if self._depth["article"]:
            self.text += data
            self.prose += "" if self._depth["pre"] or self._depth["code"] else data


def faults(html: str) -> list[str]:
    """Markup that the page shows."""
    texts = _Texts()
    texts.feed(html)
    found = [(name, m, texts.text) for name, pattern in ANYWHERE.items() for m in re.finditer(pattern, texts.text)]
    found += [(name, m, texts.prose) for name, pattern in IN_PROSE.items() for m in re.finditer(pattern, texts.prose)]
    return [f"{name}: {text[max(0, m.start() - 20) : m.end() + 40]!r}" for name, m, text in found]


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The site, built once."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("<pre><code>## Description</code></pre>", "heading"),
        ("<p># Title</p>", "heading"),
        ("<p>| a | b |\n|---|---|</p>", "table"),
        ("<p>raises :class:<code>ActionError</code></p>", "role"),
        ("<p>::: unlearn_gym.settings</p>", "directive"),
        ("<p>``task``</p>", "backtick"),
        ("<p>**most**</p>", "emphasis"),
        ("<p>[metrics](metrics.md)</p>", "link"),
    ],
)
def test_markup_that_was_not_rendered_is_seen(body, fault):
    assert fault in {line.partition(":")[0] for line in faults(f"<article>{body}</article>")}
    assert faults("<article><h2>A</h2><table><tr><td>a</td></tr></table><pre># a\nx[0](**y)</pre></article>") == []


def test_every_page_is_rendered(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").glob("*.md")))
    assert {str(page.relative_to(site)): lines for page in pages if (lines := faults(page.read_text()))} == {}


def test_the_environments_docstring_has_its_headings_and_tables(site):
    page = (site / "environment" / "index.html").read_text()
    for heading in ("Action Space", "Observation Space", "Rewards", "Episode End", "Arguments"):
        assert re.search(rf"<h[4-6][^>]*>\s*{heading}", page), heading
    assert page.count("<table>") >= 2
