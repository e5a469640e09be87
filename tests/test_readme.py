"""The README's Python blocks run, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from unlearn_gym.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL), ids=lambda b: b[:30])
def test_python_blocks_run(block):
    namespace: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), namespace)
    assert "env" in namespace


def test_every_command_named_exists():
    named = set(re.findall(r"`unlearn-gym ([a-z-]+)", README))
    assert named
    assert named <= set(COMMANDS)


def test_every_linked_file_exists():
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
