"""Checkpoints of a training, written and read without pickles: a folder that somebody else made runs no code."""

from __future__ import annotations

import zipfile
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import load_from_zip_file

from unlearn_gym.errors import SettingsError, describe_validation_error, error_line
from unlearn_gym.files import replacing, sha256, write_json

BUFFER_ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


class Counters(BaseModel):
    """What ``counters.json`` of a checkpoint holds: the state of an algorithm beside its tensors, which its zip would
    keep as pickles. ``episodes``: return, length and time of the last training episodes.
    """

    model_config = ConfigDict(extra="forbid")

    num_timesteps: int = Field(ge=0)
    n_updates: int = Field(ge=0)
    episode_num: int = Field(ge=0)
    episodes: list[dict[str, float]]


def save_checkpoint(agent: Any, folder: Path) -> None:
    """``agent.zip``, ``counters.json`` and, of an algorithm with a replay buffer, ``replay.npz`` in ``folder``."""
    with replacing(folder / "agent.zip") as file:
        agent.save(file)
    state = Counters(
        num_timesteps=agent.num_timesteps,
        n_updates=agent._n_updates,
        episode_num=agent._episode_num,
        episodes=[{name: float(value) for name, value in episode.items()} for episode in agent.ep_info_buffer or ()],
    )
    write_json(folder / "counters.json", state.model_dump())
    buffer = getattr(agent, "replay_buffer", None)
    if isinstance(buffer, ReplayBuffer):
        arrays = {name: getattr(buffer, name) for name in BUFFER_ARRAYS if hasattr(buffer, name)}
        with replacing(folder / "replay.npz") as file:
            np.savez_compressed(file, position=[buffer.pos, buffer.full], **arrays)


def restore_checkpoint(agent: BaseAlgorithm, folder: Path, digest: str) -> None:
    """Give a newly made ``agent`` the state that :func:`save_checkpoint` wrote; its zip has the SHA-256 ``digest``.

    The zip's tensors are read by torch's reader of tensors alone, and all else from plain data. Raises
    ``SettingsError`` when a file is missing or not the one that was written.
    """
    path = folder / "agent.zip"
    if not path.is_file() or sha256(path) != digest:
        raise _damaged(path)
    try:
        _restore_tensors(agent, path)
    except Exception as error:  # torch and sb3 raise whatever a damaged file makes them meet
        raise _damaged(path, error_line(error)) from None
    _restore_counters(agent, folder / "counters.json")
    buffer = getattr(agent, "replay_buffer", None)
    if isinstance(buffer, ReplayBuffer):
        _restore_buffer(buffer, folder / "replay.npz")


def _damaged(path: Path, reason: str = "") -> SettingsError:
    return SettingsError(f"{path} is missing or damaged{reason and f' ({reason})'}; start anew in another --out")


def _restore_tensors(agent: Any, path: Path) -> None:
    """Parameters and the optimizers' states."""
    modules, variables = agent._get_torch_save_params()
    _, found, more = load_from_zip_file(path, load_data=False, device=agent.device)
    if set(found) != set(modules) or set(more or {}) != set(variables):
        raise ValueError(f"it holds {', '.join([*found, *(more or {})])}, this algorithm {', '.join(modules)}")
    agent.set_parameters(found, exact_match=True, device=agent.device)
    for name in variables:
        getattr(agent, name).data = (more or {})[name].data


def _restore_counters(agent: Any, path: Path) -> None:
    try:
        state = Counters.model_validate_json(path.read_bytes())
    except OSError as error:
        raise _damaged(path, error_line(error)) from None
    except ValidationError as error:
        raise _damaged(path, describe_validation_error(error)) from None
    if str(state.num_timesteps) != path.parent.name:
        raise _damaged(path, f"num_timesteps={state.num_timesteps} in a folder of {path.parent.name}")
    agent.num_timesteps, agent._n_updates, agent._episode_num = state.num_timesteps, state.n_updates, state.episode_num
    agent.ep_info_buffer = deque(state.episodes, maxlen=agent._stats_window_size)
    agent.ep_success_buffer = deque(maxlen=agent._stats_window_size)


def _restore_buffer(buffer: ReplayBuffer, path: Path) -> None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in (name for name in BUFFER_ARRAYS if hasattr(buffer, name)):
                own = getattr(buffer, name)
                if arrays[name].shape != own.shape:
                    raise ValueError(f"{name} {arrays[name].shape}, not {own.shape}")
                own[:] = arrays[name]
            buffer.pos, buffer.full = int(arrays["position"][0]), bool(arrays["position"][1])
            if not 0 <= buffer.pos < buffer.buffer_size:
                raise ValueError(f"position {buffer.pos}")
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise _damaged(path, error_line(error)) from None
