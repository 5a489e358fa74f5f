"""A translation model as Marian makes them for small machines: transformer encoder, decoder of simple recurrent units.

Encoder: post-norm transformer layers. Decoder: in each layer a simpler simple recurrent unit (SSRU, Kim et al. 2019,
https://aclanthology.org/D19-5632, section 3.1) stands where self-attention would, then attention to the encoder, then a
feed-forward network, each with a residual and a norm after it:

    f_t = sigmoid(F x_t + b),   c_t = f_t c_(t-1) + (1 - f_t) W x_t,   o_t = relu(c_t).

So c_t is a mean of the W x_s up to t with weights that the gates decide: W has the part of attention's values, F that
of its keys. Positions are sines, embeddings are scaled by sqrt(d) and shared with the output. The decoder starts from
the zero vector: the embedding of its start token reads as zero, whatever the table holds there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peftree.assets.dit import eager_attention_forward


class SsruConfig(PretrainedConfig):
    """Sizes of the model, under the names that Marian's config has in transformers."""

    model_type = "peftree-ssru"
    attribute_map = {  # noqa: RUF012  (transformers' own declaration)
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }
    vocab_size: int = 32000
    d_model: int = 256
    encoder_layers: int = 6
    decoder_layers: int = 2
    encoder_attention_heads: int = 8
    decoder_attention_heads: int = 8
    encoder_ffn_dim: int = 1536
    decoder_ffn_dim: int = 1536
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    is_encoder_decoder: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | None = 0
    decoder_start_token_id: int | None = 0


class Embedding(nn.Embedding):
    """Rows of the table times sqrt(d); zero for the token `start`."""

    def __init__(self, config: SsruConfig, start: int | None = None) -> None:
        super().__init__(config.vocab_size, config.d_model)
        self.start = start

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's own name)
        """Return vectors `[..., d]` for ids `[...]`."""
        found: Tensor = super().forward(input) * self.embedding_dim**0.5
        return found if self.start is None else found.masked_fill((input == self.start)[..., None], 0.0)


def positions(like: Tensor, places: Tensor | None, start: int = 0) -> Tensor:
    """Return the vectors of positions, `[batch or 1, tokens, d]`: d/2 sines, then as many cosines.

    Args:
        like: hidden states `[batch, tokens, d]`, for sizes, dtype and device.
        places: the positions, int64 `[batch or 1, tokens]`; None: one by one from `start` on.
        start: position of the first token.
    """
    half, device = like.shape[-1] // 2, like.device
    if places is None:
        places = torch.arange(start, start + like.shape[1], device=device)[None]
    rates = 10000.0 ** (-torch.arange(half, device=device, dtype=torch.float32) / max(half - 1, 1))
    angles = places[..., None].float() * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(like.dtype)


class Attention(nn.Module):
    """Attention through transformers' interface, to the tokens themselves or to those of the encoder."""

    def __init__(self, config: SsruConfig, heads: int, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.head_dim = config.d_model // heads
        self.is_causal = False
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.d_model, config.d_model) for _ in range(4)
        )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, encoded: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
    ) -> Tensor:  # fmt: skip
        """Return what the sub-layer adds, `[batch, tokens, d]`; keys and values are of `encoded`, if given."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        cache = None if past_key_values is None else past_key_values.cross_attention_cache
        if past_key_values is not None and past_key_values.is_updated.get(self.index):
            assert cache is not None
            layer: Any = cache.layers[self.index]
            k, v = layer.keys, layer.values
        else:
            seen = hidden_states if encoded is None else encoded
            wide = (*seen.shape[:-1], -1, self.head_dim)
            k, v = (p(seen).view(wide).transpose(1, 2) for p in (self.k_proj, self.v_proj))
            if past_key_values is not None and cache is not None:
                k, v = cache.update(k, v, self.index)
                past_key_values.is_updated[self.index] = True
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, _ = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.head_dim**-0.5)
        out: Tensor = self.out_proj(mixed.flatten(2))
        return out


class Recurrence(nn.Module):
    """The recurrent unit: `candidate` is W, `forget` is F with its bias."""

    def __init__(self, config: SsruConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.candidate = nn.Linear(config.d_model, config.d_model, bias=False)
        self.forget = nn.Linear(config.d_model, config.d_model)

    def forward(
        self, hidden_states: Tensor, kept: Tensor | None = None, past_key_values: EncoderDecoderCache | None = None
    ) -> Tensor:
        """Return what the sub-layer adds, `[batch, tokens, d]`; tokens outside `kept` leave the state as it is.

        The cache holds gates and gated candidates of the tokens before, as it would hold keys and values: beams may
        reorder it and a prompt may be cut off, which one running state could not undo.
        """
        forget = torch.sigmoid(self.forget(hidden_states))
        added = (1 - forget) * self.candidate(hidden_states)
        if kept is not None:
            forget, added = forget.masked_fill(~kept, 1.0), added.masked_fill(~kept, 0.0)
        if past_key_values is not None:
            cache = past_key_values.self_attention_cache
            gates, adds = cache.update(forget[:, None], added[:, None], self.index)
            forget, added = gates[:, 0], adds[:, 0]
        state, states = torch.zeros_like(added[:, 0]), []
        for step in range(added.shape[1]):
            state = torch.addcmul(added[:, step], forget[:, step], state)
            states.append(state)
        return functional.relu(torch.stack(states[-hidden_states.shape[1] :], dim=1))


class EncoderLayer(GradientCheckpointingLayer):
    """Self-attention and a feed-forward network."""

    def __init__(self, config: SsruConfig, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, config.encoder_attention_heads, index)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the new hidden states `[batch, tokens, d]`."""
        x = self.self_attn_layer_norm(hidden_states + self.self_attn(hidden_states, attention_mask))
        out: Tensor = self.final_layer_norm(x + self.fc2(functional.relu(self.fc1(x))))
        return out


class DecoderLayer(GradientCheckpointingLayer):
    """The recurrent unit, attention to the encoder, and a feed-forward network."""

    def __init__(self, config: SsruConfig, index: int) -> None:
        super().__init__()
        self.recurrence = Recurrence(config, index)
        self.recurrence_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.encoder_attn = Attention(config, config.decoder_attention_heads, index)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.d_model, config.decoder_ffn_dim)
        self.fc2 = nn.Linear(config.decoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, kept: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None, past_key_values: EncoderDecoderCache | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the new hidden states `[batch, tokens, d]`; for `kept` see `Recurrence`."""
        x = self.recurrence_layer_norm(hidden_states + self.recurrence(hidden_states, kept, past_key_values))
        seen = self.encoder_attn(x, encoder_attention_mask, encoder_hidden_states, past_key_values)
        x = self.encoder_attn_layer_norm(x + seen)
        out: Tensor = self.final_layer_norm(x + self.fc2(functional.relu(self.fc1(x))))
        return out


class _Base(PreTrainedModel):
    """What transformers wants to know of the model and its parts."""

    config_class = SsruConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["EncoderLayer", "DecoderLayer"]  # noqa: RUF012  (transformers' own declaration)


class SsruEncoder(_Base):
    """Token ids to vectors that the decoder looks at."""

    def __init__(self, config: SsruConfig) -> None:
        super().__init__(config)
        self.embed_tokens = Embedding(config)
        self.layers = nn.ModuleList(EncoderLayer(config, i) for i in range(config.encoder_layers))
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, position_ids: Tensor | None = None, output_hidden_states: bool = False,
        **_: Any,
    ) -> BaseModelOutput:  # fmt: skip
        """Return hidden states.

        Args:
            input_ids: `[batch, tokens]`.
            attention_mask: 1 for tokens, 0 for padding, `[batch, tokens]`; None: no padding.
            inputs_embeds: in place of `input_ids`, scaled already, `[batch, tokens, d]`.
            position_ids: `[batch or 1, tokens]`; None: counted from 0.
            output_hidden_states: return those before the first layer and after each.
        """
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = create_bidirectional_mask(self.config, x, attention_mask)
        x = x + positions(x, position_ids)
        states = [x]
        for layer in self.layers:
            x = layer(x, mask)
            states += [x] if output_hidden_states else []
        return BaseModelOutput(last_hidden_state=x, hidden_states=tuple(states) if output_hidden_states else None)


class SsruDecoder(_Base):
    """Token ids, one place later than those to predict, to vectors that predict them."""

    def __init__(self, config: SsruConfig) -> None:
        super().__init__(config)
        self.embed_tokens = Embedding(config, config.decoder_start_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.decoder_layers))
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None, encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, position_ids: Tensor | None = None,
        use_cache: bool | None = None, output_hidden_states: bool = False, **_: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:  # fmt: skip
        """Return hidden states, and the cache if one is used.

        Args:
            input_ids: `[batch, tokens]`; with a cache, those that are new.
            attention_mask: 0 for tokens, of the cache's too, that leave the state as it is, `[batch, all tokens]`.
            encoder_hidden_states: `[batch, source tokens, d]`.
            encoder_attention_mask: 1 for the encoder's tokens, 0 for padding, `[batch, source tokens]`.
            past_key_values: what earlier calls have left.
            inputs_embeds: in place of `input_ids`, scaled already, `[batch, tokens, d]`.
            position_ids: `[batch or 1, tokens]`; None: counted on from what the cache holds.
            use_cache: make a cache if none is given.
            output_hidden_states: return those before the first layer and after each.
        """
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        mask = create_bidirectional_mask(
            self.config, x, encoder_attention_mask, encoder_hidden_states=encoder_hidden_states
        )
        x = x + positions(x, position_ids, 0 if past_key_values is None else int(past_key_values.get_seq_length()))
        kept = None if attention_mask is None else attention_mask[:, -x.shape[1] :, None].bool()
        states = [x]
        for layer in self.layers:
            x = layer(x, encoder_hidden_states, kept, encoder_attention_mask=mask, past_key_values=past_key_values)
            states += [x] if output_hidden_states else []
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=x, past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
        )  # fmt: skip


class SsruTranslator(_Base, GenerationMixin):
    """Encoder, decoder, and logits over the vocabulary: the embedding's table with a bias of its own."""

    _tied_weights_keys = {  # noqa: RUF012  (transformers' own declaration)
        "decoder.embed_tokens.weight": "encoder.embed_tokens.weight",
        "lm_head.weight": "encoder.embed_tokens.weight",
    }

    def __init__(self, config: SsruConfig) -> None:
        super().__init__(config)
        self.encoder = SsruEncoder(config)
        self.decoder = SsruDecoder(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """Return the encoder's embedding; the decoder's has the same table."""
        return self.encoder.embed_tokens

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None, decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None, encoder_outputs: Any = None, past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None, decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None, output_hidden_states: bool = False, **_: Any,
    ) -> Seq2SeqLMOutput:  # fmt: skip
        """Return logits `[batch, tokens, vocabulary]`, and the loss if there are labels.

        Args:
            labels: ids to predict, `[batch, tokens]`, -100 where none is; without `decoder_input_ids` the decoder is
                given them one place later.
            encoder_outputs: what the encoder has returned, not to run it again.
            input_ids, attention_mask, inputs_embeds: see `SsruEncoder`; the others: see `SsruDecoder`.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        shown = bool(output_hidden_states)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds, output_hidden_states=shown)
        out = self.decoder(
            decoder_input_ids, decoder_attention_mask, encoder_hidden_states=encoder_outputs[0],
            encoder_attention_mask=attention_mask, past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds, use_cache=use_cache and labels is None, output_hidden_states=shown,
        )  # fmt: skip
        logits = self.lm_head(out.last_hidden_state)
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        return Seq2SeqLMOutput(
            loss=loss, logits=logits, past_key_values=out.past_key_values, decoder_hidden_states=out.hidden_states,
            encoder_last_hidden_state=encoder_outputs[0], encoder_hidden_states=encoder_outputs.get("hidden_states"),
        )  # fmt: skip

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Return what the decoder reads to predict `labels`: the start token, then all but the last."""
        shifted = labels.roll(1, dims=1).masked_fill(labels.roll(1, dims=1) == -100, self.config.pad_token_id)
        shifted[:, 0] = self.config.decoder_start_token_id
        return shifted


AutoConfig.register(SsruConfig.model_type, SsruConfig)
AutoModel.register(SsruConfig, SsruTranslator)
AutoModelForSeq2SeqLM.register(SsruConfig, SsruTranslator)
