"""The setting `quantize`: runs, plans, and what is refused before a model is loaded."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import peftree
from peftree.cli import app
from peftree.deltas.packed import dense, is_packed, stored
from peftree.errors import ConfigError, MergeError
from peftree.plan import plan, request
from peftree.settings import RunConfig
from peftree.tasks import quantized
from peftree.tasks.base import Options
from peftree.tasks.loading import load as load_model
from peftree.tasks.quantized import to_pack
from peftree.train.run import open_run, run
from quantized.llama import KINDS, loaded


def _config(model: str, data: Path, out: Path, **more: Any) -> RunConfig:
    settings = {"model": model, "task": "generation", "steps": 3, "batch_size": 2}
    return RunConfig.model_validate(settings | {"output": str(out), "data": {"train": str(data)}} | more)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_on_a_packed_base(kind: str, decoder: str, prompt_data: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = run(_config(decoder, prompt_data, tmp_path / "r", quantize=kind, measure_memory=True))
    assert found.steps == 3 and found.planned_bytes and found.peak_bytes
    written = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert written["planned_bytes"] == found.planned_bytes
    # What a packed product takes and releases is an estimate; here, 64 units wide, it is much of the whole.
    assert abs(found.planned_bytes / found.peak_bytes - 1) < 0.25


@pytest.mark.parametrize("kind", KINDS)
def test_planned_weights_are_the_bytes_of_the_loaded_ones(kind: str, tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8, vocab_size=256,
        max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    model = loaded(kind, tmp_path / "m")
    parts = {t.data_ptr(): t.untyped_storage().nbytes() for p in model.parameters() for t in stored(p)}
    asked = {"model": str(tmp_path / "m"), "dtype": "float32", "max_length": 16}
    planned = plan(request(**asked, quantize=kind)).parts["weights"]
    assert planned == pytest.approx(sum(parts.values()), rel=0.01)
    assert planned < 0.5 * plan(request(**asked)).parts["weights"]


@pytest.mark.parametrize("kind", KINDS)
def test_heads_stay_plain_and_planned_so(kind: str, tmp_path: Path) -> None:
    """A classifier with a bias, which transformers would pack, one of two maps, and a language model's head."""
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    for name, head in (
        ("BertForSequenceClassification", "classifier"), ("RobertaForSequenceClassification", "classifier."),
        ("BertForMaskedLM", "cls.predictions.decoder"),
    ):  # fmt: skip
        cls: Any = getattr(transformers, name)
        config = cls.config_class(vocab_size=64, max_position_embeddings=32, **small)
        cls(config).save_pretrained(tmp_path / name)
        read = cls.config_class.from_pretrained(tmp_path / name)
        model, _ = load_model(cls, str(tmp_path / name), read, Options(quantize=kind))
        packed = {n.removesuffix(".weight") for n, p in model.named_parameters() if is_packed(p)}
        assert packed == set(to_pack(cls(config), kind)) and not any(head in each for each in packed)
        assert any(each.endswith("encoder.layer.0.attention.self.query") for each in packed)


def test_what_is_missing_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="int8_torchao needs torchao, which is not installed") as told:
        run(_config("/nowhere", tmp_path / "none.jsonl", tmp_path / "r", quantize="int8_torchao"))
    assert told.value.fix == "Run: pip install torchao"
    assert not (tmp_path / "r").exists()


def test_a_word_for_merging_is_checked_first(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "none"), str(tmp_path / "out"), "--quantized", "pack"])
    assert isinstance(done.exception, MergeError) and "refuse, dequantize, requantize" in done.exception.fix


def test_a_packed_folder_is_not_packed_twice(tmp_path: Path) -> None:
    small = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
    )  # fmt: skip
    LlamaForCausalLM(small).save_pretrained(tmp_path / "m")
    loaded("nf4", tmp_path / "m").save_pretrained(tmp_path / "packed")
    config = LlamaConfig.from_pretrained(tmp_path / "packed")
    with pytest.raises(ConfigError, match="is quantised already"):
        load_model(LlamaForCausalLM, str(tmp_path / "packed"), config, Options(quantize="int8"))
    model, _ = load_model(LlamaForCausalLM, str(tmp_path / "packed"), config, Options())
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"  # type: ignore[union-attr,index]


def test_a_model_without_maps_that_fit_is_refused(tmp_path: Path) -> None:
    """With torchao no transposed map is packed, so that nothing in GPT-2 would be smaller."""
    from transformers import GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="GPT2LMHeadModel has no linear map that it packs"):
        load_model(GPT2LMHeadModel, str(tmp_path), config, Options(quantize="fp8"))
    model, _ = load_model(GPT2LMHeadModel, str(tmp_path), config, Options(quantize="int8"))
    assert model.transformer.h[0].attn.c_attn.weight.dtype == torch.int8  # type: ignore[union-attr,index]
    adapter = peftree.adapt(model, "lora")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1)
    peftree.export(adapter, tmp_path / "merged", "merged", "dequantize")  # transposed again
    plain = GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model.eval()(ids).logits, rtol=0, atol=0.02)


LLAMA_7B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip


def test_one_run_file_plans_a_7b_model_and_trains_its_tiny_twin(
    decoder: str, prompt_data: Path, tmp_path: Path
) -> None:
    """The 7B folder holds a config and a tokenizer; the figure is QLoRA's arithmetic (arXiv 2305.14314, section 3)."""
    large = tmp_path / "llama-2-7b"
    shutil.copytree(decoder, large, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    LlamaConfig(**LLAMA_7B, dtype="bfloat16", architectures=["LlamaForCausalLM"]).save_pretrained(large)
    assert not list(large.glob("*.safetensors"))
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {large}\ntask: generation\ndata: {{train: {prompt_data}}}\noutput: {tmp_path / 'out'}\n"
        "dtype: bfloat16\nquantize: nf4\nmethod: qlora\nmax_length: 32\nbatch_size: 2\nsteps: 3\nlr: 0.01\n"
    )
    planned = CliRunner().invoke(app, ["plan", str(file), "--json"])
    assert planned.exit_code == 0, planned.output
    found = json.loads(planned.stdout)
    maps = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    plain = 2 * 32000 * 4096 + (2 * 32 + 1) * 4096  # embeddings, head, norms: two bytes each
    packed = maps * (0.5 + (1 + 4 / 256) / 64)  # four bits; a byte for 64 weights; four for 256 of those bytes
    assert found["parts"]["weights"] == pytest.approx(packed + 2 * plain, rel=0.01)
    assert found["total"] == maps + plain and found["trainable"] == 32 * 64 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    trained = CliRunner().invoke(app, ["train", str(file), f"model={decoder}"])
    assert trained.exit_code == 0, trained.output
    opened = open_run(tmp_path / "out")
    assert sum(is_packed(p) for p in opened.task.model.parameters()) == 2 * 7
    assert len(opened.adapter.deltas) == 2 * 7 and all(bool(d.B.any()) for d in opened.adapter.deltas.values())  # type: ignore[operator]


def test_a_loftq_run_starts_near_the_plain_model_resumes_and_merges(
    decoder: str, prompt_data: Path, tmp_path: Path
) -> None:
    """From its file to a merged folder; only the start of training reads the plain weights."""
    shutil.copytree(decoder, tmp_path / "m")
    file, out = tmp_path / "run.yaml", tmp_path / "out"
    file.write_text(
        f"model: {tmp_path / 'm'}\ntask: generation\ndata: {{train: {prompt_data}}}\noutput: {out}\nquantize: nf4\n"
        "method: {name: loftq, r: 4, alpha: 4}\nmax_length: 32\nbatch_size: 2\nsteps: 4\nsave_every: 2\nlr: 1.0e-9\n"
    )

    def shown(*words: str) -> str:
        done = CliRunner().invoke(app, list(words))
        assert done.exit_code == 0, done.output + repr(done.exception)
        return done.stdout

    fields = "r: 4, alpha: 4, sites: linear}"
    planned = [
        json.loads(shown("plan", str(file), f"method={{name: {n}, {fields}", "--json")) for n in ("loftq", "lora")
    ]
    assert planned[0]["parts"] == planned[1]["parts"] and planned[0]["trainable"] == planned[1]["trainable"] > 0
    shown("train", str(file), "-q")
    whole = (out / "adapter" / "adapter.safetensors").read_bytes()
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(out / name)
    (out / "metrics.json").unlink()
    shown("train", f"{out}/resolved.yaml", "resume=true", "-q")
    assert (out / "adapter" / "adapter.safetensors").read_bytes() == whole

    opened = open_run(out)
    model, twin = opened.task.model, LlamaForCausalLM.from_pretrained(tmp_path / "m")
    for _, site, delta in opened.adapter.entries:  # at this rate, where it started
        module: Any = model.get_submodule(site.path)
        E = twin.get_submodule(site.path).weight - dense(module, module.weight)  # type: ignore[operator]
        left, best = E - delta.weight(torch.zeros_like(E)), torch.linalg.svdvals(E)[4:]
        assert float(left.detach().norm()) == pytest.approx(float(best.detach().norm()), rel=1e-4)
    with peftree.disabled(model):
        base = model.eval()(torch.arange(8)[None]).logits
    shown("merge", str(out), str(tmp_path / "merged"), "--quantized", "dequantize")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    far, near = (
        (m - twin.eval()(torch.arange(8)[None]).logits).norm() for m in (base, merged(torch.arange(8)[None])[0])
    )
    assert near < 0.9 * far
