"""Does this tree compute what another commit computes? ``python tests/record.py [COMMIT]``.

Plays the same short episodes with the code of COMMIT (by default the last commit before the house was rebuilt) and with
the working tree, on this machine, and compares observations, rewards, measured terms and final weights to the bit. It
prints every case that differs and ends with status 1 if any does. pytest does not collect this file: a record to the
bit does not carry over to other processors, so both sides are computed anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEFORE = "178a1a09b3c047c4ff06b6880ac9f912b4f0acfc"
RENAMED: dict[str, str] = {}
"""Measured terms whose names have changed since, as old: new."""
STEPS, BATCH = 4, 8
OBJECTIVES = {
    "gaussians-2d": ("siss", "siss-no-is", "bernoulli", "naive", "neggrad", "erasediff", "retrack"),
    "mnist-trousers": ("siss", "siss-no-is", "bernoulli", "naive", "neggrad", "erasediff", "retrack"),
    "vae-mnist-trousers": ("siss", "siss-no-is", "naive", "neggrad"),
    "sfd-mnist-digits": ("sfd",),
}
STACKED = ("gaussians-2d", "mnist-trousers")
"""Tasks of ε-networks, whose runs can be stacked."""
OTHER_TASKS = ("mnist-bags", "mnist-digits:3", "mnist-sandals", "mnist-tshirt", "gaussians-2d:0,4")
OPTIONS: dict[str, dict[str, Any]] = {
    "potential": {"reward": "potential"},
    "fresh": {"features": "fresh"},
    "extended": {"observation": "extended"},
    "raw": {"normalize_features": False, "forget_grad_rule": "fixed_norm", "forget_grad_norm": 0.5},
    "adam": {"optimizer": "adam", "adam_betas": [0.5, 0.9], "max_grad_norm": None, "max_grad_value": 0.01},
    "sgd": {"optimizer": "sgd", "loss_reduction": "sum", "dataset_factors": "none", "learning_rate": 1e-6},
    "whole": {"skip_zero_weights": False},
}


def cases() -> Iterator[tuple[str, dict[str, Any], str | None]]:
    """Name, options and vector backend (None: one environment) of every case."""
    for task, objectives in OBJECTIVES.items():
        for objective in objectives:
            rule = {"siss": {}, "erasediff": {}}.get(objective, {"forget_grad_rule": "loss"})
            options = {"task": task, "objective": objective, **rule}
            yield f"{task} {objective}", options, None
            for backend in backends(task, objective):
                yield f"{task} {objective} {backend}", options, backend
        for name, options in OPTIONS.items():
            for backend in (None, "stacked") if task in STACKED else (None,):
                if task != "sfd-mnist-digits" or name in ("potential", "extended"):
                    yield f"{task} {name} {backend}", {"task": task, **options}, backend
    yield "sfd hybrid", {"task": "sfd-mnist-digits", "hybrid_coef": 0.5, "forget_grad_rule": "loss"}, None
    yield "instances", {"instances": "gaussians-2d/train"}, None
    for task in OTHER_TASKS:
        yield task, {"task": task}, None


def backends(task: str, objective: str) -> Iterator[str]:
    """The vector backends that are played: processes with the default objective of a kind of model alone."""
    yield "serial"
    if task in STACKED:
        yield "stacked"
    if objective in ("siss", "sfd"):
        yield "processes"


def digest(value: Any) -> str:
    """A checksum of numbers that are the same to the bit: floats by their bytes, dicts by their keys in order."""
    import numpy as np

    if isinstance(value, dict):
        return " ".join(f"{RENAMED.get(key, key)}={digest(value[key])}" for key in sorted(value))
    if isinstance(value, list | tuple):
        return hashlib.sha256(" ".join(map(digest, value)).encode()).hexdigest()[:12]
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:12]


def play(options: dict[str, Any], backend: str | None) -> dict[str, str]:
    """Checksums of what an episode with these options shows."""
    import gymnasium as gym
    import numpy as np

    import unlearn_gym  # noqa: F401 - registers the environment

    options = {**options, "horizon": STEPS, "batch_size": BATCH}
    lambdas = np.linspace(0.1, 0.9, 2 * (STEPS + 1), dtype=np.float32).reshape(-1, 2, 1)
    vector = backend is not None
    env = (
        gym.make_vec("SISSUnlearn-v0", num_envs=2, backend=backend, **options) if vector
        else gym.make("SISSUnlearn-v0", **options)
    )  # fmt: skip
    found: dict[str, list[Any]] = {"observations": [env.reset(seed=3)[0]], "rewards": [], "terms": []}
    for actions in lambdas[:STEPS]:
        observation, reward, *_, info = env.step(actions if vector else actions[0])
        for name, value in (("observations", observation), ("rewards", reward), ("terms", info.get("terms", {}))):
            found[name].append(np.asarray(value, dtype=np.float64) if name == "rewards" else value)
    record = {name: digest(values) for name, values in found.items()}
    if not vector:
        state = env.unwrapped.run.model.state_dict()
        record["weights"] = digest({name: value.numpy() for name, value in state.items()})
    env.close()
    return record


def record(tree: Path) -> dict[str, dict[str, str]]:
    """What every case shows with the code of ``tree``: half of the cases at a time, in processes of one thread."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}

    def part(number: int) -> dict[str, dict[str, str]]:
        command = [sys.executable, __file__, "--part", str(number)]
        return json.loads(subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.PIPE).stdout)

    with ThreadPoolExecutor(2) as pool:
        return {name: shown for half in pool.map(part, (0, 1)) for name, shown in half.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", default=BEFORE, help=f"what to compare with (default {BEFORE})")
    parser.add_argument("--part", type=int, choices=(0, 1), help="print the checksums of half of the cases, as JSON")
    args = parser.parse_args()
    if args.part is not None:
        json.dump({name: play(*case) for name, *case in list(cases())[args.part :: 2]}, sys.stdout)
        return 0
    with tempfile.TemporaryDirectory(prefix="record-") as folder:
        tree = Path(folder) / "before"
        subprocess.run(["git", "worktree", "add", "--detach", "-q", tree, args.commit], cwd=ROOT, check=True)
        try:
            before, now = record(tree), record(ROOT)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    other = [f"{name}: {', '.join(k for k in before[name] if before[name][k] != now[name][k])}" for name in before]
    different = [line for line in other if not line.endswith(": ")]
    print("\n".join([*different, f"{len(before)} cases, {len(different)} differ from {args.commit}"]))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
