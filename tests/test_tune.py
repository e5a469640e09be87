"""The search for hyper-parameters: what it leaves behind, and what it does after a crash."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agents import tune as module
from agents.config import load_config
from agents.train import train
from agents.tune import SPACES, STARTUP_TRIALS, _open_study, _retry_unfinished, place, repeatable_sampler, tune
from unlearn_gym.errors import LockError, SettingsError

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"timesteps": 60, "stages": 1, "eval_episodes": 1, "n_envs": 1}
pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    def space(trial):
        return {
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
            "n_steps": 60, "batch_size": 60, "n_epochs": 1,
        }  # fmt: skip

    monkeypatch.setitem(SPACES, "ppo", space)


def test_a_search_goes_on_where_it_stopped_and_its_best_is_a_config(tmp_path):
    tune(out=tmp_path, trials=2, **SMALL)
    first = json.loads((tmp_path / "study.json").read_text())["trials"]
    best = tune(out=tmp_path, trials=3, **SMALL)
    trials = json.loads((tmp_path / "study.json").read_text())["trials"]
    assert [t["number"] for t in trials] == [0, 1, 2]
    assert len({t["params"]["learning_rate"] for t in trials}) == 3
    finished = re.findall(r"^\| (\d+) \| (-[\d.]+) ", (tmp_path / "study.md").read_text(), flags=re.MULTILINE)
    best_first = sorted((t for t in trials if t["state"] == "complete"), key=lambda t: -t["return"])
    assert finished == [(str(t["number"]), f"{t['return']:.4g}") for t in best_first]
    assert trials[:2] == first
    winner = max(trials, key=lambda t: t["return"])
    config = load_config("ppo", "gaussians-2d", best)
    assert config.arguments["learning_rate"] == pytest.approx(winner["params"]["learning_rate"])
    assert (config.n_envs, config.n_timesteps) == (1, 60)
    agent = train(task=("gaussians-2d",), config=best, out=tmp_path / "agent", eval_episodes=1)
    retrained = json.loads(agent.with_suffix(".json").read_text())["validation"][-1]["returns"]
    assert retrained == pytest.approx([winner["return"]])  # the same seed, settings and length: the same agent


def without_seconds(trials):
    return [{k: v for k, v in t.items() if k != "seconds"} for t in trials]


def proposals(seed, interrupted, trials=14):
    """The settings of a search over three parameters whose ``interrupted`` trials were cut off once, all after the
    first parameter was proposed; every one is of a search that starts anew, as another process would.
    """
    import optuna

    study = optuna.create_study(direction="maximize")
    cut, found = set(), []

    def objective(trial):
        place_ = place(trial.study.trials, trial)
        first = trial.suggest_float("a", 1e-4, 1.0, log=True)
        if place_ in interrupted and place_ not in cut:
            cut.add(place_)
            raise KeyboardInterrupt
        second = trial.suggest_categorical("b", [1, 2, 3])
        found.append((place_, first, second, trial.suggest_int("c", 0, 1000)))
        return -((first - 0.1) ** 2) - second / 10 + found[-1][3] / 1000

    while len(found) < trials:
        _retry_unfinished(study)
        study.sampler = repeatable_sampler(seed)
        with contextlib.suppress(KeyboardInterrupt):
            study.optimize(objective, n_trials=1)
    return found


def test_an_interrupted_search_proposes_what_one_that_ran_through_does():
    whole = proposals(0, ())
    assert [number for number, *_ in whole] == list(range(14))
    assert proposals(0, (0, 3, 4, 9, 13)) == whole
    assert len({tuple(values) for _, *values in whole}) == 14
    assert proposals(1, ()) != whole


def test_the_sampler_learns_from_what_was_tried():
    """After its first trials it proposes better settings than chance does."""
    value = [-((a - 0.1) ** 2) - b / 10 + c / 1000 for _, a, b, c in proposals(3, (), trials=40)]
    assert sum(value[20:]) / 20 > sum(value[:STARTUP_TRIALS]) / STARTUP_TRIALS


@pytest.mark.parametrize("line", ["[]\n", '{"op_code": 3}\n', "\x00\x01\n{}\n", '{"worker_id": 1, "op_code": "a"}\n'])
def test_a_damaged_journal_is_named(line, tmp_path):
    tune(out=tmp_path, trials=1, **SMALL)
    journal = tmp_path / "journal.log"
    journal.write_text(line + journal.read_text())
    with pytest.raises(SettingsError, match=r"journal\.log is damaged") as caught:
        tune(out=tmp_path, trials=2, **SMALL)
    assert "\n" not in str(caught.value)


def test_a_search_in_use_is_left_alone(locked):
    with pytest.raises(LockError, match="in use"):
        tune(out=locked, trials=1, **SMALL)


KILLED = """
import os, sys
from pathlib import Path
from agents import tune
tune.SPACES["ppo"] = lambda trial: {
    "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True), "n_steps": 60, "batch_size": 60,
    "n_epochs": 1,
}
real = tune.train_agent
def train_agent(plan, where, total, *, callbacks, stage_done):
    done = []
    def kill(stage):
        done.append(stage)
        if where.name == "1" and len(done) == int(sys.argv[2]):
            os.kill(os.getpid(), 9)
        stage_done(stage)
    return real(plan, where, total, callbacks=callbacks, stage_done=kill)
tune.train_agent = train_agent
tune.tune(out=Path(sys.argv[1]), trials=2, timesteps=120, stages=2, eval_episodes=1, n_envs=1)
"""


TWO_STAGES = {**SMALL, "timesteps": 120, "stages": 2}


@functools.cache
def uninterrupted(out):
    tune(out=out, trials=2, **TWO_STAGES)
    return without_seconds(json.loads((out / "study.json").read_text())["trials"])


@pytest.mark.parametrize("checkpoints", [1, 2])
def test_a_trial_whose_process_was_killed_is_taken_up_where_it_was(checkpoints, tmp_path, tmp_path_factory):
    script = [sys.executable, "-c", KILLED, str(tmp_path), str(checkpoints)]
    assert subprocess.run(script, cwd=ROOT, check=False).returncode == -9
    asked = _open_study(tmp_path).trials[1].params
    tune(out=tmp_path, trials=2, **TWO_STAGES)
    trials = json.loads((tmp_path / "study.json").read_text())["trials"]
    assert trials[1]["params"] == asked
    assert list(trials[1]["validation"]) == ["1", "2"]
    assert {p.name for p in (tmp_path / "trials").iterdir()} == {"0", "1"}
    assert without_seconds(trials) == uninterrupted(tmp_path_factory.getbasetemp() / "uninterrupted")


def test_an_interrupted_trial_is_taken_up_too(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(module, "train_agent", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tune(out=tmp_path, trials=1, **SMALL)
    asked = _open_study(tmp_path).trials[0].params
    tune(out=tmp_path, trials=1, **SMALL)
    assert [t.params for t in _open_study(tmp_path).trials if t.value is not None] == [asked]


def test_settings_that_every_trial_refuses_end_the_search_at_once(tmp_path):
    config = tmp_path / "bad.yml"
    config.write_text("SISSUnlearn-v0: {n_timesteps: 60, policy: MlpPolice}")
    with pytest.raises(SettingsError, match="ppo refuses its settings"):
        tune(config=config, out=tmp_path / "out", trials=1, **SMALL)


def test_two_processes_share_a_search(tmp_path):
    tune(out=tmp_path, trials=3, jobs=2, **SMALL)
    trials = json.loads((tmp_path / "study.json").read_text())["trials"]
    assert [t["state"] for t in trials].count("complete") >= 3
    assert len({t["params"]["learning_rate"] for t in trials}) == len(trials)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "trials=0"),
        ({"stages": 0}, "stages=0"),
        ({"eval_episodes": 0}, "eval_episodes=0"),
        ({"algo": "pop"}, "did you mean 'ppo'"),
        ({"timesteps": 0}, "timesteps=0"),
        ({"n_envs": 0}, "n_envs=0"),
        ({"task": "gaussian-2d"}, "did you mean 'gaussians-2d'"),
        ({"reward": "money"}, "reward='money'"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(changes, message, tmp_path):
    with pytest.raises((SettingsError, LookupError), match=message):
        tune(out=tmp_path / "out", **{**SMALL, "trials": 1, **changes})
    assert not (tmp_path / "out").exists()


def test_another_search_in_the_folder_is_refused(tmp_path):
    tune(out=tmp_path, trials=1, **SMALL)
    with pytest.raises(SettingsError, match="another options"):
        tune(out=tmp_path, trials=1, reward="potential", **SMALL)
