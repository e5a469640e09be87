"""Train an agent: ``python -m agents.train --task mnist-trousers --algo ppo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import stable_baselines3
import tyro

import unlearn_gym
from agents.callbacks import Bar, UnlearnScalars
from agents.config import load_config
from agents.main import invocation, run_command
from agents.training import FIRST_VALIDATION_SEED, Plan, read_stages, static_returns, train_agent
from unlearn_gym.cli.arguments import OptionTexts, parse_options
from unlearn_gym.errors import PolicyError, SettingsError
from unlearn_gym.files import replacing, sha256, write_json
from unlearn_gym.policies.manifest import read_manifest
from unlearn_gym.system.locks import folder_lock
from unlearn_gym.tasks import get_task

help_ = tyro.conf.arg


def train(
    task: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        help_(help="a task's name; may be repeated: every episode then draws one (default: mnist-trousers)"),
    ] = (),
    instances: Annotated[
        str | None, help_(help="a set in place of tasks: gaussians-2d/train, or a file as in my.json/train")
    ] = None,
    algo: Annotated[str, help_(help="ppo, a2c, sac, td3, or ppo_lstm (needs the extra 'agents')")] = "ppo",
    reward: Annotated[str, help_(help="'siss' (the paper's) or 'potential'")] = "siss",
    observation: Annotated[str, help_(help="'paper' (six entries) or 'extended'")] = "paper",
    option: OptionTexts = (),
    seed: Annotated[int, help_(help="0..99; every seed has training episodes of its own")] = 0,
    timesteps: Annotated[int | None, help_(help="environment steps; default: n_timesteps of the config")] = None,
    n_envs: Annotated[int | None, help_(help="environments, in processes; default: n_envs of the config")] = None,
    config: Annotated[Path | None, help_(help="default: configs/agents/ALGO.yml")] = None,
    device: Annotated[str, help_(help="of the agent's networks; the runs' own is the task's")] = "cpu",
    out: Annotated[Path | None, help_(help="default: runs/agents/TASK-ALGO-REWARD-SEED")] = None,
    eval_every: Annotated[
        int, help_(help="environment steps of a stage, which ends with validation and checkpoint")
    ] = 9600,
    eval_episodes: Annotated[int, help_(help="episodes of a validation, on seeds of its own")] = 5,
) -> Path:
    """Train an agent on SISSUnlearn-v0; the same command again goes on where it stopped.

    Training goes in stages of --eval-every steps, rounded up to whole rollouts. Each ends with a validation on held-out
    seeds and a checkpoint; best_model.zip is the best so far. At the end agent.zip is the last one, with a manifest
    beside it. Curves: tensorboard --logdir OUT/tensorboard. Use it: unlearn-gym compare --policies OUT/agent.zip ...
    """
    tasks = tuple(get_task(name).name for name in (task if task or instances else ("mnist-trousers",)))
    settings = load_config(algo, tasks[0] if len(tasks) == 1 else instances or "", config)
    total = settings.n_timesteps if timesteps is None else timesteps
    options = {"reward": reward, **({"observation": observation} if observation != "paper" else {})}
    more = parse_options(option)
    for name in {"reward", "observation"} & set(more):
        raise SettingsError(f"option {name}={more[name]!r}: give it as --{name}")
    options |= more
    workers = settings.n_envs if n_envs is None else n_envs
    plan = Plan(settings, tasks, instances, options, seed, workers, eval_every, eval_episodes, device)
    folder = out or Path("runs/agents") / f"{plan.name}-{algo}-{reward}-{seed}"
    plan.validate()
    with folder_lock(folder):
        return _train(plan, folder, total)


def _train(plan: Plan, folder: Path, total: int) -> Path:
    """Train, compare with static λ, and write the agent with its manifest, unless it is there already."""
    with Bar(f"{plan.name} {plan.config.algorithm}", total) as bar:
        agent = train_agent(plan, folder, total, callbacks=[UnlearnScalars(), bar], stage_done=lambda stage: None)
    path, stages = folder / "agent.zip", read_stages(plan, folder)
    if _is_finished(path, agent.num_timesteps):
        print(f"{path}: {agent.num_timesteps} steps, trained already")
        return path
    print(f"{plan.eval_episodes} validation episodes each of five static λ, to compare with", flush=True)
    manifest = _manifest(plan, stages, static_returns(plan))
    best = max(stages, key=lambda stage: float(np.mean(stage["returns"])))
    best_manifest = {**manifest, "timesteps": best["timesteps"], "sha256": best["sha256"]}
    write_json(folder / "best_model.json", best_manifest)
    with replacing(path) as file:
        agent.save(file)
    write_json(path.with_suffix(".json"), {**manifest, "sha256": sha256(path)})
    name = max(manifest["static_returns"], key=manifest["static_returns"].__getitem__)
    print(
        f"validation return {np.mean(stages[-1]['returns']):.4g}, at best {np.mean(best['returns']):.4g} after "
        f"{best['timesteps']} steps; best static λ: {name} with {manifest['static_returns'][name]:.4g}"
    )
    print(f"{path}: {agent.num_timesteps} steps in {manifest['seconds']} s")
    return path


def _is_finished(path: Path, timesteps: int) -> bool:
    """Whether ``path`` is the agent of so many steps with its manifest beside it."""
    try:
        manifest = read_manifest(path)
        return manifest.timesteps == timesteps and path.is_file() and manifest.sha256 == sha256(path)
    except PolicyError as error:
        print(f"{error}: it is written anew", flush=True)
        return False


def _manifest(plan: Plan, stages: list[dict[str, Any]], statics: dict[str, float]) -> dict[str, Any]:
    """What stands beside an agent, but for its file's SHA-256."""
    options = {name: value for name, value in plan.options.items() if name not in ("reward", "observation")}
    return {
        "command": invocation("train"),
        "task": plan.tasks[0] if len(plan.tasks) == 1 else None, "tasks": plan.tasks, "instances": plan.instances,
        "algorithm": plan.config.algorithm, "reward": plan.options["reward"],
        "observation": plan.options.get("observation", "paper"), "options": options,
        "eval_every": plan.eval_every, "seed": plan.seed, "training_seeds_from": plan.stage_seed(0),
        "validation_seeds_from": FIRST_VALIDATION_SEED, "timesteps": stages[-1]["timesteps"], "n_envs": plan.n_envs,
        "config": plan.config.model_dump(), "seconds": round(sum(stage["seconds"] for stage in stages), 1),
        "validation": stages, "static_returns": statics,
        "versions": {"unlearn_gym": unlearn_gym.__version__, "stable_baselines3": stable_baselines3.__version__},
    }  # fmt: skip


if __name__ == "__main__":
    run_command("train", train)
