"""Prompt and prefix tuning, one tensor `prompt_embeddings` for the whole model, and LLaMA-Adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftree import sites as site_tree
from peftree.sites import Site
from peftree.store.hfpeft.dialect import Dialect, View, refuse
from peftree.store.hfpeft.links import PREFIX, InexpressibleError, Link
from peftree.store.hfpeft.schema import Common

NAME = "prompt_embeddings"


class TokenFields(Common):
    """Keys of both. `num_transformer_submodules` 2 stands for tokens of an encoder and of a decoder."""

    num_virtual_tokens: int = Field(ge=1, le=10000)
    token_dim: int | None = Field(None, ge=1)
    num_transformer_submodules: Literal[1] | None = 1
    num_attention_heads: int | None = Field(None, ge=1)
    num_layers: int | None = Field(None, ge=1)


def check_model(model: nn.Module, path: str) -> None:
    """Raise InexpressibleError unless the model is one causal stack with an output embedding.

    PEFT leaves virtual tokens in the output, so a pooler or classifier would read them; here they are taken out.
    """
    stacks = [s for s in site_tree.tree(model) if s.role == "stack"]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is None or len(stacks) != 1 or stacks[0].path != path or not stacks[0].causal:
        raise InexpressibleError("virtual tokens mean the same there only for a generator of one stack")


def check_windows(model: nn.Module) -> None:
    """Raise InexpressibleError if layers see a sliding window: PEFT's prefix slides out of it, ours stays in sight."""
    config = model.__dict__.get("config")
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if getattr(config, "sliding_window", None) and "sliding_attention" in kinds:
        raise InexpressibleError("a prefix means something else there in layers with a sliding window")


def task(view: View) -> dict[str, Any]:
    """Return the keys that both methods write alike."""
    return {"task_type": "CAUSAL_LM", "num_transformer_submodules": 1, "inference_mode": True}


class Prompt(Dialect[TokenFields]):
    """Prompt tuning: the virtual tokens `[length, d]` as they are."""

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    schema = TokenFields
    ours: ClassVar[tuple[str, ...]] = ("prompt_tuning",)

    def config(self, view: View) -> dict[str, Any]:
        """Return length and width."""
        if len(view.entries) != 1:
            raise InexpressibleError("it has prompts for several stacks")
        _, site, _ = view.entries[0]
        check_model(view.model, site.path)
        fields: Any = view.method
        return task(view) | {
            "num_virtual_tokens": fields.length,
            "token_dim": site.in_features,
            "num_layers": len(site.layers),
            "num_attention_heads": site.heads,
            "prompt_tuning_init": "RANDOM",
        }

    def method(self, config: TokenFields, model: nn.Module, where: Path) -> tuple[str, dict[str, Any]]:
        """Return `prompt_tuning` at the model's only stack."""
        check_readable(model, where)
        return "prompt_tuning", {"length": config.num_virtual_tokens}

    def links(self, view: View) -> list[Link]:
        """One tensor, the same."""
        ((key, _, _),) = view.entries
        return [Link(NAME, (f"{key}/P",), lambda t: t[0], lambda t: [t])]


class PrefixFields(TokenFields):
    """Prefix tuning's keys; the network behind `prefix_projection` is folded away in the file."""

    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    init_weights: Any = None


class Prefix(Dialect[PrefixFields]):
    """Prefix tuning: keys and values of all layers side by side, `[length, layers x 2 x heads x head_dim]`."""

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    schema = PrefixFields
    ours: ClassVar[tuple[str, ...]] = ("prefix_tuning",)

    def config(self, view: View) -> dict[str, Any]:
        """Return length and the shape of a layer's keys."""
        stack = next(s for s in site_tree.tree(view.model) if s.role == "stack")
        check_model(view.model, stack.path)
        check_windows(view.model)
        sites = [site for _, site, _ in view.entries]
        fields: Any = view.method
        if [s.layer for s in sites] != list(range(len(stack.layers))):
            raise InexpressibleError("it does not have one prefix for every layer")
        if len({(s.kv_heads, s.head_dim) for s in sites}) != 1:
            raise InexpressibleError("the layers' keys differ in shape")
        if any("P" not in delta._parameters or delta._parameters["P"] is None for _, _, delta in view.entries):
            raise InexpressibleError("its network is not folded away yet; call adapter.finish() after training")
        if not fields.shift:
            raise InexpressibleError("its text keeps its positions (shift=False)")
        return task(view) | {
            "num_virtual_tokens": fields.length,
            "token_dim": sites[0].kv_heads * sites[0].head_dim,
            "num_layers": len(sites),
            "num_attention_heads": sites[0].kv_heads,
            "encoder_hidden_size": sites[0].kv_heads * sites[0].head_dim,
            "prefix_projection": False,
        }

    def method(self, config: PrefixFields, model: nn.Module, where: Path) -> tuple[str, dict[str, Any]]:
        """Return `prefix_tuning` at every layer."""
        check_readable(model, where, windows=True)
        return "prefix_tuning", {"length": config.num_virtual_tokens}

    def links(self, view: View) -> list[Link]:
        """One tensor for all layers: key of layer 0, value of layer 0, key of layer 1, ..."""
        sites = [site for _, site, _ in view.entries]
        shape = (len(sites), 2, sites[0].kv_heads, sites[0].head_dim)

        def encode(tensors: Sequence[Tensor]) -> Tensor:
            return torch.stack(list(tensors)).movedim(2, 0).flatten(1)

        def decode(tensor: Tensor) -> Sequence[Tensor]:
            return list(tensor.unflatten(1, shape).movedim(0, 2).unbind())

        return [Link(NAME, tuple(f"{key}/P" for key, _, _ in view.entries), encode, decode)]


def check_readable(model: nn.Module, where: Path, windows: bool = False) -> None:
    """Raise StoreError unless virtual tokens of a PEFT file mean the same on this model."""
    try:
        check_model(model, next(s.path for s in site_tree.tree(model) if s.role == "stack"))
        if windows:
            check_windows(model)
    except InexpressibleError as error:
        raise refuse(where, error.reason) from None


class AdaptionFields(Common):
    """LLaMA-Adapter's keys."""

    adapter_len: int = Field(ge=1, le=10000)
    adapter_layers: int = Field(ge=1, le=10000)
    target_modules: str | None = None


class Adaption(Dialect[AdaptionFields]):
    """LLaMA-Adapter (PEFT: adaption prompt) in the top layers of a Llama or Mistral model."""

    peft_type: ClassVar[str] = "ADAPTION_PROMPT"
    schema = AdaptionFields
    ours: ClassVar[tuple[str, ...]] = ("llama_adapter",)

    def config(self, view: View) -> dict[str, Any]:
        """Return length and number of layers."""
        sites = [site for _, site, _ in view.entries]
        stack = check_llama(view.model)
        top = list(range(len(stack.layers)))[-len(sites) :]
        if [s.layer for s in sites] != top or any(s.cross or s.tower != stack.tower for s in sites):
            raise InexpressibleError("it is not in the top layers without a gap")
        fields: Any = view.method
        return {
            "adapter_len": fields.length,
            "adapter_layers": len(sites),
            "target_modules": sites[0].path.rpartition(".")[2],
        }

    def method(self, config: AdaptionFields, model: nn.Module, where: Path) -> tuple[str, dict[str, Any]]:
        """Return `llama_adapter` in the top layers."""
        try:
            stack = check_llama(model)
        except InexpressibleError as error:
            raise refuse(where, error.reason) from None
        names = {s.path.rpartition(".")[2] for s in site_tree.resolve(model, "attn")}
        if config.adapter_layers > len(stack.layers) or {config.target_modules or "self_attn"} != names:
            raise refuse(where, f"this model has {len(stack.layers)} attention modules called {', '.join(names)}")
        return "llama_adapter", {"length": config.adapter_len, "layers": f"-{config.adapter_layers}:"}

    def links(self, view: View) -> list[Link]:
        """The prompt with a leading dimension of 1, and the gate."""
        return [
            link
            for key, site, _ in view.entries
            for link in (
                Link(
                    f"{PREFIX}{site.path}.adaption_prompt",
                    (f"{key}/P",),
                    lambda t: t[0][None],
                    lambda t: [t.squeeze(0)],
                ),
                Link(f"{PREFIX}{site.path}.adaption_gate", (f"{key}/g",), lambda t: t[0], lambda t: [t]),
            )
        ]


def check_llama(model: nn.Module) -> Site:
    """Return the model's stack; raise InexpressibleError unless PEFT's adaption prompt does the same in it as ours."""
    config: Any = model.__dict__.get("config")
    stacks = [s for s in site_tree.tree(model) if s.role == "stack"]
    if getattr(config, "model_type", "") not in ("llama", "mistral") or len(stacks) != 1:
        raise InexpressibleError("PEFT has the adaption prompt for Llama and Mistral models alone")
    if stacks[0].heads * stacks[0].head_dim != stacks[0].in_features:
        raise InexpressibleError("PEFT's adaption prompt needs heads that make up the hidden size")
    return stacks[0]
