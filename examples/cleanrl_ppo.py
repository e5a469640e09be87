"""PPO in one file, in the style of CleanRL: every line between the environment and the update is here.

    python examples/cleanrl_ppo.py --task gaussians-2d --total-timesteps 30000

The agent acts in [-1, 1], which is mapped to the range of λ. Curves: tensorboard --logdir runs/cleanrl. No agent is
saved; its training episodes begin at seed 1,000,000, away from those of comparisons.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.distributions import Normal
from torch.utils.tensorboard import SummaryWriter

import unlearn_gym  # noqa: F401 - registers SISSUnlearn-v0


@dataclass
class Args:
    """Settings of the training."""

    task: str = "gaussians-2d"
    reward: str = "siss"
    seed: int = 1
    total_timesteps: int = 30_000
    num_envs: int = 4
    num_steps: int = 60
    learning_rate: float = 5e-4
    gamma: float = 0.99
    gae_lambda: float = 0.95
    num_minibatches: int = 4
    update_epochs: int = 10
    clip_coef: float = 0.2
    ent_coef: float = 0.0
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    out: Path = Path("runs/cleanrl")


def layer(inputs: int, outputs: int, std: float = 2**0.5) -> nn.Linear:
    """A linear layer with orthogonal weights."""
    made = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(made.weight, std)
    nn.init.zeros_(made.bias)
    return made


class Agent(nn.Module):
    """Two small networks and a log standard deviation."""

    def __init__(self, num_inputs: int) -> None:
        super().__init__()
        self.actor = nn.Sequential(layer(num_inputs, 32), nn.Tanh(), layer(32, 32), nn.Tanh(), layer(32, 1, 0.01))
        self.critic = nn.Sequential(layer(num_inputs, 32), nn.Tanh(), layer(32, 32), nn.Tanh(), layer(32, 1, 1.0))
        self.log_std = nn.Parameter(torch.full((1,), -0.5))

    def distribution(self, obs: Tensor) -> Normal:
        """Of the action, ``(..., 1)``."""
        return Normal(self.actor(obs), self.log_std.exp())


def main(args: Args) -> Agent:
    """Train and return the agent."""
    torch.manual_seed(args.seed)
    envs = gym.make_vec(
        "SISSUnlearn-v0", num_envs=args.num_envs, task=args.task, reward=args.reward, autoreset_mode="SameStep"
    )
    low, high = envs.single_action_space.low, envs.single_action_space.high
    agent = Agent(envs.single_observation_space.shape[0])
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    writer = SummaryWriter(str(args.out))
    shape = (args.num_steps, args.num_envs)
    obs = torch.zeros((*shape, *envs.single_observation_space.shape))
    actions, logprobs, values = torch.zeros((*shape, 1)), torch.zeros(shape), torch.zeros(shape)
    rewards, dones = torch.zeros(shape), torch.zeros(shape)
    next_obs = torch.as_tensor(envs.reset(seed=1_000_000 + args.seed)[0])
    running, returns, started, step = np.zeros(args.num_envs), [], time.time(), 0
    for iteration in range(1, max(1, args.total_timesteps // (args.num_steps * args.num_envs)) + 1):
        for t in range(args.num_steps):
            with torch.no_grad():
                distribution = agent.distribution(next_obs)
                obs[t], actions[t] = next_obs, distribution.sample()
                logprobs[t] = distribution.log_prob(actions[t]).sum(-1)
                values[t] = agent.critic(next_obs).squeeze(-1)
            lambdas = low + (actions[t].clamp(-1, 1).numpy() + 1) / 2 * (high - low)
            seen, reward, terminated, truncated, _ = envs.step(lambdas)
            rewards[t], dones[t] = torch.as_tensor(reward), torch.as_tensor(terminated | truncated)
            next_obs, running, step = torch.as_tensor(seen), running + reward, step + args.num_envs
            for i in np.flatnonzero(terminated | truncated):
                returns.append(running[i])
                running[i] = 0.0
        with torch.no_grad():  # generalised advantage estimation; SameStep: next_obs after an end begins an episode
            next_values = torch.cat([values[1:], agent.critic(next_obs).T])
            advantages, last = torch.zeros(shape), torch.zeros(args.num_envs)
            for t in reversed(range(args.num_steps)):
                going = 1 - dones[t]
                delta = rewards[t] + args.gamma * next_values[t] * going - values[t]
                advantages[t] = last = delta + args.gamma * args.gae_lambda * going * last
        targets = advantages + values
        flat = [x.flatten(0, 1) for x in (obs, actions, logprobs, advantages, targets)]
        for _ in range(args.update_epochs):
            for chosen in torch.randperm(len(flat[0])).chunk(args.num_minibatches):
                b_obs, b_actions, b_logprobs, b_advantages, b_targets = (x[chosen] for x in flat)
                distribution = agent.distribution(b_obs)
                ratio = (distribution.log_prob(b_actions).sum(-1) - b_logprobs).exp()
                normal = (b_advantages - b_advantages.mean()) / (b_advantages.std() + 1e-8)
                clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                policy_loss = -torch.min(ratio * normal, clipped * normal).mean()
                value_loss = 0.5 * (agent.critic(b_obs).squeeze(-1) - b_targets).square().mean()
                loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * distribution.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
        if returns:
            writer.add_scalar("charts/episodic_return", np.mean(returns[-20:]), step)
        writer.add_scalar(
            "charts/lambda", (low + (actions.clamp(-1, 1).mean().item() + 1) / 2 * (high - low)).item(), step
        )
        if iteration % 10 == 0:
            print(f"{step} steps, {step / (time.time() - started):.0f} a second, return {np.mean(returns[-20:]):.3f}")
    envs.close()
    writer.close()
    print(f"{step} steps; curves in {args.out}")
    return agent


if __name__ == "__main__":
    main(tyro.cli(Args))
