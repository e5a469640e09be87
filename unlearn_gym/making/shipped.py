"""The agents that ship, with what their manifests and their scores on the test instances say."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from unlearn_gym.errors import PolicyError
from unlearn_gym.files import read_json_as
from unlearn_gym.math.statistics import Estimate
from unlearn_gym.policies.manifest import ShippedManifest
from unlearn_gym.policies.registry import SHIPPED_AGENTS
from unlearn_gym.report.tables import NOTHING, estimate_text, markdown_table, p_text

SCORES = SHIPPED_AGENTS / "scores.json"
"""What ``agents.transfer`` measured, by the files' SHA-256."""
REINSTALL = "reinstall the package"


class Found(BaseModel):
    """An agent's scores on a set, and the paired difference to the best static λ: mean and its interval's ends."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    difference: list[float] | None = Field(min_length=3, max_length=3)
    p_value: float | None


class ShippedScores(BaseModel):
    """What ``scores.json`` holds, as far as anything is read from it: by agent and set."""

    agents: dict[str, dict[str, Found]]


def shipped_agents() -> dict[Path, ShippedManifest]:
    """The manifest of every agent that ships; raises :class:`PolicyError` for a damaged installation."""
    paths = sorted(SHIPPED_AGENTS.glob("*/*.zip"))
    return {path: read_json_as(path.with_suffix(".json"), ShippedManifest, PolicyError, REINSTALL) for path in paths}


def steps_to_best_static(manifest: ShippedManifest) -> int | None:
    """Environment steps until a validation's mean return first reached the best static λ's on the same episodes."""
    threshold = max(manifest.static_returns.values())
    return next((s.timesteps for s in manifest.validation if _mean(s.returns) >= threshold), None)


def training_table() -> str:
    """What every agent was trained on, and its validation returns beside the best static λ's."""
    rows = []
    for path, manifest in shipped_agents().items():
        best = max(manifest.static_returns, key=manifest.static_returns.__getitem__)
        steps = steps_to_best_static(manifest)
        rows.append(
            [
                _name(path), manifest.algorithm, manifest.instances or manifest.task or "", manifest.reward,
                str(manifest.seed), f"{manifest.timesteps:,}", f"{manifest.seconds / 60:.1f}",
                ", ".join(f"{_mean(stage.returns):.2f}" for stage in manifest.validation),
                f"{manifest.static_returns[best]:.2f} (λ = {best.removeprefix('static:')})",
                "never" if steps is None else f"{steps:,}",
            ]
        )  # fmt: skip
    header = ["file", "algorithm", "trained on", "reward", "seed", "steps", "minutes"]
    return markdown_table([*header, "validation returns", "best static λ", "steps to that"], rows)


def score_table() -> str:
    """Every agent's score on test instances less the best static λ's of the set by hindsight."""
    scores = read_json_as(SCORES, ShippedScores, PolicyError, REINSTALL).agents
    sets = list(dict.fromkeys(name for found in scores.values() for name in found))
    rows = []
    for path, manifest in shipped_agents().items():
        found = scores.get(manifest.sha256, {})
        rows.append([_name(path), *(_difference(found.get(name)) for name in sets)])
    return markdown_table(["score − best static λ on", *sets], rows)


def _difference(found: Found | None) -> str:
    if found is None or found.difference is None:
        return NOTHING
    return f"{estimate_text(Estimate(*found.difference), '{:+.3f}'.format)}, p {p_text(found.p_value)}"


def _name(path: Path) -> str:
    return f"`{path.parent.name}/{path.name}`"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
