"""Do agents carry over? ``python -m agents.transfer agent.zip variational:variance --on gaussians-2d/test``."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

import unlearn_gym
from agents.main import invocation, run_command
from unlearn_gym.cli.arguments import OptionTexts, Trust, parse_options
from unlearn_gym.comparison.engines import run_calls
from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.errors import PolicyError, ResultsError
from unlearn_gym.files import checksum, read_json_as, sha256, write_json, write_text
from unlearn_gym.math.statistics import Estimate, bootstrap_mean, holm, paired_difference, paired_p_value
from unlearn_gym.policies import existing_sources, make_policy, split_name
from unlearn_gym.policies.episode import policy_context, run_episode
from unlearn_gym.policies.manifest import read_manifest
from unlearn_gym.report.tables import NOTHING, estimate_text, markdown_table, p_text
from unlearn_gym.system.locks import folder_lock
from unlearn_gym.tasks import Task, get_task, load_data
from unlearn_gym.tasks.instances import Instance, load_instances

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


class Scores(BaseModel):
    """What ``results.json`` holds, as far as anything is read from it; older versions wrote no checksum."""

    model_config = ConfigDict(allow_inf_nan=False)

    scores: dict[str, Score]
    checksum: str | None = None


class Cell(NamedTuple):
    """A policy, by what it is called and what it is, on an instance of a set, whose number is the episode's seed."""

    set: str
    policy: str
    spec: str
    number: int
    instance: Instance
    key: str


def run_instance(
    key: str, spec: str, instance: Instance, seed: int, options: dict[str, Any], trust: bool
) -> tuple[str, Score]:
    """One episode of a policy on one instance, under its ``key``."""
    torch.set_num_threads(1)
    env = _env_of(instance, options)
    policy = make_policy(spec, policy_context(env), trust=trust)
    episode = run_episode(env, policy, seed, name=spec, probe_every=env.settings.horizon)
    forget, retain = episode.probe["forget_loss"], episode.probe["retain_loss"]
    if episode.diverged or not np.isfinite([*forget, *retain]).all():
        return key, Score(None, None, None, episode.episode_return)
    changes = math.log(forget[-1] / forget[0]), math.log(retain[-1] / retain[0])
    return key, Score(*changes, float(np.mean(episode.trace["lambda_"])), episode.episode_return)


def transfer(
    policies: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        help_(help="agents' .zip files, other policies as in 'compare', also mine=agent.zip"),
    ],
    on: Annotated[tuple[str, ...], help_(help="sets to score them on")] = ("gaussians-2d/test",),
    statics: Annotated[tuple[str, ...], help_(help="what they are compared with")] = DEFAULT_STATICS,
    option: OptionTexts = (),
    jobs: Annotated[int, help_(help="processes")] = 1,
    out: Annotated[Path, help_(help="folder of results.json and transfer.md")] = Path("runs/transfer"),
    trust: Trust = False,
) -> Path:
    """Score policies on instances that no agent was trained on, against the best static λ by hindsight of each set.

    One episode of each policy on each instance, all with the instance's own seed. Resumes: what OUT/results.json
    holds is not run again. OUT/scores.json is what 'unlearn-gym agents' shows of agents that ship.
    """
    with folder_lock(out):
        return _transfer(policies, on, statics, parse_options(option), jobs, out, trust=trust)


def _transfer(
    policies: tuple[str, ...], on: tuple[str, ...], statics: tuple[str, ...], options: dict[str, Any], jobs: int,
    out: Path, *, trust: bool,
) -> Path:  # fmt: skip
    everyone: dict[str, str] = {}
    for name, spec in map(split_name, (*statics, *policies)):
        if everyone.setdefault(name, spec) != spec:
            raise PolicyError(f"{name!r} names both {everyone[name]} and {spec}; give each a name of its own")
    sets = {name: load_instances(name) for name in on}
    cells = [
        Cell(name, policy, spec, number, instance, _key(spec, instance, number, options))
        for name, instances in sets.items()
        for policy, spec in everyone.items()
        for number, instance in enumerate(instances)
    ]  # fmt: skip
    found = _read_scores(out / "results.json")
    missing = {cell.key: cell for cell in cells if cell.key not in found}
    for cell in {(cell.set, cell.policy): cell for cell in missing.values()}.values():
        context = policy_context(_env_of(cell.instance, options))
        make_policy(cell.spec, context, trust=trust)  # fails before anything runs
    calls = [(cell.key, cell.spec, cell.instance, cell.number, options, trust) for cell in missing.values()]
    command = invocation("transfer")
    about = {"command": command, "version": unlearn_gym.__version__, "retain_coef": RETAIN_COEF}
    try:
        with contextlib.closing(run_calls("joblib", run_instance, calls, jobs, _name)) as ran:
            for key, score in tqdm(ran, total=len(missing), unit="episode"):
                found[key] = score
    finally:  # what an interruption leaves is kept
        scores = {k: asdict(v) for k, v in found.items()}
        write_json(out / "results.json", {**about, "scores": scores, "checksum": _checksum(found)})
    summaries = summarise([(cell, found[cell.key]) for cell in cells])
    write_json(out / "scores.json", _scores_of_agents(summaries, everyone, command))
    page = out / "transfer.md"
    write_text(page, _page(summaries, everyone, command))
    print(f"\n{page.read_text()}\n{page}")
    return page


def _name(key: str, spec: str, instance: Instance, seed: int, options: dict[str, Any], trust: bool) -> str:
    return f"policy {spec!r}, instance {seed} of task {instance.task!r}"


def _env_of(instance: Instance, options: dict[str, Any]) -> SISSUnlearnEnv:
    env = SISSUnlearnEnv(instance.task, **options)
    env.reset(options={"instance": instance})
    return env


def _key(spec: str, instance: Instance, number: int, options: dict[str, Any]) -> str:
    """A hash of all that an episode depends on."""
    task = get_task(instance.task)
    sources = [*existing_sources(spec, task.name), task.pretrained_path, *task.weights_within]
    about = [unlearn_gym.__version__, torch.__version__, task.settings.model_dump(), _digest(task)]
    parts = [*about, spec, number, instance.as_info(), [sha256(source) for source in sources]]
    if options:
        parts.append(options)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _digest(task: Task) -> str:
    return load_data(task).digest()


def _read_scores(path: Path) -> dict[str, Score]:
    """What an earlier call has measured; raises ``ResultsError`` for a file that is not its."""
    if not path.is_file():
        return {}
    remedy = "it holds no scores to go on from: choose another --out or delete it"
    found = read_json_as(path, Scores, ResultsError, remedy)
    if found.checksum is not None and found.checksum != _checksum(found.scores):
        raise ResultsError(f"{path} is damaged (its scores do not match their checksum); {remedy}")
    return found.scores


def _checksum(scores: dict[str, Score]) -> str:
    return checksum({key: asdict(score) for key, score in scores.items()})


@dataclass(frozen=True)
class Summary:
    """A policy on a set: means over its instances, and the paired difference to the best static λ by hindsight.

    ``difference`` and ``p_value`` are None for that λ itself and for policies of which an episode diverged.
    """

    set: str
    policy: str
    forgotten: Estimate
    damage: Estimate
    score: Estimate
    mean_lambda: Estimate
    is_best: bool
    difference: Estimate | None
    p_value: float | None


def summarise(cells: list[tuple[Cell, Score]]) -> list[Summary]:
    """All policies on all sets, p-values Holm-corrected within a set, among the static λ and among the others."""
    sets: dict[str, dict[str, dict[int, Score]]] = {}
    for cell, score in cells:
        sets.setdefault(cell.set, {}).setdefault(cell.policy, {})[cell.number] = score
    return [summary for name, by_policy in sets.items() for summary in _summarise_set(name, by_policy)]


def _summarise_set(name: str, by_policy: dict[str, dict[int, Score]]) -> list[Summary]:
    scores = {spec: {i: s.score for i, s in found.items()} for spec, found in by_policy.items()}
    finite = [spec for spec in scores if np.isfinite(list(scores[spec].values())).all()]
    statics = [spec for spec in finite if spec.startswith("static:")]
    best = max(statics, key=lambda spec: float(np.mean(list(scores[spec].values()))), default=None)
    compared = [spec for spec in finite if best not in (None, spec)]
    p_values: dict[str, float] = {}
    for family in ([s for s in compared if s in statics], [s for s in compared if s not in statics]):
        raw = {spec: paired_p_value(scores[spec], scores[str(best)]) for spec in family}
        p_values |= holm({spec: p for spec, p in raw.items() if p is not None})
    summaries = []
    for spec, found in by_policy.items():
        columns = [[getattr(s, n) for s in found.values()] for n in ("forgotten", "damage", "score", "mean_lambda")]
        forgotten, damage, score, lambda_ = (
            bootstrap_mean([math.nan if v is None else v for v in values]) for values in columns
        )
        difference = paired_difference(scores[spec], scores[str(best)]) if spec in compared else None
        summaries.append(
            Summary(name, spec, forgotten, damage, score, lambda_, spec == best, difference, p_values.get(spec))
        )
    return summaries


def _page(summaries: list[Summary], specs: dict[str, str], command: str) -> str:
    """The table of all policies on all sets."""
    rows = []
    for s in summaries:
        row = [s.set, s.policy]
        row += [estimate_text(x, "{:.3f}".format) for x in (s.forgotten, s.damage, s.score, s.mean_lambda)]
        if s.difference is None:
            row += ["best static" if s.is_best else NOTHING, NOTHING]
        else:
            row += [estimate_text(s.difference, "{:+.3f}".format), p_text(s.p_value)]
        rows.append(row)
    header = ["tested on", "policy", "forgotten", "damage", "score", "mean λ", "score − best static", "p (Holm)"]
    return "\n\n".join(
        [
            "# Agents on instances of test sets",
            markdown_table(header, rows),
            "Forgotten and damage: log of the probe's forget and retain loss at the end over the start; score: "
            f"forgotten less {RETAIN_COEF:g} times the damage. Means over the set's instances, one episode each, with "
            "95 % bootstrap intervals; – where an episode diverged. The last two columns: paired difference to the "
            "best static λ of the set by hindsight, and Wilcoxon's signed-rank p, Holm-corrected within the set among "
            "the static λ and among the others.",
            *_known_tasks(summaries, specs),
            f"Made by `{command}`.",
        ]
    ) + "\n"  # fmt: skip


def _known_tasks(summaries: list[Summary], specs: dict[str, str]) -> list[str]:
    """A warning for each agent that was trained on a task of a set."""
    warnings = []
    for s in summaries:
        spec = specs[s.policy]
        trained_on = set(read_manifest(Path(spec)).tasks or ()) if spec.endswith(".zip") else set()
        shared = trained_on & {instance.task for instance in load_instances(s.set)}
        if shared:
            warnings.append(f"{s.policy} was trained on {', '.join(sorted(shared))}, of which {s.set} has instances.")
    return warnings


def _scores_of_agents(summaries: list[Summary], specs: dict[str, str], command: str) -> dict[str, Any]:
    """What ``unlearn-gym agents`` shows of agents that ship, by their files' SHA-256."""
    agents: dict[str, dict[str, Any]] = {}
    for s in summaries:
        if specs[s.policy].endswith(".zip"):
            score = s.score if math.isfinite(s.score.mean) else None
            shown = {"score": score, "difference": s.difference, "p_value": s.p_value}
            agents.setdefault(sha256(Path(specs[s.policy])), {})[s.set] = shown
    return {"command": command, "retain_coef": RETAIN_COEF, "agents": agents}


if __name__ == "__main__":
    run_command("transfer", transfer)
