"""Timing by turns: machines are noisy, so only what ran side by side is compared."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

WARMUP = 3


def synchronize(device: str) -> None:
    """Wait until ``device`` has done what it was given."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(torch.device(device))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def own_clock(device: str) -> Callable[[], float]:
    """For one thread of a CPU the seconds that this process has computed, whoever shares the machine; else the time."""
    return time.process_time if torch.device(device).type == "cpu" else time.perf_counter


def repeated(function: Callable[[], Any], times: int) -> Callable[[], None]:
    """A function that calls ``function`` so many times: a turn long enough for caches and threads to be warm."""

    def several() -> None:
        for _ in range(times):
            function()

    return several


class Turns:
    """Seconds of several functions that ran in turns, by name."""

    def __init__(self, seconds: Mapping[str, list[float]]) -> None:
        self.seconds = seconds

    def median(self, name: str) -> float:
        """Median seconds of ``name``."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str) -> float:
        """Median over rounds of the time of ``name`` over the time of ``to`` in the same round."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return statistics.median(a / b for a, b in pairs)


def take_turns(
    functions: Mapping[str, Callable[[], Any]], rounds: int, *, device: str = "cpu", warmup: int = WARMUP,
    clock: Callable[[], float] | None = None,
) -> Turns:  # fmt: skip
    """Run every function once in each of ``rounds`` rounds, after ``warmup`` rounds that do not count.

    ``clock``: what the seconds are read from, by default the time that passes.
    """
    clock = clock or time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + warmup):
        for name, function in functions.items():
            synchronize(device)
            started = clock()
            function()
            synchronize(device)
            if turn >= warmup:
                seconds[name].append(clock() - started)
    return Turns(seconds)
