"""Watch an agent: ``python -m agents.enjoy ppo --task gaussians-2d``."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from agents.main import run_command
from unlearn_gym.cli.arguments import Trust
from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.envs.siss_unlearn import DEFAULT_TASK
from unlearn_gym.errors import SettingsError
from unlearn_gym.files import replacing, write_text
from unlearn_gym.policies import make_policy, split_name
from unlearn_gym.policies.episode import Episode, policy_context, run_episode
from unlearn_gym.policies.manifest import AgentManifest, read_manifest
from unlearn_gym.system.locks import folder_lock
from unlearn_gym.tasks.instances import load_instances

help_ = tyro.conf.arg
FRAME_MILLISECONDS = 120


def enjoy(
    policy: Annotated[tyro.conf.Positional[str], help_(help="an agent's .zip, 'ppo', or any policy of 'compare'")],
    task: Annotated[
        str | None, help_(help="default: what the agent was trained on (of several the first), else mnist-trousers")
    ] = None,
    instances: Annotated[str | None, help_(help="in place of a task an instance of a set")] = None,
    instance: Annotated[int | None, help_(help="which one of the set; default: the first")] = None,
    observation: Annotated[
        str | None, help_(help="'paper' or 'extended'; default: as the agent was trained with, else paper")
    ] = None,
    seed: Annotated[int, help_(help="of the episode")] = 0,
    frame_every: Annotated[int, help_(help="updates between frames")] = 3,
    out: Annotated[Path, help_(help="folder of episode.gif, lambda.csv and model.safetensors")] = Path("runs/enjoy"),
    trust: Trust = False,
) -> Episode:
    """Run one episode of a policy; writes episode.gif (samples, λ and losses along it), lambda.csv and the model."""
    if frame_every < 1:
        raise SettingsError(f"frame_every={frame_every} must be at least 1")
    if instance is not None and instances is None:
        raise SettingsError(f"instance={instance} goes with --instances")
    if task is not None and instances is not None:
        raise SettingsError(f"task={task!r} beside instances={instances!r}: give one of them")
    known = None if instances is None else load_instances(instances)
    number = instance or 0
    if known and not 0 <= number < len(known):
        raise SettingsError(f"instance={number}: {instances} has {len(known)}, numbered from 0")
    policy = split_name(policy)[1]
    trained = read_manifest(Path(policy)) if policy.endswith(".zip") else AgentManifest()
    if known is None and task is None and trained.instances:
        known, number = load_instances(trained.instances), 0
    task = task or trained.task or next(iter(trained.tasks or ()), DEFAULT_TASK)
    env = SISSUnlearnEnv(
        known[number].task if known else task, render_mode="rgb_array",
        **{
            **(trained.options or {}), "reward": trained.reward or "siss",
            "observation": observation or trained.observation or "paper",
        },
    )  # fmt: skip
    env.reset(options={"instance": known[number]} if known else None)
    chosen = make_policy(policy, policy_context(env), trust=trust)
    frames: list[Image.Image] = []

    def look() -> None:
        if len(env.history) % frame_every == 0 or env.run.updates == env.settings.horizon:
            frame = env.render()
            assert frame is not None
            frames.append(Image.fromarray(frame))

    episode = run_episode(env, chosen, seed, name=policy, on_step=look)
    with folder_lock(out):
        _write_episode(out, frames, episode)
    what = ", ".join(f"{k} {v}" for k, v in env.instance.as_info().items())
    print(f"{what}: return {episode.episode_return:.4g} in {len(env.history)} updates")
    print(f"{out / 'episode.gif'}: {len(frames)} frames; {out / 'lambda.csv'}: λ and all else that was measured")
    if not episode.diverged:
        print(f"{env.save(out / 'model.safetensors')}: the unlearned model, for 'unlearn-gym evaluate'")
    return episode


def _write_episode(out: Path, frames: list[Image.Image], episode: Episode) -> None:
    """``episode.gif`` and ``lambda.csv``."""
    with replacing(out / "episode.gif") as file:
        frames[0].save(
            file, "GIF", save_all=True, append_images=frames[1:], duration=FRAME_MILLISECONDS, loop=0
        )  # fmt: skip
    table = io.StringIO(newline="")
    rows = csv.writer(table)
    rows.writerow(["update", *episode.trace])
    rows.writerows([i, *values] for i, values in enumerate(zip(*episode.trace.values(), strict=True), start=1))
    write_text(out / "lambda.csv", table.getvalue())


if __name__ == "__main__":
    run_command("enjoy", enjoy)
