"""The search for hyper-parameters: what it leaves behind, and what it does after a crash."""

from __future__ import annotations

import json

import pytest

from agents import tune as module
from agents.config import load_config
from agents.train import train
from agents.tune import SPACES, _open_study, tune
from unlearn_gym.errors import SettingsError

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
    assert trials[:2] == first
    winner = max(trials, key=lambda t: t["return"])
    config = load_config("ppo", "gaussians-2d", best)
    assert config.arguments["learning_rate"] == pytest.approx(winner["params"]["learning_rate"])
    assert (config.n_envs, config.n_timesteps) == (1, 60)
    agent = train(task=("gaussians-2d",), config=best, out=tmp_path / "agent", eval_episodes=1)
    retrained = json.loads(agent.with_suffix(".json").read_text())["validation"][-1]["returns"]
    assert retrained == pytest.approx([winner["return"]])  # the same seed, settings and length: the same agent


def test_a_trial_whose_process_died_is_tried_again_with_its_settings(tmp_path, monkeypatch):
    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(module, "train_agent", die)
        with pytest.raises(KeyboardInterrupt):
            tune(out=tmp_path, trials=2, **SMALL)
    study = _open_study(tmp_path, 0)
    study._storage.create_new_trial(study._study_id)  # and one that died before it had any settings
    asked = study.trials[0].params
    tune(out=tmp_path, trials=2, **SMALL)
    trials = json.loads((tmp_path / "study.json").read_text())["trials"]
    done = [t for t in trials if t["state"] == "complete"]
    assert len(done) == 2
    assert done[0]["params"] == asked


def test_two_processes_share_a_search(tmp_path):
    tune(out=tmp_path, trials=2, jobs=1, **SMALL)
    tune(out=tmp_path, trials=4, jobs=2, **SMALL)
    states = [t["state"] for t in json.loads((tmp_path / "study.json").read_text())["trials"]]
    assert states.count("complete") >= 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "trials=0"),
        ({"stages": 0}, "stages=0"),
        ({"eval_episodes": 0}, "eval_episodes=0"),
        ({"algo": "pop"}, "did you mean 'ppo'"),
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
