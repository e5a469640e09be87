"""What an agent's zip does not hold: observations normalised by ``VecNormalize``, and wrappers around its environment.

The statistics of ``VecNormalize`` are a pickle beside the zip. They are read by an unpickler that knows the names below
and no other, and that gives a stand-in for each of them: nothing that a pickle names is imported or called.
"""

from __future__ import annotations

import io
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, TypeAdapter, ValidationError

from unlearn_gym import ENV_ID
from unlearn_gym.errors import PolicyError, error_line
from unlearn_gym.files import CheckedLoader, read_yaml, sha256
from unlearn_gym.policies.base import Observation
from unlearn_gym.policies.sb3_file import needs_pickles

NAMES = ("vecnormalize.pkl", "vec_normalize.pkl")
"""What the zoo and the documentation of stable-baselines3 call the file."""
MAX_BYTES = 16 << 20
ADMITTED = frozenset(
    {
        ("stable_baselines3.common.vec_env.vec_normalize", "VecNormalize"),
        ("stable_baselines3.common.running_mean_std", "RunningMeanStd"),
        ("gymnasium.spaces.box", "Box"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "_reconstruct"),  # numpy 1 and 2 call the same by two names
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy._core.numeric", "_frombuffer"),
        ("numpy.random._pickle", "__generator_ctor"),  # of spaces that have been sampled from
        ("numpy.random._pickle", "__bit_generator_ctor"),
        ("numpy.random._pcg64", "PCG64"),
        ("numpy.random.bit_generator", "SeedSequence"),
        ("numpy.random.bit_generator", "__pyx_unpickle_SeedSequence"),
    }
)
HARMLESS_WRAPPERS = {
    "ClipAction", "ClipReward", "Monitor", "NormalizeReward", "OrderEnforcing", "PassiveEnvChecker",
    "RecordEpisodeStatistics", "RescaleAction", "TimeLimit", "TransformReward", "VecMonitor",
}  # fmt: skip
"""Wrappers that leave observations as they are, or change the range of actions, which the zip tells."""


class _Part:
    """Stands for an object that a pickle makes: it keeps what the pickle says of it."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _UnknownNameError(Exception):
    """A pickle names what is not in ``ADMITTED``."""


class _PartsUnpickler(pickle.Unpickler):
    """Reads pickles whose every name is one of ``ADMITTED``, as parts."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._kinds: dict[tuple[str, str], type[_Part]] = {}

    def find_class(self, module: str, name: str) -> type[_Part]:
        """A class of parts of that name, this reading's own."""
        if (module, name) not in ADMITTED:
            raise _UnknownNameError(f"{module}.{name}"[:80])
        return self._kinds.setdefault((module, name), type(name, (_Part,), {}))


@dataclass(frozen=True)
class Statistics:
    """How observations are normalised: ``clip((obs - mean) / sqrt(var + epsilon), -clip, clip)``, as by
    ``VecNormalize``; ``mean`` and ``var`` are ``(entries,)``, or both None where only rewards were.
    """

    mean: NDArray[np.float64] | None
    var: NDArray[np.float64] | None
    clip: float
    epsilon: float

    def apply(self, obs: Observation) -> Observation:
        """The normalised observation, ``(entries,)`` float32."""
        if self.mean is None or self.var is None:
            return obs
        scaled = (obs - self.mean) / np.sqrt(self.var + self.epsilon)
        return np.clip(scaled, -self.clip, self.clip).astype(np.float32)


def statistics_path(agent: Path) -> Path | None:
    """Where the statistics of the agent ``agent`` are: beside it, under the names of stable-baselines3 and of its
    checkpoints, or in the folder beside it where RL Baselines3 Zoo puts them; None where there are none.

    Agents of ``agents.train`` are trained without them; they are recognised by the SHA-256 in their manifest.
    """
    if _is_of_agents_train(agent):
        return None
    checkpoint = re.fullmatch(r"(.+)_(\d+_steps)", agent.stem)
    names = (*((f"{checkpoint[1]}_vecnormalize_{checkpoint[2]}.pkl",) if checkpoint else ()), *NAMES)
    return next((path for folder in _folders(agent) for name in names if (path := folder / name).is_file()), None)


def _folders(agent: Path) -> tuple[Path, ...]:
    """The agent's own, and those that the zoo makes for what it records of a training."""
    return agent.parent, agent.parent / ENV_ID, agent.parent / agent.stem


class _Manifest(BaseModel):
    """What ``agents.train`` leaves beside an agent, as far as it matters here."""

    sha256: str
    config: dict[str, Any]


def _is_of_agents_train(agent: Path) -> bool:
    try:
        manifest = _Manifest.model_validate_json(agent.with_suffix(".json").read_bytes())
        return manifest.sha256 == sha256(agent)
    except (OSError, ValidationError):
        return False


def find_statistics(agent: Path, entries: int, *, normalized: bool = False, trust: bool = False) -> Statistics | None:
    """The statistics of an agent whose observations have so many ``entries``; None for one that was trained without.

    Raises :class:`PolicyError` for statistics that are damaged or of another shape, for missing ones where the
    training record (the zoo's ``config.yml``), or without a word of it there the agent's own file (``normalized``),
    says that observations were normalised, and for wrappers in that record that a policy cannot apply. With ``trust`` a
    file that refers to anything outside ``ADMITTED`` is unpickled, which can run any code.
    """
    recorded = False if _is_of_agents_train(agent) else _check_record(agent)
    path = statistics_path(agent)
    if path is None:
        if normalized if recorded is None else recorded:
            raise _statistics_missing(agent)
        return None
    found = read_statistics(path, trust=trust)
    if found.mean is not None and found.mean.shape != (entries,):
        raise PolicyError(
            f"{path} normalises observations {found.mean.shape}, this environment has ({entries},); use the agent with "
            "the settings that it was trained with"
        )
    return found


def _statistics_missing(agent: Path) -> PolicyError:
    return PolicyError(
        f"{agent} was trained on normalised observations and {NAMES[0]}, which holds their statistics, is not beside "
        f"it; put it into {agent.parent} (if VecNormalize left observations as they are, write 'normalize: false' into "
        f"{agent.parent / 'config.yml'})"
    )


def read_statistics(path: Path, *, trust: bool = False) -> Statistics:
    """The statistics in the file that ``VecNormalize.save`` has written. Raises :class:`PolicyError`."""
    content = path.read_bytes()[: MAX_BYTES + 1]
    try:
        if len(content) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        try:
            found = _from_part(_PartsUnpickler(content).load())
        except _UnknownNameError as name:
            if not trust:
                raise needs_pickles(path, f"it names {str(name)!r}, no part of VecNormalize's statistics") from None
            found = _from_object(path, pickle.loads(content))
        return _checked(found)
    except PolicyError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise PolicyError(f"{path} is damaged ({error_line(error)}); save it again with VecNormalize.save") from None


def _checked(found: Statistics) -> Statistics:
    """``found``, if it can be used; raises ValueError."""
    if not found.clip > 0 or not 0 <= found.epsilon < float("inf"):
        raise ValueError(f"clip_obs={found.clip}, epsilon={found.epsilon}")
    if found.mean is not None and found.var is not None:
        if found.mean.shape != found.var.shape:
            raise ValueError(f"mean {found.mean.shape}, variance {found.var.shape}")
        if not np.isfinite([found.mean, found.var]).all() or (found.var < 0).any():
            raise ValueError("mean or variance is not finite, or a variance negative")
    return found


def _from_object(path: Path, wrapper: Any) -> Statistics:
    if type(wrapper).__name__ != "VecNormalize":
        raise PolicyError(
            f"{path} is a {type(wrapper).__name__}, which may normalise otherwise than VecNormalize; wrap agent and "
            "preprocessing in a class of your own and name it as module:attribute"
        )
    rms = wrapper.obs_rms if wrapper.norm_obs else None
    mean, var = (None, None) if rms is None else (np.asarray(rms.mean, np.float64), np.asarray(rms.var, np.float64))
    return Statistics(mean, var, float(wrapper.clip_obs), float(wrapper.epsilon))


def _from_part(wrapper: _Part) -> Statistics:
    _expect(wrapper, "VecNormalize")
    state = wrapper.state
    mean = var = None
    if _number(state["norm_obs"]):
        rms = _expect(state["obs_rms"], "RunningMeanStd").state
        mean, var = _array(rms["mean"]), _array(rms["var"])
    return Statistics(mean, var, _number(state["clip_obs"]), _number(state["epsilon"]))


def _number(value: Any) -> float:
    """A number of Python's, or numpy's from its parts."""
    if not isinstance(value, _Part):
        return float(value)
    kind, content = _expect(value, "scalar").arguments
    kind = _expect(kind, "dtype")
    if kind.arguments[0] not in ("b1", "f4", "f8", "i4", "i8"):
        raise ValueError(f"a number of type {kind.arguments[0]}")
    return float(np.frombuffer(content, np.dtype(kind.arguments[0]).newbyteorder(kind.state[1]))[0])


def _expect(part: Any, *names: str) -> _Part:
    if not isinstance(part, _Part) or type(part).__name__ not in names:
        raise ValueError(f"{type(part).__name__} where {names[0]} is expected")
    return part


def _array(part: Any) -> NDArray[np.float64]:
    """A numpy array of floating point from its parts, in either of the forms that numpy pickles it in."""
    _expect(part, "_reconstruct", "_frombuffer")
    if type(part).__name__ == "_frombuffer":
        content, kind, shape, order = part.arguments
    else:
        _, shape, kind, by_columns, content = part.state
        order = "F" if by_columns else "C"
    kind = _expect(kind, "dtype")
    code, byte_order = kind.arguments[0], kind.state[1]
    if code not in ("f4", "f8") or byte_order not in ("<", ">"):
        raise ValueError(f"an array of {byte_order}{code}")
    return np.frombuffer(content, np.dtype(byte_order + code)).reshape(shape, order=order).astype(np.float64)


class _PlainLoader(CheckedLoader):
    """Reads the zoo's files, whose tags name Python objects, as plain lists and texts."""


def _plain(loader: _PlainLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        parts = loader.construct_sequence(node, deep=True)
        return dict(parts[0]) if suffix.endswith(":collections.OrderedDict") and parts else parts
    return node.value


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _plain)


def _check_record(agent: Path) -> bool | None:
    """Whether the zoo's record beside ``agent`` says that observations were normalised; None where it says neither.

    Raises :class:`PolicyError` for wrappers in it that change observations otherwise.
    """
    path = next((path for folder in _folders(agent) if (path := folder / "config.yml").is_file()), None)
    if path is None:
        return None
    try:
        record = TypeAdapter(dict[str, Any]).validate_python(read_yaml(path, _PlainLoader))
    except (ValidationError, ValueError) as error:
        raise PolicyError(f"{path} is no record of a training by the zoo ({error_line(error)}); mend it") from None
    wrappers = [name for key in ("env_wrapper", "vec_env_wrapper") for name in _wrapper_names(record.get(key))]
    unknown = [name for name in wrappers if name not in {*HARMLESS_WRAPPERS, "VecNormalize"}]
    if unknown or record.get("frame_stack"):
        what = unknown[0][:80] if unknown else "a stack of frames"
        raise PolicyError(
            f"{agent} was trained behind {what} ({path}), which a policy here does not apply; wrap agent and "
            "preprocessing in a class of your own and name it as module:attribute"
        )
    if "VecNormalize" in wrappers:
        return True
    return _normalizes_observations(record) if "normalize" in record else None


def _normalizes_observations(record: dict[str, Any]) -> bool:
    """As the zoo reads it: ``normalize`` is a flag, or the arguments of ``VecNormalize`` as a mapping or as code."""
    told = record.get("normalize")
    if isinstance(told, str):
        return re.search(r"norm_obs\W+False", told) is None
    arguments = told if isinstance(told, dict) else record.get("normalize_kwargs")
    norm_obs = arguments.get("norm_obs", True) if isinstance(arguments, dict) else True
    return bool(told) and bool(norm_obs)


def _wrapper_names(value: Any) -> list[str]:
    """The classes' names, without their modules and arguments."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    named = (next(iter(entry), "") if isinstance(entry, dict) else entry for entry in values)
    return [name.rpartition(".")[2] if isinstance(name, str) else type(name).__name__ for name in named]
