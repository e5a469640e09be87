"""Shared fixtures: one thread, so that a seed gives the same floats everywhere, and a cheap run."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from unlearn_gym.errors import LONGEST_LINE, shown
from unlearn_gym.run import UnlearningRun
from unlearn_gym.system.locks import folder_lock
from unlearn_gym.tasks import get_task, load_data

torch.set_num_threads(1)

TASKS = (
    "gaussians-2d", "mnist-bags", "mnist-digits", "mnist-sandals", "mnist-trousers", "mnist-tshirt",
    "sfd-mnist-digits", "vae-mnist-trousers",
)  # fmt: skip


@pytest.fixture
def make_run() -> Callable[..., UnlearningRun]:
    def make(task: str = "gaussians-2d", seed: int = 0, **options: Any) -> UnlearningRun:
        chosen = get_task(task)
        settings = chosen.settings.override(**options)
        return UnlearningRun(
            chosen.pretrained_model(), load_data(chosen), chosen.schedule.alphas_cumprod(), settings, seed
        )

    return make


def fails(error: type[BaseException], function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The message of the error that the call raises: one line of a sane length."""
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert len(message) <= LONGEST_LINE
    return message


def label(value: Any) -> str:
    """A test's name from a value, the same in every process: without addresses in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", shown(value))


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder that another thread writes to as long as the test runs."""
    folder, taken, ended = tmp_path / "locked", threading.Event(), threading.Event()

    def hold() -> None:
        with folder_lock(folder):
            taken.set()
            ended.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(10)
    yield folder
    ended.set()
    thread.join()
