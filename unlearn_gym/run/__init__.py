"""The live unlearning run."""

from __future__ import annotations

from unlearn_gym.run.run import Snapshot, UnlearningRun

__all__ = ["Snapshot", "UnlearningRun"]
