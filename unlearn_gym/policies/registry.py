"""Policies by name, as the command line and the comparison take them."""

from __future__ import annotations

import difflib
import re
import sys
from importlib.resources import files
from pathlib import Path

from unlearn_gym.errors import PolicyError, UnlearnGymError
from unlearn_gym.files import read_json, sha256
from unlearn_gym.policies import open_loop, variational
from unlearn_gym.policies.base import LambdaPolicy, PolicyContext
from unlearn_gym.policies.normalization import statistics_path
from unlearn_gym.policies.own import load_own_policy, module_spec
from unlearn_gym.policies.transfer import trained_network
from unlearn_gym.policies.variational_spec import FORM, parse_variational
from unlearn_gym.settings import LAMBDA_ROLES
from unlearn_gym.system.torch_state import insulated
from unlearn_gym.tasks import get_task

SCHEDULES = {"linear": open_loop.linear, "cosine": open_loop.cosine, "exponential": open_loop.exponential}
DRAWS = {"prior": open_loop.prior_draw, "random": open_loop.uniform_draw}
SHIPPED_AGENTS = Path(str(files("unlearn_gym"))) / "assets" / "agents"
SHIPPED_NAMES = tuple(sorted({path.stem for path in SHIPPED_AGENTS.glob("*/*.zip")}))
"""Agents that ship for at least one task."""
BUILT_IN = ("static", "variational", *SHIPPED_NAMES, *DRAWS, *SCHEDULES)
USAGE = (
    "static:λ, prior, random, linear[:from:to], cosine[:from:to], exponential[:from:to], "
    f"{FORM}, {', '.join(SHIPPED_NAMES)}, a path to an SB3 .zip, module:attribute; a name of your own before any but "
    "static, as in mine=path/to/agent.zip"
)
RESERVED = (*BUILT_IN, "untouched", "oracle", "finetune")
"""Names that mean something already."""


def split_name(text: str) -> tuple[str, str]:
    """``(name, spec)`` of ``"name=spec"``; without a name of its own a policy is called what it is: ``(spec, spec)``.

    What is the path of an existing file is that path. Raises :class:`PolicyError` for a name that is taken or of other
    than letters, digits and ``. _ @ + -``.
    """
    name, equals, spec = text.partition("=")
    if not equals or ":" in name or "/" in name or Path(text).is_file():
        return text, text
    if not re.fullmatch(r"[\w.@+-]{1,40}", name) or name in RESERVED:
        raise PolicyError(
            f"policy {text!r}: {name!r} cannot be its name; take up to 40 letters, digits and . _ @ + - that are none "
            f"of {', '.join(RESERVED)}"
        )
    if spec.startswith("static"):
        raise PolicyError(
            f"policy {text!r}: a static λ goes by its own name, as others are compared with it; drop {name}="
        )
    return name, spec


@insulated
def make_policy(spec: str, context: PolicyContext, *, trust: bool = False) -> LambdaPolicy:
    """The policy that ``spec`` names: see ``USAGE``. Raises :class:`PolicyError` with the remedy.

    An agent's pickles are opened only with ``trust``, as they can run any code, and only where the agent cannot be
    rebuilt without. ``module:attribute`` imports that module, which runs it.
    """
    spec = split_name(spec)[1]
    name, *arguments = spec.split(":")
    if spec.endswith(".zip"):
        return _agent(Path(spec), context, trust=trust)
    if name == "static":
        return open_loop.StaticPolicy(_lambdas(spec, arguments, context, 1)[0])
    if name in DRAWS and not arguments:
        return open_loop.DrawPolicy(context, DRAWS[name])
    if name in SCHEDULES and len(arguments) in (0, 2):
        start, end = _lambdas(spec, arguments, context, 2) if arguments else (context.lambda_max, context.lambda_min)
        return open_loop.SchedulePolicy(SCHEDULES[name], start, end, context.horizon)
    if name == "variational":
        return _variational(spec, context)
    if name in SHIPPED_NAMES and not arguments:
        return _agent(_checked_shipped(SHIPPED_AGENTS / context.task / f"{name}.zip"), context)
    if len(arguments) == 1 and all(part.isidentifier() for part in (*name.split("."), *arguments)):
        return _from_module(name, arguments[0])
    if (Path(spec) / "agent.zip").is_file():
        raise PolicyError(f"{spec!r} is a folder; its agent is {str(Path(spec) / 'agent.zip')!r}")
    close = difflib.get_close_matches(name, BUILT_IN, n=1)
    raise PolicyError(f"unknown policy {spec!r}; {f'did you mean {close[0]!r}? ' if close else ''}known: {USAGE}")


def policy_sources(spec: str, task: str) -> list[Path]:
    """The files that a policy's behaviour comes from, beside this package: an agent and the statistics that normalise
    its observations, a user's module, or the weights and constants of the task that it was trained on.
    """
    spec = split_name(spec)[1]
    name, *arguments = spec.split(":")
    if name == "variational":
        source = parse_variational(spec).source
        return [] if source is None else _task_files(source)
    if spec.endswith(".zip"):
        statistics = statistics_path(Path(spec))
        return [Path(spec), *(() if statistics is None else (statistics,))]
    if name in SHIPPED_NAMES:
        return [SHIPPED_AGENTS / task / f"{name}.zip"]
    if name in BUILT_IN or len(arguments) != 1:
        return []
    module = module_spec(name)
    return [Path(module.origin)] if module is not None and module.origin else []


def existing_sources(spec: str, task: str) -> list[Path]:
    """:func:`policy_sources`, or :class:`PolicyError` where one of these files is missing."""
    sources = policy_sources(spec, task)
    missing = next((path for path in sources if not path.is_file()), None)
    if missing is not None and spec in SHIPPED_NAMES:
        raise PolicyError(
            f"policy {spec!r}: no such agent ships for task {task!r}; give the path of another task's, which "
            f"'unlearn-gym agents' lists, or train one with 'python -m agents.train --task {task}'"
        )
    if missing is not None:
        raise PolicyError(f"policy {spec!r}: there is no {missing}; correct the path or name")
    return sources


def _task_files(name: str) -> list[Path]:
    task = get_task(name)
    constants = [folder / "constants.json" for folder in (task.assets, task.pretrained_path.parent)]
    return [task.pretrained_path, *task.weights_within, *(path for path in dict.fromkeys(constants) if path.is_file())]


def _lambdas(spec: str, arguments: list[str], context: PolicyContext, count: int) -> list[float]:
    try:
        values = [float(a) for a in arguments]
    except ValueError:
        values = []
    if len(values) != count:
        raise PolicyError(f"policy {spec!r} needs {count} number(s) after its name, as in static:0.5 or linear:0.9:0.1")
    for value in values:
        if not context.lambda_min <= value <= context.lambda_max:
            raise PolicyError(f"policy {spec!r}: λ={value} must lie in [{context.lambda_min}, {context.lambda_max}]")
    return values


def _variational(spec: str, context: PolicyContext) -> LambdaPolicy:
    chosen = parse_variational(spec)
    if chosen.estimator == "variance":
        if LAMBDA_ROLES[context.objective] != "mixture":
            raise PolicyError(
                f"policy {spec!r} needs an objective that draws from a mixture, as 'siss' and 'bernoulli' do, "
                f"not {context.objective!r}"
            )
        return variational.VariancePolicy(context, kl_coef=chosen.beta)
    trained, seconds = None, 0.0
    try:
        num_inputs = len(variational.seen_entries(chosen.features, context))
        if chosen.source is not None:
            task = get_task(chosen.source).name
            trained, seconds = trained_network(task, chosen.estimator, chosen.beta, chosen.features, num_inputs)
    except UnlearnGymError as error:
        raise PolicyError(f"policy {spec!r}: {error}") from None
    return variational.VariationalPolicy(
        context, chosen.estimator, kl_coef=chosen.beta, features=chosen.features, trained=trained,
        training_seconds=seconds,
    )  # fmt: skip


def _checked_shipped(path: Path) -> Path:
    """``path``, an agent that ships; raises :class:`PolicyError` unless it has the hash of its manifest."""
    if path.is_file() and sha256(path) != read_json(path.with_suffix(".json"))["sha256"]:
        raise PolicyError(f"{path} is not the agent that ships: its SHA-256 is another; install unlearn_gym again")
    return path


def _agent(path: Path, context: PolicyContext, *, trust: bool = False) -> LambdaPolicy:
    from unlearn_gym.policies.sb3 import SB3Policy

    if not path.is_file():
        raise PolicyError(f"no agent at {path}; train one with 'python -m agents.train --task {context.task}'")
    return SB3Policy(context, path, trust=trust)


def _from_module(module: str, attribute: str) -> LambdaPolicy:
    if module_spec(module) is None and module not in sys.modules:
        reason = "there is no such module in this folder, nor is one installed"
        raise PolicyError(f"policy '{module}:{attribute}': cannot import {module!r}: {reason}; see {USAGE}")
    return load_own_policy(module, attribute)
