"""Folders whose weights are packed already: plans, runs, gradients and merged models; what is refused, by name."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

import peftree
from peftree.deltas.packed import dense, is_packed, keep_gradients, stored
from peftree.errors import AdapterError, ConfigError, PeftreeWarning
from peftree.plan import fit, plan, request
from peftree.plan.show import Shown
from peftree.tasks import quantized
from peftree.tasks.base import Options
from peftree.tasks.loading import load
from peftree.train.processes import Team
from peftree.train.sharded import shard
from quantized.llama import logits, saved, tokens

FORMS = ("nf4", "nf4 single", "fp4", "int8", "int8_torchao", "fp8_torchao", "int-quantized",
         "pack-quantized", "float-quantized", "fp8")  # fmt: skip
OPENED = ("int-quantized", "pack-quantized", "float-quantized", "fp8")  # unpacked while they are read
QUICK = ("nf4 single", "int8_torchao", "pack-quantized", "fp8")
forms = pytest.mark.parametrize("form", [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in FORMS])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Llama, wide enough for groups of 128 weights."""
    return saved(tmp_path_factory.mktemp("plain"), 256)


def _as_transformers_saves(source: Path, out: Path, config: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32).save_pretrained(
            out
        )


def _as_compressed_tensors_saves(source: Path, out: Path, form: str) -> None:
    """Round to the nearest with the package's own scales, and pack with its own compressor."""
    from compressed_tensors import quantization as ct
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = {"int-quantized": "W8A8", "pack-quantized": "W4A16", "float-quantized": "FP8_DYNAMIC"}[form]
    groups = {"group_0": ct.preset_name_to_scheme(scheme, ["Linear"])}
    config = ct.QuantizationConfig(
        config_groups=groups, ignore=["lm_head"], format=form, quantization_status="compressed"
    )
    model: Any = LlamaForCausalLM.from_pretrained(source)
    ct.apply_quantization_config(model, config)
    for module in (m for m in model.modules() if getattr(m, "quantization_scheme", None) is not None):
        how = module.quantization_scheme.weights
        rows = module.weight.data.unflatten(-1, (-1, how.group_size or module.in_features))
        scale, _ = calculate_qparams(rows.amin(-1), rows.amax(-1), how)
        module.weight_scale.data = scale.to(module.weight_scale.dtype).reshape(module.weight_scale.shape)
        module.quantization_status = ct.QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model, form)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)


def _fp8_in_blocks(source: Path, out: Path) -> None:
    """As DeepSeek's files: float8 values, and a scale for 128 x 128 of them."""
    shutil.copytree(source, out)
    tensors = {}
    for name, W in load_file(source / "model.safetensors").items():
        tensors[name] = W
        if "layers" in name and W.dim() == 2:
            blocks = W.unflatten(0, (-1, 128)).unflatten(-1, (-1, 128))
            scale = blocks.abs().amax((1, 3)) / 448
            tensors[name] = (blocks / scale[:, None, :, None]).reshape(W.shape).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    _says(out, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"})


def _says(folder: Path, config: dict[str, Any]) -> None:
    """Write `quantization_config` into a folder's config."""
    held = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(held | {"quantization_config": config}))


def _packed(form: str, source: Path, out: Path) -> Path:
    """Write the folder of a form, with the package that makes such folders."""
    if form == "fp8":
        _fp8_in_blocks(source, out)
    elif form in OPENED:
        _as_compressed_tensors_saves(source, out, form)
    else:
        from torchao import quantization as ao

        four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
        made: Any = {
            "nf4": lambda: BitsAndBytesConfig(**four, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
            "nf4 single": lambda: BitsAndBytesConfig(**four, bnb_4bit_quant_type="nf4"),
            "fp4": lambda: BitsAndBytesConfig(**four),
            "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
            "int8_torchao": lambda: TorchAoConfig(ao.Int8WeightOnlyConfig()),
            "int8 activations": lambda: TorchAoConfig(ao.Int8DynamicActivationInt8WeightConfig()),
            "fp8_torchao": lambda: TorchAoConfig(ao.Float8WeightOnlyConfig()),
        }
        _as_transformers_saves(source, out, made[form]())
    return out


def _loaded(folder: Path) -> Any:
    """Return the model as a run loads it."""
    config = AutoConfig.from_pretrained(folder)
    model, new = load(AutoModelForCausalLM, str(folder), config, Options())
    assert not new
    return model


def _gradient(model: Any) -> torch.Tensor:
    """Return LoRA's gradient after one step, when neither factor is zero."""
    adapter = peftree.adapt(model, "lora", seed=3)
    for _ in range(2):
        for p in adapter.parameters():
            if p.grad is not None:
                p.data.sub_(p.grad)
        model.train().zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    return torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])


@forms
def test_a_packed_folder_trains_is_planned_and_merges(form: str, source: Path, tmp_path: Path) -> None:
    folder = _packed(form, source, tmp_path / "m")
    model: Any = _loaded(folder)
    twin: Any = LlamaForCausalLM.from_pretrained(source)
    held = {t.data_ptr(): t.untyped_storage().nbytes() for p in model.parameters() for t in stored(p)}
    asked = request(model=str(folder), dtype="float32", max_length=16, method="lora")
    assert plan(asked).parts["weights"] == pytest.approx(sum(held.values()), rel=0.01)
    count = sum(is_packed(p) for p in model.parameters())
    assert count == (0 if form in OPENED else 14)

    base = logits(model)
    with torch.no_grad():
        for module, other in zip(model.modules(), twin.modules(), strict=True):
            keep_gradients(module)
            for name, p in module._parameters.items():
                if p is not None:
                    value = dense(module, p)
                    error = (value - other._parameters[name]).norm() / value.norm()
                    assert error < 0.15  # the files are those of this model, rounded
                    other._parameters[name].copy_(value)
    mine, theirs = _gradient(model), _gradient(twin)
    rounds = form == "int8"  # activations too
    assert (mine - theirs).norm() / theirs.norm() < (0.03 if rounds else 1e-4)
    with peftree.disabled(model):
        assert torch.equal(logits(model), base)
    on = logits(model)
    assert not torch.equal(on, base)

    adapter = peftree.adapters(model)["default"]
    peftree.export(adapter, tmp_path / "merged", "merged", "dequantize")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), on, rtol=0, atol=0.03 if rounds else 1e-5)
    if form not in OPENED:
        with pytest.warns(PeftreeWarning, match="again changed one by"):
            peftree.export(adapter, tmp_path / "again", "merged", "requantize")
        assert sum(is_packed(p) for p in _loaded(tmp_path / "again").parameters()) == 14


@pytest.mark.parametrize("kind", ["gptq", "awq", "hqq", "quanto", "mxfp4", "a_new_one", None])
def test_what_cannot_be_trained_on_is_refused_by_name(kind: str | None, source: Path, tmp_path: Path) -> None:
    """Transformers reads an unknown kind as plain weights, with a line in its log."""
    shutil.copytree(source, tmp_path / "m")
    _says(tmp_path / "m", {"quant_method": kind, "bits": 4})
    with pytest.raises(ConfigError, match=f"m is packed with {kind}, which cannot be trained on"):
        _loaded(tmp_path / "m")
    with pytest.raises(ConfigError, match=f"m is packed with {kind}"):
        plan(request(model=str(tmp_path / "m"), max_length=16))


def test_torchao_forms_without_a_backward_pass_are_refused(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "m")
    form = {"default": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 32}, "_version": 2}}
    _says(tmp_path / "m", {"quant_method": "torchao", "quant_type": form})
    with pytest.raises(ConfigError, match="torchao Int4WeightOnlyConfig, which cannot be trained on"):
        _loaded(tmp_path / "m")
    rounded = _packed("int8 activations", source, tmp_path / "r")
    with pytest.raises(ConfigError, match="torchao Int8DynamicActivationInt8WeightConfig, which cannot"):
        _loaded(rounded)
    with pytest.raises(AdapterError, match="packed by torchao, in a form that no adapter can be trained on"):
        peftree.adapt(AutoModelForCausalLM.from_pretrained(rounded), "lora")


def test_a_missing_package_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(source, tmp_path / "m")
    _says(tmp_path / "m", {"quant_method": "compressed-tensors", "format": "pack-quantized"})
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="compressed-tensors, which is not installed") as told:
        _loaded(tmp_path / "m")
    assert told.value.fix == "Run: pip install compressed-tensors"


@pytest.mark.slow
def test_a_packed_folder_is_not_planned_in_other_forms(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _packed("nf4 single", source, tmp_path / "m")
    with pytest.raises(ConfigError, match=r"quantised already \(bitsandbytes\)"):
        plan(request(model=str(folder), max_length=16, quantize="int8"))
    asked = {"model": str(folder), "max_length": 16, "method": "lora", "device": "cpu"}
    made = plan(request(**asked))
    assert Shown.of(request(**asked, memory=2 * made.expected)).ways == ()
    monkeypatch.setattr(fit, "TRIES", 8)  # nothing fits, so each is used for a change
    assert fit.ways(request(**asked), made.parts["weights"] + 1) == []


def test_a_packed_folder_is_not_divided(source: Path, tmp_path: Path) -> None:
    folder = _packed("nf4 single", source, tmp_path / "m")
    with pytest.raises(ConfigError, match=r"weights are packed in forms that are not divided.*Set shard to none"):
        shard(peftree.adapt(_loaded(folder), "lora"), Team(0, 2))
    made = plan(request(model=str(folder), max_length=16, method="lora", processes=2, shard="fsdp"))
    assert any("does not shard a quantised base" in note for note in made.notes)


def test_weights_that_no_delta_reads_are_refused(source: Path, tmp_path: Path) -> None:
    """Loaded by transformers alone, they stay packed until the first pass, and only then have a weight."""
    folder = _packed("pack-quantized", source, tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(AdapterError, match="packed by compressed-tensors, in a form that no adapter"):
        peftree.adapt(model, "lora")
