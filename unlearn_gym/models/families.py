"""Kinds of generative models, and how each is asked: for its error on samples, for samples, for reconstructions.

A model names its kind by an attribute ``family``; without one it is an ε-network of a diffusion model. Whoever asks
goes through :func:`family_of`, so that runs, environments, metrics and pictures are the same for all.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from unlearn_gym.math import sfd
from unlearn_gym.math.diffusion import grid_loss, q_sample, reconstruct, sample
from unlearn_gym.math.elbo import negative_elbo


class Diffusion:
    """ε-networks ``(x_t, timesteps, labels or None) -> epsilon_pred``.

    Samples ``x (B, *S)``, labels and ``timesteps (B,)``, ``noise (B, *N)`` with N of :meth:`noise_shape`, and
    ``alphas_cumprod (T,)``, ᾱ_t of the schedule.
    """

    name: ClassVar[str] = "diffusion"

    def noise_shape(self, model: Any, sample_shape: torch.Size) -> tuple[int, ...]:
        """Shape of the noise of one sample."""
        return tuple(sample_shape)

    def errors(
        self, model: Any, x: Tensor, labels: Tensor | None, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
    ) -> Tensor:
        """What training minimises, per sample ``(B,)``: the mean over pixels of (ε_θ - ε)²."""
        pred = model(q_sample(x, noise, timesteps, alphas_cumprod), timesteps, labels)
        return (pred - noise).square().flatten(1).mean(1)

    def grid(self, model: Any, x: Tensor, alphas_cumprod: Tensor, **options: Any) -> Tensor:
        """Errors on a fixed grid ``(10, B)``, see :func:`unlearn_gym.math.diffusion.grid_loss`."""
        return grid_loss(model, x, alphas_cumprod, **options)

    def sample(self, model: Any, noise: Tensor, alphas_cumprod: Tensor, **options: Any) -> Tensor:
        """Samples ``(B, *S)`` of ``noise``, see :func:`unlearn_gym.math.diffusion.sample`."""
        return sample(model, noise, alphas_cumprod, **options)

    def reconstruct(self, model: Any, x: Tensor, alphas_cumprod: Tensor, **options: Any) -> Tensor:
        """What the model makes of ``x``, see :func:`unlearn_gym.math.diffusion.reconstruct`."""
        return reconstruct(model, x, alphas_cumprod, **options)


class Generator(Diffusion):
    """One-step generators (:class:`unlearn_gym.models.one_step.OneStepModel`): ε-networks of what they generate."""

    name = "generator"

    def sample(self, model: Any, noise: Tensor, alphas_cumprod: Tensor, **options: Any) -> Tensor:
        """Samples of one step; those of many are the :class:`Diffusion` family's."""
        with torch.inference_mode():
            drawn = sfd.generate(model.generator, noise, options.get("labels"), alphas_cumprod, model.start)
            clip = options.get("clip")
            return drawn if clip is None else drawn.clamp(-clip, clip)


class VAE:
    """Variational autoencoders (:mod:`unlearn_gym.math.elbo`); timesteps and schedules are nothing to them."""

    name: ClassVar[str] = "vae"

    def noise_shape(self, model: Any, sample_shape: torch.Size) -> tuple[int, ...]:
        """Shape of a latent."""
        return (model.config.latent_dim,)

    def errors(
        self, model: Any, x: Tensor, labels: Tensor | None, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
    ) -> Tensor:
        """The negative ELBO, nats per pixel ``(B,)``, without the decoder's constant."""
        return negative_elbo(model, x, labels, noise)

    @torch.inference_mode()
    def grid(
        self,
        model: Any,
        x: Tensor,
        alphas_cumprod: Tensor,
        *,
        labels: Tensor | None,
        generator: torch.Generator,
        batch_size: int = 512,
        target: Any = None,
        num_draws: int = 10,
    ) -> Tensor:
        """Negative ELBO of every sample at ``num_draws`` latents each, ``(num_draws, B)``.

        With ``target`` the mean squared difference of both models' reconstructions instead, in every row the same.
        """
        rows = []
        for _ in range(num_draws):
            errors = []
            for start in range(0, len(x), batch_size):
                part, y = x[start : start + batch_size], None if labels is None else labels[start : start + batch_size]
                shape = (len(part), *self.noise_shape(model, part.shape[1:]))
                noise = torch.randn(shape, generator=generator, device=generator.device).to(part)
                errors.append(
                    negative_elbo(model, part, y, noise) if target is None
                    else (model(part, y) - target(part, y)).square().flatten(1).mean(1)
                )  # fmt: skip
            rows.append(torch.cat(errors))
        return torch.stack(rows)

    @torch.inference_mode()
    def sample(self, model: Any, noise: Tensor, alphas_cumprod: Tensor, **options: Any) -> Tensor:
        """The decoder's means ``(B, *S)`` at latents from the prior: ``noise (B, Z)``."""
        return model.decode(noise, options.get("labels"))

    @torch.inference_mode()
    def reconstruct(self, model: Any, x: Tensor, alphas_cumprod: Tensor, **options: Any) -> Tensor:
        """The decoder's mean at the posterior's."""
        return model(x, options.get("labels"))


Family = Diffusion | VAE
FAMILIES: dict[str, Family] = {family.name: family for family in (Diffusion(), Generator(), VAE())}


def family_of(model: Any) -> Family:
    """The family of a model, or of the config or function that makes it."""
    return FAMILIES[getattr(model, "family", "diffusion")]
