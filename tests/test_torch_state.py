"""Runs, measurements and evaluations mean the same in whatever torch state the caller is, and leave it as it was."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import unlearn_gym  # noqa: F401 - registers the environment
from unlearn_gym.envs import SISSUnlearnEnv, SISSUnlearnVectorEnv
from unlearn_gym.errors import RunError
from unlearn_gym.making.calibration import calibrate
from unlearn_gym.making.pretraining import Pretraining, PretrainSettings, training_samples
from unlearn_gym.metrics.evaluator import Evaluator
from unlearn_gym.metrics.judge import EvaluationSettings
from unlearn_gym.policies import make_policy
from unlearn_gym.policies.episode import policy_context, run_episode
from unlearn_gym.run import UnlearningRun
from unlearn_gym.run.stacked import StackedRuns
from unlearn_gym.system.torch_state import initial_weights_from, own_torch_state
from unlearn_gym.tasks import get_task, load_data
from unlearn_gym.tasks.registry import _DATA


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device() -> Iterator[None]:
    """On the meta device every tensor that names no device of its own is without values."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def everything() -> Iterator[None]:
    with default_dtype(), default_device(), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        yield


STATES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64": default_dtype,
    "default device": default_device,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "everything": everything,
}
"""What a caller may have set."""


def torch_state() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
        torch.get_default_device(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"),
    )  # fmt: skip


def random_state() -> tuple[Any, ...]:
    numpy_state = np.random.get_state()  # noqa: NPY002 - the global one is what must not change
    return random.getstate(), numpy_state[1].tolist(), numpy_state[2], torch.get_rng_state().tolist()


@pytest.fixture(params=STATES)
def state(request) -> Callable[[], Any]:
    return STATES[request.param]


def same_in(state: Callable[[], Any], job: Callable[[], Any]) -> None:
    """``job`` returns the same in the caller's ``state`` as in torch's own, and changes neither that nor random ones.

    Data that the job reads is read anew, within the state: what is kept for later jobs must be good for them.
    """
    expected = job()
    _DATA.clear()
    with state():
        before = torch_state(), random_state()
        found = job()
        assert (torch_state(), random_state()) == before
    assert found == expected
    assert job() == expected  # of what was kept for later


def weights(run: UnlearningRun) -> bytes:
    with own_torch_state():
        return run.flat.vector.detach().numpy().tobytes()


def make_run(task: str = "gaussians-2d", **options: Any) -> UnlearningRun:
    chosen = get_task(task)
    return UnlearningRun(
        chosen.pretrained_model(), load_data(chosen), chosen.schedule.alphas_cumprod(),
        chosen.settings.override(batch_size=4, **options), 3,
    )  # fmt: skip


def as_text(terms: Any) -> str:
    return repr({k: v if not isinstance(v, np.ndarray) else v.tolist() for k, v in terms.as_dict().items()})


RUNS: dict[str, dict[str, Any]] = {
    "gaussians-2d": {},
    "retrack": {"objective": "retrack", "forget_grad_rule": "loss"},
    "combined": {"forget_grad_rule": "loss", "grad_norms": "every:2"},
    "mnist-trousers": {"task": "mnist-trousers"},
    "vae": {"task": "vae-mnist-trousers"},
    "naive-vae": {"task": "vae-mnist-trousers", "objective": "naive"},
    "sfd": {"task": "sfd-mnist-digits", "hybrid_coef": 0.5, "forget_grad_rule": "loss"},
}


@pytest.mark.parametrize(
    ("name", "state"),
    [*((name, "everything") for name in RUNS), *(("gaussians-2d", state) for state in STATES), ("sfd", "no_grad")],
)
def test_a_run_learns_the_same_whatever_state_the_caller_is_in(name, state):
    options = RUNS[name]

    def job() -> tuple[Any, ...]:
        run = make_run(**options)
        start = weights(run)
        snapshot, terms = (
            run.snapshot(),
            [as_text(run.update(0.3)), as_text(run.measure(0.6)), as_text(run.update(0.8))],
        )
        learned, losses = weights(run), run.probe_losses()
        assert learned != start
        run.restore(snapshot)
        assert weights(run) == start
        return (*terms, learned, losses)

    same_in(STATES[state], job)


def test_unweighted_terms_are_the_same(state):
    same_in(state, lambda: make_run().measure_unweighted().tolist())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_go_on_as_the_original_does(state, copier):
    def job() -> tuple[str, bytes]:
        run = make_run()
        run.update(0.4)
        other = copier(run)
        return as_text(other.update(0.4)), weights(other)

    same_in(state, job)


def episode(**options: Any) -> list[Any]:
    """What an environment returns in two steps, and its frame."""
    env: Any = gym.make("SISSUnlearn-v0", horizon=3, **options)
    steps = [env.reset(seed=0), *(env.step(np.array([x], np.float32)) for x in (0.3, 0.7))]
    frame = env.render() if env.render_mode else np.zeros(1)
    return [frame.tobytes(), *(repr([np.asarray(part).tolist() for part in step[:-1]]) for step in steps)]


@pytest.mark.parametrize(
    "options",
    [
        {"observation": "extended", "reward": "potential", "render_mode": "rgb_array"},
        {"features": "fresh", "normalize_features": False},
    ],
    ids=["extended", "fresh"],
)
def test_an_environment_is_the_same(options):
    same_in(everything, lambda: episode(task="gaussians-2d", **options))


def test_an_extended_environment_of_a_vae_is_the_same():
    same_in(everything, lambda: episode(task="vae-mnist-trousers", observation="extended", batch_size=4))


@pytest.mark.parametrize("backend", ["serial", "stacked"])
def test_vector_environments_are_the_same(state, backend):
    def job() -> list[Any]:
        envs = SISSUnlearnVectorEnv(2, "gaussians-2d", backend=backend, horizon=3)
        envs.reset(seed=0)
        obs, rewards, *_ = envs.step(np.array([[0.3], [0.7]], np.float32))
        envs.close()
        return [obs.tolist(), rewards.tolist()]

    same_in(state, job)


def test_process_environments_are_the_same():
    def job() -> list[Any]:
        envs = SISSUnlearnVectorEnv(2, "gaussians-2d", backend="processes", num_workers=1, horizon=3)
        envs.reset(seed=0)
        obs, rewards, *_ = envs.step(np.array([[0.3], [0.7]], np.float32))
        envs.close()
        return [obs.tolist(), rewards.tolist()]

    same_in(everything, job)


def test_stacked_runs_are_the_same(state):
    def job() -> list[Any]:
        stack = StackedRuns([make_run(), make_run()])
        terms = stack.update({0: 0.3, 1: 0.7})
        return [as_text(terms[0]), as_text(terms[1]), weights(stack.runs[0])]

    same_in(state, job)


@pytest.mark.parametrize("policy", ["variational:pathwise", "variational:variance", "ppo"])
def test_an_episode_of_a_policy_is_the_same(state, policy):
    def job() -> list[Any]:
        env = SISSUnlearnEnv("gaussians-2d", horizon=3)
        result = run_episode(env, make_policy(policy, policy_context(env)), 5)
        return [result.trace, result.episode_return, weights(env.run)]

    same_in(state, job)


def test_a_policy_asked_by_hand_is_the_same(state):
    def job() -> list[float]:
        env = SISSUnlearnEnv("gaussians-2d", horizon=3)
        policy: Any = make_policy("variational:pathwise", policy_context(env))
        policy.reset(1)
        obs, info = env.reset(seed=1)
        return [policy.act(obs, info), policy.act(obs, info)]

    same_in(state, job)


def test_an_evaluation_is_the_same():
    def job() -> dict[str, Any]:
        task = get_task("gaussians-2d")
        settings = EvaluationSettings(num_forget_samples=50, num_quality_samples=200, num_likelihood_samples=2)
        result = Evaluator(task, load_data(task), settings).evaluate(task.pretrained_model())
        return {**result.metrics, "profile": result.profile}

    same_in(everything, job)


def test_calibration_is_the_same(state):
    task = get_task("gaussians-2d")
    same_in(state, lambda: calibrate(task, load_data(task), num_batches=64).model_dump_json())


def test_pretraining_is_the_same(state):
    def job() -> bytes:
        task = get_task("gaussians-2d")
        training = Pretraining(task, *training_samples(load_data(task), retain_only=True), PretrainSettings(updates=2))
        training.update()
        training.update()
        with own_torch_state():
            return training.flat.vector.detach().numpy().tobytes()

    same_in(state, job)


def test_the_state_is_the_callers_again_after_an_error(state):
    run = make_run()
    with state():
        before = torch_state()
        with pytest.raises(RunError):
            run.update(2.0)
        assert torch_state() == before


def test_a_network_without_a_graph_is_refused_and_not_taken_for_a_side_left_out():
    """A user's network that detaches what it returns would give two gradients of zero."""

    class Detached(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2))

        def forward(self, x_t, timesteps, labels=None):
            return (x_t + self.weight).detach()

    task = get_task("gaussians-2d")
    run = UnlearningRun(Detached(), load_data(task), task.schedule.alphas_cumprod(), task.settings)
    with pytest.raises(RunError, match="no gradient"):
        run.update(0.5)
    assert run.updates == 0


def replace_all(model: torch.nn.Module) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def replace_one(model: torch.nn.Module) -> None:
    name, value = next(iter(model.state_dict().items()))
    model.load_state_dict({name: value.clone()}, strict=False, assign=True)


@pytest.mark.parametrize("replace", [replace_all, replace_one, torch.nn.Module.double])
def test_parameters_that_the_run_does_not_train_are_noticed_before_anything_is_drawn(replace):
    run = make_run(forget_grad_rule="loss", grad_norms="every:4")
    run.update(0.5)
    stack = StackedRuns([make_run(), make_run()])
    stack.update({0: 0.5, 1: 0.5})
    replace(run.model)
    replace(stack.runs[1].model)
    before = run.generator.get_state(), stack.runs[0].generator.get_state()
    with pytest.raises(RunError, match="not those that the run trains"):
        run.update(0.5)
    with pytest.raises(RunError, match="not those that the run trains"):
        stack.update({0: 0.5, 1: 0.5})
    assert torch.equal(before[0], run.generator.get_state())
    assert torch.equal(before[1], stack.runs[0].generator.get_state())


class Dying(torch.nn.Module):
    """A network whose units are all dead in some batches, or, ``apart``, one that never asks its weights."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        with initial_weights_from(0):
            self.inner, self.outer = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, bias=False)
        self.apart = apart

    def forward(self, x_t, timesteps, labels=None):
        x = torch.cat([x_t, timesteps[:, None].float() / 1000], 1)
        hidden = torch.relu(self.inner(x) if not self.apart else torch.zeros(len(x), 4, requires_grad=True))
        return self.outer(hidden) if not self.apart else hidden[:, :2] * 1.0


def test_a_batch_without_a_gradient_is_none_of_a_network_that_cannot_learn():
    task = get_task("gaussians-2d")
    settings = task.settings.override(batch_size=1)
    run = UnlearningRun(Dying(apart=False), load_data(task), task.schedule.alphas_cumprod(), settings)
    norms = [run.update(0.5).retain_grad_norm for _ in range(40)]
    assert 0 in norms
    assert max(norms) > 0
    run = UnlearningRun(Dying(apart=True), load_data(task), task.schedule.alphas_cumprod(), settings)
    with pytest.raises(RunError, match="neither loss has a gradient"):
        run.measure(0.5)


@pytest.mark.parametrize(("objective", "side"), [("naive", "forget_grad"), ("neggrad", "retain_grad")])
def test_a_side_that_an_objective_leaves_out_has_no_gradient(objective, side):
    run = make_run("vae-mnist-trousers", objective=objective, forget_grad_rule="loss")
    run.update(0.5)
    left, other = getattr(run, side), run.retain_grad if side == "forget_grad" else run.forget_grad
    assert not left.any()
    assert other.any()


def test_a_network_made_in_inference_mode_learns_and_shared_parameters_stay_shared():
    task = get_task("gaussians-2d")

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
            self.two.weight = self.one.weight
            self.register_buffer("shift", torch.ones(2))

        def forward(self, x_t, timesteps, labels=None):
            return self.two(self.one(x_t)) + self.shift

    with torch.inference_mode():
        model = Tied()
        run = UnlearningRun(model, load_data(task), task.schedule.alphas_cumprod(), task.settings)
    before = weights(run)
    run.update(0.5)
    assert weights(run) != before
    assert model.two.weight is model.one.weight


def test_initial_weights_come_from_the_seed_and_leave_the_global_stream():
    before = random_state()
    drawn = []
    for seed in (1, 1, 2):
        with initial_weights_from(seed):
            drawn.append(torch.nn.Linear(2, 2).weight.tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    assert random_state() == before
