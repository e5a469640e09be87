"""The house's rules: what may import what, and what importing the package costs."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "unlearn_gym"
ROOMS = (
    "errors", "files", "system", "settings", "math", "models", "tasks", "metrics", "run", "envs", "policies",
    "comparison", "report", "making", "benchmark", "cli",
)  # fmt: skip
"""From the ground up: a room may import those before it."""


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def modules(package: Path) -> dict[str, Path]:
    """Every file of the package by its module's name, but for the package's own ``__init__``."""
    files = (path for path in package.rglob("*.py") if path != package / "__init__.py")
    return {".".join(p.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def room(module: str) -> str:
    return module.split(".")[1]


def faults(package: Path) -> list[str]:
    """Every import between files that runs up, and every circle of files."""
    files = modules(package)
    graph = {name: (imports(path) & files.keys()) - {name} for name, path in files.items()}
    graph = {name: {n for n in found if not any(o.startswith(f"{n}.") for o in found)} for name, found in graph.items()}
    up = [
        f"{name} imports {other}"
        for name, found in graph.items() for other in sorted(found)
        if ROOMS.index(room(other)) > ROOMS.index(room(name))
    ]  # fmt: skip
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as circle:
        return [*up, f"circle: {' -> '.join(circle.args[1])}"]
    return up


def test_imports_run_from_the_ground_up_without_a_circle():
    assert faults(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        (
            "math/siss.py",
            "from unlearn_gym.run.terms import StepTerms",
            "unlearn_gym.math.siss imports unlearn_gym.run.terms",
        ),
        ("metrics/judge.py", "from unlearn_gym import envs", "unlearn_gym.metrics.judge imports unlearn_gym.envs"),
        ("run/gradients.py", "from unlearn_gym.run.objectives.base import Objective", "circle: "),
        ("models/flat.py", "if TYPE_CHECKING:\n    from unlearn_gym.models.weights import load_weights\n", None),
        ("models/weights.py", "def f():\n    from unlearn_gym.models.flat import detached_copy\n", None),
    ],
)
def test_a_planted_fault_is_found(file, line, fault, tmp_path):
    package = shutil.copytree(PACKAGE, tmp_path / "unlearn_gym", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (package / file).write_text((package / file).read_text() + f"\n{line}\n")
    assert any(found.startswith(fault) for found in faults(package)) if fault else faults(package) == []


def test_a_report_needs_neither_environments_nor_networks():
    files, seen = modules(PACKAGE), set()
    waiting = [name for name in files if room(name) == "report"]
    while waiting:
        name = waiting.pop()
        if name in files and name not in seen:
            seen.add(name)
            waiting += imports(files[name])
    assert {room(name) for name in seen} <= {
        "errors", "files", "system", "settings", "math", "metrics", "comparison", "report"
    }  # fmt: skip
    assert not {name for name in seen if room(name) == "metrics"} - {
        "unlearn_gym.metrics", "unlearn_gym.metrics.catalogue", "unlearn_gym.metrics.pictures"
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(modules(PACKAGE)))
def test_only_environments_import_gymnasium_and_only_adapters_sb3(name):
    path = modules(PACKAGE)[name]
    compared = path == PACKAGE / "benchmark" / "vector.py"  # with vector environments of both
    for imported in imports(path):
        assert not imported.startswith("agents"), f"{path} imports {imported}"
        if imported.split(".")[0] == "gymnasium":
            assert compared or room(name) == "envs" or path.name == "sb3.py", f"{path} imports {imported}"
        if imported.split(".")[0] == "stable_baselines3":
            assert compared or path.name == "sb3.py"


def test_importing_the_package_loads_neither_torch_nor_sb3():
    code = (
        "import sys, unlearn_gym; print([m for m in ('torch', 'stable_baselines3', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_making_an_environment_loads_nothing_that_takes_long_and_is_not_needed():
    heavy = ("stable_baselines3", "matplotlib", "torch_fidelity", "diffusers", "scipy.stats", "ray")
    code = (
        "import sys, gymnasium, unlearn_gym, unlearn_gym.tasks.diffusers_pipeline;"
        "gymnasium.make('SISSUnlearn-v0', task='gaussians-2d');"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
