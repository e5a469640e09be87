"""Agents' files: no code in them runs, what they do not hold is found beside them or missed, and agents have names."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import io
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib import TRPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, PPO, SAC, TD3
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from agents.enjoy import enjoy
from agents.main import run_command
from agents.training import train_agent
from agents.transfer import transfer
from unlearn_gym.cli import main
from unlearn_gym.comparison.comparison import Comparison, run_comparison
from unlearn_gym.comparison.results import merge_results
from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.errors import PolicyError, ResultsError, SettingsError
from unlearn_gym.files import sha256
from unlearn_gym.metrics.judge import EvaluationSettings
from unlearn_gym.policies import make_policy, policy_sources, split_name
from unlearn_gym.policies.episode import policy_context, run_episode
from unlearn_gym.policies.normalization import ADMITTED, _Part, _PartsUnpickler, read_statistics
from unlearn_gym.policies.registry import SHIPPED_AGENTS
from unlearn_gym.policies.sb3 import SB3Policy
from unlearn_gym.policies.sb3_file import read_agent
from unlearn_gym.report.report import write_report

from .test_agents import HIGH, LOW, ROOT, small_plan

ZIPS = sorted([*SHIPPED_AGENTS.rglob("*.zip"), *(ROOT / "docs").rglob("*.zip")])
OBSERVATIONS = np.random.default_rng(0).normal(0, 3, (40, 6)).astype(np.float32)


def rescaled(**options: Any) -> gym.Env:
    made = gym.make("SISSUnlearn-v0", task="gaussians-2d", horizon=4, **options)
    return gym.wrappers.RescaleAction(made, LOW, HIGH)


@pytest.fixture(scope="module")
def context():
    return policy_context(SISSUnlearnEnv("gaussians-2d"))


def saved(path: Path, algorithm: Any = PPO, policy: Any = "MlpPolicy", **arguments: Any) -> Path:
    """An agent whose actions differ from observation to observation, as one's that was trained do."""
    agent = algorithm(policy, rescaled(), device="cpu", seed=1, **arguments)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    agent.save(path)
    return path


def actions(network: Any) -> list[bytes]:
    """What a policy or an algorithm of stable-baselines3 does, bit by bit, over an episode."""
    memory, found = None, []
    for obs in OBSERVATIONS:
        action, memory = network.predict(obs, memory, np.array([memory is None]), deterministic=True)
        found.append(action.tobytes())
    return found


# --- the pickles stay closed


class Evil:
    """Pickled, it is a call that makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


@contextlib.contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def rewrite(path: Path, **entries: Any) -> Path:
    """The zip with other entries; a function is given the old content."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    for name, new in entries.items():
        name = name.replace("__", ".")
        content[name] = new(content[name]) if callable(new) else new
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in content.items():
            archive.writestr(name, value)
    return path


def edit(**changes: Any):
    """An edit of the zip's ``data``: keys of its JSON."""
    return lambda data: json.dumps({**json.loads(data), **changes}).encode()


def poison(path: Path, marker: Path) -> Path:
    """Every pickle in the zip's JSON is the evil one, and what was plain data is one, too."""
    pickled = base64.b64encode(pickle.dumps(Evil(marker))).decode()

    def poisoned(data: bytes) -> bytes:
        content = json.loads(data)
        for key, value in content.items():
            if isinstance(value, dict) and ":serialized:" in value:
                value[":serialized:"] = pickled
            elif key == "start_time":
                content[key] = {":type:": "<class 'int'>", ":serialized:": pickled}
        return json.dumps(content).encode()

    return rewrite(path, data=poisoned)


def test_the_poisoned_zip_is_poisonous(tmp_path):
    path = poison(saved(tmp_path / "a.zip"), tmp_path / "marker")
    with contextlib.suppress(Exception):  # what follows from a space that is none
        PPO.load(path, device="cpu")
    assert (tmp_path / "marker").is_dir()


def test_no_command_runs_what_an_agents_pickles_say(tmp_path, context, monkeypatch):
    monkeypatch.chdir(tmp_path)
    marker, path = tmp_path / "marker", saved(tmp_path / "a.zip")
    before = actions(PPO.load(path, device="cpu"))
    poison(path, marker)
    assert actions(make_policy(str(path), context).network) == before
    comparison = Comparison("gaussians-2d", (f"mine={path}",), (0,), {"horizon": 2}, EvaluationSettings(200, 200))
    run_comparison(comparison, tmp_path / "out")
    enjoy(str(path), task="gaussians-2d", frame_every=60, out=tmp_path / "seen")
    Path("one.json").write_text(json.dumps({"test": [{"task": "gaussians-2d", "horizon": 2}], "train": []}))
    assert not marker.exists()


def test_a_policy_that_needs_its_pickles_is_refused_by_every_command_unless_trusted(
    tmp_path, context, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "a.zip", policy_kwargs={"activation_fn": Twice})
    marker = tmp_path / "marker"
    before = actions(PPO.load(path, device="cpu"))
    assert actions(make_policy(str(path), context, trust=True).network) == before
    poison(path, marker)
    for name, command in {"enjoy": enjoy, "transfer": transfer}.items():
        more = ["--on", "gaussians-2d/test"] if name == "transfer" else ["--task", "gaussians-2d"]
        monkeypatch.setattr(sys, "argv", [name, str(path), *more])
        with pytest.raises(SystemExit):
            run_command(name, command)
        assert "add --trust" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(PolicyError, match="add --trust"):
        Comparison("gaussians-2d", (str(path),), (0,)).try_policies((str(path),))
    assert not marker.exists()
    with pytest.raises(PolicyError, match="stable-baselines3 cannot load"):
        make_policy(str(path), context, trust=True)
    assert marker.is_dir()  # with the user's word it is opened


def test_trust_reaches_the_cells_of_a_comparison(tmp_path):
    path = saved(tmp_path / "a.zip", policy_kwargs={"activation_fn": Twice})
    arguments = ("gaussians-2d", (f"mine={path}",), (0,), {"horizon": 2}, EvaluationSettings(200, 200))
    results = run_comparison(Comparison(*arguments, trust=True), tmp_path / "out")
    assert len(results.of("mine")) == 1
    with pytest.raises(PolicyError, match="add --trust"):
        run_comparison(Comparison(*arguments), tmp_path / "other")


@pytest.mark.parametrize("entry", ["policy__pth", "pytorch_variables__pth", "policy__optimizer__pth"])
def test_pickles_among_the_tensors_stay_closed_too(entry, tmp_path, context):
    marker, path = tmp_path / "marker", saved(tmp_path / "a.zip")
    torch.save({"evil": Evil(marker)}, tmp_path / "evil.pth")
    rewrite(path, **{entry: (tmp_path / "evil.pth").read_bytes()})
    if entry == "policy__pth":
        with pytest.raises(PolicyError, match="weights are mixed with other objects"):
            make_policy(str(path), context)
    else:
        make_policy(str(path), context)
    assert not marker.exists()


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
@pytest.mark.parametrize("entry", ["data", "policy__pth"])
def test_a_training_that_somebody_else_began_runs_no_code_when_it_goes_on(algorithm, entry, tmp_path):
    plan, folder, marker = small_plan(algorithm, n_envs=1), tmp_path / "training", tmp_path / "marker"
    train_agent(plan, folder, 16, callbacks=[], stage_done=lambda stage: None)
    path = next(folder.glob("checkpoints/*/agent.zip"))
    if entry == "data":
        poison(path, marker)
    else:
        torch.save({"evil": Evil(marker)}, tmp_path / "evil.pth")
        rewrite(path, policy__pth=(tmp_path / "evil.pth").read_bytes())
    progress = json.loads((folder / "progress.json").read_text())
    progress["stages"][-1]["sha256"] = sha256(path)
    del progress["checksum"]
    (folder / "progress.json").write_text(json.dumps(progress))
    if entry == "data":
        train_agent(plan, folder, 32, callbacks=[], stage_done=lambda stage: None)
    else:
        with pytest.raises(SettingsError, match="damaged"):
            train_agent(plan, folder, 32, callbacks=[], stage_done=lambda stage: None)
    assert not marker.exists()


# --- what is loaded acts as stable-baselines3's own


@pytest.mark.parametrize("path", ZIPS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_agent_here_acts_bit_by_bit_as_stable_baselines3_loads_it(path, context):
    algorithms = {"ppo": PPO, "a2c": A2C, "sac": SAC, "td3": TD3, "ppo_lstm": RecurrentPPO}
    algorithm = algorithms[json.loads(path.with_suffix(".json").read_text())["algorithm"]]
    policy = make_policy(str(path), context)
    assert actions(policy.network) == actions(algorithm.load(path, device="cpu"))
    assert len(set(actions(policy.network))) > 1


@pytest.mark.parametrize(
    ("algorithm", "policy", "arguments"),
    [
        (PPO, "MlpPolicy", {}),
        (PPO, "MlpPolicy", {"policy_kwargs": {"net_arch": {"pi": [8, 5], "vf": [3]}, "activation_fn": torch.nn.ReLU}}),
        (PPO, "MlpPolicy", {"policy_kwargs": {"activation_fn": torch.nn.ELU, "ortho_init": False, "net_arch": []}}),
        (PPO, "MlpPolicy", {"use_sde": True, "policy_kwargs": {"squash_output": True, "full_std": False}}),
        (A2C, "MlpPolicy", {}),
        (TRPO, "MlpPolicy", {}),
        (SAC, "MlpPolicy", {"policy_kwargs": {"net_arch": [8]}}),
        (SAC, "MlpPolicy", {"use_sde": True, "policy_kwargs": {"clip_mean": 0.5}}),
        (TD3, "MlpPolicy", {"policy_kwargs": {"activation_fn": torch.nn.Tanh, "n_critics": 3}}),
        (DDPG, "MlpPolicy", {}),
        (RecurrentPPO, "MlpLstmPolicy", {"policy_kwargs": {"lstm_hidden_size": 7, "n_lstm_layers": 2}}),
        (RecurrentPPO, "MlpLstmPolicy", {"policy_kwargs": {"shared_lstm": True, "enable_critic_lstm": False}}),
        (RecurrentPPO, "MlpLstmPolicy", {"policy_kwargs": {"lstm_kwargs": {"bias": False}}}),
    ],
)  # fmt: skip
def test_every_network_that_is_loaded_is_the_one_that_was_saved(algorithm, policy, arguments, tmp_path, context):
    path = saved(tmp_path / "a.zip", algorithm, policy, **arguments)
    made = make_policy(str(path), context)
    assert actions(made.network) == actions(algorithm.load(path, device="cpu"))
    assert len(set(actions(made.network))) > 1


class Twice(torch.nn.Module):
    def forward(self, x):
        return 2 * x


class OwnPolicy(ActorCriticPolicy):
    def _predict(self, observation, deterministic=False):
        return -super()._predict(observation, deterministic)


class OwnFeatures(FlattenExtractor):
    def forward(self, observations):
        return -super().forward(observations)


@pytest.mark.parametrize(
    ("policy", "arguments", "message"),
    [
        ("MlpPolicy", {"activation_fn": Twice}, "its activation is <class 'tests.test_agent_files.Twice'>"),
        ("MlpPolicy", {"activation_fn": functools.partial(torch.nn.LeakyReLU, 0.5)}, "its activation is functools"),
        ("MlpPolicy", {"features_extractor_class": OwnFeatures}, "its features come from <class 'tests"),
        (OwnPolicy, {}, "its policy is a class of 'tests.test_agent_files'"),
    ],
)
def test_what_its_plain_text_does_not_tell_is_refused_and_never_acts_otherwise(
    policy, arguments, message, tmp_path, context
):
    path = saved(tmp_path / "a.zip", policy=policy, policy_kwargs=arguments)
    with pytest.raises(PolicyError, match=message) as caught:
        make_policy(str(path), context)
    assert "--trust" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert actions(make_policy(str(path), context, trust=True).network) == actions(PPO.load(path, device="cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy_kwargs": {"net_arch": [9, 9]}}, "its weights are not those of the network"),
        ({"policy_kwargs": {"net_arch": [10**9]}}, "arguments are not plain or not known"),
        ({"policy_kwargs": {"net_arch": [64] * 100}}, "arguments are not plain or not known"),
        ({"policy_kwargs": {"dropout": 0.5}}, "no field 'dropout'"),
        ({"policy_kwargs": {"lstm_hidden_size": 5}}, "its weights are not those of the network"),
        ({"policy_kwargs": [1]}, "'policy_kwargs' are no mapping"),
        ({"policy_class": None}, "it has no 'policy_class'"),
        ({"policy_class": {"__module__": "os", "__init__": "<function TD3Policy.__init__ at 0>"}}, "class of 'os'"),
        ({"observation_space": "Box"}, "it has no 'observation_space'"),
        ({"observation_space": {"_shape": [6], "low": "[...]", "high": "[1]"}}, "not told in plain text"),
        ({"observation_space": {"_shape": [6]}}, "bounds of its spaces are not told"),
    ],
)  # fmt: skip
def test_a_zip_that_was_tampered_with_is_one_line(changes, message, tmp_path, context):
    path = rewrite(saved(tmp_path / "a.zip"), data=edit(**changes))
    with pytest.raises(PolicyError, match=message) as caught:
        make_policy(str(path), context)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"[1]", b"\xff", b"[" * 100_000, b"{" * 9], ids=range(5))
def test_a_zip_without_an_agents_data_is_one_line(data, tmp_path, context):
    path = rewrite(saved(tmp_path / "a.zip"), data=data)
    with pytest.raises(PolicyError, match="not a stable-baselines3 zip"):
        make_policy(str(path), context)


def test_an_entry_too_large_for_an_agent_is_not_unpacked(tmp_path, context, monkeypatch):
    monkeypatch.setitem(sys.modules["unlearn_gym.policies.sb3_file"].MAX_BYTES, "data", 100)
    with pytest.raises(PolicyError, match="an agent's at most 100"):
        make_policy(str(saved(tmp_path / "a.zip")), context)


def test_loading_draws_nothing_and_heeds_no_default_of_the_caller(tmp_path, context):
    path = saved(tmp_path / "a.zip")
    expected = actions(make_policy(str(path), context).network)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        assert actions(make_policy(str(path), context).network) == expected
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_shipped_agent_is_known_by_its_hash(tmp_path, monkeypatch, context):
    shutil.copytree(SHIPPED_AGENTS / "gaussians-2d", tmp_path / "gaussians-2d")
    monkeypatch.setattr("unlearn_gym.policies.registry.SHIPPED_AGENTS", tmp_path)
    make_policy("ppo", context)
    shutil.copy(saved(tmp_path / "other.zip"), tmp_path / "gaussians-2d" / "ppo.zip")
    with pytest.raises(PolicyError, match="is not the agent that ships"):
        make_policy("ppo", context)


# --- normalised observations


def normalized(**arguments: Any) -> VecNormalize:
    """An environment under VecNormalize that has seen what is far from standard."""
    env = VecNormalize(DummyVecEnv([rescaled]), clip_obs=2.0, **arguments)
    env.seed(0)
    env.reset()
    for _ in range(12):
        env.step(np.array([[0.3]], np.float32))
    if env.norm_obs:
        env.obs_rms.update(OBSERVATIONS * 2 + 1)
    env.action_space.sample()
    return env


PLACES = {
    "beside": ("a.zip", "vecnormalize.pkl"),
    "as in the docs of sb3": ("a.zip", "vec_normalize.pkl"),
    "zoo": ("SISSUnlearn-v0_1/SISSUnlearn-v0.zip", "SISSUnlearn-v0_1/SISSUnlearn-v0/vecnormalize.pkl"),
    "zoo's best": ("SISSUnlearn-v0_1/best_model.zip", "SISSUnlearn-v0_1/SISSUnlearn-v0/vecnormalize.pkl"),
    "checkpoint": ("rl_model_100_steps.zip", "rl_model_vecnormalize_100_steps.pkl"),
}


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize(("agent", "statistics"), PLACES.values(), ids=PLACES)
def test_statistics_beside_an_agent_normalise_what_it_sees(agent, statistics, protocol, tmp_path, context):
    env, path = normalized(), saved(tmp_path / agent)
    raw = make_policy(str(path), context)
    (tmp_path / statistics).parent.mkdir(exist_ok=True)
    (tmp_path / statistics).write_bytes(pickle.dumps(env, protocol))
    policy, own = make_policy(str(path), context), PPO.load(path, device="cpu")
    for obs in OBSERVATIONS:
        action = own.predict(env.normalize_obs(obs), deterministic=True)[0]
        expected = context.clip(context.from_unit((float(action[0]) + 1) / 2))
        assert policy.act(obs, {}) == expected
    assert any(raw.act(obs, {}) != policy.act(obs, {}) for obs in OBSERVATIONS)
    assert policy_sources(str(path), "gaussians-2d") == [path, tmp_path / statistics]


def test_compare_and_enjoy_apply_statistics_too_and_new_statistics_make_new_cells(tmp_path):
    path, env = saved(tmp_path / "a.zip"), normalized()
    arguments = ("gaussians-2d", (str(path),), (0,), {"horizon": 3}, EvaluationSettings(200, 200))
    before = Comparison(*arguments).cell_keys()[str(path)]
    env.save(str(tmp_path / "vecnormalize.pkl"))
    assert Comparison(*arguments).cell_keys()[str(path)] != before
    results = run_comparison(Comparison(*arguments), tmp_path / "out")
    run = SISSUnlearnEnv("gaussians-2d", horizon=3)
    expected = run_episode(run, make_policy(str(path), policy_context(run)), 0).trace["lambda_"]
    (tmp_path / "vecnormalize.pkl").unlink()
    raw = run_episode(run, make_policy(str(path), policy_context(run)), 0).trace["lambda_"]
    assert results.of(str(path))[0]["trace"]["lambda_"] == pytest.approx(expected, rel=1e-6)
    assert raw != pytest.approx(expected, rel=1e-3)
    env.save(str(tmp_path / "vecnormalize.pkl"))
    episode = enjoy(str(path), task="gaussians-2d", frame_every=60, out=tmp_path / "seen")
    whole = SISSUnlearnEnv("gaussians-2d")
    again = run_episode(whole, make_policy(str(path), policy_context(whole)), 0)
    assert episode.trace["lambda_"] == again.trace["lambda_"]


def test_rewards_alone_that_were_normalised_leave_observations_as_they_are(tmp_path, context):
    path = saved(tmp_path / "a.zip")
    normalized(norm_obs=False).save(str(tmp_path / "vecnormalize.pkl"))
    policy, own = make_policy(str(path), context), PPO.load(path, device="cpu")
    assert actions(policy.network) == actions(own)
    np.testing.assert_array_equal(policy.statistics.apply(OBSERVATIONS[0]), OBSERVATIONS[0])


def test_an_agent_of_agents_train_was_trained_without_whatever_lies_beside_it(tmp_path, context):
    path = tmp_path / "ppo.zip"
    for end in (".zip", ".json"):
        shutil.copy((SHIPPED_AGENTS / "gaussians-2d" / "ppo").with_suffix(end), path.with_suffix(end))
    normalized().save(str(tmp_path / "vecnormalize.pkl"))
    assert make_policy(str(path), context).statistics is None
    path.with_suffix(".json").unlink()
    assert make_policy(str(path), context).statistics is not None


ZOO = """!!python/object/apply:collections.OrderedDict
- - - env_wrapper
    - - gymnasium.wrappers.RescaleAction:
          max_action: 1.0
          min_action: -1.0
  - - normalize
    - {normalize}
  - - policy
    - MlpPolicy
  - - policy_kwargs
    - !!python/tuple [1, !!python/name:torch.nn.ReLU '']
{more}"""


def zoo_agent(folder: Path, normalize: str = "true", more: str = "") -> Path:
    path = saved(folder / "SISSUnlearn-v0_1" / "SISSUnlearn-v0.zip")
    record = path.with_suffix("") / "config.yml"
    record.parent.mkdir()
    record.write_text(ZOO.format(normalize=normalize, more=more))
    return path


@pytest.mark.parametrize("normalize", ["true", "'{''norm_obs'': True}'", "dict(norm_reward=False)", "{norm_obs: true}"])
def test_statistics_that_the_zoo_records_and_that_are_missing_are_missed(normalize, tmp_path, context):
    path = zoo_agent(tmp_path, normalize)
    with pytest.raises(PolicyError, match=r"trained on normalised observations and vecnormalize\.pkl.* put it into"):
        make_policy(str(path), context)
    normalized().save(str(path.with_suffix("") / "vecnormalize.pkl"))
    assert make_policy(str(path), context).statistics is not None


@pytest.mark.parametrize("normalize", ["false", "dict(norm_obs=False)", "{norm_obs: false}", "'{''norm_obs'': False}'"])
def test_a_training_that_left_observations_alone_needs_no_statistics(normalize, tmp_path, context):
    assert make_policy(str(zoo_agent(tmp_path, normalize)), context).statistics is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("  - - frame_stack\n    - 4\n", "behind a stack of frames"),
        ("  - - vec_env_wrapper\n    - my.wrappers.VecDelta\n", "behind VecDelta"),
    ],
)
def test_preprocessing_that_a_policy_cannot_apply_is_named(more, message, tmp_path, context):
    with pytest.raises(PolicyError, match=message) as caught:
        make_policy(str(zoo_agent(tmp_path, "false", more)), context)
    assert "module:attribute" in str(caught.value)


@pytest.mark.parametrize("text", ["!!python/object/apply:os.mkdir [MARKER]", "[1, 2]", "a: ["])
def test_the_zoos_record_is_data_and_runs_nothing(text, tmp_path, context):
    path = zoo_agent(tmp_path)
    (path.with_suffix("") / "config.yml").write_text(text.replace("MARKER", str(tmp_path / "marker")))
    with pytest.raises(PolicyError, match="no record of a training"):
        make_policy(str(path), context)
    assert not (tmp_path / "marker").exists()


def test_observations_that_a_wrapper_normalised_are_told_by_their_bounds(tmp_path, context):
    env = gym.wrappers.NormalizeObservation(rescaled())
    PPO("MlpPolicy", env, device="cpu").save(tmp_path / "a.zip")
    with pytest.raises(PolicyError, match=r"other bounds .*NormalizeObservation\): \(-inf, .* this environment's are"):
        make_policy(str(tmp_path / "a.zip"), context)


def test_statistics_of_other_observations_are_refused(tmp_path, context):
    path = saved(tmp_path / "a.zip")
    VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")])).save(str(tmp_path / "vecnormalize.pkl"))
    with pytest.raises(PolicyError, match=r"normalises observations \(3,\), this environment has \(6,\)"):
        make_policy(str(path), context)


# --- the reader of pickles


def called(name: str, argument: str) -> bytes:
    """A pickle that calls ``module:name``; protocol 4 lets a name have dots."""
    texts = b"".join(pickle.SHORT_BINUNICODE + bytes([len(s)]) + s.encode() for s in name.split(":"))
    given = pickle.SHORT_BINUNICODE + bytes([len(argument)]) + argument.encode()
    return b"\x80\x04" + texts + pickle.STACK_GLOBAL + given + pickle.TUPLE1 + pickle.REDUCE + b"."


@pytest.mark.parametrize(
    "name",
    [
        "os:system", "posix:system", "builtins:eval", "builtins:exec", "builtins:getattr", "subprocess:Popen",
        "numpy.testing._private.utils:runstring", "numpy.f2py.crackfortran:myeval", "numpy:load", "numpy:fromfile",
        "numpy._core.multiarray:fromfile", "numpy:core.multiarray._reconstruct", "numpy:ndarray.tofile",
        "stable_baselines3.common.vec_env.vec_normalize:VecNormalize.load", "torch:load", "pickle:loads",
        "gymnasium.spaces.box:Box.__init__.__globals__", "stable_baselines3.common.vec_env.vec_normalize:pickle.loads",
        "stable_baselines3.common.vec_env.vec_normalize:inspect.os.system", "gymnasium:make", "copyreg:_reconstructor",
    ],
)  # fmt: skip
def test_the_reader_of_statistics_knows_no_other_name(name, tmp_path):
    path, marker = tmp_path / "vecnormalize.pkl", tmp_path / "marker"
    path.write_bytes(called(name, f"mkdir {marker}"))
    with pytest.raises(PolicyError, match=r"no part of VecNormalize's statistics.* --trust") as caught:
        read_statistics(path)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize(("module", "name"), sorted(ADMITTED))
def test_names_that_are_admitted_are_not_called_either(module, name, tmp_path):
    part = _PartsUnpickler(called(f"{module}:{name}", "x")).load()
    assert isinstance(part, _Part)
    assert part.arguments == ("x",)
    assert type(part).__module__ == _Part.__module__
    (tmp_path / "v.pkl").write_bytes(called(f"{module}:{name}", "x"))
    with pytest.raises(PolicyError, match="is damaged"):
        read_statistics(tmp_path / "v.pkl")


def test_a_pickle_cannot_change_a_class_of_the_package_or_of_sb3(tmp_path):
    """BUILD with a second dictionary sets attributes, also of classes: those are this reading's own."""
    name = "stable_baselines3.common.vec_env.vec_normalize:VecNormalize"
    texts = b"".join(pickle.SHORT_BINUNICODE + bytes([len(s)]) + s.encode() for s in name.split(":"))
    state = pickle.NONE + pickle.EMPTY_DICT + b"\x8c\x04save" + pickle.NONE + pickle.SETITEM + pickle.TUPLE2
    (tmp_path / "v.pkl").write_bytes(b"\x80\x04" + texts + pickle.STACK_GLOBAL + state + pickle.BUILD + b".")
    before = VecNormalize.save
    with pytest.raises(PolicyError):
        read_statistics(tmp_path / "v.pkl")
    assert VecNormalize.save is before


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_statistics_that_are_cut_off_are_one_line(share, tmp_path):
    content = pickle.dumps(normalized())
    (tmp_path / "v.pkl").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(PolicyError, match="is damaged") as caught:
        read_statistics(tmp_path / "v.pkl")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda env: setattr(env, "clip_obs", -1.0),
        lambda env: setattr(env, "clip_obs", 0.0),
        lambda env: setattr(env, "clip_obs", float("nan")),
        lambda env: setattr(env, "epsilon", float("nan")),
        lambda env: setattr(env.obs_rms, "var", -env.obs_rms.var),
        lambda env: setattr(env.obs_rms, "mean", env.obs_rms.mean * np.nan),
        lambda env: setattr(env.obs_rms, "mean", env.obs_rms.mean[:3]),
        lambda env: setattr(env.obs_rms, "mean", "far"),
        lambda env: setattr(env, "obs_rms", {"a": env.obs_rms}),
    ],
)
def test_statistics_that_cannot_be_used_are_refused(spoil, tmp_path):
    env = normalized()
    spoil(env)
    env.save(str(tmp_path / "v.pkl"))
    with pytest.raises(PolicyError, match="is damaged"):
        read_statistics(tmp_path / "v.pkl")


def big_endian(env):
    env.obs_rms.mean, env.obs_rms.var = (x.astype(">f8") for x in (env.obs_rms.mean, env.obs_rms.var))


@pytest.mark.parametrize(
    "change",
    [
        lambda env: setattr(env, "clip_obs", np.float64(2.0)),
        lambda env: setattr(env, "epsilon", np.float32(1e-3)),
        lambda env: setattr(env, "clip_obs", np.int64(1)),
        lambda env: setattr(env, "norm_obs", np.bool_(False)),
        big_endian,
    ],
)
def test_statistics_with_numpys_numbers_in_them_are_what_they_say(change, tmp_path):
    env = normalized()
    change(env)
    env.save(str(tmp_path / "v.pkl"))
    found = read_statistics(tmp_path / "v.pkl")
    for obs in OBSERVATIONS:
        np.testing.assert_array_equal(found.apply(obs), env.normalize_obs(obs))


class OwnNormalize(VecNormalize):
    pass


def test_statistics_with_more_in_them_are_opened_with_trust_and_a_class_of_ones_own_is_not_applied(tmp_path):
    env = normalized()
    env.extra = Path("x")
    env.save(str(tmp_path / "v.pkl"))
    with pytest.raises(PolicyError, match="pathlib"):
        read_statistics(tmp_path / "v.pkl")
    trusted = read_statistics(tmp_path / "v.pkl", trust=True)
    np.testing.assert_array_equal(trusted.apply(OBSERVATIONS[0]), env.normalize_obs(OBSERVATIONS[0]))
    OwnNormalize(DummyVecEnv([rescaled])).save(str(tmp_path / "v.pkl"))
    with pytest.raises(PolicyError, match="is a OwnNormalize"):
        read_statistics(tmp_path / "v.pkl", trust=True)


# --- names


def test_an_agent_goes_by_its_name_in_results_tables_and_pictures(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.zip")
    policies = ("static:0.5", f"mine={path}", f"other={path}", "drawn=random")
    comparison = Comparison("gaussians-2d", policies, (0,), {"horizon": 3}, EvaluationSettings(200, 200))
    results = run_comparison(comparison, tmp_path / "out")
    assert results.policies[2:] == ["static:0.5", "mine", "other", "drawn"]
    assert results.of("mine")[0]["trace"] == results.of("other")[0]["trace"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["comparison"]["named"]["mine"] == str(path)
    drawn: list[str] = []
    monkeypatch.setattr("unlearn_gym.report.pictures.color", lambda policy: drawn.append(policy) or "black")
    report = write_report(results, tmp_path / "out").read_text()
    assert "mine" in drawn
    assert str(path) not in drawn
    assert "| mine |" in report
    assert f"`mine` is `{path}`." in report
    assert f"| {path}" not in report


def test_one_name_is_one_policy(tmp_path, context):
    one, two = saved(tmp_path / "a.zip"), saved(tmp_path / "b.zip", SAC)
    with pytest.raises(ResultsError, match="'mine' twice"):
        Comparison("gaussians-2d", (f"mine={one}", f"mine={two}"), (0,)).validate()
    keys = [
        Comparison("gaussians-2d", (spec,), (0,)).cell_keys()["mine"]
        for spec in (f"mine={one}", f"mine={two}", "mine=linear", "mine=cosine")
    ]
    assert len(set(keys)) == 4
    with pytest.raises(PolicyError, match="names both"):
        transfer((f"mine={one}", f"mine={two}"), on=("gaussians-2d/test",), out=tmp_path / "out")
    parts = [
        run_comparison(
            Comparison("gaussians-2d", (f"mine={path}",), (seed,), {"horizon": 2}, EvaluationSettings(200, 200)),
            tmp_path / path.stem,
        )
        for seed, path in enumerate((one, two))
    ]
    with pytest.raises(ResultsError, match=r"'mine' is .*b\.zip there"):
        merge_results(parts, ["a", "b"])


def test_a_comparison_can_be_made_of_another_ones_fields(tmp_path):
    comparison = Comparison("gaussians-2d", ("mine=linear",), (0,))
    again = dataclasses.replace(comparison, seeds=(1,))
    assert (again.policies, again.spec("mine"), again.spec("random")) == (("mine",), "linear", "random")


def test_what_is_a_path_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "lr=0.1.zip")
    assert split_name("lr=0.1.zip") == ("lr=0.1.zip", "lr=0.1.zip")
    assert split_name("a=lr=0.1.zip") == ("a", "lr=0.1.zip")
    for spec in ("variational:pathwise:features=losses", "variational:kl_only:from=gaussians-2d", "runs/a=b/agent.zip"):
        assert split_name(spec) == (spec, spec)


@pytest.mark.parametrize("text", ["=a.zip", "random=a.zip", "oracle=a.zip", "a b=a.zip", "a|b=a.zip", "x=static:0.5"])
def test_a_name_that_cannot_be_one_is_refused(text):
    with pytest.raises(PolicyError, match="policy"):
        split_name(text)


def test_transfer_shows_names(tmp_path):
    path = saved(tmp_path / "a.zip")
    (tmp_path / "set.json").write_text(
        json.dumps({"test": [{"task": "gaussians-2d", "horizon": 3}], "train": [{"task": "gaussians-2d:3"}]})
    )
    page = transfer((f"mine={path}",), on=(f"{tmp_path}/set.json/test",), statics=("static:0.5",), out=tmp_path / "out")
    assert "| mine |" in page.read_text()
    assert list(json.loads((tmp_path / "out" / "scores.json").read_text())["agents"]) == [sha256(path)]


def test_read_agent_gives_plain_parts_alone(tmp_path):
    file = read_agent(saved(tmp_path / "a.zip", policy_kwargs={"net_arch": [8]}))
    assert file.policy_class == "ActorCriticPolicy"
    assert file.arguments == {"net_arch": [8], "use_sde": False}
    assert file.observation.shape == (6,)
    assert (file.action.low, file.action.high) == ((-1.0,), (1.0,))


@pytest.mark.parametrize("trust", [False, True])
def test_the_word_of_the_command_line_reaches_the_policies(trust, tmp_path, monkeypatch):
    seen: list[Comparison] = []

    def stop(comparison: Comparison, *arguments: Any, **more: Any) -> None:
        seen.append(comparison)
        raise KeyboardInterrupt

    path = saved(tmp_path / "a.zip")
    arm = f"{{name: a, task: gaussians-2d, policies: [static:0.5, mine={path}]}}"
    (tmp_path / "own.yaml").write_text(f"question: Why?\nseeds: 1\narms: [{arm}]\n")
    monkeypatch.setattr("unlearn_gym.comparison.comparison.run_comparison", stop)
    monkeypatch.setattr("unlearn_gym.making.experiment.run_comparison", stop)
    for command in (
        ["compare", "--task", "gaussians-2d", "--policies", f"mine={path}"],
        ["experiment", str(tmp_path / "own.yaml")],
    ):
        monkeypatch.setattr(sys, "argv", ["unlearn-gym", *command, *(["--trust"] if trust else [])])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 130
    assert [(c.trust, c.spec("mine")) for c in seen] == [(trust, str(path))] * 2


# --- what strangers' files may not do


@pytest.mark.parametrize("bad", [torch.int64, torch.bool, torch.complex64, "nan", "huge"])
def test_weights_that_are_no_usable_numbers_are_refused(bad, context, tmp_path):
    path = saved(tmp_path / "agent.zip")
    with zipfile.ZipFile(path) as archive:
        weights = torch.load(io.BytesIO(archive.read("policy.pth")), weights_only=True)
    name = "action_net.weight"
    if isinstance(bad, torch.dtype):
        weights[name] = weights[name].to(bad)
    else:
        weights[name] = torch.full_like(weights[name], 1e300 if bad == "huge" else np.nan, dtype=torch.float64)
    content = io.BytesIO()
    torch.save(weights, content)
    rewrite(path, policy__pth=content.getvalue())
    with pytest.raises(PolicyError, match="retrain or re-export"):
        make_policy(str(path), context)


def test_a_plain_text_of_a_huge_network_builds_none(context, tmp_path, monkeypatch):
    """Shapes are compared before anything is allocated."""
    path = rewrite(saved(tmp_path / "agent.zip"), data=edit(policy_kwargs={"net_arch": [4096] * 16}))
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *a, **k: pytest.fail("it was built"))
    with pytest.raises(PolicyError, match="not those of the network"):
        make_policy(str(path), context)


@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [
        (PPO, {"net_arch": [64] * 4 + [4096]}), (PPO, {"net_arch": {"pi": [64], "vf": [64, 4096]}}),
        (SAC, {"net_arch": {"pi": [64], "qf": [256, 256]}, "n_critics": 64}),
        (RecurrentPPO, {"lstm_hidden_size": 1024}), (RecurrentPPO, {"n_lstm_layers": 16, "lstm_hidden_size": 256}),
    ],
)  # fmt: skip
def test_layers_of_more_weights_than_the_file_holds_are_not_built(algorithm, arguments, context, tmp_path):
    policy = "MlpLstmPolicy" if algorithm is RecurrentPPO else "MlpPolicy"
    path = rewrite(saved(tmp_path / "agent.zip", algorithm, policy), data=edit(policy_kwargs=arguments))
    with pytest.raises(PolicyError, match=r"its layers have [\d,]+ weights and more"):
        make_policy(str(path), context)


def test_a_tensor_that_shows_one_number_a_billion_times_counts_as_one(context, tmp_path):
    path = rewrite(saved(tmp_path / "agent.zip"), data=edit(policy_kwargs={"net_arch": [4096] * 16}))
    with zipfile.ZipFile(path) as archive:
        weights = torch.load(io.BytesIO(archive.read("policy.pth")), weights_only=True)
    content = io.BytesIO()
    torch.save({**weights, "more": torch.zeros(1).expand(10**9)}, content)
    rewrite(path, policy__pth=content.getvalue())
    with pytest.raises(PolicyError, match="weights and more"):
        make_policy(str(path), context)


@pytest.mark.parametrize("state", [torch.inference_mode, lambda: torch.device("meta"), float64])
def test_an_agent_is_the_same_in_whatever_torch_state_it_is_loaded(state, context, tmp_path):
    path = saved(tmp_path / "agent.zip")
    expected = [SB3Policy(context, path).act(obs, {}) for obs in OBSERVATIONS]
    with state():
        policy = SB3Policy(context, path)
    assert [policy.act(obs, {}) for obs in OBSERVATIONS] == expected
    assert not any(parameter.is_inference() for parameter in policy.network.parameters())


@pytest.mark.parametrize(
    ("algorithm", "policy"), [(PPO, "MlpPolicy"), (A2C, "MlpPolicy"), (RecurrentPPO, "MlpLstmPolicy")]
)
def test_an_agent_that_learned_under_vecnormalize_is_refused_without_its_statistics(
    algorithm, policy, context, tmp_path
):
    """Nothing beside the zip says so; the zip itself does."""
    env = VecNormalize(DummyVecEnv([rescaled]))
    sizes = {"n_steps": 8} if algorithm is A2C else {"n_steps": 8, "batch_size": 8}
    agent = algorithm(policy, env, device="cpu", **sizes)
    agent.learn(8)
    path = tmp_path / "agent.zip"
    agent.save(path)
    with pytest.raises(PolicyError, match="normalised observations and vecnormalize"):
        make_policy(str(path), context)
    env.save(tmp_path / "vecnormalize.pkl")
    assert make_policy(str(path), context).statistics is not None
    plain = algorithm(policy, rescaled(), device="cpu", **sizes)
    plain.learn(8)
    (tmp_path / "plain").mkdir()
    plain.save(tmp_path / "plain" / "agent.zip")
    assert make_policy(str(tmp_path / "plain" / "agent.zip"), context).statistics is None
    (tmp_path / "plain" / "config.yml").write_text("normalize: true\n")
    with pytest.raises(PolicyError, match="normalised observations and vecnormalize"):
        make_policy(str(tmp_path / "plain" / "agent.zip"), context)


def test_rewards_alone_that_were_normalised_can_be_said(context, tmp_path):
    env = VecNormalize(DummyVecEnv([rescaled]), norm_obs=False)
    agent = PPO("MlpPolicy", env, device="cpu", n_steps=8, batch_size=8)
    agent.learn(8)
    agent.save(tmp_path / "agent.zip")
    with pytest.raises(PolicyError, match=r"write 'normalize: false' into .*config\.yml"):
        make_policy(str(tmp_path / "agent.zip"), context)
    (tmp_path / "config.yml").write_text("policy: MlpPolicy\n")  # says nothing of it
    with pytest.raises(PolicyError, match="normalised observations"):
        make_policy(str(tmp_path / "agent.zip"), context)
    (tmp_path / "config.yml").write_text("normalize: false\n")
    assert make_policy(str(tmp_path / "agent.zip"), context).statistics is None


def test_trust_does_not_make_up_for_missing_statistics(context, tmp_path):
    env = VecNormalize(DummyVecEnv([rescaled]))
    kwargs = {"activation_fn": torch.nn.Softplus}
    agent = PPO("MlpPolicy", env, device="cpu", n_steps=8, batch_size=8, policy_kwargs=kwargs)
    agent.learn(8)
    agent.save(tmp_path / "agent.zip")
    with pytest.raises(PolicyError, match="normalised observations and vecnormalize"):
        SB3Policy(context, tmp_path / "agent.zip", trust=True)
    env.save(str(tmp_path / "vecnormalize.pkl"))
    assert SB3Policy(context, tmp_path / "agent.zip", trust=True).statistics is not None
