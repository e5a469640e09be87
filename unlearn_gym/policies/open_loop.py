"""Policies that do not look at the run: static λ, draws and schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unlearn_gym.policies.base import Observation, PolicyContext


@dataclass
class StaticPolicy:
    """The same λ at every step, as SISS has it."""

    lambda_: float

    def reset(self, seed: int) -> None:
        """Nothing to begin anew."""

    def act(self, obs: Observation, info: dict[str, Any]) -> float:
        """The constant."""
        return self.lambda_


@dataclass
class DrawPolicy:
    """λ drawn anew at every step, independent of the run: ``draw(generator)`` in [0, 1], mapped to the range."""

    context: PolicyContext
    draw: Callable[[np.random.Generator], float]
    np_random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def reset(self, seed: int) -> None:
        """Seed the draws."""
        self.np_random = np.random.default_rng(seed)

    def act(self, obs: Observation, info: dict[str, Any]) -> float:
        """A new draw."""
        return self.context.from_unit(self.draw(self.np_random))


def sigmoid(z: float) -> float:
    """1 / (1 + exp(-z)), without overflow."""
    return 0.5 * (1.0 + math.tanh(0.5 * z))


def prior_draw(np_random: np.random.Generator) -> float:
    """Sigmoid of a standard normal: the prior of the variational policy, and what its ``kl_only`` form tends to."""
    return sigmoid(float(np_random.standard_normal()))


def uniform_draw(np_random: np.random.Generator) -> float:
    """Uniform in [0, 1]."""
    return float(np_random.random())


def linear(progress: float) -> float:
    """Share of the way from start to end at ``progress`` in [0, 1]: in a straight line."""
    return progress


def cosine(progress: float) -> float:
    """Share of the way: half a cosine, flat at both ends."""
    return 0.5 * (1.0 - math.cos(math.pi * progress))


def exponential(progress: float) -> float:
    """Share of the way: exponential decay with rate 5, as a public SISS fork has it, scaled to arrive at the end."""
    return (1.0 - math.exp(-5.0 * progress)) / (1.0 - math.exp(-5.0))


@dataclass
class SchedulePolicy:
    """λ as a function of the update's number: from ``start`` to ``end`` over the horizon."""

    shape: Callable[[float], float]
    start: float
    end: float
    horizon: int
    step: int = 0

    def reset(self, seed: int) -> None:
        """Back to the start."""
        self.step = 0

    def act(self, obs: Observation, info: dict[str, Any]) -> float:
        """The next value."""
        share = self.shape(min(self.step / max(self.horizon - 1, 1), 1.0))
        self.step += 1
        return (1.0 - share) * self.start + share * self.end
