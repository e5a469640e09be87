"""Numbers, switches and arguments from outside: what is refused is one line that shows the value."""

from __future__ import annotations

from decimal import Decimal

import gymnasium as gym
import numpy as np
import pytest
import torch

from unlearn_gym.cli.arguments import parse_options
from unlearn_gym.envs import SB3VecEnv, SISSUnlearnEnv, SISSUnlearnVectorEnv
from unlearn_gym.envs.actions import parse_action
from unlearn_gym.errors import (
    ActionError,
    DataError,
    RunError,
    SettingsError,
    TaskError,
    one_line,
)
from unlearn_gym.making.pretraining import PretrainSettings
from unlearn_gym.models import MLPConfig
from unlearn_gym.policies.base import FunctionPolicy
from unlearn_gym.run.actions import Action
from unlearn_gym.settings import RunSettings
from unlearn_gym.tasks import get_task
from unlearn_gym.tasks.instances import load_instances

from .conftest import fails, label


class OnADevice:
    """An array of another library, which is not in this process's memory."""

    def __array__(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy.\nUse Tensor.cpu()")


def leaf(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(
    "action",
    [
        0.5, np.float32(0.5), np.float16(0.5), np.longdouble(0.5), [0.5], (0.5,), np.array(0.5), np.array([0.5]),
        np.array([0.5], np.float32), Decimal("0.5"), torch.tensor(0.5), torch.tensor([0.5]), leaf(0.5),
        leaf(0.5)[0], [leaf(0.5)[0]], leaf(0.5, dtype=torch.bfloat16), leaf(0.5, dtype=torch.float16),
        np.ma.array([0.5], mask=[False]),
    ],
    ids=repr,
)  # fmt: skip
def test_whatever_plainly_is_one_number_is_an_action(action):
    found = parse_action(action, 0.1, 0.9)
    assert type(found.lambda_) is float
    assert found == Action(0.5)


@pytest.mark.parametrize(
    "action",
    [
        "0.5", b"0.5", np.str_("0.5"), np.array(["0.5"]), np.array(["0.5"], dtype=object), 0.5 + 0j,
        np.array([0.5 + 0j]), torch.tensor(0.5 + 0j), True, np.True_, [True], torch.tensor(True), np.ma.masked,
        np.ma.array([0.5], mask=[True]),
        None, {}, {0.5: 1}, {0.5}, [], [0.5, [0.5]], [[0.5], [0.5, 0.5]], [[0.5]], [0.5, 0.5], leaf(0.5, 0.5),
        leaf(0.5)[None], 10**400, -(10**400), [10**400], np.timedelta64(1), np.datetime64("2025"), Decimal("sNaN"),
        OnADevice(), [OnADevice()], torch.empty(1, device="meta"), object(), "x" * 10**6, 10**5000,
    ],
    ids=label,
)  # fmt: skip
def test_whatever_is_not_one_number_is_an_action_error_in_one_line(action):
    assert "λ" in fails(ActionError, parse_action, action, 0.0, 1.0)


def test_a_policys_and_a_runs_lambda_are_numbers_too(make_run):
    for wrong in ("0.5", True, None, 0.5j):
        fails(ActionError, FunctionPolicy(lambda obs, value=wrong: value).act, np.zeros(6), {})
        fails(RunError, make_run().update, wrong)
    assert FunctionPolicy(lambda obs: leaf(0.5)).act(np.zeros(6), {}) == 0.5


@pytest.fixture(scope="module")
def vector():
    env = SISSUnlearnVectorEnv(2, "gaussians-2d", backend="serial", autoreset_mode="SameStep")
    yield env
    env.close()


def same_actions():
    plain = [0.5, 0.25]
    tensors = [torch.tensor(0.5, requires_grad=True), torch.tensor(0.25)]
    return [
        plain, np.array(plain), np.array(plain, np.float32)[:, None], leaf(*plain), leaf(*plain)[:, None], tensors,
        [t[None] for t in tensors], leaf(*plain, dtype=torch.bfloat16),
    ]  # fmt: skip


def test_a_batch_of_actions_in_any_form_is_the_same_step(vector):
    seen = []
    for actions in same_actions():
        vector.reset(seed=0)
        seen.append(vector.step(actions)[0])
    assert all(np.array_equal(seen[0], other) for other in seen)


@pytest.mark.parametrize(
    "actions",
    [
        [0.5, [0.5, 0.6]], [[0.5], [0.5, 0.6]], "ab", b"ab", {0.5: 1, 0.6: 2}, {0.5, 0.6}, 0.5, None, [10**400, 0.5],
        np.ma.array([0.5, 0.5], mask=[False, True]), [True, 0.5], np.array([0.5, 0.5j]), leaf(0.5), ["0.5", 0.5],
        torch.empty(2, device="meta"), OnADevice(), [OnADevice(), 0.5], torch.tensor([True, False]),
    ],
    ids=label,
)  # fmt: skip
def test_a_bad_batch_of_actions_is_one_line_and_steps_nothing(vector, actions):
    sb3 = SB3VecEnv(vector)
    vector.reset(seed=0)
    fails(ActionError, vector.step, actions)
    with pytest.raises(ActionError):
        sb3.step(actions)
    assert [env.run.updates for env in vector.envs.envs] == [0, 0]


def test_no_argument_of_an_environment_is_taken_for_another():
    make = SISSUnlearnEnv
    for task in ({}, [], 0, False, b"gaussians-2d", {"task": "gaussians-2d"}):
        assert "task=" in fails(SettingsError, make, task)
    fails(TaskError, make, "")
    for named in ({}, [], None, 3):
        fails(TaskError, get_task, named)
    for instances in (5, {}, {"task": "gaussians-2d"}, b"x", True):
        assert "instances=" in fails(SettingsError, make, instances=instances)
    for root in (3.0, b"data", True, ["data"], "da\0ta"):
        assert "data_root=" in fails(DataError, make, "gaussians-2d", data_root=root)
    assert "download=" in fails(SettingsError, make, "gaussians-2d", download="no")
    assert "render_mode=" in fails(SettingsError, make, "gaussians-2d", render_mode=["rgb_array"])


@pytest.mark.parametrize(
    "options", [3, [], [("instance", 1)], "instance", {"instance": True}, {1: 2}, {"x" * 10**6: 1}], ids=label
)
def test_bad_reset_options_are_one_line(vector, options):
    env = SISSUnlearnEnv("gaussians-2d")
    fails(SettingsError, env.reset, options=options)
    fails(SettingsError, vector.reset, options=options)


@pytest.mark.parametrize(
    "wrong",
    [
        {"worker_timeout": "5"}, {"worker_timeout": True}, {"worker_timeout": float("nan")}, {"worker_timeout": 1e300},
        {"num_envs": True}, {"num_envs": 2.0}, {"num_envs": "2"}, {"num_workers": True}, {"num_workers": "1"},
        {"backend": ["serial"]}, {"autoreset_mode": [1] * 10**6},
    ],
    ids=label,
)  # fmt: skip
def test_bad_arguments_of_many_environments_are_one_line(wrong):
    assert next(iter(wrong)) in fails(
        SettingsError, SISSUnlearnVectorEnv, **{"num_envs": 2, "task": "gaussians-2d", **wrong}
    )


@pytest.mark.parametrize("seed", ["1", True, 1.0, [1, True], [1, "2"], [1, 2.0], {1: 2, 3: 4}])
def test_bad_seeds_are_one_line(vector, seed):
    fails(SettingsError, vector.reset, seed=seed)
    fails(SettingsError, vector.reset, options={"reset_mask": [[True], [True, False]]})


def number_fields(kind: type) -> list[str]:
    return [n for n, f in RunSettings.model_fields.items() if f.annotation in (kind, kind | None)]


@pytest.mark.parametrize("name", [*number_fields(float), *number_fields(int)])
def test_settings_that_are_numbers_take_numbers_alone(name):
    default = RunSettings()
    value = getattr(default, name) or 0.5
    for same in (value, np.float64(value), np.array([value])[0]):
        assert getattr(default.override(**{name: same}), name) == value
    assert type(getattr(default.override(**{name: np.float32(value)}), name)) is type(value)
    for wrong in (True, False, np.True_, str(value), str(value).encode(), value + 0j, [value], np.array([value]), {}):
        assert f"{name}=" in fails(SettingsError, default.override, **{name: wrong})
    if name != "batch_size":  # which memory alone bounds
        fails(SettingsError, default.override, **{name: 10**400})


@pytest.mark.parametrize("name", number_fields(bool))
def test_settings_that_are_switches_take_true_and_false_alone(name):
    assert getattr(RunSettings().override(**{name: np.False_}), name) is False
    for wrong in ("no", "False", 0, 1.0, None, b"1"):
        assert f"{name}=" in fails(SettingsError, RunSettings().override, **{name: wrong})


def test_other_models_of_settings_take_numbers_alone(tmp_path):
    for model, name in ((PretrainSettings, "updates"), (PretrainSettings, "seed"), (MLPConfig, "dim")):
        for wrong in (True, "3"):
            fails(ValueError, lambda m=model, n=name, w=wrong: _one_line(m, n, w))
    fails(SettingsError, load_instances, [{"task": "gaussians-2d", "horizon": True}])
    fails(SettingsError, load_instances, [{"task": "gaussians-2d", "learning_rate": "1e-4"}])
    assert "override_classes" in fails(SettingsError, RunSettings().override, override_classes={3: True})
    assert "override_classes" in fails(SettingsError, RunSettings().override, override_classes={3.5: 8})
    assert RunSettings().override(override_classes={"3": 8}).override_classes == ((3, 8),)


def _one_line(model, name, value):
    try:
        model(**{name: value})
    except ValueError as error:
        raise ValueError(one_line(str(error))) from None


def test_options_of_the_command_line_are_json_or_pythons_words():
    texts = ("smoothness_coef=0.1", "horizon=7", "normalize_features=False", "potential_cap=None", "reward=potential")
    options = parse_options((*texts, "skip_zero_weights=false", 'override_classes={"3": 8}'))
    made = RunSettings().override(**options)
    assert (made.smoothness_coef, made.horizon, made.normalize_features, made.skip_zero_weights) == (
        0.1,
        7,
        False,
        False,
    )
    assert (made.potential_cap, made.reward, made.override_classes) == (None, "potential", ((3, 8),))
    for text in ("smoothness_coef=no", 'smoothness_coef="0.1"', "horizon=" + "9" * 5000, "horizon=" + "[" * 100_000):
        fails(SettingsError, lambda t=text: RunSettings().override(**parse_options((t,))))


def test_the_environment_takes_numpy_scalars_as_settings():
    env = gym.make("SISSUnlearn-v0", task="gaussians-2d", horizon=np.int64(3), smoothness_coef=np.float32(0.25))
    assert env.unwrapped.settings.horizon == 3
    assert env.unwrapped.settings.smoothness_coef == 0.25
