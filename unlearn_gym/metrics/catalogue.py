"""What every metric means: range, direction, cost and source. The report and docs/metrics.md are made from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher", "oracle", ""]


@dataclass(frozen=True)
class Metric:
    """A metric as tables head, print and explain it.

    ``better`` is the direction: ``"oracle"`` is closer to the retrained oracle's own value, ``""`` none. ``cost`` is
    in network evaluations of one sample at one timestep, for the default sizes. ``range`` is what can happen: "a to b",
    "≥ a", "≤ a" or "any", with C the number of classes and D the number of pixels, and after a semicolon what differs.
    """

    name: str
    title: str
    form: Callable[[float], str]
    better: Better
    range: str
    cost: str
    source: str
    meaning: str


def share(value: float) -> str:
    """As a percentage."""
    return f"{100 * value:.1f} %"


def places(digits: int) -> Callable[[float], str]:
    """With so many digits after the point."""
    return lambda value: f"{value:.{digits}f}"


FROM_SAMPLES = "samples of the forget labels: 20,000"
FROM_QUALITY = "samples of the retained labels: 20,000"

ESTIMATE = "any; in expectation ≥ 0"
DISTANCE = "0 to √D; of points ≥ 0"
BITS = "any; bits/dim"

METRICS = (
    Metric(
        "forget_rate", "forget rate", share, "lower", "0 to 1", FROM_SAMPLES, "share with Wilson's interval (1927)",
        "share of samples under the forget data's labels (of all samples, unconditional) called forget data",
    ),
    Metric(
        "forget_loss", "forget loss", places(4), "oracle", "≥ 0", "3,000", "Ho et al. (2020), eq. 14",
        "noise-prediction loss of the forget set on a fixed grid of ten timesteps, a mean over pixels; of a VAE the "
        "negative ELBO, nats per pixel without the decoder's constant; of a one-step generator its fake network's",
    ),
    Metric(
        "retain_loss", "retain loss", places(4), "lower", "≥ 0", "3,000", "Ho et al. (2020), eq. 14",
        "the same of held-out retain data",
    ),
    Metric(
        "score", "score", places(3), "higher", "≤ 1", "none", 'the Φ of `reward="potential"`',
        "share of the way from the untouched model's forget loss to the oracle's, less w times the "
        "relative rise of the retain loss (w: `potential_retain_coef`, 10): 0 for the untouched model",
    ),
    Metric(
        "feature_kid", "KID (features)", places(2), "lower", ESTIMATE, FROM_QUALITY, "Bińkowski et al. (2018)",
        "kernel distance of the task classifier's features to held-out retain data; not Inception's. An unbiased "
        "estimate on unnormalised features: of a few hundred samples it varies by a few units, below 0 too",
    ),
    Metric(
        "feature_fid", "FID (features)", places(2), "lower", "≥ 0", FROM_QUALITY, "Heusel et al. (2017)",
        "Fréchet distance of the task classifier's features to held-out retain data; not Inception's",
    ),
    Metric(
        "class_accuracy", "class accuracy", share, "higher", "0 to 1", FROM_QUALITY, "–",
        "share of class-conditional samples of retained labels that the classifier assigns to their label",
    ),
    Metric(
        "class_imbalance", "class imbalance", places(3), "lower", "0 to 1", FROM_QUALITY, "total variation distance",
        "distance of the samples' classes from those asked for (unconditional: from held-out retain data's); on "
        "gaussians-2d that of the mode weights",
    ),
    Metric(
        "class_score", "class score", places(2), "higher", "1 to C", FROM_QUALITY, "Salimans et al. (2016)",
        "the Inception Score's formula on the task classifier's probabilities",
    ),
    Metric(
        "precision", "precision", places(3), "higher", "0 to 1", FROM_QUALITY, "Kynkäänniemi et al. (2019)",
        "share of samples whose features lie within the reference's, k = 3, sets of equal size",
    ),
    Metric(
        "recall", "recall", places(3), "higher", "0 to 1", FROM_QUALITY, "Kynkäänniemi et al. (2019)",
        "share of the reference whose features lie within the samples'",
    ),
    Metric(
        "reconstruction_distance", "reconstruction", places(3), "oracle", DISTANCE, "1,000", "–",
        "mean distance, pixels in [0, 1], points as they are, of forget samples noised to 0.3 T and what the model "
        "makes of them in ten steps (of a one-step generator its fake network; of a VAE: images and what it decodes at "
        "their mean latents): small while it remembers",
    ),
    Metric(
        "membership_auc", "membership AUC", places(3), "oracle", "0 to 1", "6,000", "Yeom et al. (2018)",
        "chance that a forget sample's loss is below that of data of its kind that no model saw: 0.5 reveals nothing, "
        "below it the forget set stands out by high losses",
    ),
    Metric(
        "copy_rate", "copies", share, "lower", "0 to 1", FROM_SAMPLES, "–",
        "share of samples of the forget labels closer to the forget set than all but 0.1 % of real retain data: of its "
        "kind, if not of its very images; the report says how much unseen data of that kind is",
    ),
    Metric(
        "copy_distance", "copy distance", places(2), "higher", DISTANCE, FROM_SAMPLES, "–",
        "median distance of these samples to the forget set, pixels in [0, 1], points as they are",
    ),
    Metric(
        "ssim_copy", "SSIM to copy", places(3), "lower", "-1 to 1", FROM_SAMPLES, "Wang et al. (2004)",
        "mean structural similarity of these samples and their closest forget image",
    ),
    Metric(
        "ssim_mean", "SSIM to mean", places(3), "", "-1 to 1", FROM_QUALITY, "arXiv 2512.01054's public code",
        "mean structural similarity of samples and the mean of held-out retain data, as the paper has it: says little, "
        "as real images are unlike their mean, too",
    ),
    Metric(
        "oracle_error", "oracle error", places(4), "lower", "≥ 0", "4,000", "–",
        "mean squared difference of the noise predictions (of a VAE: reconstructions; of a one-step generator: "
        "those of its fake network) to the oracle's, on forget and "
        "held-out retain data",
    ),
    Metric(
        "oracle_fid", "FID to oracle", places(2), "lower", "≥ 0", FROM_QUALITY, "Heusel et al. (2017)",
        "Fréchet distance of features to those of the oracle's samples of other noise; the oracle's own row is a floor",
    ),
    Metric(
        "oracle_kid", "KID to oracle", places(2), "lower", ESTIMATE, FROM_QUALITY, "Bińkowski et al. (2018)",
        "kernel distance of features to those of the oracle's samples of other noise",
    ),
    Metric(
        "optimum_error", "optimum error", places(4), "lower", "≥ 0", "3,000", "closed form, tasks/gaussians.py",
        "mean squared difference of the noise predictions to the best possible ones for the retain data alone, on "
        "held-out retain data; where that is known: gaussians-2d",
    ),
    Metric(
        "nll_bound_forget", "NLL bound, forget", places(3), "oracle", BITS, "1,000 a sample",
        "Ho et al. (2020), eq. 5", "variational bound of the forget set's negative log-likelihood",
    ),
    Metric(
        "nll_bound_retain", "NLL bound, retain", places(3), "lower", BITS, "1,000 a sample",
        "Ho et al. (2020), eq. 5", "the same of held-out retain data",
    ),
    Metric(
        "nll_ode_forget", "NLL (ODE), forget", places(3), "oracle", BITS, "100 a sample, with backward passes",
        "Song et al. (2021), eq. 39",
        "negative log-likelihood of the forget set by the probability-flow ODE, from one drawn x_1 (likelihood.py)",
    ),
    Metric(
        "nll_ode_retain", "NLL (ODE), retain", places(3), "lower", BITS, "100 a sample, with backward passes",
        "Song et al. (2021), eq. 39", "the same of held-out retain data",
    ),
    Metric(
        "nll_elbo_forget", "NLL (ELBO), forget", places(3), "oracle", BITS, "1 a sample",
        "Kingma and Welling (2014)", "negative evidence lower bound of the forget set under a VAE, from one latent",
    ),
    Metric(
        "nll_elbo_retain", "NLL (ELBO), retain", places(3), "lower", BITS, "1 a sample",
        "Kingma and Welling (2014)", "the same of held-out retain data",
    ),
    Metric(
        "nll_iw_forget", "NLL (IW), forget", places(3), "oracle", BITS, "50 a sample",
        "Burda et al. (2016), eq. 8",
        "importance-weighted bound of the forget set's negative log-likelihood under a VAE, 50 latents",
    ),
    Metric(
        "nll_iw_retain", "NLL (IW), retain", places(3), "lower", BITS, "50 a sample",
        "Burda et al. (2016), eq. 8",
        "the same of held-out retain data",
    ),
    Metric(
        "multi_step_forget_rate", "forget rate, many steps", share, "lower", "0 to 1", FROM_SAMPLES, "–",
        "the forget rate of samples that a one-step generator's fake network draws in many steps",
    ),
    Metric(
        "multi_step_kid", "KID, many steps", places(2), "lower", ESTIMATE, FROM_QUALITY, "Bińkowski et al. (2018)",
        "KID (features) of such samples",
    ),
    Metric(
        "multi_step_accuracy", "class accuracy, many steps", share, "higher", "0 to 1", FROM_QUALITY, "–",
        "class accuracy of such samples",
    ),
    Metric(
        "inception_fid", "FID (Inception)", places(2), "lower", "≥ 0", FROM_QUALITY, "Heusel et al. (2017)",
        "Fréchet distance of Inception features to held-out retain data, where the user has torch-fidelity's weights",
    ),
    Metric(
        "inception_kid", "KID (Inception)", places(4), "lower", ESTIMATE, FROM_QUALITY, "Bińkowski et al. (2018)",
        "kernel distance of the same features",
    ),
    Metric(
        "inception_score", "Inception Score", places(2), "higher", "1 to 1008", FROM_QUALITY, "Salimans et al. (2016)",
        "on Inception's own logits",
    ),
    Metric(
        "mean_lambda", "mean λ", places(2), "", "λ_min to λ_max; of `finetune` 0", "none", "–", "mean of the run's λ",
    ),
    Metric(
        "episode_return", "return", places(2), "higher", "any", "none", "arXiv 2512.01054, section 5.3",
        "sum of the run's rewards; of the paper's literal ones unless `reward` says otherwise",
    ),
)  # fmt: skip

BY_NAME = {metric.name: metric for metric in METRICS}
OF_RUNS = ("score", "mean_lambda", "episode_return")
MEASURED = tuple(name for name in BY_NAME if name not in OF_RUNS)
"""Metrics of a model; the others are of a run."""
MAIN = (
    "forget_rate", "forget_loss", "retain_loss", "score", "feature_kid", "feature_fid", "class_accuracy", "mean_lambda",
    "episode_return",
)  # fmt: skip
"""Metrics of the main table; the others stand in the report's full one."""


def metrics_page() -> str:
    """docs/metrics.md."""
    directions = {"oracle": "closer to the oracle", "": "–"}
    rows = [
        f"| `{m.name}` | {m.meaning} | {m.range} | {directions.get(m.better, m.better)} | {m.cost} | {m.source} |"
        for m in METRICS
    ]
    return "\n".join([METRICS_HEAD, *rows]) + "\n"


METRICS_HEAD = """# Metrics

Made by `unlearn-gym metrics`. Cost is in network evaluations of one sample at one timestep, at the default sizes (1,000
samples of either kind in 20 steps); an update makes about 50 at batch 16. A metric that cannot be computed is absent
from `results.json`, with the reason under `absent`. Features are those of the task's own classifier: figures compare
models of one task in this package and nothing else.

| metric | what it is | range | better | cost | source |
|---|---|---|---|---|---|"""
