"""The cases of the matrix of Hugging Face PEFT's files: method x option x model family, both ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import peft
from torch import nn

import zoo

Options = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """What the options need to know of a tiny model.

    Attributes:
        qv: names of two attention projections; down: the last map of the feed-forward block; norm: names of norms.
        embed, head: names of the input embedding and of the output or task head.
        task: PEFT's task type; None where the model has none.
        batch: the zoo's name of its batch.
    """

    qv: tuple[str, ...]
    down: str
    norm: tuple[str, ...]
    embed: str = ""
    head: str = ""
    task: str | None = "CAUSAL_LM"
    batch: str = ""
    build: Callable[[], nn.Module] | None = None


_LLAMA = partial(Family, ("q_proj", "v_proj"), "down_proj", ("input_layernorm", "norm"), "embed_tokens", "lm_head")
_BERT = partial(
    Family, ("query", "value"), "output.dense", ("LayerNorm",), "word_embeddings", "classifier", task="SEQ_CLS"
)
_SEQ = partial(Family, task="SEQ_2_SEQ_LM")


def _model(kind: str, config: str, **fields: Any) -> Callable[[], nn.Module]:
    return lambda: zoo._make(kind, config, **fields)


FAMILIES: dict[str, Family] = {
    "llama": _LLAMA(),
    "llama_tied": _LLAMA(
        batch="llama", build=_model("LlamaForCausalLM", "LlamaConfig", **zoo.LLAMA, tie_word_embeddings=True)
    ),
    "qwen2": _LLAMA(),
    "qwen3": _LLAMA(),
    "mistral": _LLAMA(),
    "gemma": _LLAMA(),
    "gemma3": _LLAMA(),
    "phi3": Family(("qkv_proj",), "down_proj", ("input_layernorm",), "embed_tokens", "lm_head"),
    "mixtral": _LLAMA(),
    "qwen3_moe": _LLAMA(),
    "gpt2": Family(("c_attn",), "mlp.c_proj", ("ln_1", "ln_f"), "wte", "lm_head"),
    "gpt_neox": Family(("query_key_value",), "dense_4h_to_h", ("input_layernorm",), "embed_in", "embed_out"),
    "opt": Family(("q_proj", "v_proj"), "fc2", ("final_layer_norm",), "embed_tokens", "lm_head"),
    "bert": _BERT(task="FEATURE_EXTRACTION"),
    "bert_cls": _BERT(),
    "bert_tok": _BERT(
        task="TOKEN_CLS", build=_model("BertForTokenClassification", "BertConfig", **zoo.BERT), batch="bert_cls"
    ),
    "roberta": _BERT(),
    "distilbert": Family(
        ("q_lin", "v_lin"), "ffn.lin2", ("sa_layer_norm",), "word_embeddings", "classifier", "SEQ_CLS"
    ),
    "t5": _SEQ(("q", "v"), "wo", ("layer_norm",), "shared", "lm_head"),
    "bart": _SEQ(("q_proj", "v_proj"), "fc2", ("final_layer_norm",), "shared", "lm_head"),
    "whisper": Family(("q_proj", "v_proj"), "fc2", ("final_layer_norm",), "embed_tokens", "proj_out", None),
    "vit": Family(("q_proj", "v_proj"), "fc2", ("layernorm_before",), "", "classifier", None),
    "resnet": Family(("convolution",), "convolution", ("normalization",), "", "classifier", None),
    "clip": Family(("q_proj", "v_proj"), "fc2", ("layer_norm1",), "token_embedding", "visual_projection", None),
    "llava": Family(("q_proj", "v_proj"), "down_proj", ("input_layernorm",), "embed_tokens", "lm_head"),
}


def build(name: str) -> nn.Module:
    """Return a fresh tiny model of a family."""
    own = FAMILIES[name].build
    return own() if own is not None else zoo.build(name)


def batch_of(name: str) -> str:
    """Return the zoo's name of the family's batch and output."""
    return FAMILIES[name].batch or name


@dataclass(frozen=True)
class Case:
    """One read case: a config of PEFT on a model, or one write case: a method of ours on a model."""

    method: str
    option: str
    family: str
    make: Callable[[], Any] = field(compare=False, repr=False)

    @property
    def key(self) -> str:
        """Its name in the ledger."""
        return f"{self.method} | {self.option} | {self.family}"


def _cases(method: str, config: Any, table: dict[str, tuple[str, Callable[[Family], Options]]]) -> list[Case]:
    found = []
    for option, (families, fields) in table.items():
        for name in families.split():
            made = partial(config, **({"task_type": FAMILIES[name].task} | fields(FAMILIES[name])))
            found.append(Case(method, option, name, made))
    return found


def _qv(**more: Any) -> Callable[[Family], Options]:
    return lambda f: {"target_modules": list(f.qv)} | more


def _lora(**more: Any) -> Callable[[Family], Options]:
    return lambda f: {"r": 4, "lora_alpha": 3, "target_modules": list(f.qv)} | more


def _first(f: Family) -> str:
    return f.qv[0]


TEXT = "llama qwen2 qwen3 mistral gemma gemma3 phi3 mixtral qwen3_moe gpt2 gpt_neox opt"
ENCODERS = "bert bert_cls bert_tok roberta distilbert"
OTHERS = "t5 bart whisper vit clip llava"
MIX = "llama gpt2 bert_cls t5 vit"

LORA: dict[str, tuple[str, Callable[[Family], Options]]] = {
    "plain": (f"{TEXT} {ENCODERS} {OTHERS} llama_tied resnet", _lora()),
    "use_rslora": ("llama bert_cls t5", _lora(use_rslora=True)),
    "lora_dropout": ("llama", _lora(lora_dropout=0.1)),
    "target_modules: all-linear": (
        "llama llama_tied gpt2 bert_cls t5 vit mixtral clip",
        _lora(target_modules="all-linear"),
    ),
    "target_modules: a pattern": ("llama gpt2 llava", lambda f: _lora()(f) | {"target_modules": rf".*\.{_first(f)}"}),
    "exclude_modules: a list": ("llama", _lora(exclude_modules=["layers.0.self_attn.q_proj"])),
    "exclude_modules: a pattern": ("llama llava", _lora(exclude_modules=r".*(layers\.0|vision).*")),
    "layers_to_transform": ("llama t5 gpt2", _lora(layers_to_transform=[1])),
    "layers_to_transform, layers_pattern": ("llama", _lora(layers_to_transform=0, layers_pattern="layers")),
    "rank_pattern": (MIX, lambda f: _lora(rank_pattern={_first(f): 2})(f)),
    "rank_pattern: a pattern": ("llama", _lora(rank_pattern={r"^model\.layers\.0\..*": 2})),
    "alpha_pattern": (MIX, lambda f: _lora(alpha_pattern={_first(f): 5})(f)),
    "alpha_pattern, rank_pattern, use_rslora": (
        "llama",
        _lora(alpha_pattern={"q_proj": 5}, rank_pattern={"v_proj": 2}, use_rslora=True),
    ),
    "bias: all": ("qwen2 gpt2 bert_cls vit", _lora(bias="all")),
    "bias: lora_only": ("qwen2 gpt2 bert_cls vit", _lora(bias="lora_only")),
    "lora_bias": ("llama bert_cls", _lora(lora_bias=True)),
    "modules_to_save: the head": ("llama gpt2 t5 vit", lambda f: _lora(modules_to_save=[f.head])(f)),
    "modules_to_save: the embedding": ("llama gpt2 bert_cls", lambda f: _lora(modules_to_save=[f.embed])(f)),
    "modules_to_save: a tied pair": (
        "llama_tied gpt2",
        lambda f: _lora(modules_to_save=[f.embed, f.head])(f),
    ),
    "modules_to_save: norms": ("llama bert_cls", lambda f: _lora(modules_to_save=list(f.norm))(f)),
    "modules_to_save: the pooler": ("bert_cls", _lora(modules_to_save=["pooler"])),
    "on the head": ("llama llama_tied gpt2 qwen2 gemma t5", lambda f: _lora(target_modules=[*f.qv, f.head])(f)),
    "on the embedding": (
        "llama llama_tied gpt2 gemma bert_cls t5 bart",
        lambda f: _lora(target_modules=[*f.qv, f.embed])(f),
    ),
    "on embedding and head, tied": (
        "llama_tied gemma",
        lambda f: _lora(target_modules=[f.embed, f.head], ensure_weight_tying=True)(f),
    ),
    "trainable_token_indices": (
        "llama llama_tied gemma bert_cls gpt2",
        lambda f: _lora(trainable_token_indices={f.embed: [9, 12, 20, 30, 40, 50]})(f),
    ),
    "target_parameters": (
        "mixtral qwen3_moe",
        _lora(target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
    "use_dora": (f"{MIX} llama_tied opt", _lora(use_dora=True)),
    "use_dora, use_rslora": ("bert_cls", _lora(use_dora=True, use_rslora=True)),
    "use_dora on convolutions": ("resnet", _lora(use_dora=True)),
    "use_dora on the embedding": ("llama", lambda f: _lora(target_modules=[f.embed], use_dora=True)(f)),
    "init_lora_weights: gaussian": ("llama", _lora(init_lora_weights="gaussian")),
    "init_lora_weights: orthogonal": ("llama", _lora(init_lora_weights="orthogonal")),
    "init_lora_weights: pissa": ("llama", _lora(init_lora_weights="pissa")),
    "init_lora_weights: olora": ("llama", _lora(init_lora_weights="olora")),
    "layer_replication": ("llama", _lora(layer_replication=[(0, 2), (1, 2)])),
    "alora_invocation_tokens": ("llama", _lora(alora_invocation_tokens=[9])),
    "use_qalora": ("llama", _lora(use_qalora=True, qalora_group_size=8)),
}

ADALORA: dict[str, tuple[str, Callable[[Family], Options]]] = {
    "plain": (
        "llama gpt2 bert_cls t5 vit opt gpt_neox mixtral",
        _qv(init_r=6, target_r=3, total_step=50, lora_alpha=5),
    ),
    "tinit, tfinal": ("bert_cls", _qv(init_r=6, target_r=3, total_step=50, tinit=5, tfinal=9)),
    "use_rslora": ("llama", _qv(init_r=6, target_r=3, total_step=50, use_rslora=True)),
    "bias: all": ("bert_cls qwen2", _qv(init_r=6, target_r=3, total_step=50, bias="all")),
    "modules_to_save: the head": (
        "llama",
        lambda f: _qv(init_r=6, target_r=3, total_step=50, modules_to_save=[f.head])(f),
    ),
    "layer_replication": ("llama", _qv(init_r=6, target_r=3, total_step=50, layer_replication=[(0, 2), (1, 2)])),
    "target_modules: a pattern": (
        "llama",
        lambda f: {"init_r": 6, "target_r": 3, "total_step": 50, "target_modules": r".*\.q_proj"},
    ),
}
VERA: dict[str, tuple[str, Callable[[Family], Options]]] = {
    "plain": ("llama gpt2 bert_cls t5 vit phi3 gpt_neox opt", _qv(r=4)),
    "save_projection: false": ("llama bert_cls", _qv(r=4, save_projection=False)),
    "projection_prng_key, save_projection: false": ("llama", _qv(r=4, projection_prng_key=7, save_projection=False)),
    "d_initial": ("llama", _qv(r=4, d_initial=0.5)),
    "bias: all": ("bert_cls", _qv(r=4, bias="all")),
    "maps of several shapes": ("llama bert_cls", lambda f: {"r": 4, "target_modules": [*f.qv, f.down]}),
}
OFT: dict[str, tuple[str, Callable[[Family], Options]]] = {
    "plain": ("llama gpt2 bert_cls t5 vit mixtral opt", _qv(oft_block_size=8)),
    "r": ("llama bert_cls", _qv(r=4, oft_block_size=0)),
    "maps of several widths": ("llama", lambda f: {"oft_block_size": 8, "target_modules": [*f.qv, f.down]}),
    "r, maps of several widths": ("llama", lambda f: {"r": 4, "oft_block_size": 0, "target_modules": [*f.qv, f.down]}),
    "use_cayley_neumann: false": ("llama gpt2 bert_cls t5 vit", _qv(oft_block_size=8, use_cayley_neumann=False)),
    "num_cayley_neumann_terms": ("llama bert_cls", _qv(oft_block_size=8, num_cayley_neumann_terms=3)),
    "coft": ("llama bert_cls", _qv(oft_block_size=8, coft=True, eps=0.5)),
    "coft, use_cayley_neumann: false": ("llama", _qv(oft_block_size=8, coft=True, eps=0.5, use_cayley_neumann=False)),
    "block_share": ("llama bert_cls", _qv(oft_block_size=8, block_share=True)),
    "block_share, coft": ("llama", _qv(oft_block_size=8, block_share=True, coft=True)),
    "bias: all": ("bert_cls", _qv(oft_block_size=8, bias="all")),
    "on convolutions": ("resnet", _qv(r=2, oft_block_size=0)),
    "on the embedding": ("llama", lambda f: {"oft_block_size": 8, "target_modules": [f.embed]}),
}
FOURIER: dict[str, tuple[str, Callable[[Family], Options]]] = {
    "plain": ("llama gpt2 bert_cls t5 vit phi3 gpt_neox", _qv(n_frequency=20)),
    "random_loc_seed, scaling": ("llama", _qv(n_frequency=20, random_loc_seed=5, scaling=90.0)),
    "n_frequency_pattern": ("llama bert_cls", lambda f: _qv(n_frequency=20, n_frequency_pattern={_first(f): 9})(f)),
    "random_loc_seed: none": ("llama", _qv(n_frequency=20, random_loc_seed=None)),
    "bias: all": ("bert_cls", _qv(n_frequency=20, bias="all")),
}
IA3: dict[str, tuple[str, Callable[[Family], Options]]] = {
    "plain": (
        "llama gpt2 bert_cls t5 vit opt",
        lambda f: {"target_modules": [*f.qv, f.down], "feedforward_modules": [f.down]},
    ),
    "PEFT's default modules": ("llama gpt2 t5 bart opt gpt_neox roberta", lambda f: {}),
    "no feedforward_modules": (
        "llama bert_cls",
        lambda f: {"target_modules": [*f.qv, f.down], "feedforward_modules": []},
    ),
    "feedforward_modules alone": (
        "llama gpt2",
        lambda f: {"target_modules": [f.down], "feedforward_modules": [f.down]},
    ),
    "some modules of a role": (
        "llama",
        lambda f: {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["layers.1.mlp.down_proj"]},
    ),
    "on convolutions": ("resnet", lambda f: {"target_modules": ["convolution"], "feedforward_modules": []}),
    "on convolutions, feedforward_modules": (
        "resnet",
        lambda f: {"target_modules": ["convolution"], "feedforward_modules": ["convolution"]},
    ),
    "modules_to_save: the head": (
        "llama",
        lambda f: {"target_modules": list(f.qv), "feedforward_modules": [], "modules_to_save": [f.head]},
    ),
}
NORMS: dict[str, tuple[str, Callable[[Family], Options]]] = {
    "plain": (
        "llama gpt2 bert_cls bert_tok t5 bart vit gemma opt clip",
        lambda f: {"target_modules": list(f.norm)},
    ),
    "target_modules: a pattern": ("llama", lambda f: {"target_modules": r".*input_layernorm"}),
    "modules_to_save: the head": ("llama", lambda f: {"target_modules": list(f.norm), "modules_to_save": [f.head]}),
}
PLACES = "llama llama_tied qwen3 gemma gemma3 gpt2 gpt_neox opt bert bert_cls bert_tok roberta t5 bart llava"
PROMPT: dict[str, tuple[str, Callable[[Family], Options]]] = {
    "plain": (PLACES, lambda f: {"num_virtual_tokens": 3}),
    "num_transformer_submodules: 1": ("t5 bart", lambda f: {"num_virtual_tokens": 3, "num_transformer_submodules": 1}),
}
P_TUNING: dict[str, tuple[str, Callable[[Family], Options]]] = {
    "MLP": (
        "llama gpt2 gemma opt bert_cls bert_tok t5 bart",
        lambda f: {"num_virtual_tokens": 3, "encoder_hidden_size": 9},
    ),
    "LSTM": (
        "llama gpt2 bert_cls t5",
        lambda f: {
            "num_virtual_tokens": 3, "encoder_hidden_size": 9, "encoder_reparameterization_type": "LSTM",
            "encoder_num_layers": 2, "encoder_dropout": 0.1,
        },
    ),
}  # fmt: skip
PREFIX: dict[str, tuple[str, Callable[[Family], Options]]] = {
    "plain": (f"{PLACES} qwen2 mistral mixtral", lambda f: {"num_virtual_tokens": 3}),
    "prefix_projection": (
        "llama qwen3 gpt2 bert_cls t5 bart",
        lambda f: {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 9},
    ),
    "num_transformer_submodules: 1": ("t5 bart", lambda f: {"num_virtual_tokens": 3, "num_transformer_submodules": 1}),
}
ADAPTION: dict[str, tuple[str, Callable[[Family], Options]]] = {
    "plain": ("llama llama_tied mistral gpt2 bert_cls qwen3", lambda f: {"adapter_len": 3, "adapter_layers": 1}),
    "all layers": ("llama", lambda f: {"adapter_len": 3, "adapter_layers": 2}),
}
OTHER: dict[str, tuple[Any, Options]] = {
    "LOHA": (peft.LoHaConfig, {"r": 2}),
    "LOKR": (peft.LoKrConfig, {"r": 2}),
    "BOFT": (peft.BOFTConfig, {"boft_block_size": 4}),
    "HRA": (peft.HRAConfig, {"r": 2}),
    "VBLORA": (peft.VBLoRAConfig, {"r": 2, "num_vectors": 8, "vector_length": 8, "topk": 2}),
    "C3A": (peft.C3AConfig, {"block_size": 8}),
    "RANDLORA": (peft.RandLoraConfig, {"r": 2}),
    "SHIRA": (peft.ShiraConfig, {"r": 2}),
    "MISS": (peft.MissConfig, {"r": 2}),
    "ROAD": (peft.RoadConfig, {}),
    "POLY": (peft.PolyConfig, {"r": 2}),
    "TRAINABLE_TOKENS": (peft.TrainableTokensConfig, {"target_modules": ["embed_tokens"], "token_indices": [9, 12]}),
    "MULTITASK_PROMPT_TUNING": (
        peft.MultitaskPromptTuningConfig,
        {"num_virtual_tokens": 3, "num_tasks": 2, "target_modules": None},
    ),
}  # fmt: skip


def _other() -> list[Case]:
    found = []
    for method, (config, fields) in OTHER.items():
        given = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | fields
        made = partial(config, **{k: v for k, v in given.items() if v is not None})
        found.append(Case(method, "plain", "llama", made))
    return found


READ: list[Case] = [
    *_cases("LORA", peft.LoraConfig, LORA),
    *_cases("ADALORA", peft.AdaLoraConfig, ADALORA),
    *_cases("VERA", peft.VeraConfig, VERA),
    *_cases("OFT", peft.OFTConfig, OFT),
    *_cases("FOURIERFT", peft.FourierFTConfig, FOURIER),
    *_cases("IA3", peft.IA3Config, IA3),
    *_cases("LN_TUNING", peft.LNTuningConfig, NORMS),
    *_cases("PROMPT_TUNING", peft.PromptTuningConfig, PROMPT),
    *_cases("P_TUNING", peft.PromptEncoderConfig, P_TUNING),
    *_cases("PREFIX_TUNING", peft.PrefixTuningConfig, PREFIX),
    *_cases("ADAPTION_PROMPT", peft.AdaptionPromptConfig, ADAPTION),
    *_other(),
]
