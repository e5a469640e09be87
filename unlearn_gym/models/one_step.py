"""A one-step generator with the two networks that score forgetting distillation needs beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from unlearn_gym.errors import WeightsError
from unlearn_gym.models.unet import CompactUNet, UNetConfig
from unlearn_gym.models.weights import load_weights

START = 440
"""The timestep that the generator's network is asked at, of 1,000; as SFD's code has it."""


class OneStepModel(nn.Module):
    """Three ε-networks ``(x_t, timesteps, labels) -> epsilon_pred`` of one size.

    ``generator`` makes samples in one step (:func:`unlearn_gym.math.sfd.generate`), ``fake`` has learned the score of
    those samples, and ``teacher`` is the frozen diffusion model. As a whole it is the ε-network ``fake``, which draws
    in many steps what the generator draws in one. The teacher is no part of the state dict: it never changes.
    """

    family: ClassVar[str] = "generator"

    def __init__(self, teacher: nn.Module, start: int = START) -> None:
        super().__init__()
        self.generator, self.fake = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
        self.start = start
        self._teacher = (teacher.eval().requires_grad_(False),)

    @property
    def fractional_timesteps(self) -> bool:
        """Whether the networks take fractional timesteps."""
        return bool(getattr(self.fake, "fractional_timesteps", False))

    @property
    def teacher(self) -> nn.Module:
        """The frozen diffusion model."""
        return self._teacher[0]

    def forward(self, x_t: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict the noise in noisy samples of the generator."""
        return self.fake(x_t, timesteps, labels)

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Self:
        self._teacher[0]._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)


@dataclass(frozen=True)
class OneStepNetwork:
    """Makes a :class:`OneStepModel` around the teacher with the weights at ``teacher``.

    ``retrained``: those of a teacher that never saw the forget data, for the oracle; ``teacher_task`` is its task.
    """

    family: ClassVar[str] = "generator"

    network: UNetConfig
    teacher: Path
    retrained: Path | None = None
    start: int = START
    teacher_task: str = ""

    def __call__(self) -> OneStepModel:
        """The model, generator and fake network as copies of the teacher."""
        teacher = CompactUNet(self.network)
        load_weights(teacher, self.teacher)
        return OneStepModel(teacher, self.start)

    def of_retrained_teacher(self) -> OneStepNetwork:
        """The same with the retrained teacher; raises :class:`WeightsError` where there is none."""
        if self.retrained is None:
            raise WeightsError("this one-step generator has no retrained teacher to make an oracle of")
        return replace(self, teacher=self.retrained)
