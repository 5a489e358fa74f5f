"""A small class-conditional diffusion transformer, the model of the packaged weights `dit-fashion`.

The model is DiT (Peebles and Xie 2023, arXiv 2212.09748): patches as tokens, and each block scaled and shifted by time
and class (adaLN-Zero). It predicts the velocity of a rectified flow (Liu et al. 2023, arXiv 2209.03003):

    x_t = (1 - t) x_0 + t e,  e ~ N(0, I),  t in [0, 1];   v = e - x_0;   loss = mean (v' - v)^2.

Here the norms have their own weights, so that methods that train norms have a place, positions are learned, and
"no class" is the zero vector. It replaces a pretrained model where no model hub is available.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import ModelOutput

FREQUENCIES = 32


class DiffusionConfig(PretrainedConfig):
    """Sizes of the model; `id2label` names the classes it knows."""

    model_type = "peftree-dit"
    hidden_size: int = 96
    num_hidden_layers: int = 5
    num_attention_heads: int = 3
    intermediate_size: int = 256
    image_size: int = 28
    patch_size: int = 4
    num_channels: int = 1
    initializer_range: float = 0.08
    layer_norm_eps: float = 1e-6


@dataclass
class Velocity(ModelOutput):
    """The output of the model and of its backbone.

    Attributes:
        loss: the model's loss, if there was a target.
        velocity: `[batch, channels, side, side]`.
        last_hidden_state: the backbone's normed tokens, `[batch, patches, d]`.
        hidden_states: if asked for, the tokens before the first block and after each.
    """

    loss: Tensor | None = None
    velocity: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class ZeroLinear(nn.Linear):
    """A linear map that starts at zero."""


class Patches(nn.Module):
    """Images `[batch, channels, side, side]` to tokens `[batch, patches, d]` with positions."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, size, stride=size)
        self.position_embeddings = nn.Parameter(torch.empty(1, (config.image_size // size) ** 2, config.hidden_size))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return tokens `[batch, patches, d]`."""
        tokens: Tensor = self.projection(pixel_values).flatten(2).transpose(1, 2)
        return tokens + self.position_embeddings


class Time(nn.Module):
    """Times `[batch]` in 0..1 to vectors `[batch, d]`: sines and cosines of 1000 t, then two linear maps."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2 * FREQUENCIES, config.hidden_size)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Return vectors `[batch, d]`."""
        powers = torch.arange(FREQUENCIES, device=timesteps.device) / FREQUENCIES
        angles = 1000.0 * timesteps.float()[:, None] * 10000.0**-powers
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.fc1.weight.dtype)
        vectors: Tensor = self.fc2(functional.silu(self.fc1(waves)))
        return vectors


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return softmax(q k' scaling + mask) v `[batch, tokens, heads, head_dim]` and the weights; transformers' name."""
    scores = query @ key.transpose(2, 3) * scaling
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


class Attention(nn.Module):
    """Self-attention over the patches through transformers' attention interface."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.is_causal = False
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return what the sub-layer adds, `[batch, patches, d]`, before its gate."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, _ = attend(self, q, k, v, None, dropout=0.0, scaling=self.head_dim**-0.5)
        out: Tensor = self.o_proj(mixed.flatten(2))
        return out


class FeedForward(nn.Module):
    """Two linear maps with GELU between."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return what the sub-layer adds, `[batch, patches, d]`, before its gate."""
        out: Tensor = self.fc2(self.act(self.fc1(hidden_states)))
        return out


class Block(GradientCheckpointingLayer):
    """adaLN-Zero: x + g1 attention(norm(x) (1 + s1) + b1), then the same with the feed-forward network.

    b1 s1 g1 b2 s2 g2 are a linear map of the condition that starts at zero, so a fresh block is the identity.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FeedForward(config)
        self.modulation = ZeroLinear(config.hidden_size, 6 * config.hidden_size)

    def forward(self, hidden_states: Tensor, condition: Tensor) -> Tensor:
        """Return the new hidden states; both `[batch, patches, d]`, the condition `[batch, d]`."""
        b1, s1, g1, b2, s2, g2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = hidden_states + g1 * self.attention(self.norm1(hidden_states) * (1 + s1) + b1)
        out: Tensor = x + g2 * self.mlp(self.norm2(x) * (1 + s2) + b2)
        return out


class _Base(PreTrainedModel):
    """What transformers needs to know about the model and its backbone."""

    config_class = DiffusionConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (transformers' own declaration)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ZeroLinear):
            for parameter in module.parameters():
                init.zeros_(parameter)
            return
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, Patches):
            init.normal_(module.position_embeddings, std=self.config.initializer_range)


class DiffusionBackbone(_Base):
    """The transformer: noisy images, times and class vectors to velocities."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__(config)
        width, side = config.hidden_size, config.patch_size
        self.embeddings = Patches(config)
        self.time = Time(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.modulation = ZeroLinear(width, 2 * width)
        self.output = ZeroLinear(width, side**2 * config.num_channels)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self, pixel_values: Tensor, timesteps: Tensor, class_vectors: Tensor, output_hidden_states: bool = False
    ) -> Velocity:
        """Return velocities and hidden states.

        Args:
            pixel_values: x_t, `[batch, channels, side, side]`.
            timesteps: t, `[batch]`.
            class_vectors: `[batch, d]`, zeros for no class.
            output_hidden_states: whether to return those of every block.
        """
        x = self.embeddings(pixel_values.to(self.output.weight.dtype))
        condition = functional.silu(self.time(timesteps) + class_vectors)
        states = [x]
        for layer in self.layers:
            x = layer(x, condition)
            states += [x] if output_hidden_states else []
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        x = self.norm(x) * (1 + scale) + shift
        size = self.config.patch_size
        velocity = functional.fold(self.output(x).mT, self.config.image_size, kernel_size=size, stride=size)
        seen = tuple(states) if output_hidden_states else None
        return Velocity(velocity=velocity, last_hidden_state=x, hidden_states=seen)


class DiffusionTransformer(_Base):
    """The backbone with a vector for each class: the head, which is new for new classes."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__(config)
        self.backbone = DiffusionBackbone(config)
        self.class_vectors = ZeroLinear(len(config.id2label or {}), config.hidden_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self, pixel_values: Tensor, timesteps: Tensor, classes: Tensor | None = None, labels: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> Velocity:  # fmt: skip
        """Predict velocities, and the loss if there is a target.

        Args:
            pixel_values: x_t, `[batch, channels, side, side]`, images in -1..1.
            timesteps: t in 0..1, `[batch]`.
            classes: index of each row's class, -1 for none, int64 `[batch]`; None: no row has one.
            labels: the velocity e - x_0, as `pixel_values`.
            output_hidden_states: whether to return those of every block.
        """
        if classes is None:
            classes = torch.full_like(timesteps, -1, dtype=torch.long)
        weight = self.backbone.output.weight
        chosen = functional.one_hot(classes + 1, self.class_vectors.in_features + 1)[:, 1:].to(weight.dtype)
        out = self.backbone(pixel_values, timesteps, self.class_vectors(chosen), output_hidden_states)
        velocity, states = out.velocity, out.hidden_states
        loss = None if labels is None else functional.mse_loss(velocity.float(), labels.float())
        return Velocity(loss=loss, velocity=velocity, hidden_states=states)

    def rename(self, names: list[str]) -> list[str]:
        """Give the model the classes `names`: known ones keep their vector, new ones start at zero. Return the new."""
        old = {name: int(index) for index, name in (self.config.id2label or {}).items()}
        before = self.class_vectors.weight
        made = ZeroLinear(len(names), self.config.hidden_size, bias=False, device=before.device, dtype=before.dtype)
        with torch.no_grad():
            made.weight.zero_()
            for index, name in enumerate(names):
                if name in old:
                    made.weight[:, index] = before[:, old[name]]
        self.class_vectors = made
        self.config.id2label = dict(enumerate(names))
        self.config.label2id = {name: index for index, name in enumerate(names)}
        return [name for name in names if name not in old]


def flow(pixels: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return x_t and the velocity v of the flow from `pixels` (t = 0) to `noise` (t = 1).

    Args:
        pixels, noise: `[batch, channels, side, side]`.
        timesteps: t, `[batch]`.
    """
    t = timesteps.view(-1, 1, 1, 1)
    return (1 - t) * pixels + t * noise, noise - pixels


@torch.no_grad()
def sample(
    model: DiffusionTransformer, classes: list[int], steps: int = 25, guidance: float = 2.0, seed: int = 0
) -> Tensor:
    """Draw an image for each class: Euler steps of the flow from noise to image, in the model's mode.

    Args:
        model: the model in its current state, with or without an adapter.
        classes: index of a class for each image, -1 for none.
        steps: calls of the model.
        guidance: w of v(none) + w (v(class) - v(none)) (Ho and Salimans 2022); 1: none, and half the work.
        seed: the seed of the noise.

    Returns:
        Values in -1..1, `[len(classes), channels, side, side]`, float32.
    """
    config, device = model.config, model.device
    shape = (len(classes), config.num_channels, config.image_size, config.image_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    wanted = torch.tensor(classes, device=device)
    for step in range(steps):
        t = torch.full((len(classes),), 1 - step / steps, device=device)
        v = model(x, t, wanted).velocity.float()
        if guidance != 1:
            free = model(x, t).velocity.float()
            v = free + guidance * (v - free)
        x = x - v / steps
    return x.clamp(-1, 1)


AutoConfig.register(DiffusionConfig.model_type, DiffusionConfig)
AutoModel.register(DiffusionConfig, DiffusionTransformer)
