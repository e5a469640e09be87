"""Make the one-step generator that score forgetting distillation starts from: the first of SFD's two stages.

Score identity distillation (Zhou et al., ICML 2024) of a class-conditional teacher, without data: labels are drawn
evenly from its classes.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from unlearn_gym.errors import TaskError, WeightsError, shown
from unlearn_gym.files import sha256, write_json
from unlearn_gym.making.pretraining import MEASURED_BATCH, one_cycle
from unlearn_gym.math import sfd
from unlearn_gym.models.flat import optimizer_state
from unlearn_gym.models.one_step import OneStepNetwork
from unlearn_gym.models.weights import read_checkpoint, save_checkpoint, save_weights
from unlearn_gym.run.objectives import Learner
from unlearn_gym.run.objectives.score_forgetting import SCORE_TIMESTEPS
from unlearn_gym.system.locks import folder_lock
from unlearn_gym.system.memory import bytes_per_sample, check_memory
from unlearn_gym.system.torch_state import initial_weights_from, insulated
from unlearn_gym.system.values import SEEDS, Checked
from unlearn_gym.tasks import Task


class DistillationSettings(Checked):
    """Adam without momentum, as SiD has it, on a one-cycle learning rate, and averaged copies of both networks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    updates: int = Field(3000, ge=1)
    batch_size: int = Field(32, ge=1)
    learning_rate: float = Field(5e-4, gt=0)
    fake_learning_rate: float = Field(5e-4, gt=0)
    score_alpha: float = Field(1.2, ge=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    seed: int = Field(0, ge=0, lt=SEEDS)
    checkpoint_every: int = Field(250, ge=1)


class _Network(Learner):
    """A learner with an averaged copy."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network, learning_rate=1.0)
        self.average = self.flat.vector.detach().clone()

    def descend(self, loss: Tensor, learning_rate: float, decay: float) -> None:
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.step(loss, max_grad_norm=1.0)
        self.average.lerp_(self.flat.vector.detach(), 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        state = optimizer_state(self.optimizer, self.flat.vector)
        return {"vector": self.flat.vector, "average": self.average, **{f"optimizer.{k}": v for k, v in state.items()}}

    def load(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.flat.vector.copy_(state["vector"])
            self.average.copy_(state["average"])
        self.optimizer.state[self.flat.vector] = {
            k.removeprefix("optimizer."): v for k, v in state.items() if k.startswith("optimizer.")
        }


class Distillation:
    """The whole state of a distillation, so that a resumed one equals an uninterrupted one."""

    @insulated
    def __init__(self, network: OneStepNetwork, alphas_cumprod: Tensor, settings: DistillationSettings) -> None:
        self.settings, self.alphas_cumprod = settings, alphas_cumprod
        with initial_weights_from(None):  # the teacher's weights replace them
            self.model = network().to(memory_format=torch.channels_last)
        self.networks = {"generator": _Network(self.model.generator), "fake": _Network(self.model.fake)}
        config = network.network
        self.num_classes = config.num_classes or 1
        self.shape = (config.image_channels, config.image_size, config.image_size)
        self.generator = torch.Generator().manual_seed(settings.seed)
        parts = [settings.model_dump_json(exclude={"checkpoint_every"}), config.model_dump_json(), str(network.start)]
        digest = hashlib.sha256("|".join([*parts, sha256(network.teacher)]).encode()).digest()
        self.fingerprint = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        self.done = 0
        if settings.batch_size > MEASURED_BATCH:
            other = torch.Generator().manual_seed(0)
            needed = settings.batch_size * bytes_per_sample(lambda size: self._fake_loss(size, other))
            check_memory(needed, f"batch_size={shown(settings.batch_size)}")

    def _fake_loss(self, size: int, generator: torch.Generator) -> Tensor:
        """The fake network's loss on noise: what part of an update takes in memory."""
        x, noise = (torch.randn((size, *self.shape), generator=generator) for _ in range(2))
        labels = torch.zeros(size, dtype=torch.int64)
        return sfd.denoising_loss(self.model.fake, x, labels, noise, labels, self.alphas_cumprod)

    @insulated
    def update(self) -> tuple[Tensor, Tensor]:
        """One step of the fake network, then one of the generator; returns the divergence and the fake loss, 0-dim."""
        s, model, g, ac = self.settings, self.model, self.generator, self.alphas_cumprod
        labels = torch.randint(self.num_classes, (s.batch_size,), generator=g)
        noises = [torch.randn((s.batch_size, *self.shape), generator=g) for _ in range(3)]
        low, high = (int(share * len(ac)) for share in SCORE_TIMESTEPS)
        fake_timesteps = torch.randint(len(ac), (s.batch_size,), generator=g)
        timesteps = torch.randint(low, high, (s.batch_size,), generator=g)
        rate, decay = one_cycle(self.done / s.updates), min(s.ema_decay, (1 + self.done) / (10 + self.done))
        samples = sfd.generate(model.generator, noises[0], labels, ac, model.start)
        fake_loss = sfd.denoising_loss(model.fake, samples.detach(), labels, noises[1], fake_timesteps, ac)
        self.networks["fake"].descend(fake_loss, rate * s.fake_learning_rate, decay)
        terms = sfd.score_terms(
            samples, noises[2], timesteps, ac, teacher=model.teacher, fake=model.fake,
            teacher_labels=labels, fake_labels=labels, alpha=s.score_alpha,
        )  # fmt: skip
        self.networks["generator"].descend(terms.surrogate.mean(), rate * s.learning_rate, decay)
        self.done += 1
        return terms.divergence.mean(), fake_loss.detach()

    def averaged_model(self) -> nn.Module:
        """The model with averaged weights in place of its own: the end of the distillation."""
        with torch.no_grad():
            for network in self.networks.values():
                network.flat.vector.copy_(network.average)
        return self.model

    def save(self, path: Path) -> None:
        """Write everything that :meth:`load` needs to continue exactly here."""
        states = {f"{name}.{k}": v for name, n in self.networks.items() for k, v in n.tensors().items()}
        more = {"done": torch.tensor(self.done), "rng": self.generator.get_state(), "fingerprint": self.fingerprint}
        save_checkpoint(path, states | more)

    @insulated
    def load(self, path: Path) -> None:
        """Continue from :meth:`save`; raises :class:`WeightsError` for a damaged one or one of another distillation."""
        tensors = read_checkpoint(path)
        if not torch.equal(tensors.get("fingerprint", torch.empty(0)), self.fingerprint):
            raise WeightsError(
                f"{path} is of a distillation of another teacher or with other settings; choose another --out "
                "or remove it"
            )
        for name, network in self.networks.items():
            network.load({k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")})
        self.generator.set_state(tensors["rng"])
        self.done = int(tensors["done"])


@insulated
def distill(
    task: Task,
    settings: DistillationSettings,
    out: Path,
    *,
    retain_only: bool = False,
    command: str = "",
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
    """Distil the task's teacher, or with ``retain_only`` the one that never saw F; resumes from ``out``'s checkpoint.

    Writes ``<name>.safetensors`` (averaged weights of generator and fake network) and ``<name>.json`` (the manifest,
    also returned) to ``out``, where name is ``pretrained`` or ``oracle``. Raises what
    :func:`unlearn_gym.making.pretraining.pretrain` raises.
    """
    distillation = Distillation(_network(task, retain_only=retain_only), task.schedule.alphas_cumprod(), settings)
    with folder_lock(out):
        return _distill(task, distillation, out, retain_only, command, progress)


def _distill(
    task: Task,
    distillation: Distillation,
    out: Path,
    retain_only: bool,
    command: str,
    progress: Callable[[int, int, float], None] | None,
) -> dict[str, Any]:
    settings, name = distillation.settings, "oracle" if retain_only else "pretrained"
    checkpoint = out / f"{name}.checkpoint.safetensors"
    if checkpoint.is_file():
        distillation.load(checkpoint)
    started, start_update = time.perf_counter(), distillation.done
    divergence = fake_loss = 0.0
    while distillation.done < settings.updates:
        values = distillation.update()
        if distillation.done % 50 == 0 or distillation.done == settings.updates:
            divergence, fake_loss = (float(value) for value in values)
            if progress:
                progress(distillation.done, settings.updates, divergence)
        if distillation.done % settings.checkpoint_every == 0 or distillation.done == settings.updates:
            distillation.save(checkpoint)
    weights = out / f"{name}.safetensors"
    save_weights(weights, distillation.averaged_model().state_dict())
    network = _network(task, retain_only=retain_only)
    manifest = {
        "command": command, "task": task.name, "schedule": task.schedule.model_dump(),
        "network": network.network.model_dump(mode="json"), "teacher_sha256": sha256(network.teacher),
        "settings": settings.model_dump(), "retain_only": retain_only,
        "figures": {"divergence": divergence, "fake_loss": fake_loss},
        "updates_this_session": settings.updates - start_update,
        "seconds_this_session": round(time.perf_counter() - started, 1), "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "sha256": sha256(weights),
    }  # fmt: skip
    write_json(out / f"{name}.json", manifest)
    return manifest


def _network(task: Task, *, retain_only: bool) -> OneStepNetwork:
    network = task.network
    if not isinstance(network, OneStepNetwork):
        raise TaskError(f"task {task.name!r} has no one-step generator to distil; take one of the family 'generator'")
    return network.of_retrained_teacher() if retain_only else network
