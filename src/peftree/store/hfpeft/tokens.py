"""Prompt and prefix tuning, one tensor `prompt_embeddings` for the whole model, and LLaMA-Adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from peftree import sites as site_tree
from peftree.sites import Site
from peftree.store.hfpeft.dialect import Dialect, View, exactly, refuse
from peftree.store.hfpeft.links import InexpressibleError, Link, Part, links_of
from peftree.store.hfpeft.schema import Common

NAME = "prompt_embeddings"


class TokenFields(Common):
    """Common keys. With `num_transformer_submodules` 2, a decoder's tokens follow the encoder's; PEFT ignores them."""

    num_virtual_tokens: int = Field(ge=1, le=10000)
    token_dim: int | None = Field(None, ge=1)
    num_transformer_submodules: Literal[1, 2] | None = None
    num_attention_heads: int | None = Field(None, ge=1)
    num_layers: int | None = Field(None, ge=1)


def task_of(model: nn.Module) -> str:
    """Return the task type with which PEFT runs a model's virtual tokens; InexpressibleError if there is none."""
    names = [c.__name__ for c in type(model).__mro__]
    towers = {s.tower for s in site_tree.tree(model) if s.role == "stack"}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if towers == {"encoder", "decoder"} and getattr(type(model), "main_input_name", "") == "input_ids":
        return "SEQ_2_SEQ_LM"
    if len(towers) == 1 and any(s.causal for s in site_tree.tree(model) if s.role == "stack") and output is not None:
        return "CAUSAL_LM"
    ends = {"ForTokenClassification": "TOKEN_CLS", "ForSequenceClassification": "SEQ_CLS"}
    found = next((task for end, task in ends.items() if any(n.endswith(end) for n in names)), None)
    if len(towers) == 1 and found is not None:
        return found
    raise InexpressibleError("PEFT has no virtual tokens for this class of models")


def stack_of(model: nn.Module, task: str | None, prefix: bool) -> Site:
    """Return the stack that PEFT gives virtual tokens: the only one, or the encoder's.

    Raises:
        InexpressibleError: they would not act the same in PEFT. It leaves virtual tokens in the output, where a pooler
            or a sequence classifier reads them; peftree removes them. A prefix is in no output.
    """
    if task not in (own := task_of(model), None):
        raise InexpressibleError(f"its task_type {task} does not fit this model, whose task type is {own}")
    stacks = {s.tower: s for s in site_tree.tree(model) if s.role == "stack"}
    if own == "SEQ_CLS" and not prefix:
        raise InexpressibleError("PEFT pools a virtual token where the first real one is pooled here")
    if own == "SEQ_2_SEQ_LM":
        return stacks["encoder"]
    (stack,) = stacks.values()
    return stack


def check_prefix(model: nn.Module) -> None:
    """Raise InexpressibleError if a prefix means something else in PEFT.

    In PEFT it slides out of a sliding window, and has positions in the decoder of an encoder-decoder; in peftree it
    stays visible, without positions. A classifier gets the backbone's second output, which must be the pooled token.
    """
    config = model.__dict__.get("config")
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if getattr(config, "sliding_window", None) and "sliding_attention" in kinds:
        raise InexpressibleError("a prefix acts differently in PEFT in layers with a sliding window")
    if task_of(model) == "SEQ_2_SEQ_LM":
        raise InexpressibleError("a prefix has positions in the decoder in PEFT, but none here")
    if task_of(model) == "SEQ_CLS" and not any(n.endswith("pooler") for n, _ in model.named_modules()):
        raise InexpressibleError("PEFT gives this classifier other inputs than its own forward does")


def task(view: View) -> dict[str, Any]:
    """Return the keys that all of them write."""
    own = task_of(view.model)
    return {"task_type": own, "num_transformer_submodules": 2 if own == "SEQ_2_SEQ_LM" else 1, "inference_mode": True}


def doubled(view: View) -> bool:
    """Return whether the file also holds a decoder's tokens, which PEFT does not use."""
    given = view.config.num_transformer_submodules if isinstance(view.config, TokenFields) else None
    return (given or task(view)["num_transformer_submodules"]) == 2


class Prompt(Dialect[TokenFields]):
    """Prompt tuning: the virtual tokens `[length, d]` as they are; PEFT has no dropout on them."""

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    schema = TokenFields
    ours: ClassVar[tuple[str, ...]] = ("prompt_tuning",)
    root: ClassVar[str] = "base_model."

    def config(self, view: View) -> dict[str, Any]:
        """Return length and width."""
        stack = stack_of(view.model, None, False)
        if [site.path for _, site, _ in view.entries] != [stack.path]:
            raise InexpressibleError(f"PEFT has virtual tokens only in {stack.tower}:stack")
        site, tokens = view.entries[0][1], cast("Any", view.entries[0][2])
        return task(view) | {
            "num_virtual_tokens": tokens.length,
            "token_dim": site.entry or site.in_features,
            "num_layers": len(site.layers),
            "num_attention_heads": site.heads,
            "prompt_tuning_init": "RANDOM",
        }

    def method(self, config: TokenFields, model: nn.Module, where: Path) -> tuple[str, dict[str, Any]]:
        """Return `prompt_tuning` at the stack that PEFT uses."""
        stack = readable(model, config, where, prefix=False)
        return "prompt_tuning", {"length": config.num_virtual_tokens, "sites": _at(model, stack, "stack")}

    def links(self, view: View) -> list[Link]:
        """The same tensor; for an encoder-decoder, rows that PEFT does not use follow it."""
        if len(view.entries) != 1:
            raise InexpressibleError("it has prompts for several stacks")
        ((key, _, _),) = view.entries
        n = 2 if doubled(view) else 1
        return [Link(NAME, (f"{key}/P",), lambda t: t[0].repeat(n, 1), lambda t: [t[: len(t) // n]])]


class PTuningFields(TokenFields):
    """P-tuning's keys; the file holds what its network made, without the network."""

    encoder_reparameterization_type: Any = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0


class PTuning(Prompt):
    """P-tuning, whose finished form is prompt tuning's."""

    peft_type: ClassVar[str] = "P_TUNING"
    schema = PTuningFields


class PrefixFields(TokenFields):
    """Prefix tuning's keys; the file does not hold the network behind `prefix_projection`."""

    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    init_weights: Any = None


class Prefix(Dialect[PrefixFields]):
    """Prefix tuning: keys and values of all layers side by side, `[length, layers x 2 x heads x head_dim]`."""

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    schema = PrefixFields
    ours: ClassVar[tuple[str, ...]] = ("prefix_tuning",)
    root: ClassVar[str] = "base_model."

    def config(self, view: View) -> dict[str, Any]:
        """Return length and the shape of a layer's keys."""
        stack = stack_of(view.model, None, True)
        check_prefix(view.model)
        sites = [site for _, site, _ in view.entries]
        fields: Any = view.method
        if [(s.tower, s.layer) for s in sites] != [(stack.tower, i) for i in range(len(stack.layers))]:
            raise InexpressibleError(f"it must have one prefix for each layer of {stack.tower}:stack, and no others")
        if len({(s.kv_heads, s.head_dim) for s in sites}) != 1 or any(s.value_dim for s in sites):
            raise InexpressibleError("the layers' keys and values differ in shape")
        if any("P" not in delta._parameters or delta._parameters["P"] is None for _, _, delta in view.entries):
            raise InexpressibleError("its network is not yet folded in; call adapter.finish() after training")
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
        stack = readable(model, config, where, prefix=True)
        hidden = (config.encoder_hidden_size or stack.in_features) if config.prefix_projection else 0
        sites = _at(model, stack, "attn")
        return "prefix_tuning", {"length": config.num_virtual_tokens, "hidden": hidden, "sites": sites}

    def links(self, view: View) -> list[Link]:
        """One tensor for all layers: key of layer 0, value of layer 0, key of layer 1, ..."""
        sites = [site for _, site, _ in view.entries]
        shape = (len(sites), 2, sites[0].kv_heads, sites[0].head_dim)

        def encode(tensors: Sequence[Tensor]) -> Tensor:
            return torch.stack(list(tensors)).movedim(2, 0).flatten(1)

        def decode(tensor: Tensor) -> Sequence[Tensor]:
            return list(tensor.unflatten(1, shape).movedim(0, 2).unbind())

        return [Link(NAME, tuple(f"{key}/P" for key, _, _ in view.entries), encode, decode)]


def _at(model: nn.Module, stack: Site, role: str) -> str:
    return role if sum(s.role == "stack" for s in site_tree.tree(model)) == 1 else f"{stack.tower}:{role}"


def readable(model: nn.Module, config: TokenFields, where: Path, prefix: bool) -> Site:
    """Return the stack that gets a PEFT file's tokens; raise StoreError unless they mean the same on this model."""
    with exactly(where):
        if prefix:
            check_prefix(model)
        return stack_of(model, config.task_type, prefix)


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
            raise InexpressibleError("it is not in adjacent top layers")
        fields: Any = view.method
        return {
            "adapter_len": fields.length,
            "adapter_layers": len(sites),
            "target_modules": sites[0].path.rpartition(".")[2],
        }

    def method(self, config: AdaptionFields, model: nn.Module, where: Path) -> tuple[str, dict[str, Any]]:
        """Return `llama_adapter` in the top layers."""
        with exactly(where):
            stack = check_llama(model)
        names = {s.path.rpartition(".")[2] for s in site_tree.resolve(model, "attn")}
        if config.adapter_layers > len(stack.layers) or {config.target_modules or "self_attn"} != names:
            raise refuse(where, f"this model has {len(stack.layers)} attention modules called {', '.join(names)}")
        return "llama_adapter", {"length": config.adapter_len, "layers": f"-{config.adapter_layers}:"}

    def links(self, view: View) -> list[Link]:
        """The prompt with a leading dimension of 1, and the gate."""
        prompt = Part("adaption_prompt", ("P",), None, lambda t: t[0][None], lambda t: [t.squeeze(0)])
        return links_of(view.entries, lambda _: [prompt, Part("adaption_gate", ("g",))])


def check_llama(model: nn.Module) -> Site:
    """Return the model's stack; raise InexpressibleError unless PEFT's adaption prompt acts there as ours does."""
    config: Any = model.__dict__.get("config")
    stacks = [s for s in site_tree.tree(model) if s.role == "stack"]
    if getattr(config, "model_type", "") not in ("llama", "mistral") or len(stacks) != 1:
        raise InexpressibleError("PEFT has the adaption prompt only for Llama and Mistral models")
    if stacks[0].heads * stacks[0].head_dim != stacks[0].in_features:
        raise InexpressibleError("PEFT's adaption prompt needs heads that make up the hidden size")
    return stacks[0]
