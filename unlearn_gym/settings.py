"""Settings of an unlearning run: every option, its range and its meaning."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from unlearn_gym.errors import SettingsError, UnknownOptionError, describe_validation_error, error_line, shown
from unlearn_gym.system.values import Checked

MAKER_ARGUMENTS = {
    **dict.fromkeys(("task", "instances", "render_mode", "data_root", "download"), "gym.make and gym.make_vec"),
    **dict.fromkeys(
        ("num_envs", "backend", "num_workers", "worker_timeout", "autoreset_mode"),
        "gym.make_vec without vectorization_mode",
    ),
    "max_episode_steps": "gym.make, or of gym.make_vec with vectorization_mode='sync'; horizon= sets the length here",
}
"""Arguments that users give as settings by mistake, and what they are arguments of."""

PRESETS: dict[str, dict[str, Any]] = {
    "siss-code": {
        "dataset_factors": "none", "loss_reduction": "sum", "forget_grad_rule": "fixed_norm", "forget_grad_norm": 5.0,
        "max_grad_norm": 1.0, "optimizer": "adamw", "adam_betas": (0.95, 0.999),
    },
    "sfd-code": {
        "objective": "sfd", "dataset_factors": "none", "loss_reduction": "sum", "forget_grad_rule": "loss",
        "max_grad_norm": None, "max_grad_value": 1.0, "optimizer": "adam", "adam_betas": (0.0, 0.999),
        "score_alpha": 1.2, "fake_timesteps": "scores", "fake_forget_coef": 0.01, "redraw_samples": True,
        "lambda_min": 0.0, "lambda_init": 0.01,
    },
}  # fmt: skip
"""What ``preset=`` stands for: updates as public code makes them, see ``docs/objectives.md``. Options given
alongside a preset override it. The size of the run (``batch_size``, ``learning_rate``, ``horizon``) is part of none."""


LONGEST_HORIZON = 1_000_000


def usable_device(name: str) -> str:
    """``name`` itself; raises :class:`SettingsError` where torch has no such device here."""
    try:
        if torch.empty(0, device=name).is_meta:
            raise ValueError("it holds no values")
    except (RuntimeError, AssertionError, ValueError) as error:
        raise SettingsError(f"device {shown(name)} cannot be used here ({error_line(error)}); try 'cpu'") from None
    return name


LambdaRole = Literal["mixture", "weight", "none"]
LAMBDA_ROLES: dict[str, LambdaRole] = {
    "siss": "mixture", "siss-no-is": "none", "bernoulli": "mixture", "naive": "none", "neggrad": "none",
    "erasediff": "none", "retrack": "weight", "sfd": "weight",
}  # fmt: skip
"""What λ is to each objective: the share of forget samples in a mixture, the forget term's weight, or nothing."""
OWN_FORGET_RULES = ("erasediff",)
"""Objectives that scale the forget gradient themselves, in place of ``forget_grad_rule``."""
FAMILY_OPTIONS: dict[str, tuple[str, ...]] = {
    "diffusion": (),
    "vae": ("encoder_gradient", "kl_coef"),
    "generator": (
        "fake_forget_coef", "fake_learning_rate", "fake_timesteps", "hybrid_coef", "override_classes",
        "redraw_samples", "score_alpha",
    ),
}  # fmt: skip
"""Settings that only objectives for this family of models read."""


class RunSettings(Checked):
    """Options of :class:`unlearn_gym.run.UnlearningRun` and of the environment around it.

    ``objective``: what an update minimises, see :mod:`unlearn_gym.run.objectives`; all but ``"siss"`` are baselines.

    ``dataset_factors`` gives (c_r, c_f), with N samples in all and K to forget: ``"siss"`` = (N/(N-K), K/(N-K)),
    the SISS paper's; ``"inverse_size"`` = (N/(N-K), N/K), the adaptive-λ paper's text; ``"none"`` = (1, 1), as in the
    public SISS code. That code also sums errors over pixels and rescales the forget gradient to a norm: all of it is
    ``preset="siss-code"``, to be given where settings are, as in ``gym.make`` (:data:`PRESETS`; ``"sfd-code"`` is
    the public score forgetting distillation's).

    ``loss_reduction``: ``"mean"`` takes errors as means over the D pixels of a sample, ``"sum"`` as sums. Sums
    make losses and gradients D times larger: scale ``forget_grad_norm``, ``max_grad_norm`` and ``max_grad_value``
    accordingly. Adam's ε (1e-8) and the reward ``"siss"`` are not adjusted.

    ``forget_grad_rule``: ``"loss"`` uses the gradient of L_SISS as it is, ``"fixed_norm"`` rescales the forget
    gradient to ``forget_grad_norm``, ``"relative_norm"`` to ``forget_grad_norm`` times the retain gradient's
    norm. Under both norm rules a batch whose forget weights are all below 0.001 gets no forget gradient, as
    rescaling would turn its noise into a full step, and ``forget_scale`` shows in the reported loss alone.

    ``max_grad_norm`` clips the whole gradient by its norm, ``max_grad_value`` then each of its entries.

    ``grad_norms``: ``"exact"`` measures ‖g_r‖ and ‖g_f‖ in every update; ``"every:4"`` only in every fourth and
    makes the others with one backward pass of L_SISS: for ``forget_grad_rule="loss"``, which needs no norms. The
    observation then has a seventh entry, the norms' age. ``skip_zero_weights``: on a CPU, samples whose retain
    (forget) weight is exactly 0 get no pass for the retain (forget) gradient, which they do not change; it pays
    where the network's cost grows with the batch and most weights are saturated, as labels that differ make them.

    ``observation``: ``"extended"`` appends the forget loss over five bands of timesteps, mean classifier features of
    a few samples and the parameters' distance from the start to the paper's six entries; the environment's docstring
    has the groups and what each costs.

    Of VAEs alone: ``kl_coef`` and ``encoder_gradient`` (:mod:`unlearn_gym.run.objectives.latent`). Of
    ``objective="sfd"`` alone: ``override_classes`` (default: the next kept class), ``score_alpha``, ``hybrid_coef``,
    ``fake_learning_rate``, ``fake_timesteps``, ``fake_forget_coef`` and ``redraw_samples``
    (:mod:`unlearn_gym.run.objectives.score_forgetting`).

    ``reward``: ``"siss"`` is -L_SISS less the smoothness penalty, ``"potential"`` the change of a score on a fixed
    probe set; the environment's docstring has both formulas.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    objective: Literal["siss", "siss-no-is", "bernoulli", "naive", "neggrad", "erasediff", "retrack", "sfd"] = Field(
        "siss", description="what an update minimises"
    )
    dataset_factors: Literal["siss", "inverse_size", "none"] = Field(
        "siss", description="the factors (c_r, c_f) of both losses, from the numbers of samples"
    )
    loss_reduction: Literal["mean", "sum"] = Field(
        "mean", description="errors of a sample are means over its D pixels, or sums"
    )
    forget_grad_rule: Literal["loss", "fixed_norm", "relative_norm"] = Field(
        "relative_norm",
        description="what becomes of the forget gradient: used as it is, or rescaled to `forget_grad_norm`, or to "
        "`forget_grad_norm` times the retain gradient's norm",
    )
    forget_grad_norm: float = Field(
        0.5,
        ge=0,
        description="`fixed_norm`: the forget gradient's new norm; `relative_norm`: its ratio to the retain's",
    )
    forget_scale: float = Field(1.0, ge=0, description="1 + s: weight of the forget term")
    grad_norms: str = Field("exact", description="both gradient norms in every update, or (`every:k`) in every k-th")
    skip_zero_weights: bool = Field(
        True, description="on a CPU, samples of weight 0 get no backward pass, which would change nothing"
    )
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="the whole gradient is clipped to this norm; `null`: no clipping"
    )
    max_grad_value: float | None = Field(
        None, gt=0, description="then each of its entries is clipped to ± this; `null`: no clipping"
    )
    optimizer: Literal["adamw", "adam", "sgd"] = Field("adamw", description="torch's, without weight decay")
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="of the optimizers `adamw` and `adam`"
    )
    learning_rate: float = Field(5e-5, gt=0, description="of the optimizer")
    batch_size: int = Field(16, ge=1, description="pairs of a retain and a forget sample in an update")
    horizon: int = Field(60, ge=1, description="updates in an episode")
    lambda_min: float = Field(0.1, ge=0, le=1, description="smallest λ that may be chosen")
    lambda_max: float = Field(0.9, ge=0, le=1, description="largest λ that may be chosen")
    lambda_init: float = Field(0.5, ge=0, le=1, description="the λ before the first step, within both")
    smoothness_coef: float = Field(0.1, ge=0, description="weight of the penalty (λ_t - λ_{t-1})² in the reward")
    features: Literal["lagged", "fresh"] = Field(
        "lagged", description="an observation shows what the last update measured, or unweighted terms of a new batch"
    )
    observation: Literal["paper", "extended"] = Field(
        "paper", description="the paper's six entries, or these and three groups more"
    )
    normalize_features: bool = Field(
        True, description="losses and norms are observed as log(x / x0), x0 measured for the task; False: as they are"
    )
    reward: Literal["siss", "potential"] = Field(
        "siss", description="-L_SISS, or the change of the potential Φ on fixed samples; less the smoothness penalty"
    )
    potential_cap: float | None = Field(None, gt=0, description="None: the oracle's forget loss, stored with the task")
    potential_retain_coef: float = Field(10.0, ge=0, description="w in the potential Φ")
    divergence_penalty: float = Field(10.0, ge=0, description="a run that diverges ends with minus this reward")
    kl_coef: float = Field(1.0, ge=0, description="β of a VAE's KL term")
    encoder_gradient: Literal["full", "stopped"] = Field(
        "full", description="whether a VAE's encoder learns, or stays as it was"
    )
    override_classes: tuple[tuple[int, int], ...] | None = Field(
        None,
        description="of `sfd`: forgotten class and the one that overrides it, as a dict or as pairs; None: the next "
        "kept class",
    )
    score_alpha: float = Field(1.2, ge=0, description="of `sfd`: α of score identity distillation")
    hybrid_coef: float = Field(0.0, ge=0, description="of `sfd`: weight of SISS beside score forgetting distillation")
    fake_learning_rate: float | None = Field(
        None, gt=0, description="of `sfd`: learning rate of the fake network; None: `learning_rate`"
    )
    fake_timesteps: Literal["all", "scores"] = Field(
        "all",
        description="of `sfd`: timesteps that the fake network learns; `scores`: those that scores are compared at",
    )
    fake_forget_coef: float = Field(
        1.0, ge=0, description="of `sfd`: weight of the forgotten classes in the fake network's loss"
    )
    redraw_samples: bool = Field(False, description="of `sfd`: generate samples anew once the fake network has learned")
    device: str = Field("cpu", description="torch's name of the device that the run is on")

    @field_validator("grad_norms")
    @classmethod
    def _exact_or_every(cls, value: str) -> str:
        if not re.fullmatch(r"exact|every:[1-9][0-9]{0,6}", value):
            raise ValueError("must be 'exact' or 'every:k' with a whole k from 1 to 9,999,999, as in 'every:4'")
        return value

    @field_validator("override_classes", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        """Of a dict, as JSON or Python has it, its sorted pairs: settings are hashed."""
        try:
            pairs = value.items() if isinstance(value, dict) else value
            # JSON has texts for keys, and who writes those may write the others so
            found = [tuple(int(x) if isinstance(x, str) else x for x in (old, new)) for old, new in pairs or ()]
            return None if value is None else tuple(sorted(found))
        except (TypeError, ValueError):
            raise ValueError(
                "must map forgotten classes to others, as {3: 8}; on the command line "
                """--option 'override_classes={"3": 8}'"""
            ) from None

    @field_validator("horizon")
    @classmethod
    def _kept_in_memory(cls, value: int) -> int:
        if value > LONGEST_HORIZON:
            raise ValueError(f"must be at most {LONGEST_HORIZON:,}: an episode keeps what each of its updates measured")
        return value

    @field_validator("device")
    @classmethod
    def _device_exists(cls, value: str) -> str:
        return usable_device(value)

    @model_validator(mode="after")
    def _lambda_range(self) -> Self:
        if not self.lambda_min < self.lambda_max:
            raise ValueError(f"lambda_min={self.lambda_min} must be below lambda_max={self.lambda_max}")
        if not self.lambda_min <= self.lambda_init <= self.lambda_max:
            raise ValueError(f"lambda_init={self.lambda_init} must lie in [{self.lambda_min}, {self.lambda_max}]")
        return self

    @model_validator(mode="after")
    def _norms_when_needed(self) -> Self:
        if self.grad_norms != "exact" and self.forget_grad_rule != "loss":
            raise ValueError(
                f"grad_norms={self.grad_norms!r} goes with forget_grad_rule='loss' only: "
                f"{self.forget_grad_rule!r} needs both norms at every update"
            )
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> Self:
        if self.objective == "neggrad" and self.forget_grad_rule == "relative_norm":
            raise ValueError(
                "objective='neggrad' has no retain gradient for forget_grad_rule='relative_norm' to be relative to; "
                "use 'loss' or 'fixed_norm'"
            )
        if self.objective == "sfd" and self.features == "fresh":
            raise ValueError("objective='sfd' has no unweighted terms for features='fresh'; use 'lagged'")
        if self.objective == "erasediff" and self.grad_norms != "exact":
            raise ValueError(
                f"objective='erasediff' needs both gradients always, so grad_norms={self.grad_norms!r} must be 'exact'"
            )
        return self

    @property
    def norms_period(self) -> int:
        """Both gradient norms are measured in every so many updates."""
        return int(self.grad_norms.removeprefix("every:")) if self.grad_norms != "exact" else 1

    def override(self, **options: Any) -> RunSettings:
        """A copy with ``options`` replaced. A ``preset`` is expanded first; explicit options override it.

        Raises :class:`SettingsError` for a bad name or value.
        """
        preset = options.pop("preset", None)
        if preset is not None:
            if not isinstance(preset, str) or preset not in PRESETS:
                raise SettingsError(f"preset={preset!r} must be one of {', '.join(map(repr, PRESETS))}")
            options = {**PRESETS[preset], **options}
        arguments = [*type(self).model_fields, "preset", *MAKER_ARGUMENTS]
        for name in options:
            if name in MAKER_ARGUMENTS:
                raise SettingsError(f"{name!r} is no run setting but an argument of {MAKER_ARGUMENTS[name]}")
            if name not in type(self).model_fields:
                close = difflib.get_close_matches(name, arguments, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(arguments)}"
                raise UnknownOptionError(f"got an unexpected keyword argument {shown(name)}; {hint}")
        try:
            return type(self).model_validate({**self.model_dump(), **options})
        except ValidationError as error:
            raise SettingsError(describe_validation_error(error)) from None
