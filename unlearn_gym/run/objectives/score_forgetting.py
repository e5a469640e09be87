"""Score forgetting distillation as an objective, with λ, for many classes at once, and with SISS beside it.

Chen et al. (ICLR 2025, arXiv 2409.11219). An update first lets the fake network learn the generator's samples, then
takes the generator down

    L = (1-λ) c_r L_remain + (1+s) λ c_f L_forget,

where L_remain is the Fisher divergence (:func:`unlearn_gym.math.sfd.score_terms`) of what the generator makes of kept
classes to the teacher's score of them, and L_forget that of what it makes of a forgotten class to the teacher's score
of the class that overrides it. Nothing is drawn from data but their classes. Any number of classes is forgotten at
once, each with its own override: the multi-class form of arXiv 2512.01054, as λ in place of two fixed coefficients
is its adaptive one.

The public loop does some things in other ways; ``preset="sfd-code"`` sets the options for them. Its coefficients are
1 and 0.01, for the generator (λ = 0.01, but for a factor of 0.99) and for the fake network (``fake_forget_coef``).
Both networks see 38 to 711 of 1,000 timesteps, here the fake network all of them (``fake_timesteps``). The generator's
step has samples of its own, here it takes those that the fake network has just learned from, which spares a pass
(``redraw_samples``). Errors are summed over pixels (``loss_reduction``), and gradients clipped entry by entry at 1
(``max_grad_value``). Left out are its dropout, its moving average of the generator, and its draw of kept classes from
data: here all are equally likely.

With ``hybrid_coef`` h > 0 the SISS loss on real pairs is added, h L_SISS(λ), of the generator's network as a denoiser
at its own timestep: the direct gradient beside the data-free ones. No equation of the paper's hybrid is public; this
is our reading of its description.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unlearn_gym.errors import SettingsError
from unlearn_gym.math import sfd, siss
from unlearn_gym.run.batch import Batch, mix
from unlearn_gym.run.objectives.base import Context, Learner, OwnPasses, Passes
from unlearn_gym.settings import RunSettings
from unlearn_gym.tasks.data import TaskData

SCORE_TIMESTEPS = (0.038, 0.712)
"""Share of T between which scores are compared; SFD's code: 38 to 711 of 1,000."""


class Classes(NamedTuple):
    """Kept classes ``(K,)``, forgotten ones ``(F,)`` and what overrides each of those ``(F,)``.

    ``redraw``: whether batches hold noise for a second draw of samples.
    """

    kept: Tensor
    forgotten: Tensor
    overrides: Tensor
    redraw: bool


class ScoreDraw(NamedTuple):
    """What an update draws for one side: labels, the teacher's labels, noises ``(B, *S)`` and timesteps ``(B,)``.

    ``noise`` is what the generator starts from, ``score_noise`` at ``timesteps`` what scores are compared in,
    ``fake_noise`` at ``fake_timesteps`` what the fake network learns in, ``fake_start`` what the samples that it learns
    are generated from, where they are not the generator's own of this update.
    """

    labels: Tensor
    teacher_labels: Tensor
    noise: Tensor
    score_noise: Tensor
    timesteps: Tensor
    fake_noise: Tensor
    fake_timesteps: Tensor
    fake_start: Tensor | None = None


def _timesteps(shares: Tensor, num_timesteps: int, span: tuple[float, float]) -> Tensor:
    """The timesteps of ``shares`` in [0, 1) of the way through a ``span`` of T."""
    low, high = (share * num_timesteps for share in span)
    return (low + shares * (high - low)).long()


def override_pairs(kept: list[int], forgotten: list[int], pairs: tuple[tuple[int, int], ...] | None) -> list[int]:
    """The override of each of ``forgotten``: the one in ``pairs``, or the next kept class, cyclically.

    Raises :class:`SettingsError` for one that is itself forgotten or unknown, and for pairs of kept classes. Pairs of
    classes that are neither serve other instances, which forget more.
    """
    if not kept:
        raise SettingsError(f"objective='sfd' needs a class to keep; all of {forgotten} are to be forgotten")
    chosen = dict(pairs or ())
    for old, new in chosen.items():
        if old in kept:
            raise SettingsError(f"override_classes: {old} is not forgotten here; the forgotten classes are {forgotten}")
        if new in forgotten:
            raise SettingsError(f"override_classes: {new}, to override {old}, is itself forgotten; take one of {kept}")
        if new not in kept:
            raise SettingsError(f"override_classes: {new}, to override {old}, is no kept class; take one of {kept}")
    following = {old: next((c for c in kept if c > old), kept[0]) for old in forgotten}
    return [chosen.get(old, following[old]) for old in forgotten]


class ScoreForgetting(OwnPasses):
    """The objective ``"sfd"``, of one-step generators; λ is the forget term's weight, the remain term's being 1-λ."""

    lambda_role = "weight"
    learns_target = True

    def trained(self, model: Any) -> nn.Module:
        """The generator."""
        return model.generator

    def learner(self, model: Any, settings: RunSettings) -> Learner:
        """The fake network; by Adam without momentum, as SFD's code has it, whatever the run's own optimizer."""
        return Learner(model.fake, settings.fake_learning_rate or settings.learning_rate)

    def check(self, data: TaskData, settings: RunSettings) -> None:
        """Raise :class:`SettingsError` for overrides that cannot be."""
        self.prepare(data, settings)

    def prepare(self, data: TaskData, settings: RunSettings) -> Classes:
        """The classes and their overrides."""
        if data.retain_labels is None or data.forget_labels is None:
            raise SettingsError("objective='sfd' forgets classes, and this task's data has no labels")
        forgotten = data.forget_labels.unique()
        kept = data.retain_labels.unique()
        kept = kept[~torch.isin(kept, forgotten)]
        overrides = override_pairs(kept.tolist(), forgotten.tolist(), settings.override_classes)
        return Classes(kept, forgotten, torch.tensor(overrides, device=kept.device), settings.redraw_samples)

    def complete(self, batch: Batch, data: TaskData, prepared: Classes, generator: torch.Generator) -> Batch:
        """``batch`` with the classes, noises and timesteps of both sides."""
        return batch._replace(extra=tuple(
            self._draw(batch, labels, teacher_labels, generator, redraw=prepared.redraw)
            for labels, teacher_labels in ((prepared.kept, prepared.kept), (prepared.forgotten, prepared.overrides))
        ))  # fmt: skip

    def _draw(
        self, batch: Batch, labels: Tensor, teacher_labels: Tensor, generator: torch.Generator, *, redraw: bool
    ) -> ScoreDraw:
        size, device = len(batch.timesteps), generator.device
        place = torch.randint(len(labels), (size,), generator=generator, device=device)
        noises = [torch.randn(batch.noise.shape, generator=generator, device=device) for _ in range(3 + redraw)]
        shares = torch.rand(2, size, generator=generator, device=device)
        return ScoreDraw(
            labels[place], teacher_labels[place], noises[0], noises[1], shares[0], noises[2], shares[1], *noises[3:]
        )

    def passes(self, model: Any, batch: Batch, lambda_: Tensor, context: Context, learner: Learner | None) -> Passes:
        """Generate both sides, let the fake network learn them, and compare scores."""
        alphas_cumprod, s = context.alphas_cumprod, context.settings
        samples = [sfd.generate(model.generator, d.noise, d.labels, alphas_cumprod, model.start) for d in batch.extra]
        if learner is not None:
            learner.step(self._fake_loss(model, samples, batch, context), max_grad_value=s.max_grad_value)
        scores = [
            self._scores(model, x, draw, alphas_cumprod, s.score_alpha)
            for x, draw in zip(samples, batch.extra, strict=True)
        ]
        weights = (1.0 - lambda_).expand_as(batch.uniforms), lambda_.expand_as(batch.uniforms)
        coefs = context.retain_coef, context.forget_coef
        retain, forget = (c * (w * x.surrogate).mean() for c, w, x in zip(coefs, weights, scores, strict=True))
        losses = [c * (w * x.divergence).mean() for c, w, x in zip(coefs, weights, scores, strict=True)]
        nothing, both = samples[0].detach()[:0], torch.arange(2, device=lambda_.device).bool()
        loss = losses[0] + s.forget_scale * losses[1]
        terms = siss.SISSTerms(
            losses[0], losses[1], loss, scores[0].divergence, scores[1].divergence, *weights, nothing, nothing
        )
        passes = Passes(retain, forget, terms, both)
        return self._with_siss(passes, model, batch, lambda_, context) if s.hybrid_coef > 0 else passes

    def _fake_loss(self, model: Any, samples: list[Tensor], batch: Batch, context: Context) -> Tensor:
        """The fake network's loss on the samples of both sides, or on such as are drawn for it."""
        draws, alphas_cumprod, s = batch.extra, context.alphas_cumprod, context.settings
        if s.redraw_samples:
            with torch.no_grad():
                samples = [
                    sfd.generate(model.generator, d.fake_start, d.labels, alphas_cumprod, model.start) for d in draws
                ]
        labels, noise, shares = (
            torch.cat([getattr(d, name) for d in draws]) for name in ("labels", "fake_noise", "fake_timesteps")
        )
        span = SCORE_TIMESTEPS if s.fake_timesteps == "scores" else (0.0, 1.0)
        timesteps = _timesteps(shares, len(alphas_cumprod), span)
        weights = None
        if s.fake_forget_coef != 1.0:
            weights = torch.ones_like(shares)
            weights[len(shares) // 2 :] = s.fake_forget_coef
        drawn = torch.cat(samples).detach()
        loss = sfd.denoising_loss(model.fake, drawn, labels, noise, timesteps, alphas_cumprod, weights)
        return loss * 2 * drawn[0].numel() if s.loss_reduction == "sum" else loss

    def _scores(
        self, model: Any, samples: Tensor, draw: ScoreDraw, alphas_cumprod: Tensor, alpha: float
    ) -> sfd.ScoreTerms:
        timesteps = _timesteps(draw.timesteps, len(alphas_cumprod), SCORE_TIMESTEPS)
        return sfd.score_terms(
            samples, draw.score_noise, timesteps, alphas_cumprod, teacher=model.teacher, fake=model.fake,
            teacher_labels=draw.teacher_labels, fake_labels=draw.labels, alpha=alpha,
        )  # fmt: skip

    def _with_siss(self, passes: Passes, model: Any, batch: Batch, lambda_: Tensor, context: Context) -> Passes:
        """``passes`` and h L_SISS of the generator's network on real pairs at its own timestep."""
        s, start = context.settings, torch.full_like(batch.timesteps, model.start)
        draw = mix(batch._replace(timesteps=start), context.alphas_cumprod, lambda_)
        pred = model.generator(draw.x_t, draw.timesteps, draw.labels)
        options = {
            "retain_coef": context.retain_coef,
            "forget_coef": context.forget_coef,
            "forget_scale": s.forget_scale,
        }
        direct = siss.siss_terms(pred, draw.targets, **options)
        with torch.no_grad():
            own = self.lambda_gradients(passes.terms, passes.from_forget, lambda_, **options)
            added = siss.lambda_gradients(direct, draw.from_forget, lambda_, **options)
            slopes = {name: value + s.hybrid_coef * added[name] for name, value in own.items()}
            terms = passes.terms._replace(siss_loss=passes.terms.siss_loss + s.hybrid_coef * direct.siss_loss)
        return passes._replace(
            terms=terms, direct=s.hybrid_coef * direct.siss_loss, from_forget=draw.from_forget, lambda_gradients=slopes
        )
