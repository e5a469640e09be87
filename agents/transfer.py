"""Do agents carry over? ``python -m agents.transfer agent.zip variational:variance --on gaussians-2d/test``."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import tyro
from tqdm import tqdm

import unlearn_gym
from agents.main import invocation, run_command
from unlearn_gym.engines import run_calls
from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.errors import PolicyError, ResultsError, error_line
from unlearn_gym.evaluation.episode import policy_context, run_episode
from unlearn_gym.evaluation.statistics import bootstrap_mean, holm, paired_difference, paired_p_value
from unlearn_gym.evaluation.tables import NOTHING, estimate_text, markdown_table, p_text
from unlearn_gym.files import sha256, write_json
from unlearn_gym.instances import Instance, load_instances
from unlearn_gym.policies import make_policy, missing_source, policy_sources
from unlearn_gym.tasks import Task, get_task, load_data

help_ = tyro.conf.arg
DEFAULT_STATICS = ("static:0.1", "static:0.3", "static:0.5", "static:0.7", "static:0.9")
RETAIN_COEF = 10.0
"""w: what a relative rise of the retain loss costs in logarithms of the forget loss."""


@dataclass(frozen=True)
class Score:
    """What one episode came to, on the run's probe: logs of end over start of both losses; None if it diverged."""

    forgotten: float | None
    damage: float | None
    mean_lambda: float | None
    episode_return: float

    @property
    def score(self) -> float:
        """log(f/f0) - w max(0, log(r/r0)): forgetting less damage, for instances that have no oracle to aim at."""
        if self.forgotten is None or self.damage is None:
            return math.nan
        return self.forgotten - RETAIN_COEF * max(0.0, self.damage)


class Cell(NamedTuple):
    """A policy on an instance of a set, whose number is the episode's seed."""

    set: str
    policy: str
    number: int
    instance: Instance
    key: str


def run_instance(key: str, spec: str, instance: Instance, seed: int) -> tuple[str, Score]:
    """One episode of a policy on one instance, under its ``key``."""
    torch.set_num_threads(1)
    env = _env_of(instance)
    episode = run_episode(env, make_policy(spec, policy_context(env)), seed, probe_every=env.settings.horizon)
    forget, retain = episode.probe["forget_loss"], episode.probe["retain_loss"]
    if episode.diverged or not np.isfinite([*forget, *retain]).all():
        return key, Score(None, None, None, episode.episode_return)
    changes = math.log(forget[-1] / forget[0]), math.log(retain[-1] / retain[0])
    return key, Score(*changes, float(np.mean(episode.trace["lambda_"])), episode.episode_return)


def transfer(
    policies: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        help_(help="agents' .zip files, other policies as in 'compare'"),
    ],
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
    cells = [
        Cell(name, spec, number, instance, _key(spec, instance, number))
        for name, instances in sets.items() for spec in everyone for number, instance in enumerate(instances)
    ]  # fmt: skip
    found = _read_scores(out / "results.json")
    missing = {cell.key: cell for cell in cells if cell.key not in found}
    for cell in {(cell.set, cell.policy): cell for cell in missing.values()}.values():
        make_policy(cell.policy, policy_context(_env_of(cell.instance)))  # fails before anything runs
    calls = [(cell.key, cell.policy, cell.instance, cell.number) for cell in missing.values()]
    ran = run_calls("joblib", run_instance, calls, jobs)
    out.mkdir(parents=True, exist_ok=True)
    command = invocation("transfer")
    about = {"command": command, "version": unlearn_gym.__version__, "retain_coef": RETAIN_COEF}
    try:
        for key, score in tqdm(ran, total=len(missing), unit="episode"):
            found[key] = score
    finally:  # what an interruption leaves is kept
        write_json(out / "results.json", {**about, "scores": {k: asdict(v) for k, v in found.items()}})
    page = out / "transfer.md"
    page.write_text(transfer_page([(cell, found[cell.key]) for cell in cells], command), encoding="utf-8")
    print(f"\n{page.read_text()}\n{page}")
    return page


def _env_of(instance: Instance) -> SISSUnlearnEnv:
    env = SISSUnlearnEnv(instance.task)
    env.reset(options={"instance": instance})
    return env


def _key(spec: str, instance: Instance, number: int) -> str:
    """A hash of all that an episode depends on."""
    task = get_task(instance.task)
    sources = [*policy_sources(spec, task.name), task.pretrained_path]
    missing = [source for source in sources if not source.is_file()]
    if missing:
        raise PolicyError(missing_source(spec, task.name, missing[0]))
    about = [unlearn_gym.__version__, torch.__version__, task.settings.model_dump(), _digest(task)]
    parts = [*about, spec, number, instance.as_info(), [sha256(source) for source in sources]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _digest(task: Task) -> str:
    return load_data(task).digest()


def _read_scores(path: Path) -> dict[str, Score]:
    """What an earlier call has measured; raises ``ResultsError`` for a file that is not its."""
    if not path.is_file():
        return {}
    try:
        return {key: Score(**values) for key, values in json.loads(path.read_text())["scores"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"{path} holds no scores ({error_line(error)}); choose another --out or delete it") from None


def transfer_page(cells: list[tuple[Cell, Score]], command: str) -> str:
    """The table of all policies on all sets."""
    rows = []
    for name in dict.fromkeys(cell.set for cell, _ in cells):
        by_policy: dict[str, dict[int, Score]] = {}
        for cell, score in cells:
            if cell.set == name:
                by_policy.setdefault(cell.policy, {})[cell.number] = score
        rows += _rows(name, by_policy)
    header = ["tested on", "policy", "forgotten", "damage", "score", "mean λ", "score − best static", "p (Holm)"]
    return "\n\n".join(
        [
            "# Agents on instances that they were not trained on",
            markdown_table(header, rows),
            "Forgotten and damage: log of the probe's forget and retain loss at the end over the start; score: "
            f"forgotten less {RETAIN_COEF:g} times the damage. Means over the set's instances, one episode each, with "
            "95 % bootstrap intervals; – where an episode diverged. The last two columns: paired difference to the "
            "best static λ of the set by hindsight, and Wilcoxon's signed-rank p, Holm-corrected within the set among "
            "the static λ and among the others.",
            f"Made by `{command}`.",
        ]
    ) + "\n"  # fmt: skip


def _rows(name: str, by_policy: dict[str, dict[int, Score]]) -> list[list[str]]:
    scores = {spec: {i: s.score for i, s in found.items()} for spec, found in by_policy.items()}
    finite = [spec for spec in scores if np.isfinite(list(scores[spec].values())).all()]
    statics = [spec for spec in finite if spec.startswith("static:")]
    best = max(statics, key=lambda spec: float(np.mean(list(scores[spec].values()))), default=None)
    p_values: dict[str, float] = {}
    for family in ([s for s in statics if s != best], [s for s in finite if s not in statics]):
        if best is not None:
            raw = {spec: paired_p_value(scores[spec], scores[best]) for spec in family}
            p_values |= holm({spec: p for spec, p in raw.items() if p is not None})
    rows = []
    for spec, found in by_policy.items():
        columns = [[getattr(s, n) for s in found.values()] for n in ("forgotten", "damage", "score", "mean_lambda")]
        means = [bootstrap_mean([math.nan if v is None else v for v in values]) for values in columns]
        row = [name, spec, *(estimate_text(mean, "{:.3f}".format) for mean in means)]
        if best is None or spec == best or spec not in finite:
            row += ["best static" if spec == best else NOTHING, NOTHING]
        else:
            difference = paired_difference(scores[spec], scores[best])
            row += [estimate_text(difference, "{:+.3f}".format), p_text(p_values.get(spec))]
        rows.append(row)
    return rows


if __name__ == "__main__":
    run_command("transfer", transfer)
