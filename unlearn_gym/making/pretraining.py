"""Train the model that an unlearning run starts from, or its retrained-from-scratch oracle."""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from unlearn_gym.errors import WeightsError, shown
from unlearn_gym.files import sha256, write_json
from unlearn_gym.metrics.probe import set_losses
from unlearn_gym.models.families import family_of
from unlearn_gym.models.flat import FlatParameters
from unlearn_gym.models.weights import read_checkpoint, save_checkpoint, save_weights
from unlearn_gym.system.curves import curve_errors
from unlearn_gym.system.locks import folder_lock
from unlearn_gym.system.memory import bytes_per_sample, check_memory
from unlearn_gym.system.torch_state import initial_weights_from, insulated
from unlearn_gym.system.values import SEEDS, Checked
from unlearn_gym.tasks import Task, TaskData, to_model_range

PROBE_SIZE = 1000
MEASURED_BATCH = 1024
"""Above this batch size what an update takes in memory is measured first."""


class PretrainSettings(Checked):
    """AdamW with a one-cycle learning rate and an averaged copy, on the family's loss: a DDPM's noise-prediction loss,
    a VAE's negative ELBO.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    updates: int = Field(6000, ge=1)
    batch_size: int = Field(128, ge=1)
    max_learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    seed: int = Field(0, ge=0, lt=SEEDS)
    checkpoint_every: int = Field(500, ge=1)


def one_cycle(progress: float, warmup: float = 0.1) -> float:
    """Fraction of the largest learning rate at ``progress`` in [0, 1]: linear up, cosine down."""
    if progress < warmup:
        return 0.04 + 0.96 * progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


class Pretraining:
    """The whole state of a training, so that a resumed one equals an uninterrupted one."""

    @insulated
    def __init__(
        self,
        task: Task,
        samples: Tensor,
        labels: Tensor | None,
        settings: PretrainSettings,
    ) -> None:
        self.settings, self.samples, self.labels = settings, samples, labels
        self.alphas_cumprod = task.schedule.alphas_cumprod()
        with initial_weights_from(settings.seed):
            self.model = task.build_model().to(memory_format=torch.channels_last)
        self.family = family_of(self.model)
        self.flat = FlatParameters(self.model)
        self.gradient = torch.zeros_like(self.flat.vector)
        self.flat.point_gradients(self.flat.gradient_views(self.gradient))
        self.flat.vector.grad = self.gradient
        self.ema = self.flat.vector.detach().clone()
        self.optimizer = torch.optim.AdamW([self.flat.vector], lr=1.0, weight_decay=settings.weight_decay, fused=True)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.fingerprint = _fingerprint(task, samples, labels, settings)
        self.done = 0
        if settings.batch_size > MEASURED_BATCH:
            other = torch.Generator().manual_seed(0)
            needed = settings.batch_size * bytes_per_sample(lambda size: self._loss(size, other))
            check_memory(needed, f"batch_size={shown(settings.batch_size)}")

    def _loss(self, size: int, generator: torch.Generator) -> Tensor:
        """The loss of a batch, 0-dim, with its graph."""
        index = torch.randint(len(self.samples), (size,), generator=generator)
        x = to_model_range(self.samples[index])
        timesteps = torch.randint(len(self.alphas_cumprod), (size,), generator=generator)
        noise = torch.randn((size, *self.family.noise_shape(self.model, x.shape[1:])), generator=generator)
        labels = None if self.labels is None else self.labels[index]
        return self.family.errors(self.model, x, labels, noise, timesteps, self.alphas_cumprod).mean()

    @insulated
    def update(self) -> Tensor:
        """One optimizer step; returns the batch's loss as a scalar tensor."""
        s = self.settings
        loss = self._loss(s.batch_size, self.generator)
        self.gradient.zero_()
        loss.backward()
        nn.utils.clip_grad_norm_([self.flat.vector], 1.0)
        self.optimizer.param_groups[0]["lr"] = s.max_learning_rate * one_cycle(self.done / s.updates)
        self.optimizer.step()
        self.ema.lerp_(self.flat.vector.detach(), 1 - min(s.ema_decay, (1 + self.done) / (10 + self.done)))
        self.done += 1
        return loss.detach()

    def averaged_model(self) -> nn.Module:
        """The network with the averaged weights in place of its own: the end of the training."""
        with torch.no_grad():
            self.flat.vector.copy_(self.ema)
        return self.model

    def save(self, path: Path) -> None:
        """Write everything that :meth:`load` needs to continue exactly here."""
        state = self.optimizer.state[self.flat.vector]
        save_checkpoint(
            path,
            {
                "vector": self.flat.vector, "ema": self.ema, "done": torch.tensor(self.done),
                "generator": self.generator.get_state(), "fingerprint": self.fingerprint,
                **{f"optimizer.{k}": v for k, v in state.items()},
            },
        )  # fmt: skip

    @insulated
    def load(self, path: Path) -> None:
        """Continue from :meth:`save`; raises :class:`WeightsError` for a damaged one or one of another training."""
        tensors = read_checkpoint(path)
        if not torch.equal(tensors.get("fingerprint", torch.empty(0)), self.fingerprint):
            raise WeightsError(
                f"{path} is of a training with another network, data or settings; choose another --out or remove it"
            )
        with torch.no_grad():
            self.flat.vector.copy_(tensors["vector"])
            self.ema.copy_(tensors["ema"])
        self.optimizer.state[self.flat.vector] = {
            k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")
        }
        self.generator.set_state(tensors["generator"])
        self.done = int(tensors["done"])


def training_samples(data: TaskData, *, retain_only: bool) -> tuple[Tensor, Tensor | None]:
    """D = R ∪ F, or R alone for the oracle: samples and labels."""
    if retain_only:
        return data.retain, data.retain_labels
    samples = torch.cat([data.retain, data.forget])
    if data.retain_labels is None or data.forget_labels is None:
        return samples, None
    return samples, torch.cat([data.retain_labels, data.forget_labels])


def _fingerprint(task: Task, samples: Tensor, labels: Tensor | None, settings: PretrainSettings) -> Tensor:
    """SHA-256 of all that a training depends on, uint8 ``(32,)``."""
    parts = [task.schedule.model_dump_json(), settings.model_dump_json(exclude={"checkpoint_every"})]
    parts.append(task.network.model_dump_json() if isinstance(task.network, BaseModel) else task.name)
    digest = hashlib.sha256("|".join(parts).encode())
    digest.update(samples.numpy().tobytes())
    if labels is not None:
        digest.update(labels.numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


@insulated
def pretrain(
    task: Task,
    data: TaskData,
    settings: PretrainSettings,
    out: Path,
    *,
    retain_only: bool = False,
    command: str = "",
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
    """Train on R ∪ F (or R alone), resuming from ``out``'s checkpoint if there is one.

    Writes ``<name>.safetensors`` (averaged weights), ``<name>.json`` (the manifest, also returned),
    ``<name>.checkpoint.safetensors`` and TensorBoard curves to ``out``, where name is ``pretrained``
    or ``oracle``. Raises :class:`WeightsError` where ``out`` holds another training's checkpoint or a damaged one,
    :class:`FileError` where it cannot be written to, and :class:`LockError` while another process writes to it.
    """
    training = Pretraining(task, *training_samples(data, retain_only=retain_only), settings)
    with folder_lock(out):
        return _pretrain(task, data, training, out, retain_only, command, progress)


def _pretrain(
    task: Task,
    data: TaskData,
    training: Pretraining,
    out: Path,
    retain_only: bool,
    command: str,
    progress: Callable[[int, int, float], None] | None,
) -> dict[str, Any]:
    from torch.utils.tensorboard import SummaryWriter

    settings, name = training.settings, "oracle" if retain_only else "pretrained"
    checkpoint = out / f"{name}.checkpoint.safetensors"
    if checkpoint.is_file():
        training.load(checkpoint)
    started, start_update, running = time.perf_counter(), training.done, 0.0
    curves = out / "tensorboard" / name
    with curve_errors(curves), SummaryWriter(str(curves), purge_step=training.done) as writer:
        while training.done < settings.updates:
            loss = training.update()
            running += float(loss)
            if training.done % 50 == 0:
                writer.add_scalar("pretrain/loss", running / 50, training.done)
                if progress:
                    progress(training.done, settings.updates, running / 50)
                running = 0.0
            if training.done % settings.checkpoint_every == 0 or training.done == settings.updates:
                training.save(checkpoint)
        seconds = time.perf_counter() - started
        model = training.averaged_model()
        figures = set_losses(model, data, training.alphas_cumprod, num_samples=PROBE_SIZE)
        for key, value in figures.items():
            writer.add_scalar(f"pretrain/{key}", value, training.done)
    weights = out / f"{name}.safetensors"
    save_weights(weights, model.state_dict())
    manifest = {
        "command": command, "task": task.name, "schedule": task.schedule.model_dump(),
        "network": task.network.model_dump(mode="json") if isinstance(task.network, BaseModel) else str(task.network),
        "settings": settings.model_dump(), "retain_only": retain_only,
        "num_samples": len(training.samples), "num_parameters": len(training.flat.vector),
        "figures": figures, "updates_this_session": settings.updates - start_update,
        "seconds_this_session": round(seconds, 1), "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "sha256": sha256(weights),
    }  # fmt: skip
    write_json(out / f"{name}.json", manifest)
    return manifest
