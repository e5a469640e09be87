"""U-Nets of the diffusers library as ε-networks. The library is imported when one is built, not before."""

from __future__ import annotations

import inspect
import json
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from unlearn_gym.errors import SettingsError, error_line, shown
from unlearn_gym.math.diffusion import ScheduleConfig, per_sample

Architecture = Literal["UNet2DModel", "UNet2DConditionModel"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]

ALLOWED: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional", "learned"),
    "class_embed_type": (None,),
    "addition_embed_type": (None,),
    "encoder_hid_dim_type": (None,),
    "time_cond_proj_dim": (None,),
}
"""Arguments of the library's that make a network need more than x_t, an integer timestep and a label."""
MOST_BLOCKS, MOST_LAYERS = 16, 64
"""Of a network that a file from outside describes, and of each of its blocks: more than published ones have."""


class DiffusersConfig(BaseModel):
    """A U-Net of diffusers and what its output means. Calling it builds a :class:`DiffusersNetwork`.

    ``unet`` are the arguments of the ``architecture``'s class, as ``unet/config.json`` of a saved pipeline has them;
    what it leaves out has diffusers' default. ``schedule`` is the one that the network was trained with.

    ``num_classes`` gives a ``UNet2DConditionModel`` a learned class embedding for its cross-attention; networks with
    ``num_class_embeds`` among their arguments have one of their own and take none. ``learned_variance`` says that the
    network's second half of output channels are variances (Nichol and Dhariwal, 2021), which nothing here reads.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["diffusers"] = "diffusers"
    architecture: Architecture = "UNet2DModel"
    unet: dict[str, Any]
    prediction_type: PredictionType = "epsilon"
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    num_classes: int | None = Field(None, ge=1)
    learned_variance: bool = False

    @field_validator("unet", mode="after")
    @classmethod
    def _as_json_has_it(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Tuples as lists and keys in order, so that equal configs are equal and hash to the same."""
        try:
            plain: dict[str, Any] = json.loads(json.dumps(value, sort_keys=True, allow_nan=False))
        except TypeError as error:
            raise ValueError(f"it must hold what JSON knows ({error})") from None
        return plain

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    def __call__(self) -> DiffusersNetwork:
        """A freshly initialised network; draws from torch's global generator like every ``nn.Module``."""
        return DiffusersNetwork(self)


def completed(config: DiffusersConfig) -> DiffusersConfig:
    """``config`` with every argument that it leaves out, so that configs of one network are equal."""
    known = inspect.signature(getattr(import_diffusers(config.architecture), config.architecture).__init__).parameters
    defaults = {name: one.default for name, one in known.items() if one.default is not one.empty}
    given = {name: value for name, value in config.unet.items() if not name.startswith("_")}  # who wrote it, and when
    fields = {name: getattr(config, name) for name in DiffusersConfig.model_fields}
    return DiffusersConfig(**{**fields, "unet": {**defaults, **given, "dropout": 0.0}})  # dropout is always off


def excess(config: DiffusersConfig) -> str | None:
    """Which of its arguments give a network more blocks or layers than any should have; None if none does."""
    unet = config.unet
    for name in ("block_out_channels", "down_block_types", "up_block_types"):
        if isinstance(unet.get(name), list | str) and len(unet[name]) > MOST_BLOCKS:
            return f"{len(unet[name])} {name}, more than {MOST_BLOCKS}"
    names = ("layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block")
    layers, *within = (unet.get(name) for name in names)
    if _largest(layers) * _largest(within) > MOST_LAYERS:
        told = ", ".join(f"{name}={shown(unet[name])}" for name in names if name in unet)
        return f"{told}, more than {MOST_LAYERS} layers in a block"
    return None


def _largest(value: Any) -> float:
    """The largest number in nested lists, at least 1, and of those above :data:`MOST_LAYERS` no more than the next."""
    found, left = 1.0, [value]
    while left:
        item = left.pop()
        if isinstance(item, list):
            left.extend(item)
        elif isinstance(item, int | float):
            found = max(found, min(item, MOST_LAYERS + 1))
    return found


def to_epsilon(output: Tensor, x_t: Tensor, alpha_bars: Tensor, prediction_type: PredictionType) -> Tensor:
    """The noise ``(B, *S)`` that a network's ``output (B, *S)`` at ``x_t (B, *S)`` and ᾱ ``alpha_bars (B,)`` implies.

    Of ``x_t = √ᾱ x_0 + √(1-ᾱ) ε``: for ``"v_prediction"``, v = √ᾱ ε - √(1-ᾱ) x_0 (Salimans and Ho, 2022, appendix
    D), ε = √ᾱ v + √(1-ᾱ) x_t; for ``"sample"``, which is x_0, ε = (x_t - √ᾱ x_0) / √(1-ᾱ).

    Both factors of v are at most 1: its ε is as exact as v at every t. That of ``"sample"`` has √(ᾱ/(1-ᾱ)) times the
    error of x_0, which grows without bound as ᾱ → 1. As ᾱ → 0 both become x_t: the output hardly counts, and
    x_0 that a sampler makes of that ε has rounding errors of about 1e-7/√ᾱ, which its ``clip`` bounds.
    """
    if prediction_type == "epsilon":
        return output
    alpha_bars = per_sample(alpha_bars, x_t)
    signal, noise = alpha_bars.sqrt(), (1.0 - alpha_bars).sqrt()
    if prediction_type == "v_prediction":
        return signal * output + noise * x_t
    return (x_t - signal * output) / noise


class DiffusersNetwork(nn.Module):
    """``forward(x_t (B, C, H, W), timesteps (B,), labels (B,) or None) -> epsilon_pred (B, C, H, W)``.

    Labels go to ``class_labels`` where the network embeds them itself. Where it has cross-attention, it attends to
    one vector: the label's row of ``class_embedding``, or zeros for a network or a call without labels. Dropout is
    off, whatever the config says: it would draw from no seeded generator.

    ``channels`` is C, ``num_labels`` the number of labels (None for an unconditional network), and H and W must be
    multiples of ``size_factor``. ``fractional_timesteps`` says whether timesteps may be fractions: tables of ᾱ and of
    learned embeddings have no row for them. Raises :class:`SettingsError` for a config that cannot be built or served.
    """

    def __init__(self, config: DiffusersConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = _build_unet(config)
        values = self.unet.config
        _check(config, values)
        self.channels: int = values["in_channels"]
        self.num_labels: int | None = values["num_class_embeds"] or config.num_classes
        self._attends = config.architecture == "UNet2DConditionModel"
        self._embeds_labels = values["num_class_embeds"] is not None
        self.size_factor = 1 if self._attends else 2 ** (len(values["block_out_channels"]) - 1)
        self.class_embedding = (
            nn.Embedding(config.num_classes, values["cross_attention_dim"]) if config.num_classes else None
        )
        self.alphas_cumprod: Tensor | None
        alphas_cumprod = None if config.prediction_type == "epsilon" else config.schedule.alphas_cumprod()
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)
        learned_times = values.get("time_embedding_type") == "learned"
        self.fractional_timesteps: bool = alphas_cumprod is None and not learned_times

    def forward(self, x_t: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict the noise in ``x_t``."""
        named: dict[str, Tensor | None] = {"class_labels": labels if self._embeds_labels else None}
        if self._attends:
            named["encoder_hidden_states"] = self._attended(x_t, labels)
        elif labels is not None and not self._embeds_labels:
            raise ValueError("an unconditional network takes no labels")
        output: Tensor = self.unet(x_t, timesteps, return_dict=False, **named)[0][:, : self.channels]
        if self.alphas_cumprod is None:
            return output
        return to_epsilon(output, x_t, self.alphas_cumprod[timesteps], self.config.prediction_type)

    def _attended(self, x_t: Tensor, labels: Tensor | None) -> Tensor:
        """What cross-attention sees, ``(B, 1, cross_attention_dim)``."""
        if labels is None or self._embeds_labels:
            return x_t.new_zeros(len(x_t), 1, self.unet.config["cross_attention_dim"])
        if self.class_embedding is None:
            raise ValueError("an unconditional network takes no labels; give its config num_classes")
        embedded: Tensor = self.class_embedding(labels)[:, None]
        return embedded


def import_diffusers(what: str) -> Any:
    """The library; raises :class:`SettingsError`, which says that ``what`` needs it."""
    try:
        import diffusers
    except ImportError:
        raise SettingsError(f"{what} needs diffusers; install it with: pip install 'unlearn_gym[diffusers]'") from None
    return diffusers


def _build_unet(config: DiffusersConfig) -> Any:
    """The library's network, freshly initialised; raises :class:`SettingsError`."""
    library = import_diffusers(config.architecture)
    kind = getattr(library, config.architecture)
    try:
        return kind(**{**config.unet, "dropout": 0.0})
    except Exception as error:  # whatever its constructors raise for values that came from a file
        raise SettingsError(
            f"diffusers {library.__version__} cannot build the {config.architecture} of this config "
            f"({error_line(error)}); mend it, or install the diffusers that wrote it"
        ) from None


def _check(config: DiffusersConfig, values: Any) -> None:
    """Raise :class:`SettingsError` for a network that needs or gives what has no place here."""
    name = config.architecture
    for argument, allowed in ALLOWED.items():
        if values.get(argument, allowed[0]) not in allowed:
            wanted = " or ".join(repr(value) for value in allowed)
            raise SettingsError(f"{name} with {argument}={values[argument]!r} is not supported; it must be {wanted}")
    inputs, outputs = values["in_channels"], values["out_channels"]
    if outputs != (2 * inputs if config.learned_variance else inputs):
        raise SettingsError(
            f"{name} has in_channels={inputs} and out_channels={outputs}; they must agree, or, with variance_type "
            "'learned' or 'learned_range' in the scheduler's config, the second be twice the first"
        )
    embeds = values["num_class_embeds"]
    if embeds is not None and embeds < 1:
        raise SettingsError(f"num_class_embeds={embeds} must be at least 1; leave it out for a network without classes")
    steps = values.get("num_train_timesteps")  # the size of a learned table of time embeddings
    if values.get("time_embedding_type") == "learned" and steps < config.schedule.num_train_timesteps:
        raise SettingsError(
            f"{name} has learned embeddings of {steps} timesteps, the schedule "
            f"{config.schedule.num_train_timesteps} timesteps; num_train_timesteps of both configs must agree"
        )
    if name == "UNet2DConditionModel" and not isinstance(values["cross_attention_dim"], int):
        raise SettingsError(
            f"cross_attention_dim={values['cross_attention_dim']!r} is not supported; it must be one number"
        )
    if config.num_classes and (name != "UNet2DConditionModel" or values["num_class_embeds"] is not None):
        raise SettingsError(
            f"num_classes={config.num_classes} embeds labels for the cross-attention of a UNet2DConditionModel "
            "without num_class_embeds; leave it out, or for a UNet2DModel put num_class_embeds into unet"
        )
    blocks = (*values["down_block_types"], values.get("mid_block_type"), *values["up_block_types"])
    if config.num_classes and not any("CrossAttn" in str(block) for block in blocks):
        raise SettingsError(
            f"num_classes={config.num_classes} embeds labels for cross-attention, and this network has none; "
            "leave the class embedding out"
        )


def published_siss_network(num_class_embeds: int | None = None) -> DiffusersConfig:
    """The MNIST network of Alberti et al. (2025): a ``UNet2DModel`` on 28×28 with attention at 14×14.

    As in ``config/train_tshirt_mnist.yaml`` of github.com/claserken/SISS; there it is unconditional, ε-predicting and
    trained on the linear schedule of Ho et al. (2020). With ``num_class_embeds`` it is class-conditional.
    """
    return DiffusersConfig(
        unet={
            "sample_size": 28, "in_channels": 1, "out_channels": 1, "block_out_channels": [64, 128, 256],
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"], "num_class_embeds": num_class_embeds,
        },
    )  # fmt: skip


ARCHITECTURES: tuple[str, ...] = get_args(Architecture)
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)
