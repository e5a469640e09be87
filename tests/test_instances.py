"""Instances: what an episode unlearns, chosen at reset, and the sets that are trained and tested on."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.errors import SettingsError, TaskError, WeightsError
from unlearn_gym.tasks import get_task, load_data, register_task
from unlearn_gym.tasks.instances import INSTANCES, Instance, build_instances, load_instances, shipped_sets

ROOT = Path(__file__).resolve().parent.parent
MIXED = ("gaussians-2d", {"task": "gaussians-2d:2,3", "horizon": 5}, {"task": "gaussians-2d:6", "num_forget": 1})


def episode(env: gym.Env, **reset) -> list:
    obs, _ = env.reset(**reset)
    seen = [obs]
    for _ in range(4):
        obs, reward, *_ = env.step(np.array([0.3], dtype=np.float32))
        seen += [obs, reward]
    return seen


def same(first: list, second: list) -> bool:
    return all(map(np.array_equal, first, second))


def test_an_instance_is_the_environment_made_for_it():
    asked = SISSUnlearnEnv("gaussians-2d")
    made = SISSUnlearnEnv("gaussians-2d:2,3", learning_rate=1e-3, forget_scale=2.0, horizon=7)
    options = {"instance": {"task": "gaussians-2d:2,3", "learning_rate": 1e-3, "forget_scale": 2.0, "horizon": 7}}
    assert same(episode(asked, seed=3, options=options), episode(made, seed=3))
    assert same(
        episode(asked, seed=3, options={"instance": "gaussians-2d"}), episode(SISSUnlearnEnv("gaussians-2d"), seed=3)
    )


def test_an_instance_stays_until_another_one_is_named():
    env = SISSUnlearnEnv("gaussians-2d")
    info = env.reset(seed=0, options={"instance": "gaussians-2d:5"})[1]
    assert info["instance"]["task"] == "gaussians-2d:5"
    assert env.reset(seed=0)[1]["instance"] == info["instance"]


def test_a_set_is_drawn_from_evenly_and_by_the_seed():
    env = SISSUnlearnEnv(instances=MIXED)
    seen = [env.reset(seed=seed)[1]["instance"]["task"] for seed in range(90)]
    assert seen == [env.reset(seed=seed)[1]["instance"]["task"] for seed in range(90)]
    counts = [seen.count(Instance.parse(one).task) for one in MIXED]
    assert min(counts) > 15  # 30 expected, standard deviation 4.5
    assert env.reset(options={"instance": 1})[1]["instance"] == Instance.parse(MIXED[1]).as_info()


def test_part_of_the_forget_set_is_a_seeded_choice_from_it():
    data = load_data(get_task("mnist-trousers"))
    parts = [Instance(task="mnist-trousers", num_forget=5, forget_seed=seed).data(data) for seed in (1, 1, 2)]
    assert torch.equal(parts[0].forget, parts[1].forget)
    assert not torch.equal(parts[0].forget, parts[2].forget)
    assert parts[0].forget.shape == (5, 1, 28, 28)
    assert parts[0].forget_labels.shape == (5,)
    everything = {bytes(x.numpy().tobytes()) for x in data.forget}
    assert {bytes(x.numpy().tobytes()) for x in parts[2].forget} <= everything
    assert torch.equal(parts[0].retain, data.retain)


@pytest.mark.parametrize("backend", ["serial", "processes"])
def test_vector_with_instances_equals_single(backend):
    vector = gym.make_vec(
        "SISSUnlearn-v0", num_envs=2, instances=MIXED, backend=backend, autoreset_mode="Disabled", horizon=4
    )
    singles = [SISSUnlearnEnv(instances=MIXED, horizon=4) for _ in range(2)]
    for first_seed in (0, 10):
        obs, infos = vector.reset(seed=first_seed)
        for i, env in enumerate(singles):
            own, info = env.reset(seed=first_seed + i)
            assert np.array_equal(own, obs[i])
            assert infos["instance"]["task"][i] == info["instance"]["task"]
        stepped = vector.step(np.full((2, 1), 0.4, dtype=np.float32))
        for i, env in enumerate(singles):
            assert np.array_equal(env.step(np.array([0.4], dtype=np.float32))[0], stepped[0][i])
    vector.close()


@pytest.mark.filterwarnings("ignore:.*symmetric and normalized space")
def test_gymnasiums_checker_passes_with_instances():
    check_env(gym.make("SISSUnlearn-v0", instances=MIXED, horizon=3).unwrapped, skip_render_check=True)


@pytest.mark.parametrize("name", shipped_sets())
def test_shipped_sets_are_built_from_their_ranges_and_share_no_task(name, tmp_path):
    path = INSTANCES / f"{name}.json"
    content = json.loads(path.read_text())
    again = build_instances(ROOT / "configs" / "instances" / f"{name}.yaml", tmp_path / "a.json", content["command"])
    assert json.loads(json.dumps(again)) == content
    train, test = (load_instances(f"{name}/{split}") for split in ("train", "test"))
    assert not {i.task for i in train} & {i.task for i in test}
    for split, instances in (("train", train), ("test", test)):
        ranges = content["ranges"][split]
        assert len(set(instances)) == len(instances) == ranges["count"]
        for one in instances:
            task = get_task(one.task)
            assert ranges["horizon"][0] - 1 <= one.horizon <= ranges["horizon"][1] + 1
            assert ranges["learning_rate"][0] * 0.99 <= one.learning_rate / task.settings.learning_rate <= 2.02
            one.settings(task, {})
            one.data(load_data(task))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"instance": {"task": "gaussians-2d", "horizon": 0}}, SettingsError, "horizon=0"),
        ({"instance": {"task": "gaussians-2d", "forget_scal": 1}}, SettingsError, "did you mean 'forget_scale'"),
        (
            {"instance": {"task": "gaussians-2d", "x": 1}},
            SettingsError,
            "there is no field 'x'; known: task, num_forget",
        ),
        ({"instance": {"horizon": 5}}, SettingsError, "task is missing"),
        ({"instance": {"task": "gaussians-2d", "num_forget": 10**6}}, SettingsError, "num_forget=1000000, but"),
        ({"instance": {"task": "gaussians-2d", "forget_seed": 2**32}}, SettingsError, "forget_seed=4294967296"),
        ({"instance": 3}, SettingsError, "instance=3: this environment has a set of 3"),
        ({"instance": "gaussian-2d"}, TaskError, "did you mean 'gaussians-2d'"),
        ({"instance": 3.5}, SettingsError, "instance 3.5"),
        ({"horizon": 5}, SettingsError, r"unknown reset options \['horizon'\]"),
    ],
)
def test_a_bad_instance_is_named_and_changes_nothing(options, error, message):
    env = SISSUnlearnEnv(instances=MIXED)
    env.reset(seed=0)
    before, state = env.instance, env.np_random.bit_generator.state
    with pytest.raises(error, match=message) as caught:
        env.reset(options=options)
    assert "\n" not in str(caught.value)
    assert env.instance == before
    assert env.np_random.bit_generator.state == state
    env.step(np.array([0.5], dtype=np.float32))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("gaussians-2d", "must end in /train or /test"),
        ("gausians/train", "there are no instances 'gausians'; known: gaussians-2d"),
        ([], "is empty"),
        ("damaged.json/train", "holds no instances"),
        ("overlap.json/train", "is in both sets"),
    ],
)
def test_a_bad_set_is_named(value, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("damaged.json").write_text("{}")
    Path("overlap.json").write_text(
        json.dumps({"train": [{"task": "gaussians-2d"}], "test": [{"task": "gaussians-2d"}]})
    )
    with pytest.raises(SettingsError, match=message):
        SISSUnlearnEnv(instances=value)


def test_an_array_of_instances_reaches_the_workers():
    names = np.array(["gaussians-2d", "gaussians-2d:3"])
    env = gym.make_vec("SISSUnlearn-v0", num_envs=2, instances=names, backend="processes", horizon=3)
    infos = env.reset(seed=0)[1]
    env.close()
    assert len(infos["instance"]["task"]) == 2


def test_a_misspelt_range_is_named_with_the_right_one(tmp_path):
    (tmp_path / "r.yaml").write_text("train: {count: 1, tasks: [gaussians-2d], forget_scal: [1, 2]}\ntest: {}\n")
    with pytest.raises(SettingsError, match=r"no field 'train.forget_scal'; did you mean 'forget_scale'"):
        build_instances(tmp_path / "r.yaml", tmp_path / "out.json", "")


def test_a_task_beside_instances_is_refused():
    with pytest.raises(SettingsError, match="task='gaussians-2d' beside instances="):
        SISSUnlearnEnv("gaussians-2d", instances=MIXED)


def test_ranges_that_overlap_or_are_reversed_are_refused(tmp_path):
    ranges = {"count": 2, "tasks": ["gaussians-2d"]}
    for change, message in (
        ({}, "in the training and in the test tasks"),
        ({"tasks": ["gaussians-2d:0"]}, "in the training and in the test tasks"),
        ({"tasks": ["gaussians-2d:1"], "horizon": [9, 3]}, "the smaller one first"),
        ({"tasks": ["gaussians-2d:1"], "count": 0}, "count"),
    ):
        path = tmp_path / "ranges.yaml"
        path.write_text(json.dumps({"train": ranges, "test": {**ranges, **change}}))
        with pytest.raises(SettingsError, match=message):
            build_instances(path, tmp_path / "out.json", "")
    assert not (tmp_path / "out.json").exists()


def test_every_member_of_a_set_is_checked_when_the_environment_is_made():
    for bad, error in (("nonsense", TaskError), ({"task": "gaussians-2d", "num_forget": 10**6}, SettingsError)):
        with pytest.raises(error):
            SISSUnlearnEnv(instances=["gaussians-2d", bad])
    with pytest.raises(TaskError, match="no oracle"):
        SISSUnlearnEnv(instances=["gaussians-2d", "gaussians-2d:5"], reward="potential")
    SISSUnlearnEnv(instances=["gaussians-2d", "gaussians-2d:5"], reward="potential", potential_cap=2.0)


@pytest.mark.parametrize("options", [{"reward": "potential"}, {}])
def test_a_refused_instance_leaves_the_environment_as_it_was(options, tmp_path):
    without = dataclasses.replace(get_task("gaussians-2d"), name=f"without-constants-{tmp_path.name}", assets=tmp_path)
    without = dataclasses.replace(without, pretrained_assets=tmp_path, classify=None)
    shutil.copy(get_task("gaussians-2d").pretrained_path, tmp_path)
    register_task(without)
    refused = "gaussians-2d:5" if options else without.name
    env, other = (SISSUnlearnEnv("gaussians-2d", **options) for _ in range(2))
    with pytest.raises(TaskError):
        env.reset(seed=0, options={"instance": refused})
    assert same(episode(env, seed=1), episode(other, seed=1))


def test_two_names_of_a_task_are_one():
    assert Instance(task="gaussians-2d:0") == Instance(task="gaussians-2d")


def test_a_named_instance_stays_when_its_worker_is_replaced():
    vector = gym.make_vec("SISSUnlearn-v0", num_envs=2, num_workers=2, task="gaussians-2d", autoreset_mode="SameStep")
    vector.reset(seed=0, options={"instance": "gaussians-2d:3"})
    vector.envs.workers[0].process.kill()
    with pytest.warns(UserWarning, match="worker 0 died"):
        vector.step(np.full((2, 1), 0.5, dtype=np.float32))
    assert [instance.task for instance in vector.get_attr("instance")] == ["gaussians-2d:3"] * 2
    vector.close()


def test_workers_know_every_task_of_a_set():
    mine = [dataclasses.replace(get_task("gaussians-2d"), name=name) for name in ("mine-a", "mine-b")]
    for task in mine:
        register_task(task)
    vector = gym.make_vec("SISSUnlearn-v0", num_envs=2, num_workers=2, instances=["mine-a", "mine-b"])
    vector.reset(seed=0, options={"instance": 1})
    assert [instance.task for instance in vector.get_attr("instance")] == ["mine-b"] * 2
    vector.close()


def test_instances_and_stacked_runs_exclude_each_other():
    with pytest.raises(SettingsError, match="needs equal runs"):
        gym.make_vec("SISSUnlearn-v0", num_envs=2, instances=MIXED, backend="stacked")
    vector = gym.make_vec("SISSUnlearn-v0", num_envs=2, task="gaussians-2d", backend="stacked")
    with pytest.raises(SettingsError, match="needs equal runs"):
        vector.reset(options={"instance": "gaussians-2d:3"})


def test_extended_observations_of_tasks_with_other_classifiers_are_refused():
    env = SISSUnlearnEnv("gaussians-2d", observation="extended")
    with pytest.raises(SettingsError, match="has other observations"):
        env.reset(options={"instance": "mnist-trousers"})
    assert env.task.name == "gaussians-2d"


@pytest.mark.parametrize(("lacks", "error"), [("constants.json", TaskError), ("pretrained.safetensors", WeightsError)])
def test_an_instance_whose_files_are_missing_is_refused_before_any_episode(lacks, error, tmp_path):
    ring = get_task("gaussians-2d")
    for file in ("constants.json", "pretrained.safetensors"):
        if file != lacks:
            shutil.copy(ring.assets / file, tmp_path)
    register_task(dataclasses.replace(ring, name=f"lacks-{lacks}", assets=tmp_path, pretrained_assets=None))
    with pytest.raises(error, match=f"lacks-{lacks}"):
        SISSUnlearnEnv(instances=["gaussians-2d", f"lacks-{lacks}"])
