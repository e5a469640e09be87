"""The house's rules: what may import what, and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "unlearn_gym"
LAYERS = {
    "errors": 0, "files": 0, "values": 0, "memory": 0, "interrupts": 0, "curves": 0, "processes": 0, "locks": 0,
    "engines": 0, "torch_state": 0, "diffusion": 1, "models": 1, "siss": 1, "settings": 1, "elbo": 1, "sfd": 1,
    "families": 1, "tasks": 2,
    "step": 3, "objectives": 3, "run": 3, "stacked": 3, "instances": 3, "pretraining": 3, "distillation": 3,
    "train_classifier": 3,
    "calibration": 4, "envs": 4, "policies": 5, "evaluation": 6, "shipped": 7,
    "network_table": 7, "benchmark": 7, "cli": 8,
}  # fmt: skip

TOP_LEVEL_NAMES = ("__version__", "ENV_ID", "register_envs")


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def modules() -> list[Path]:
    return [p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.name != "__init__.py"]


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_from_the_task_to_the_report(path):
    own = LAYERS[layer(path)]
    for name in imports(path):
        assert not name.startswith("agents"), f"{path} imports {name}"
        parts = name.split(".")
        if parts[0] == "unlearn_gym" and len(parts) > 1 and parts[1] not in TOP_LEVEL_NAMES:
            assert LAYERS[parts[1]] <= own, f"{path} imports {name}"
        compared = path == PACKAGE / "benchmark" / "vector.py"  # with vector environments of both
        if parts[0] == "gymnasium":
            assert compared or layer(path) == "envs" or path.name == "sb3.py", f"{path} imports {name}"
        if parts[0] == "stable_baselines3":
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
