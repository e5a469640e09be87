"""What mkdocs does to every page: roles of docstrings, as in ``:class:`Task```, become plain code."""

from __future__ import annotations

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """The page without the roles' names."""
    return re.sub(r":(?:class|data|func|meth|mod):(?=<code>)", "", html)
