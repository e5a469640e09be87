"""Do agents carry over? ``python -m agents.transfer ppo static:0.5 --on gaussians-2d/test mnist-digits/test``."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from tqdm import tqdm

import unlearn_gym
from unlearn_gym.engines import run_calls
from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.errors import PolicyError, UnlearnGymError
from unlearn_gym.evaluation.episode import policy_context, run_episode
from unlearn_gym.evaluation.statistics import bootstrap_mean, holm, paired_difference, paired_p_value
from unlearn_gym.evaluation.tables import NOTHING, estimate_text, markdown_table, p_text
from unlearn_gym.files import sha256, write_json
from unlearn_gym.instances import Instance, load_instances
from unlearn_gym.policies import make_policy, policy_sources

help_ = tyro.conf.arg
DEFAULT_STATICS = ("static:0.1", "static:0.3", "static:0.5", "static:0.7", "static:0.9")
RETAIN_COEF = 10.0
"""w: what a relative rise of the retain loss costs in logarithms of the forget loss."""


@dataclass(frozen=True)
class Score:
    """What one episode came to, on the run's probe: logarithms of end over start of both losses, and the return."""

    forgotten: float
    damage: float
    episode_return: float
    mean_lambda: float

    @property
    def score(self) -> float:
        """log(f/f0) - w max(0, log(r/r0)): forgetting less damage, for instances that have no oracle to aim at."""
        return self.forgotten - RETAIN_COEF * max(0.0, self.damage)


def run_instance(key: str, spec: str, instance: Instance, seed: int) -> tuple[str, Score]:
    """One episode of a policy on one instance, under its ``key``."""
    torch.set_num_threads(1)
    env = SISSUnlearnEnv(instance.task)
    env.reset(options={"instance": instance})
    policy = make_policy(spec, policy_context(env))
    episode = run_episode(env, policy, seed, probe_every=env.settings.horizon)
    if episode.diverged:
        return key, Score(math.nan, math.nan, episode.episode_return, math.nan)
    forget, retain = episode.probe["forget_loss"], episode.probe["retain_loss"]
    changes = math.log(forget[-1] / forget[0]), math.log(retain[-1] / retain[0])
    return key, Score(*changes, episode.episode_return, float(np.mean(episode.trace["lambda_"])))


def transfer(
    policies: Annotated[tyro.conf.Positional[tuple[str, ...]], help_(help="agents' .zip files, and any of 'compare'")],
    on: Annotated[tuple[str, ...], help_(help="sets to score them on")] = ("gaussians-2d/test",),
    statics: Annotated[tuple[str, ...], help_(help="what they are compared with")] = DEFAULT_STATICS,
    jobs: Annotated[int, help_(help="processes")] = 1,
    out: Annotated[Path, help_(help="folder of results.json and transfer.md")] = Path("runs/transfer"),
) -> Path:
    """Score policies on instances that no agent was trained on, against the best static λ by hindsight of each set.

    One episode of each policy on each instance, all with the instance's own seed. Resumes: what OUT/results.json
    holds is not run again.
    """
    everyone = tuple(dict.fromkeys((*statics, *policies)))
    sets = {name: load_instances(name) for name in on}
    cells = {}
    for name, instances in sets.items():
        for spec in everyone:
            for number, instance in enumerate(instances):
                cells[_key(spec, instance, number)] = (name, spec, number, instance)
    path = out / "results.json"
    found: dict[str, Any] = json.loads(path.read_text())["cells"] if path.is_file() else {}
    missing = {key: cell for key, cell in cells.items() if key not in found}
    calls = [(key, spec, instance, number) for key, (_, spec, number, instance) in missing.items()]
    ran = run_calls("joblib", run_instance, calls, jobs)
    out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "agents.transfer", *sys.argv[1:]])
    about = {"command": command, "version": unlearn_gym.__version__, "retain_coef": RETAIN_COEF}
    for count, (key, score) in enumerate(tqdm(ran, total=len(missing), unit="episode"), start=1):
        name, spec, number, _ = missing[key]
        found[key] = {"set": name, "policy": spec, "instance": number, **vars(score)}
        if count % 50 == 0 or count == len(missing):
            write_json(path, {**about, "cells": found})
    page = out / "transfer.md"
    page.write_text(transfer_page([found[key] for key in cells], command), encoding="utf-8")
    print(f"\n{page.read_text()}\n{page}")
    return page


def _key(spec: str, instance: Instance, number: int) -> str:
    """A hash of all that an episode depends on."""
    sources = policy_sources(spec, instance.task)
    missing = [source for source in sources if not source.is_file()]
    if missing:
        raise PolicyError(f"policy {spec!r}: there is no {missing[0]}; correct the path or name")
    parts = [unlearn_gym.__version__, torch.__version__, spec, number, instance.as_info(), [sha256(s) for s in sources]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def transfer_page(cells: list[dict[str, Any]], command: str) -> str:
    """The table of all policies on all sets."""
    rows = []
    for name in dict.fromkeys(cell["set"] for cell in cells):
        rows += _rows(name, [cell for cell in cells if cell["set"] == name])
    header = ["tested on", "policy", "forgotten", "damage", "score", "mean λ", "score − best static", "p (Holm)"]
    return "\n\n".join(
        [
            "# Agents on instances that they were not trained on",
            markdown_table(header, rows),
            "Forgotten and damage: log of the probe's forget and retain loss at the end over the start; score: "
            f"forgotten less {RETAIN_COEF:g} times the damage. Means over the set's instances, one episode each, with "
            "95 % bootstrap intervals; the last two columns: paired difference to the best static λ of the set by "
            "hindsight, and Wilcoxon's signed-rank p, Holm-corrected within the set among the static λ and among the "
            "others.",
            f"Made by `{command}`.",
        ]
    ) + "\n"  # fmt: skip


def _rows(name: str, cells: list[dict[str, Any]]) -> list[list[str]]:
    names = ("forgotten", "damage", "episode_return", "mean_lambda")
    by_policy: dict[str, dict[int, Score]] = {}
    for cell in cells:
        by_policy.setdefault(cell["policy"], {})[cell["instance"]] = Score(*(cell[n] for n in names))
    scores = {spec: {i: s.score for i, s in found.items()} for spec, found in by_policy.items()}
    statics = [spec for spec in scores if spec.startswith("static:")]
    best = max(statics, key=lambda spec: float(np.mean(list(scores[spec].values())))) if statics else None
    p_values: dict[str, float] = {}
    for family in ([s for s in statics if s != best], [s for s in scores if s not in statics]):
        if best is not None:
            raw = {spec: paired_p_value(scores[spec], scores[best]) for spec in family}
            p_values |= holm({spec: p for spec, p in raw.items() if p is not None})
    rows = []
    for spec, found in by_policy.items():
        columns = (
            [s.forgotten for s in found.values()], [s.damage for s in found.values()], list(scores[spec].values()),
            [s.mean_lambda for s in found.values()],
        )  # fmt: skip
        row = [name, spec, *(estimate_text(bootstrap_mean(values), "{:.3f}".format) for values in columns)]
        if best is None or spec == best:
            row += ["best static" if best else NOTHING, NOTHING]
        else:
            difference = paired_difference(scores[spec], scores[best])
            row += [estimate_text(difference, "{:+.3f}".format), p_text(p_values.get(spec))]
        rows.append(row)
    return rows


def main() -> None:
    """Entry point: a known error becomes one line and exit status 2."""
    try:
        tyro.cli(transfer, description=transfer.__doc__)
    except UnlearnGymError as error:
        print(f"agents.transfer: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
