"""``SISSUnlearn-v0``: choose λ for every update of a live unlearning run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from unlearn_gym.envs.actions import parse_action
from unlearn_gym.envs.features import FEATURE_CLIP, ExtendedFeatures
from unlearn_gym.errors import SettingsError, shown
from unlearn_gym.run.actions import Action
from unlearn_gym.run.objectives import get_objective
from unlearn_gym.run.run import Snapshot, UnlearningRun
from unlearn_gym.run.terms import FEATURES, StepTerms
from unlearn_gym.settings import RunSettings
from unlearn_gym.system.torch_state import insulated
from unlearn_gym.system.values import is_whole
from unlearn_gym.tasks import Task, TaskData, get_task, load_data
from unlearn_gym.tasks.instances import Instance, load_instances
from unlearn_gym.tasks.saving import save_model

DEFAULT_TASK = "mnist-trousers"


def reset_options(options: Any) -> dict[str, Any]:
    """The options of a reset as a dict of the caller's own; raises :class:`SettingsError` for what is none."""
    if options is not None and not isinstance(options, Mapping):
        raise SettingsError(f"reset's options={shown(options)} must be a dict or None")
    return dict(options or {})


def _feature_scale(task: Task, run: UnlearningRun) -> NDArray[np.float64]:
    """x0 of each feature: the task's constants times the run's data-set factors."""
    if not run.settings.normalize_features:
        return np.ones(len(FEATURES))
    coefs = {"retain": run.retain_coef, "forget": run.forget_coef}
    return np.array([getattr(task.constants, f) * coefs[f.split("_")[0]] for f in FEATURES])


class SISSUnlearnEnv(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Unlearn data from a diffusion model, one optimizer update a step, by choosing λ.

    ## Description
    A diffusion model has been trained on D = R ∪ F. Every step makes one real optimizer update of it with
    the SISS loss (Alberti et al., ICLR 2025), which draws noisy samples from a mixture of a retain
    and a forget sample. The agent chooses the mixture's weight λ. The formulation is that of
    arXiv 2512.01054, section 5.3. ``env.unwrapped.run`` is the live :class:`unlearn_gym.run.UnlearningRun`.

    ## Action Space
    ``Box(lambda_min, lambda_max, (1,), float32)``: λ, the probability of drawing the forget sample (for
    ``objective="retrack"`` and ``"sfd"`` the forget term's weight, for some baselines nothing); by default in
    [0.1, 0.9]. For agents that want [-1, 1], wrap the environment in
    ``gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))``.

    ## Observation Space
    ``Box(float32, (6,))``: six entries by default; some settings below add more:

    | Index | Observation | Min | Max |
    |---|---|---|---|
    | 0 | log-ratio of the retain loss L_retain | -5 | 5 |
    | 1 | log-ratio of the forget loss L_forget | -5 | 5 |
    | 2 | log-ratio of the retain gradient's norm | -5 | 5 |
    | 3 | log-ratio of the forget gradient's norm | -5 | 5 |
    | 4 | λ of the previous step | lambda_min | lambda_max |
    | 5 | progress t / horizon | 0 | 1 |

    Entries 0 to 3 are log(x / x0) clipped to ±5, with x0 measured once for the task at λ = 0.5;
    with ``normalize_features=False`` they are the raw values, in [0, ∞). They are what the previous update
    measured (with ``features="fresh"``: unweighted terms of a new batch, at about twice the cost). With
    ``grad_norms="every:k"`` there is a seventh entry in [0, 1): updates since both norms were measured, over k.
    With ``hybrid_coef`` above 0 the next entry is the norm of the direct gradient over the retain gradient's, as a
    logarithm in ±5. ``observation="extended"`` appends the groups of :data:`unlearn_gym.envs.features.GROUPS`, each 0
    at the start, in [-5, 5], measured on fixed samples and fixed noise, whatever ``normalize_features``;
    ``observation_groups`` says where each is. Cost: time of a step relative to one without the group, on a CPU.

    | group | entries | what | cost on ``gaussians-2d`` | cost on ``mnist-trousers`` |
    |---|---|---|---|---|
    | ``bands`` | 5 | log(forget loss / its start) in each fifth of the timesteps, 8 samples each | 1.11 | 1.61 |
    | ``samples`` | F | mean classifier features of 16 samples, their change since the start | 1.46 | 2.44 |
    | ``distance`` | 1 | log(1 + 500 ‖θ − θ_0‖ / ‖θ_0‖) of the parameters θ | 1.02 | 1.01 |

    The change of features is measured in units of their standard deviations at the start; F = 64 for MNIST, 2 for
    points, 0 without a classifier.

    ## Rewards
    ``reward="siss"``: ``-L_SISS(λ_t) - smoothness_coef (λ_t - λ_{t-1})²``, as the paper has it. At
    fixed weights its expectation does not depend on 0 < λ < 1, where λ is a mixture's (with ``objective="sfd"`` or
    ``"retrack"`` it is a weight, and this reward pays for little of it). ``reward="potential"``: the difference of
    ``Φ = (min(f, cap) - f0)/(cap - f0) - w max(0, r/r0 - 1)``, with f and r the forget and held-out
    retain loss on a fixed probe set, f0 and r0 their start values and cap the forget loss of a
    model that never saw the forget data; less the same smoothness penalty. ``info["reward_terms"]``
    holds each term.

    ## Starting State
    The pretrained weights, a new optimizer, λ_{t-1} = ``lambda_init`` and t = 0; the features come from
    one measured batch. ``reset(seed=)`` fixes every random draw of the episode; the update batches
    of a seed do not depend on the actions.

    ## Episode End
    Terminated after ``horizon`` steps: the horizon is part of the observation. Terminated at once
    when a loss or parameter is not finite, with ``info["diverged"] = True`` and the reward
    ``-divergence_penalty``. Never truncated.

    ## Arguments
    ``task``: a registered task's name, by default "mnist-trousers". ``instances``: in its place a set from which every
    episode draws what it unlearns (what an instance says goes before options), by name (``"gaussians-2d/train"``),
    from a file or as a list; see :mod:`unlearn_gym.tasks.instances`. ``render_mode``: None or ``"rgb_array"``.
    ``data_root``: folder with torchvision's data, else the environment variable ``UNLEARN_GYM_DATA_ROOT``, else the
    shipped subset. ``download``: let torchvision fill that folder. Every field of
    :class:`unlearn_gym.settings.RunSettings` replaces the task's default:
    ``gym.make("SISSUnlearn-v0", task="gaussians-2d", horizon=100, learning_rate=1e-4)``. Raises
    ``TaskError``, ``SettingsError``, ``DataError`` or ``WeightsError`` in one line.

    ## Version History
    * v0: initial release.
    """

    metadata = {  # noqa: RUF012 - gymnasium declares it so
        "render_modes": ["rgb_array"],
        "render_fps": 10,
    }

    @insulated
    def __init__(
        self,
        task: str | None = None,
        *,
        instances: str | Sequence[Any] | None = None,
        render_mode: str | None = None,
        data_root: str | os.PathLike[str] | None = None,
        download: bool = False,
        **options: Any,
    ) -> None:
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise SettingsError(
                f"render_mode={shown(render_mode)} must be one of {self.metadata['render_modes']} or None"
            )
        if task is not None and not isinstance(task, str):
            raise SettingsError(f"task={shown(task)} must be a task's name, as {DEFAULT_TASK!r}")
        if task is not None and instances is not None:
            raise SettingsError(f"task={task!r} beside instances=: give one of them")
        if not isinstance(download, bool | np.bool_):
            raise SettingsError(f"download={shown(download)} must be True or False")
        self.instances = None if instances is None else load_instances(instances)
        self.render_mode = render_mode
        self._options, self._data_root, self._download = options, data_root, download
        first = self.instances[0].task if self.instances else DEFAULT_TASK
        self._enter(Instance.parse(first if task is None else task))
        for instance in self.instances or ():
            self._read(instance)
        s = self.settings
        self.action_space: spaces.Box = spaces.Box(s.lambda_min, s.lambda_max, (1,), np.float32)  # type: ignore[assignment]
        self.observation_space: spaces.Box = self._make_observation_space(s, self.observation_extra)  # type: ignore[assignment]
        self.history: list[StepTerms] = []
        self._ended = False
        self._features = np.zeros(len(FEATURES))
        self._extra = np.zeros(self.observation_extra)
        self._norms_age, self._direct = 0, 0.0
        self._lambda = s.lambda_init
        self._potential = 0.0

    def _enter(self, instance: Instance) -> None:
        """Make ``instance`` what the following episodes unlearn; raises before anything changes."""
        task, s, data = self._read(instance)
        run = UnlearningRun(task.pretrained_model(), data, task.schedule.alphas_cumprod(), s)
        extended = ExtendedFeatures(task, run) if s.observation == "extended" else None
        space = getattr(self, "observation_space", None)
        if space is not None and space != self._make_observation_space(s, 0 if extended is None else extended.size):
            raise SettingsError(
                f"instance {instance.as_info()} has other observations than the environment; with "
                "observation='extended' all instances need classifiers with equally many features"
            )
        scale, start = _feature_scale(task, run), run.snapshot()
        self.instance, self.task, self.settings, self.run, self._extended = instance, task, s, run, extended
        self._scale: NDArray[np.float64] = scale
        self._start: Snapshot = start
        self._start_potential: tuple[float, float] | None = None

    def _read(self, instance: Instance) -> tuple[Task, RunSettings, TaskData]:
        """What ``instance`` needs; raises where its task, a value or the reward that is asked for does not fit."""
        task = get_task(instance.task)
        task.check_pretrained()  # before its data, which may be large
        s = instance.settings(task, self._options)
        objective = get_objective(task.family.name, s)
        if s.reward == "potential" and s.potential_cap is None:
            task.unseen_forget_loss  # noqa: B018 - raises where it is not known
        if s.normalize_features:
            task.constants  # noqa: B018 - raises where they were never measured
        data = instance.data(load_data(task, self._data_root, download=self._download))
        objective.check(data, s)
        return task, s, data

    def _named_instance(self, options: dict[str, Any]) -> Instance | None:
        """The instance that reset's ``options`` name, if they do."""
        unknown = [name for name in options if name != "instance"]
        if unknown:
            raise SettingsError(f"unknown reset options {shown(unknown)}; this environment takes 'instance'")
        named: Any = options.get("instance")
        if not is_whole(named):
            return None if named is None else Instance.parse(named)
        known = self.instances or ()
        if not 0 <= named < len(known):
            raise SettingsError(f"instance={shown(named)}: this environment has a set of {len(known)}, numbered from 0")
        return known[int(named)]

    def _make_observation_space(self, s: RunSettings, extra: int) -> spaces.Box:
        low, high = (-FEATURE_CLIP, FEATURE_CLIP) if s.normalize_features else (0.0, np.inf)
        age = [] if s.grad_norms == "exact" else [1.0]
        direct = [FEATURE_CLIP] * (s.hybrid_coef > 0)
        added = [FEATURE_CLIP] * extra
        return spaces.Box(
            np.array(
                [low] * len(FEATURES) + [s.lambda_min, 0.0] + [0.0] * len(age) + [-x for x in direct + added],
                dtype=np.float32,
            ),
            np.array([high] * len(FEATURES) + [s.lambda_max, 1.0] + age + direct + added, dtype=np.float32),
        )

    @property
    def observation_groups(self) -> dict[str, slice]:
        """Where each group of entries is in an observation: ``"paper"``, then what ``observation="extended"`` adds."""
        start = len(self.observation_space.low) - self.observation_extra
        groups = {"paper": slice(0, start)}
        for name, group in () if self._extended is None else self._extended.groups.items():
            groups[name] = slice(start, start := start + group.size)
        return groups

    @property
    def observation_extra(self) -> int:
        """How many entries ``observation="extended"`` adds at the observation's end; 0 without it."""
        return 0 if self._extended is None else self._extended.size

    @insulated
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Restore the pretrained model and seed the run.

        ``options["instance"]`` names what to unlearn: an :class:`unlearn_gym.tasks.instances.Instance`, a dict of its
        fields, a task's name, or a number in the environment's ``instances``. It is in ``info["instance"]`` and stays
        until another one is named; an environment with ``instances`` draws one for every episode.
        """
        instance = self._named_instance(reset_options(options))
        super().reset(seed=seed)
        if instance is None and self.instances:
            instance = self.instances[self.np_random.integers(len(self.instances))]
        if instance is not None and instance != self.instance:
            self._enter(instance)
        s = self.settings
        self.run.restore(self._start)
        self.run.seed(int(self.np_random.integers(2**32)))
        self.history, self._ended = [], False
        self._lambda = s.lambda_init
        terms = self.run.measure(s.lambda_init)
        self._observe(terms)
        self._potential = self._current_potential(terms)
        return self._observation(), {**self._info(terms, {}), "instance": self.instance.as_info()}

    @insulated
    def step(
        self, action: NDArray[np.float32] | float | Action
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """One optimizer update at λ = ``action``; raises :class:`ActionError` before anything changes."""
        chosen = self.validate(action)
        return self.advance(self.run.update(chosen), stop=chosen.stop)

    @insulated
    def advance(
        self, terms: StepTerms, *, stop: bool = False
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """What :meth:`step` returns, for an update that the run has made already; ``stop`` ends the episode with it."""
        before, self._potential = self._potential, self._current_potential(terms)
        if not np.isfinite(self._potential):
            self.run.diverged = True
            terms = replace(terms, diverged=True)
        reward_terms = self._reward_terms(terms, before)
        self._lambda = terms.lambda_
        self.history.append(terms)
        if not terms.diverged:
            self._observe(terms)
        terminated = self._ended = stop or terms.diverged or self.run.updates >= self.settings.horizon
        return self._observation(), sum(reward_terms.values()), terminated, False, self._info(terms, reward_terms)

    def validate(self, action: NDArray[np.float32] | float | Action) -> Action:
        """What ``action`` decides; raises :class:`ActionError`, or ``ResetNeeded`` after the end."""
        parsed = parse_action(action, self.settings.lambda_min, self.settings.lambda_max)
        if self._ended or self.run.updates >= self.settings.horizon or self.run.diverged:
            raise gym.error.ResetNeeded("the episode has ended; call reset() before the next step")
        return parsed

    @property
    def start_vector(self) -> Tensor:
        """The pretrained parameters ``(P,)`` that :meth:`reset` restores."""
        return self._start.vector

    def share(self, start_vector: Tensor, data: TaskData) -> None:
        """Use start weights and data of another environment of the same task, in place of copies of one's own."""
        self._start = replace(self._start, vector=start_vector)
        self.run.data = data

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the model as it is now to ``path``, see :func:`unlearn_gym.tasks.saving.save_model`; returns the path.

        ``env.unwrapped.save("unlearned.safetensors")`` writes one file, which ``unlearn-gym evaluate`` and
        :func:`unlearn_gym.tasks.saving.load_model` read. The episode goes on as if nothing had been written.
        """
        return save_model(self.run.model, self.task, path)

    def _observe(self, terms: StepTerms) -> None:
        """Keep the features that the next observation shows."""
        self._norms_age = terms.norms_age
        with np.errstate(divide="ignore", invalid="ignore"):
            self._direct = float(np.log(np.float64(terms.direct_grad_norm) / terms.retain_grad_norm))
        if self.settings.features == "fresh":
            self._features = self.run.measure_unweighted()
        else:
            self._features = np.array([getattr(terms, name) for name in FEATURES])
        if self._extended is not None:
            self._extra = self._extended.measure(self.run, self._start.vector)

    def _observation(self) -> NDArray[np.float32]:
        s, features = self.settings, self._features
        if s.normalize_features:
            tiny = np.finfo(np.float64).tiny
            ratio = np.nan_to_num(features / self._scale, nan=np.inf)
            features = np.clip(np.log(np.maximum(ratio, tiny)), -FEATURE_CLIP, FEATURE_CLIP)
        age = [] if s.grad_norms == "exact" else [self._norms_age / s.norms_period]
        direct = [self._direct] if s.hybrid_coef > 0 else []
        values = np.array([*features, self._lambda, self.run.updates / s.horizon, *age, *direct, *self._extra])
        low, high = self.observation_space.low, self.observation_space.high
        finite = np.clip(np.nan_to_num(values), np.finfo(np.float32).min, np.finfo(np.float32).max)
        return np.clip(finite.astype(np.float32), low, high)

    def _reward_terms(self, terms: StepTerms, potential_before: float) -> dict[str, float]:
        """The reward's summands, as the class docstring has them."""
        s = self.settings
        if terms.diverged:
            return {"divergence": -s.divergence_penalty}
        smoothness = -s.smoothness_coef * (terms.lambda_ - self._lambda) ** 2
        if s.reward == "siss":
            return {"siss": -terms.siss_loss, "smoothness": smoothness}
        return {"potential": self._potential - potential_before, "smoothness": smoothness}

    def _current_potential(self, terms: StepTerms) -> float:
        """Φ of the current model, 0 at the pretrained weights; NaN where it is not finite."""
        s = self.settings
        if s.reward != "potential" or terms.diverged:
            return 0.0
        forget, retain = self.run.probe_losses()
        if not np.isfinite([forget, retain]).all():
            return float("nan")
        if self._start_potential is None:
            self._start_potential = (forget, retain)
        f0, r0 = self._start_potential
        cap = s.potential_cap if s.potential_cap is not None else self.task.unseen_forget_loss
        if not cap > f0:
            raise SettingsError(f"potential_cap={cap} must be above the start's forget loss {f0:.4g}")
        forgotten = (min(forget, cap) - f0) / (cap - f0)
        return forgotten - s.potential_retain_coef * max(0.0, retain / r0 - 1.0)

    def _info(self, terms: StepTerms, reward_terms: dict[str, float]) -> dict[str, Any]:
        """The measured terms by name, and the reward's; every array is the caller's own."""
        return {"terms": terms.as_dict(), "reward_terms": reward_terms, "diverged": terms.diverged}

    @insulated
    def render(self) -> NDArray[np.uint8] | None:
        """A frame ``(H, W, 3)`` uint8: samples from fixed noise, the λ trace and both losses."""
        if self.render_mode is None:
            gym.logger.warn('render() needs gym.make("SISSUnlearn-v0", render_mode="rgb_array")')
            return None
        from unlearn_gym.envs.rendering import draw_frame

        return draw_frame(self.task, self.run, self.history)
