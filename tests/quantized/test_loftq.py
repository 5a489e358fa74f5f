"""LoftQ: the start on a packed weight is the best of its rank, as the paper's formula and Hugging Face PEFT have it."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import loftq_utils
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaModel,
)
from transformers.core_model_loading import Chunk, WeightConverter

import peftree
from peftree.deltas.packed import dense, is_packed, keep_gradients
from peftree.errors import MethodError
from quantized.llama import KINDS, Loader, loaded, logits, tokens
from sampled import quick

R = 4
FOUR: Any = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


@torch.no_grad()
def _left(model: Any, adapter: Any, plain: dict[str, Tensor]) -> list[tuple[float, float]]:
    """What each term leaves of W - Q, and what the best of its rank leaves (Eckart and Young)."""
    found = []
    for _, site, delta in adapter.entries:
        module = model.get_submodule(site.path)
        rows = slice(*(site.rows or (None,)))
        E = plain[f"{site.path}.weight"][rows] - dense(module, module.weight)[rows]
        S = torch.linalg.svdvals(E)
        found.append((float((E - delta.scale * delta.B.T @ delta.A).norm()), float(S[delta.A.shape[0] :].norm())))
        assert float(S[0]) > 0 and is_packed(module.weight)
    return found


@pytest.mark.parametrize("kind", quick(KINDS, 2))
@pytest.mark.parametrize("fields", [{"alpha": 4.0}, {"alpha": 32.0}, {"rank_stabilized": True}], ids=str)
def test_the_start_is_the_best_of_its_rank(kind: str, fields: dict[str, Any], load: Loader) -> None:
    model, twin = load(kind), load("none")
    for module in model.modules():
        keep_gradients(module)  # whose layout rounds no scales
    base, whole = logits(model), logits(twin)
    adapter = peftree.adapt(model, "loftq", r=R, **fields)
    found = _left(model, adapter, twin.state_dict())
    assert len(found) == 14 and all(own == pytest.approx(best, rel=1e-5) for own, best in found)
    with peftree.disabled(model):
        assert torch.equal(logits(model), base)
    if kind != "int8":  # LLM.int8 rounds activations too
        assert (logits(model) - whole).norm() < (base - whole).norm()


def test_it_is_the_start_of_hugging_face_peft(load: Loader, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's function asks for a GPU by name; here it gets the CPU."""
    model: Any = load("nf4")
    maps = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(load("nf4"), peft.LoraConfig(r=R, lora_alpha=R, target_modules=maps))
        to = Tensor.to

        def on_cpu(self: Tensor, *args: Any, **more: Any) -> Tensor:
            return to(self, *args, **(more | {"device": "cpu"} if more.get("device") == "cuda" else more))

        monkeypatch.setattr(Tensor, "to", on_cpu)
        loftq_utils.replace_lora_weights_loftq(theirs, str(folder))
        monkeypatch.undo()
    adapter = peftree.adapt(model, "loftq", r=R, alpha=float(R))
    assert len(adapter.entries) == 14
    for _, site, delta in adapter.entries:
        layer = theirs.base_model.model.get_submodule(site.path)
        wanted = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
        assert float(wanted.abs().max()) > 1e-4
        torch.testing.assert_close((delta.scale * delta.B.T @ delta.A).detach(), wanted, rtol=0, atol=1e-5)


def test_it_is_loras_start_where_nothing_is_packed(load: Loader) -> None:
    """W - Q is 0 there, and two factors of 0 would never train."""
    one, two = load("none"), load("none")
    mine, usual = peftree.adapt(one, "loftq", r=R, seed=3), peftree.adapt(two, "lora", sites="linear", r=R, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), usual.parameters(), strict=True))
    assert any(bool(p.any()) for p in mine.parameters())


def test_a_transposed_and_fused_weight(tmp_path: Path) -> None:
    """GPT-2's file has the transpose of what bitsandbytes packs, and three maps in one tensor."""
    torch.manual_seed(1)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16)).save_pretrained(tmp_path)
    plain = {n: t.t() if t.dim() == 2 else t for n, t in GPT2LMHeadModel.from_pretrained(tmp_path).state_dict().items()}
    model = GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**FOUR))
    adapter = peftree.adapt(model, "loftq", r=R, sites="attn.q attn.v attn.o ffn.up ffn.down")
    assert {d.B.shape[1] for _, s, d in adapter.entries if s.role in ("attn.q", "attn.o")} == {32}
    assert all(own == pytest.approx(best, rel=1e-5) for own, best in _left(model, adapter, plain))


@pytest.mark.parametrize("form", ["a whole model's", "a bare model's", "renamed", "renamed in vain", "in shards"])
def test_files_with_other_names(form: str, folder: Path, tmp_path: Path) -> None:
    path, more, auto = tmp_path / "m", {}, AutoModelForCausalLM
    plain = LlamaForCausalLM.from_pretrained(folder)
    if form == "a whole model's":
        shutil.copytree(folder, path)
        auto = AutoModel
    elif form == "a bare model's":
        plain.model.save_pretrained(path)
    elif form == "renamed in vain":
        shutil.copytree(folder, path)
        more = {"key_mapping": {"q_proj": "query"}}  # transformers takes a name of the model as it is
    elif form == "renamed":
        shutil.copytree(folder, path)
        values = {n.replace("self_attn", "mixer"): t for n, t in load_file(folder / "model.safetensors").items()}
        save_file(values, path / "model.safetensors", {"format": "pt"})
        more = {"key_mapping": {"mixer": "self_attn"}}
    else:
        plain.save_pretrained(path, max_shard_size="100KB")
        assert len(list(path.glob("*.safetensors"))) > 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto.from_pretrained(path, quantization_config=BitsAndBytesConfig(**FOUR), dtype=torch.float32, **more)
    peftree.adapt(model, "lora", name="other")  # whose classes and tensors are on the model by then
    adapter = peftree.adapt(model, "loftq", r=R)
    values = (plain.model if isinstance(model, LlamaModel) else plain).state_dict()
    found = _left(model, adapter, values)
    assert len(found) == 14 and all(own == pytest.approx(best, rel=1e-5) for own, best in found)


def _packed_itself(model: Any, path: Path) -> Any:
    model.save_pretrained(path / "packed")
    return AutoModelForCausalLM.from_pretrained(path / "packed")


def _moved(model: Any, path: Path) -> Any:
    shutil.rmtree(path)
    return model


def _a_shard_is_lost(model: Any, path: Path) -> Any:
    LlamaForCausalLM.from_pretrained(path).save_pretrained(path, max_shard_size="100KB")
    (path / "model.safetensors").unlink(missing_ok=True)
    next(path.glob("model-00002*")).unlink()
    return model


def _from_nowhere(model: Any, path: Path) -> Any:
    model.config.name_or_path = ""
    return model


def _joined(model: Any, path: Path) -> Any:
    values = load_file(path / "model.safetensors")
    for layer in (f"model.layers.{i}.self_attn" for i in range(2)):
        both = [values.pop(f"{layer}.{name}_proj.weight") for name in ("q", "o")]
        values[f"{layer}.qo_proj.weight"] = torch.cat(both)
    save_file(values, path / "model.safetensors", {"format": "pt"})
    parts = [r"self_attn.q_proj.weight", r"self_attn.o_proj.weight"]
    model._weight_conversions = [WeightConverter("self_attn.qo_proj.weight", parts, [Chunk(dim=0)])]
    return model


def _other_weights(model: Any, path: Path) -> Any:
    torch.manual_seed(9)
    LlamaForCausalLM(model.config).save_pretrained(path)
    return model


def _packed_since(model: Any, path: Path) -> Any:
    values = {n: t.to(torch.int8) for n, t in load_file(path / "model.safetensors").items()}
    save_file(values, path / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_packed_itself, r"packed is packed itself"),
        (_moved, r"m has neither model\.safetensors nor model\.safetensors\.index\.json"),
        (_a_shard_is_lost, r"m has no model-00002-of"),
        (_from_nowhere, r"the model was not loaded from a folder"),
        (_joined, r"m has no tensor that is model\.layers\.0\.self_attn\.q_proj\.weight alone"),
        (_other_weights, r"that in the model's folder is another one"),
        (_packed_since, r"q_proj\.weight in .* is torch\.int8 \[64, 64\], not a plain \[64, 64\]"),
    ],
)
def test_what_is_not_known_is_said_and_nothing_is_changed(change: Any, why: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = change(loaded("nf4", tmp_path / "m"), tmp_path / "m")
    names = list(model.state_dict())
    with pytest.raises(MethodError, match=rf"q_proj\) has no plain weight to start from: .*{why}") as told:
        peftree.adapt(model, "loftq", r=R)
    assert told.value.fix.endswith("or set start=zero.") and list(model.state_dict()) == names
    assert not peftree.adapters(model)
    peftree.adapt(model, "loftq", r=R, start="zero")


@pytest.mark.parametrize("layout", ["native", "peft"])
def test_a_saved_adapter_needs_no_plain_files(layout: Any, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    model, other = loaded("nf4", tmp_path / "m"), loaded("nf4", tmp_path / "m")
    adapter = peftree.adapt(model, "loftq", r=R)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.01)
    on = logits(model)
    peftree.save(adapter, tmp_path / "a", format=layout)
    if layout == "peft":
        assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == R, "not written as twice it"
    shutil.rmtree(tmp_path / "m")
    with pytest.raises(MethodError, match="has no plain weight"):
        peftree.adapt(other, "loftq", r=R)
    peftree.load(other, tmp_path / "a", name="one")
    torch.testing.assert_close(logits(other), on, rtol=0, atol=1e-6)
    for how in ("weights", "effects"):
        peftree.load(other, tmp_path / "a", name=f"two_{how}")
        peftree.combine(other, {"one": 0.25, f"two_{how}": 0.75}, name=f"both_{how}", how=how)
        torch.testing.assert_close(logits(other), on, rtol=0, atol=1e-5)
    mixed = peftree.adapt(other, "moa", name="mixed", sources=["one", "two_weights"])
    one = peftree.adapters(other)["one"].deltas
    assert all(torch.equal(d.members[0].A, one[key].A) for (key, d) in mixed.deltas.items())


def test_peft_reads_it(load: Loader, tmp_path: Path) -> None:
    model, plain = load("nf4"), load("nf4")
    peftree.export(peftree.adapt(model, "loftq", r=R), tmp_path / "p")
    for module in plain.modules():
        keep_gradients(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of transformers
        theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "p")).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)


def test_a_weight_that_packing_leaves_as_it_is_trains(folder: Path, tmp_path: Path) -> None:
    """Four bits hold a weight of zeros exactly; its term starts as LoRA's, since two factors of 0 would stay so."""
    plain = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        plain.model.layers[0].mlp.down_proj.weight.zero_()
    plain.save_pretrained(tmp_path)
    model = loaded("nf4", tmp_path)
    adapter = peftree.adapt(model, "loftq", r=R, sites="ffn.down")
    first, second = (delta for _, _, delta in adapter.entries)
    assert bool(first.A.any()) and not bool(first.B.any()) and bool(second.B.any())
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert bool(first.B.grad.any())
