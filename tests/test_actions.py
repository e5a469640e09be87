"""What more than λ an action decides: the forget gradient's strength and the length of the step, for one update."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

from unlearn_gym.envs import SISSUnlearnEnv, SISSUnlearnVectorEnv
from unlearn_gym.errors import ActionError, RunError
from unlearn_gym.policies.base import FunctionPolicy
from unlearn_gym.policies.episode import run_episode
from unlearn_gym.run.actions import Action
from unlearn_gym.run.gradients import clip_factor
from unlearn_gym.run.stacked import StackedRuns

TASKS = ("gaussians-2d", "mnist-trousers", "vae-mnist-trousers")
OPTIMIZERS = ("adamw", "adam", "sgd")


def moved(run, action):
    """How far an update with ``action`` takes the parameters of ``run``."""
    before = run.flat.vector.detach().clone()
    run.update(action)
    return run.flat.vector.detach() - before


@pytest.mark.parametrize("task", TASKS)
def test_an_action_of_lambda_alone_is_the_number(make_run, task):
    one, other = (make_run(task, batch_size=4) for _ in range(2))
    for lambda_ in (0.2, 0.8):
        assert torch.equal(moved(one, Action(lambda_)), moved(other, lambda_))


@pytest.mark.parametrize("task", TASKS)
def test_no_strength_is_an_update_on_retain_data_alone(make_run, task):
    run = make_run(task, batch_size=4, optimizer="sgd", max_grad_norm=0.1, learning_rate=1.0)
    found = moved(run, Action(0.5, forget_strength=0.0))
    clipped = run.retain_grad * clip_factor(run.retain_grad.norm(), 0.1)
    torch.testing.assert_close(found, -clipped, rtol=1e-3, atol=3e-7)
    assert run.forget_grad.any()


@pytest.mark.parametrize("rule", ["relative_norm", "fixed_norm"])
def test_a_strength_is_the_rules_constant_for_this_update_alone(make_run, rule):
    given, set_so, as_before = (make_run(forget_grad_rule=rule, forget_grad_norm=n) for n in (0.5, 2.0, 0.5))
    assert torch.equal(moved(given, Action(0.5, forget_strength=2.0)), moved(set_so, 0.5))
    restored = given.snapshot()
    as_before.restore(restored)
    assert torch.equal(moved(given, 0.5), moved(as_before, 0.5))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scale", [0.0, 0.25, 3.0])
def test_a_step_is_as_many_times_as_long_and_the_next_one_is_not(make_run, optimizer, scale):
    scaled, plain = (make_run(optimizer=optimizer) for _ in range(2))
    for run in (scaled, plain):
        run.update(0.5)
    found, whole = moved(scaled, Action(0.5, step_scale=scale)), moved(plain, 0.5)
    torch.testing.assert_close(found, scale * whole, rtol=1e-3, atol=1e-6)
    assert whole.any()
    assert scaled.optimizer.param_groups[0]["lr"] == plain.optimizer.param_groups[0]["lr"]
    for name, value in scaled.snapshot().optimizer.items():
        assert torch.equal(value, plain.snapshot().optimizer[name])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stacked_runs_take_strength_and_scale_of_each_run_alone(make_run, optimizer):
    options = {"optimizer": optimizer, "forget_grad_norm": 0.5}
    stack = StackedRuns([make_run(seed=s, **options) for s in range(3)])
    single = [make_run(seed=s, **options) for s in range(3)]
    start = [run.flat.vector.detach().clone() for run in single]
    for _ in range(2):
        actions = [Action(0.5, 0.0), Action(0.3, step_scale=4.0), Action(0.7)]
        terms = stack.update(dict(enumerate(actions)))
        for i, action in enumerate(actions):
            assert terms[i].forget_multiplier == pytest.approx(single[i].update(action).forget_multiplier, rel=1e-3)
    for run, other, before in zip(stack.runs, single, start, strict=True):
        moves = (run.flat.vector.detach() - before, other.flat.vector.detach() - before)
        assert (moves[0] - moves[1]).norm() < 2e-3 * moves[1].norm()
    assert stack.optimizer.param_groups[0]["lr"] == single[0].settings.learning_rate


@pytest.mark.parametrize("name", ["forget_strength", "step_scale"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "1", True, 1j])
def test_a_value_out_of_range_is_named_and_changes_nothing(make_run, name, value):
    run = make_run()
    before = run.generator.get_state()
    with pytest.raises(RunError, match=f"{name}=.* must be a number of at least 0"):
        run.update(Action(0.5, **{name: value}))
    assert torch.equal(run.generator.get_state(), before)


@pytest.mark.parametrize("options", [{"forget_grad_rule": "loss"}, {"objective": "erasediff"}])
def test_a_strength_where_no_rule_has_it_is_refused(make_run, options):
    with pytest.raises(RunError, match=r"forget_strength=0\.5 is the norm rules' constant"):
        make_run(**options).update(Action(0.5, forget_strength=0.5))


def test_an_environment_takes_actions_and_policies_may_return_them():
    plain, other = (SISSUnlearnEnv("gaussians-2d", horizon=3) for _ in range(2))
    weak = run_episode(plain, FunctionPolicy(lambda obs: Action(0.5, forget_strength=0.0)), 0)
    strong = run_episode(other, FunctionPolicy(lambda obs: 0.5), 0)
    assert weak.trace["lambda_"] == strong.trace["lambda_"] == [0.5] * 3
    assert not torch.equal(plain.run.flat.vector, other.run.flat.vector)
    with pytest.raises(ActionError, match=r"λ=0\.95 must lie in"):
        plain.validate(Action(0.95))


@pytest.mark.parametrize("backend", ["serial", "stacked"])
def test_vector_environments_pass_on_what_they_parsed(backend):
    envs = SISSUnlearnVectorEnv(2, "gaussians-2d", backend=backend, horizon=3)
    envs.reset(seed=0)
    outcomes = envs.envs.step([Action(0.3, step_scale=0.0), Action(0.3)])
    assert all(np.isfinite(outcome.obs).all() for outcome in outcomes)
    start = envs.envs.envs[0].start_vector
    rows = [env.run.flat.vector.detach() for env in envs.envs.envs]
    assert torch.equal(rows[0], start)
    assert not torch.equal(rows[1], start)


@pytest.mark.parametrize("backend", ["serial", "stacked"])
def test_an_action_may_end_the_episode_with_its_update(backend):
    env = SISSUnlearnEnv("gaussians-2d", horizon=9)
    env.reset(seed=0)
    assert env.step(Action(0.5, stop=True))[2:4] == (True, False)
    assert env.run.updates == 1
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0.5)
    env.reset(seed=0)
    assert env.step(0.5)[2] is False
    envs = SISSUnlearnVectorEnv(2, "gaussians-2d", backend=backend, horizon=9)
    envs.reset(seed=0)
    outcomes = envs.envs.step([Action(0.3, stop=True), Action(0.3)])
    assert [outcome.terminated for outcome in outcomes] == [True, False]
