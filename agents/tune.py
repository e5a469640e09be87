"""Search hyper-parameters: ``python -m agents.tune --task gaussians-2d --algo ppo --trials 30``."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
import torch
import tyro
import yaml

from agents.config import AgentConfig, load_config
from agents.main import invocation, run_command
from agents.training import Plan, read_stages, train_agent
from unlearn_gym import ENV_ID
from unlearn_gym.comparison.engines import Engine, run_calls
from unlearn_gym.errors import SettingsError, error_line
from unlearn_gym.files import write_json, write_text
from unlearn_gym.report.tables import markdown_table
from unlearn_gym.system.locks import folder_lock
from unlearn_gym.tasks import get_task

if TYPE_CHECKING:
    import optuna

help_ = tyro.conf.arg
STUDY = "study"
MIN_FOR_IMPORTANCE = 20
"""Finished trials below which a share of importance would be noise."""
STARTUP_TRIALS = 5
TAKES_UP = "takes_up"
"""The attribute of a trial that takes up one that was cut off: that one's place in the search."""
SAMPLING = "TPE, seeded for each trial and parameter"
Space = Callable[["optuna.Trial"], dict[str, Any]]


def on_policy(trial: optuna.Trial) -> dict[str, Any]:
    """What PPO, recurrent PPO and A2C share."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 5e-3, log=True),
        "gamma": trial.suggest_categorical("gamma", [0.9, 0.97, 0.99, 1.0]),
        "gae_lambda": trial.suggest_categorical("gae_lambda", [0.8, 0.9, 0.95, 1.0]),
        "ent_coef": trial.suggest_float("ent_coef", 1e-5, 1e-2, log=True),
    }


def ppo(trial: optuna.Trial) -> dict[str, Any]:
    """PPO, recurrent or not."""
    return on_policy(trial) | {
        "n_steps": trial.suggest_categorical("n_steps", [60, 120, 240]),
        "batch_size": trial.suggest_categorical("batch_size", [60, 120]),
        "n_epochs": trial.suggest_categorical("n_epochs", [5, 10, 20]),
        "clip_range": trial.suggest_categorical("clip_range", [0.1, 0.2, 0.3]),
    }


def a2c(trial: optuna.Trial) -> dict[str, Any]:
    """A2C."""
    return on_policy(trial) | {"n_steps": trial.suggest_categorical("n_steps", [5, 15, 30, 60])}


def off_policy(trial: optuna.Trial) -> dict[str, Any]:
    """SAC and TD3."""
    steps = trial.suggest_categorical("train_freq", [1, 4, 8])
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 5e-3, log=True),
        "gamma": trial.suggest_categorical("gamma", [0.9, 0.97, 0.99, 1.0]),
        "tau": trial.suggest_categorical("tau", [0.005, 0.01, 0.02, 0.05]),
        "batch_size": trial.suggest_categorical("batch_size", [64, 128, 256]),
        "train_freq": steps, "gradient_steps": steps,
    }  # fmt: skip


SPACES: dict[str, Space] = {"ppo": ppo, "ppo_lstm": ppo, "a2c": a2c, "sac": off_policy, "td3": off_policy}


def tune(
    task: Annotated[str, help_(help="a task's name")] = "gaussians-2d",
    algo: Annotated[str, help_(help=", ".join(SPACES))] = "ppo",
    reward: Annotated[str, help_(help="'siss' (the paper's) or 'potential'")] = "siss",
    trials: Annotated[int, help_(help="settings to try, those of earlier calls counted")] = 20,
    timesteps: Annotated[int | None, help_(help="of each trial; default: n_timesteps of the config")] = None,
    stages: Annotated[int, help_(help="validations of each trial; after each it may be given up")] = 4,
    eval_episodes: Annotated[int, help_(help="episodes of a validation")] = 10,
    n_envs: Annotated[int | None, help_(help="environments of each trial; default: n_envs of the config")] = None,
    seed: Annotated[int, help_(help="of the search and of the trainings")] = 0,
    jobs: Annotated[int, help_(help="trials at a time; the search then depends on their timing")] = 1,
    engine: Annotated[
        Engine, help_(help="ray: on the cluster of $RAY_ADDRESS, whose machines must share OUT")
    ] = "joblib",
    config: Annotated[Path | None, help_(help="what the trials vary; default: configs/agents/ALGO.yml")] = None,
    out: Annotated[Path | None, help_(help="default: runs/tune/TASK-ALGO-REWARD")] = None,
) -> Path:
    """Search for the settings of the highest validation return; the same command again goes on where it stopped.

    TPE proposes, the median of earlier trials prunes. OUT/journal.log holds the study, OUT/best.yml the settings found,
    as a config for agents.train and the zoo, OUT/study.json every trial and OUT/study.md a summary.
    """
    if importlib.util.find_spec("optuna") is None:
        raise SettingsError("agents.tune needs optuna; install it with: pip install 'unlearn_gym[agents]'")
    base = load_config(algo, task, config)
    for name, value in (("trials", trials), ("stages", stages), ("jobs", jobs)):
        if value < 1:
            raise SettingsError(f"{name}={value} must be at least 1")
    total = base.n_timesteps if timesteps is None else timesteps
    base.check_length(total)
    every = -(-total // stages)
    plan = Plan(
        base, (task,), None, {"reward": reward}, seed, base.n_envs if n_envs is None else n_envs, every, eval_episodes
    )
    plan.validate()
    get_task(task).settings.override(reward=reward)
    _try_settings(plan)
    folder = (out or Path("runs/tune") / f"{plan.name}-{algo}-{reward}").resolve()
    with folder_lock(folder):
        study = _open_study(folder)
        _check_same_search(study, {**plan.as_json(), "timesteps": total, "sampling": SAMPLING}, folder)
        _retry_unfinished(study)
        calls = [(folder, plan, total, trials, seed)] * jobs
        list(run_calls(engine, _search, calls, jobs, lambda *call: "a process of the search"))
        return _write_findings(_open_study(folder), base, folder)


def _open_study(folder: Path) -> optuna.Study:
    """The study in ``folder``; raises ``SettingsError`` where its journal is damaged."""
    try:
        return _read_study(folder)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:  # what optuna meets in its lines
        raise SettingsError(
            f"{folder / 'journal.log'} is damaged ({error_line(error)}); choose another --out or delete it"
        ) from None


def _read_study(folder: Path) -> optuna.Study:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # here, as every process that searches opens the study
    return optuna.create_study(
        study_name=STUDY, storage=JournalStorage(JournalFileBackend(str(folder / "journal.log"))), load_if_exists=True,
        direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
    )  # fmt: skip


def _check_same_search(study: optuna.Study, search: dict[str, Any], folder: Path) -> None:
    """A folder holds one search: trials of different lengths or tasks cannot be compared."""
    known = study.user_attrs.get("search")
    if known is not None and known != search:
        kept = known if isinstance(known, dict) else {}
        differing = ", ".join(key for key in search if kept.get(key) != search[key])
        raise SettingsError(f"{folder} holds a search with another {differing}; choose another --out")
    study.set_user_attr("search", search)


def _retry_unfinished(study: optuna.Study) -> None:
    """Trials that were cut off are asked for again; their trainings go on where they were."""
    from optuna.trial import TrialState

    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    asked = study.trials
    taken_up = {place(asked, trial) for trial in asked if trial.state is not TrialState.FAIL}
    for trial in (trial for trial in asked if trial.state is TrialState.FAIL):
        if place(asked, trial) not in taken_up:
            taken_up.add(place(asked, trial))
            study.enqueue_trial(trial.params, user_attrs={TAKES_UP: place(asked, trial)})


def place(asked: list[optuna.trial.FrozenTrial], trial: optuna.Trial | optuna.trial.FrozenTrial) -> int:
    """Which setting of the search ``trial`` tries, counted from 0: a trial that takes up another one has that one's.

    An interruption shifts the numbers that optuna gives, but not these, so they name folders and seed what is proposed.
    """
    new = sum(other.number < trial.number and TAKES_UP not in other.user_attrs for other in asked)
    return int(trial.user_attrs.get(TAKES_UP, new))


def _try_settings(plan: Plan) -> None:
    """Raise what every trial would raise."""
    env = dataclasses.replace(plan, n_envs=1).make_env()
    try:
        plan.config.make(env)
    finally:
        env.close()


def _search(folder: Path, plan: Plan, total: int, trials: int, seed: int) -> None:
    """Run trials until the study has so many; one of perhaps several processes."""
    from optuna.study import MaxTrialsCallback
    from optuna.trial import TrialState

    torch.set_num_threads(1)
    study = _open_study(folder)
    study.sampler = repeatable_sampler(seed)
    counted = (TrialState.COMPLETE, TrialState.PRUNED)
    if len(study.get_trials(states=counted)) < trials:
        study.optimize(
            functools.partial(_try, folder, plan, total), callbacks=[_say, MaxTrialsCallback(trials, states=counted)]
        )  # fmt: skip


def repeatable_sampler(seed: int) -> optuna.samplers.BaseSampler:
    """TPE whose every proposal has a generator of its own, seeded by ``seed``, the setting's place in the search and
    the parameter: it depends on the trials that ended before and on nothing that an interruption would lose.
    """
    import optuna

    class Repeatable(optuna.samplers.BaseSampler):
        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            return {}

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            parts = f"{seed} {place(study.trials, trial)} {param_name}"
            own = int.from_bytes(hashlib.sha256(parts.encode()).digest()[:4], "big")
            sampler = optuna.samplers.TPESampler(seed=own, n_startup_trials=STARTUP_TRIALS)
            return sampler.sample_independent(study, trial, param_name, param_distribution)

    return Repeatable()


def _say(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """A line for each trial that ended."""
    last = list(trial.intermediate_values.values())[-1:]
    returned = "".join(f", validation return {value:.4g}" for value in last)
    print(f"trial {trial.number} {trial.state.name.lower()}{returned}: {trial.params}", flush=True)


def _try(folder: Path, plan: Plan, total: int, trial: optuna.Trial) -> float:
    """Train with the settings that ``trial`` proposes; the mean return at the last validation."""
    import optuna

    where = folder / "trials" / str(place(trial.study.trials, trial))
    arguments = {**plan.config.arguments, **SPACES[plan.config.algorithm](trial)}
    own = dataclasses.replace(plan, config=plan.config.model_copy(update={"arguments": arguments}))
    means: list[float] = []

    def stage_done(stage: dict[str, Any]) -> None:
        means.append(float(np.mean(stage["returns"])))
        trial.report(means[-1], len(means))
        if trial.should_prune():
            raise optuna.TrialPruned

    for stage in read_stages(own, where):
        stage_done(stage)
    train_agent(own, where, total, callbacks=[], stage_done=stage_done)
    return means[-1]


def _write_findings(study: optuna.Study, base: AgentConfig, folder: Path) -> Path:
    """``best.yml``, ``study.json`` and ``study.md``."""
    asked = study.trials
    trials = [
        {
            "number": place(asked, t), "state": t.state.name.lower(), "return": t.value, "params": t.params,
            "validation": {str(k): v for k, v in t.intermediate_values.items()},
            "seconds": None if t.duration is None else round(t.duration.total_seconds(), 1),
        }
        for t in _last_tries(asked)
    ]  # fmt: skip
    command, search = invocation("tune"), study.user_attrs["search"]
    write_json(folder / "study.json", {"command": command, "search": search, "trials": trials})
    write_text(folder / "study.md", _summary(study, command))
    best = SPACES[base.algorithm](cast("optuna.Trial", study.best_trial))  # gives back what it was given
    own = base.model_dump(exclude={"algorithm", "arguments", *(() if base.noise_type else ("noise_type", "noise_std"))})
    changed = {"n_timesteps": search["timesteps"], "n_envs": search["n_envs"]}
    entry = {**own, **changed, **base.arguments, **best}
    path = folder / "best.yml"
    number = place(asked, study.best_trial)
    head = f"# Trial {number}, validation return {study.best_value:.4g}: {command}\n"
    write_text(path, head + yaml.safe_dump({ENV_ID: entry}, sort_keys=False))
    done = sum(t["state"] in ("complete", "pruned") for t in trials)
    print(f"{path}: trial {number}, the best of {done}, with validation return {study.best_value:.4g}")
    return path


def _last_tries(asked: list[optuna.trial.FrozenTrial]) -> list[optuna.trial.FrozenTrial]:
    """The trials without those that another one took up, in the order of the search."""
    return [trial for _, trial in sorted({place(asked, trial): trial for trial in asked}.items())]


def _summary(study: optuna.Study, command: str) -> str:
    """The finished trials, best first, and what their settings had to do with it."""
    import optuna

    states = optuna.trial.TrialState
    complete = sorted(study.get_trials(states=(states.COMPLETE,)), key=lambda t: -cast("float", t.value))
    pruned, search = len(study.get_trials(states=(states.PRUNED,))), study.user_attrs["search"]
    names = list(study.best_trial.params)
    asked = study.trials
    rows = [
        [
            str(place(asked, t)), f"{t.value:.4g}", ", ".join(f"{v:.4g}" for v in t.intermediate_values.values()),
            *(f"{t.params[name]:.3g}" for name in names),
        ]
        for t in complete
    ]  # fmt: skip
    lines = [
        f"# {search['config']['algorithm']} on {', '.join(search['tasks'])}, reward {search['options']['reward']}",
        markdown_table(["trial", "return", "validations", *names], rows),
        f"{len(complete)} trials of {search['timesteps']:,} steps, best first, and {pruned} that were given up. The "
        f"return is the mean of the last validation's {search['eval_episodes']} episodes.",
    ]
    if len(complete) >= MIN_FOR_IMPORTANCE:
        shares = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
        )
        shown = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        lines.append(f"Importance of the settings (PED-ANOVA, finished trials alone): {shown}.")
    return "\n\n".join([*lines, f"Made by `{command}`."]) + "\n"


if __name__ == "__main__":
    run_command("tune", tune)
