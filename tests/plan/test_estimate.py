"""A plan's whole: depth by depth, optimizer, quantised bases, sharding, fallback; against independent counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from transformers.training_args import OptimizerNames

import plantruth
from peftree import registry
from peftree.errors import AdapterError, ConfigError, MethodError, SiteError
from peftree.evaluate.cost import allocator_peak, tensor_bytes
from peftree.optimizers import _why_not, make_optimizer
from peftree.plan import estimate, formulas, kept, plan, request, skeleton, step
from peftree.plan.result import Plan
from plan.test_fit import BERT, LLAMA
from sampled import quick

CONFIGS: dict[str, Any] = {
    "llama": tf.LlamaConfig(**LLAMA.to_dict() | {"num_hidden_layers": 6}),
    "bert": tf.BertConfig(**BERT.to_dict() | {"num_hidden_layers": 6}),
    "t5": tf.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=5, num_decoder_layers=6, num_heads=4,
        decoder_start_token_id=0, architectures=["T5ForConditionalGeneration"],
    ),
    "gemma3": tf.Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 4,
        architectures=["Gemma3ForCausalLM"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in CONFIGS}
    for name, config in CONFIGS.items():
        config.save_pretrained(made[name])
    return made


def deep(asked: Any) -> dict[str, int]:
    """Return phase -> bytes of a trace of every layer."""
    config, kind = estimate.read(asked.model, asked.task, asked.labels)
    dtype = formulas.dtype_of(config, asked.dtype)
    model, adapter = step.adapted(config, kind, asked, dtype)
    model.config.use_cache = False
    found = step.trace(model, adapter, asked)
    return {phase: sum(parts.values()) for phase, parts in found.parts.items()}


def shallow(asked: Any) -> dict[str, int]:
    config, kind = estimate.read(asked.model, asked.task, asked.labels)
    shared = estimate._whole(asked.model_dump_json()).shared
    found, _ = estimate.traced(config, kind, asked, formulas.dtype_of(config, asked.dtype), shared)
    return {phase: round(sum(parts.values())) for phase, parts in found.items()}


DEPTHS = [(name, method) for method in ("lora", "full", "prefix_tuning", "houlsby") for name in CONFIGS]
DEPTHS.sort(key=lambda case: case[0] != "llama")
DEPTHS += [(name, m) for i, m in enumerate(("lst", "mam", "dora", "molora")) for name in list(CONFIGS)[i % 2 :: 2]]


@pytest.mark.parametrize(("name", "method"), quick(DEPTHS, 4))
def test_few_layers_tell_of_all(folders: dict[str, Path], name: str, method: str) -> None:
    asked = request(model=str(folders[name]), method=method, batch_size=2, max_length=8)
    try:
        wanted = deep(asked)
    except SiteError:
        pytest.skip("the method does not fit the model")
    found = shallow(asked)
    assert {k: pytest.approx(v, rel=0.006 if method == "lst" else 0.002) for k, v in wanted.items()} == found


@pytest.mark.parametrize("method", quick(["mam", "fact", "compacter", "propetl"]))
@pytest.mark.parametrize("kind", [LLAMA, BERT], ids=["llama", "bert"])
def test_layers_that_share_are_known_to_the_byte_from_few(
    kind: Any, method: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """The peak of many may lie where that of few does not."""
    type(kind)(**kind.to_dict() | {"num_hidden_layers": 11}).save_pretrained(tmp_path)
    asked = request(model=str(tmp_path), method=method, batch_size=2, max_length=8)
    wanted, depths, own = deep(asked), list[int](), estimate.trace

    def seen(model: Any, *more: Any) -> step.Traced:
        depths.append(model.config.num_hidden_layers)
        return own(model, *more)

    monkeypatch.setattr(estimate, "trace", seen)
    assert estimate._whole(asked.model_dump_json()).shared and shallow(asked) == wanted
    assert depths == [3, 4, 5]


@pytest.mark.parametrize("method", ["said", "x_peft", "nola", "vera"])
def test_frozen_random_values_are_not_drawn_for_a_plan(folders: dict[str, Path], method: str) -> None:
    asked = request(model=str(folders["bert"]), method=method)
    config, kind = estimate.read(asked.model, asked.task, asked.labels)
    drawn: list[int] = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and not made.is_meta:
                drawn.append(made.numel())
            return made

    with Seen():
        step.adapted(config, kind, asked, torch.float32)
    assert max(drawn, default=0) < 128  # positions and the like; frozen values are thousands


@pytest.mark.slow
def test_layers_that_share_what_grows_with_depth_are_all_traced(tmp_path: Path) -> None:
    tf.LlamaConfig(**LLAMA.to_dict() | {"num_hidden_layers": 9}).save_pretrained(tmp_path)
    asked = request(model=str(tmp_path), method="hyperformer", batch_size=2, max_length=8)
    assert shallow(asked) == deep(asked)


def test_a_range_of_layers_is_traced_whole(folders: dict[str, Path]) -> None:
    asked = request(model=str(folders["llama"]), method={"name": "lora", "layers": "-2:"}, batch_size=2, max_length=8)
    assert shallow(asked) == deep(asked)
    assert plan(asked).low < plan(request(model=str(folders["llama"]), batch_size=2, max_length=8)).low


USABLE = [o.value for o in OptimizerNames if not _why_not(o.value) and not o.value.startswith("paged_")]


@pytest.mark.parametrize("kind", USABLE)
def test_the_optimizer_holds_what_the_real_one_holds(kind: str) -> None:
    """State and a step's own memory on a CPU, of one large and one small tensor, for every name that a run can have."""
    values = [torch.nn.Parameter(torch.randn(size)) for size in ((100, 70), (64, 90), (8,))]
    made = make_optimizer(kind, [{"params": values, "lr": 1e-3}])
    for value in values:
        value.grad = torch.randn_like(value)
    made.step()
    state = [t for held in made.state.values() for t in held.values() if isinstance(t, torch.Tensor)]
    planned = [torch.nn.Parameter(torch.empty_like(value, device="meta")) for value in values]
    assert kept.optimizer_state(planned, kind) == tensor_bytes(state)
    peak, wanted = allocator_peak(made.step), kept.optimizer_scratch(planned, kind, "cpu")
    assert peak == pytest.approx(wanted, rel=0.01, abs=256), (peak, wanted)


def test_an_optimizer_that_looks_at_values_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Looks(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            float(self.param_groups[0]["params"][0].grad.sum())

    monkeypatch.setattr(kept, "make_optimizer", lambda kind, groups: Looks(groups))
    with pytest.raises(ConfigError, match="The memory of optimizer=other is not known"):
        kept.optimizer_state([torch.nn.Parameter(torch.empty(3, device="meta"))], "other")


@pytest.mark.parametrize("kind", [{"gradient_checkpointing": True}, {"accumulation": 2}])
def test_checkpointing_and_accumulation_are_the_allocators(kind: dict[str, Any]) -> None:
    asked = plantruth.asked("llama", "lora", **kind)
    assert plantruth.traced("llama", asked).timeline.peak() == plantruth.real_peak("llama", asked)


def test_few_bits_a_weight() -> None:
    model = skeleton.build(CONFIGS["llama"], tf.LlamaForCausalLM).requires_grad_(False)
    weights = formulas.linear_weights(model, "nf4")
    count = 6 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # the head is left out
    assert sum(w.numel() for w in weights) == count
    rows = sum(w.shape[0] for w in weights)
    assert formulas.quantised(weights, "int8") == count + 4 * rows
    least = count / 2 + count / 64  # half a byte a weight, a byte for 64 of them; then scales of scales and the code
    assert least < formulas.quantised(weights, "nf4") < least + count / 64 / 64 * 2 + 80 * len(weights)


@pytest.mark.slow
def test_what_devices_share(folders: dict[str, Path]) -> None:
    asked = {"model": str(folders["llama"]), "method": "full", "batch_size": 1, "max_length": 8}
    alone, two = plan(request(**asked)), plan(request(**asked, devices=2, shard="fsdp"))
    with torch.device("meta"):
        layers = tf.LlamaForCausalLM(CONFIGS["llama"]).model.layers
    half = 4 * sum(p.numel() for p in layers.parameters()) // 2
    assert two.parts["weights"] == alone.parts["weights"] - half
    assert (two.parts["optimizer"], two.parts["adapter"]) == (alone.parts["optimizer"], alone.parts["adapter"])
    packed = asked | {"method": "lora", "quantize": "nf4"}  # which `peftree train` does not divide
    one, half = plan(request(**packed)), plan(request(**packed, devices=2, shard="fsdp"))
    assert half.parts["weights"] == -(-one.parts["weights"] // 2)
    rows = plan(request(**asked, devices=2, shard="ddp"))
    assert rows.low - alone.low == pytest.approx(4 * alone.trainable, rel=0.01)  # buckets of the gradients


def test_fsdp_gathers_the_largest_layer_and_the_next(folders: dict[str, Path]) -> None:
    """Where a peak lies in the forward pass: two whole layers stand beside the shards, and gradients are copied."""
    with torch.device("meta"):
        layers = tf.LlamaForCausalLM(CONFIGS["llama"]).model.layers
    layer = max(sum(p.numel() * p.element_size() for p in one.parameters()) for one in layers)
    lora = 4 * 8 * ((64 + 64) + (64 + 32))  # float32, r=8, on maps of 64 to 64 (q) and 64 to 32 (v)
    asked = {"model": str(folders["llama"]), "method": "lora", "batch_size": 1, "max_length": 64}
    alone, two, rows = (
        plan(request(**asked, **more)) for more in ({}, {"devices": 2, "shard": "fsdp"}, {"devices": 2, "shard": "ddp"})
    )
    assert two.parts["temporaries"] - alone.parts["temporaries"] == 2 * layer + 6 * lora
    assert rows.parts["temporaries"] - alone.parts["temporaries"] == 6 * lora  # every gradient, and no layer


def test_a_model_that_resists_is_told_of_roughly(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(model=str(folders["llama"]), batch_size=3, max_length=9)
    exact = plan(asked)
    estimate._planned.cache_clear()

    def refuse(*_: object) -> None:
        raise RuntimeError("it wants a real value")

    with monkeypatch.context() as patch:
        patch.setattr(estimate, "trace", refuse)
        found = plan(asked)
    estimate._planned.cache_clear()
    assert found.how == "formula" and exact.how == "traced"
    assert "it wants a real value" in found.notes[0]
    assert exact.low / 3 < found.low < exact.low * 3
    assert found.high / found.expected > exact.high / exact.expected


@given(st.integers(1, 12), st.integers(1, 24))
@settings(max_examples=4, deadline=None)
@pytest.mark.slow
def test_more_rows_or_tokens_take_more(rows: int, tokens: int) -> None:
    with tf_folder() as folder:
        asked = request(model=folder, batch_size=rows, max_length=tokens, eval_batch_size=1)
        first = plan(asked).low
        assert first < plan(asked.model_copy(update={"batch_size": rows + 1})).low
        assert first < plan(asked.model_copy(update={"max_length": tokens + 1})).low


class tf_folder:  # noqa: N801  used as a function
    """A folder with the small Llama's config."""

    def __enter__(self) -> str:
        import tempfile

        self.held = tempfile.TemporaryDirectory()
        CONFIGS["llama"].save_pretrained(self.held.name)
        return self.held.name

    def __exit__(self, *_: object) -> None:
        self.held.cleanup()


@pytest.mark.parametrize("mode", ["eval", "generate"])
def test_reading_takes_less_than_training(folders: dict[str, Path], mode: str) -> None:
    asked = {"model": str(folders["llama"]), "batch_size": 4, "max_length": 32}
    found = plan(request(**asked, mode=mode, new_tokens=16))
    assert found.low < plan(request(**asked)).low
    assert "gradients" not in found.parts and "optimizer" not in found.parts
    if mode == "generate":  # keys and values: 6 layers, 2 heads of 16, 4 rows of 48 tokens
        assert found.phases["generation"] - found.parts["weights"] > 2 * 6 * 2 * 16 * 4 * 48 * 4


@pytest.mark.slow
def test_methods_are_planned_or_refused_in_words(folders: dict[str, Path]) -> None:
    def planned(method: str, **fields: Any) -> Plan:
        return plan(request(model=str(folders["bert"]), method={"name": method, **fields}, batch_size=2, max_length=8))

    unfit = ("conv_adapter", "convpass", "vpt", "xattn_tuning")  # for images, and for what is encoded
    for name in {*list(registry.methods())[::12], *unfit}:  # the ledger's tests take all
        try:
            try:
                found = planned(name)
            except (AdapterError, ConfigError, MethodError):  # its defaults are too large for a tiny model
                found = planned(name, **registry.get(name).tags.small)
        except SiteError:
            assert name in unfit
        else:
            assert found.how == "traced" and found.trainable > 0, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pass_in_bf16_is_the_allocators(dtype: str) -> None:
    """What oneDNN takes inside a product of bfloat16 hangs on the CPU (of one at most 200 KB) and is not planned."""
    found = {}
    for precision in ("float32", "bf16"):
        asked = plantruth.asked("llama", "lora", precision=precision, dtype=dtype, chunked_loss=False)
        found[precision] = plantruth.traced("llama", asked).timeline.peak()
        assert found[precision] == plantruth.real_peak("llama", asked)
    assert (found["bf16"] == found["float32"]) == (dtype == "bfloat16")  # whose adapted maps have nothing to cast


@pytest.mark.slow
def test_frozen_weights_without_an_adapter_are_cast_for_each_pass_and_kept(folders: dict[str, Path]) -> None:
    """Under autocast a float32 map is held a second time, in bf16, until the backward pass, unless LoRA is on it."""
    more = {}
    for sites in ("attn.q", "linear"):
        method = {"name": "lora", "sites": sites}
        asked = {"model": str(folders["llama"]), "method": method, "batch_size": 1, "max_length": 1, "device": "cpu"}
        full, half = (plan(request(**asked, precision=kind)) for kind in ("float32", "bf16"))
        more[sites] = half.parts.get("activations", 0) - full.parts.get("activations", 0)
    model = skeleton.build(CONFIGS["llama"], tf.LlamaForCausalLM)
    matrices = {n: p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2}
    assert more["attn.q"] > 1.5 * sum(size for n, size in matrices.items() if "q_proj" not in n)
    assert more["linear"] < 0


def test_what_a_plan_leaves_out_is_said(folders: dict[str, Path]) -> None:
    asked = {"model": str(folders["llama"]), "batch_size": 1, "max_length": 8}
    plain = plan(request(**asked)).notes
    said = plan(request(**asked, precision="bf16", compile=True, optimizer="paged_adamw_8bit")).notes
    new = " ".join(set(said) - set(plain))
    assert all(word in new for word in ("not compared with a device", "plain passes", "can leave the device"))
    for name, words in (("adamw", "there is no optimizer"), ("lomo", "cannot be used")):
        with pytest.raises(ConfigError, match=words):
            plan(request(**asked, optimizer=name))


def test_cudas_autocast_leaves_norms_in_float32() -> None:
    """A layer norm of a bf16 tensor gives float32 there and bf16 on a CPU; a product gives bf16 on both."""
    x = torch.zeros(2, 4, dtype=torch.bfloat16)
    for kind, wide in (("bf16", torch.float32), ("float32", torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16), step.Fused(kind):
            assert torch.nn.functional.layer_norm(x, (4,)).dtype == wide
            assert torch.softmax(x, -1).dtype == x.sum().dtype == wide
            assert torch.nn.functional.linear(x.float(), x.float()).dtype == torch.bfloat16
    with step.Fused("bf16"):
        assert torch.softmax(x, -1).dtype == torch.bfloat16


@pytest.mark.slow
def test_compiled_passes_are_planned_with_whole_logits_and_scores_without(folders: dict[str, Path]) -> None:
    asked = {"model": str(folders["llama"]), "method": "lora", "max_length": 32, "batch_size": 8, "device": "cpu"}
    chunks, compiled, whole = (
        plan(request(**asked, config={"vocab_size": 4096}, **more))
        for more in ({}, {"compile": True}, {"chunked_loss": False})
    )
    assert compiled.phases["backward"] == whole.phases["backward"] > chunks.phases["backward"]
    assert compiled.phases["scoring"] == chunks.phases["scoring"] < whole.phases["scoring"]
