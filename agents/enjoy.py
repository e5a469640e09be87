"""Watch an agent: ``python -m agents.enjoy ppo --task gaussians-2d``."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.errors import SettingsError, UnlearnGymError
from unlearn_gym.evaluation.episode import Episode, policy_context, run_episode
from unlearn_gym.instances import load_instances
from unlearn_gym.policies import make_policy

help_ = tyro.conf.arg
FRAME_MILLISECONDS = 120


def enjoy(
    policy: Annotated[tyro.conf.Positional[str], help_(help="an agent's .zip, 'ppo', or any policy of 'compare'")],
    task: Annotated[str, help_(help="a task's name")] = "mnist-trousers",
    instances: Annotated[str | None, help_(help="in place of a task an instance of a set")] = None,
    instance: Annotated[int, help_(help="which one of the set")] = 0,
    seed: Annotated[int, help_(help="of the episode")] = 0,
    frame_every: Annotated[int, help_(help="updates between frames")] = 3,
    out: Annotated[Path, help_(help="folder of episode.gif and lambda.csv")] = Path("runs/enjoy"),
) -> Episode:
    """Run one episode of a policy; writes episode.gif (samples, λ and losses along the run) and lambda.csv."""
    if frame_every < 1:
        raise SettingsError(f"frame_every={frame_every} must be at least 1")
    known = None if instances is None else load_instances(instances)
    if known and not 0 <= instance < len(known):
        raise SettingsError(f"instance={instance}: {instances} has {len(known)}, numbered from 0")
    env = SISSUnlearnEnv(known[instance].task if known else task, render_mode="rgb_array")
    env.reset(options={"instance": known[instance]} if known else None)
    chosen = make_policy(policy, policy_context(env))
    frames: list[Image.Image] = []

    def look() -> None:
        if len(env.history) % frame_every == 0 or env.run.updates == env.settings.horizon:
            frame = env.render()
            assert frame is not None
            frames.append(Image.fromarray(frame))

    episode = run_episode(env, chosen, seed, on_step=look)
    out.mkdir(parents=True, exist_ok=True)
    frames[0].save(out / "episode.gif", save_all=True, append_images=frames[1:], duration=FRAME_MILLISECONDS, loop=0)
    with (out / "lambda.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["update", *episode.trace])
        rows.writerows([i, *values] for i, values in enumerate(zip(*episode.trace.values(), strict=True), start=1))
    what = ", ".join(f"{k} {v}" for k, v in env.instance.as_info().items())
    print(f"{what}: return {episode.episode_return:.4g} in {len(env.history)} updates")
    print(f"{out / 'episode.gif'}: {len(frames)} frames; {out / 'lambda.csv'}: λ and all else that was measured")
    return episode


def main() -> None:
    """Entry point: a known error becomes one line and exit status 2."""
    try:
        tyro.cli(enjoy, description=enjoy.__doc__)
    except UnlearnGymError as error:
        print(f"agents.enjoy: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
