"""Every method on bases that bitsandbytes and torchao packed: gradients, the base when off, files, merging."""

from __future__ import annotations

import itertools
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import peftree
from peftree import registry
from peftree.deltas import place
from peftree.deltas.packed import dense, is_packed, keep_gradients
from peftree.errors import MergeError, MethodError, PeftreeWarning, SiteError, StoreError
from peftree.graft import weights
from peftree.store.fingerprint import fingerprint
from quantized.llama import KINDS, Loader, logits, tokens

FEW = ("lora", "dora", "oft", "ia3", "full", "houlsby", "prefix_tuning", "prompt_tuning", "lst")


def _adapted(load: Loader, kind: str, method: str) -> tuple[Any, Any]:
    model = load(kind)
    logits(model)  # a scoring pass first, after which bitsandbytes has another layout on some CPUs
    try:
        adapter = peftree.adapt(model, method, **dict(registry.get(method).tags.small or {}))
    except (MethodError, SiteError) as error:
        pytest.skip(str(error)[:80])
    return model, adapter


def _step(model: Any, adapter: Any, rate: float) -> None:
    model.train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    with torch.no_grad():
        for p in adapter.parameters():
            if p.grad is not None:
                p.sub_(rate * p.grad)
    for p in adapter.parameters():
        p.grad = None


def _trains(load: Loader, kind: str, method: str, tmp_path: Path) -> None:
    """Every trained tensor gets a gradient, the base stays as it was when off, and the file comes back."""
    model, adapter = _adapted(load, kind, method)
    with peftree.disabled(model):
        base = logits(model)
    if any(part.tags.needs_data for part in (adapter.method, *adapter.method.parts())):
        adapter.init([lambda: model(input_ids=tokens(), labels=tokens()).loss] * 2)
    for _ in range(3):  # tensors behind zeros get theirs at the second step
        _step(model, adapter, 0.05)
    model.train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    without = [i for i, p in enumerate(adapter.parameters()) if p.requires_grad and p.grad is None]
    zero = [p for p in adapter.parameters() if p.grad is not None and not bool(p.grad.abs().sum() > 0)]
    assert not without and len(zero) * 2 <= len(list(adapter.parameters())), (without, len(zero))
    on = logits(model)
    assert not torch.equal(on, base)
    with peftree.disabled(model):
        assert torch.equal(logits(model), base)
    peftree.save(adapter, tmp_path / "a", format="native")
    other = load(kind)
    logits(other)  # its scales are rounded by that, as those of the first
    peftree.load(other, tmp_path / "a")
    torch.testing.assert_close(logits(other), on, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "method"), [*itertools.product(("nf4", "int8_torchao"), FEW)])
def test_a_method_trains(kind: str, method: str, load: Loader, tmp_path: Path) -> None:
    _trains(load, kind, method, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", registry.methods())
def test_every_method_trains(method: str, load: Loader, tmp_path: Path) -> None:
    """In four bits; `make quantized-page` tries each on the other forms too."""
    _trains(load, "nf4", method, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", FEW)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_method_trains_on_the_others(kind: str, method: str, load: Loader, tmp_path: Path) -> None:
    _trains(load, kind, method, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dense_twin(kind: str, load: Loader) -> None:
    """The oracle is a plain model whose weights are what the packed ones stand for."""
    twin, model = load("none"), load(kind)
    with torch.no_grad():
        for (path, module), other in zip(model.named_modules(), twin.modules(), strict=True):
            for name, p in module._parameters.items():
                if is_packed(p):
                    keep_gradients(module)
                    other._parameters[name].copy_(dense(module, p))
                elif p is not None:
                    assert torch.equal(p, other._parameters[name]), path
    found = []
    for net in (twin, model):
        adapter = peftree.adapt(net, "dora", seed=3)
        _step(net, adapter, 1.0)
        net.train()
        net(input_ids=tokens(), labels=tokens()).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None]))
    error = (found[0] - found[1]).norm() / found[0].norm()
    assert error < (0.02 if kind == "int8" else 1e-4)  # LLM.int8 rounds activations


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_merging_is_asked_for(kind: str, method: str, load: Loader) -> None:
    model, adapter = _adapted(load, kind, method)
    _step(model, adapter, 0.5)
    on = logits(model)
    with pytest.raises(MergeError, match="is quantised"):
        peftree.merge(model)
    assert torch.equal(logits(model), on)
    assert peftree.merge(model, "dequantize") == 0
    torch.testing.assert_close(logits(model), on, rtol=0, atol=0.02 if kind == "int8" else 1e-5)
    peftree.unmerge(model)
    assert torch.equal(logits(model), on)
    with pytest.warns(PeftreeWarning, match="again changed one by"):
        error = peftree.merge(model, "requantize")
    assert 0 < error < 2
    assert all(is_packed(m._parameters["weight"]) for n, m in model.named_modules() if n.endswith("q_proj"))
    assert not torch.equal(logits(model), on)  # bitsandbytes moves a weight's scales in its first pass
    peftree.unmerge(model)
    assert torch.equal(logits(model), on)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["dequantize", "requantize"])
def test_a_merged_model_is_a_folder(kind: str, how: Any, load: Loader, tmp_path: Path) -> None:
    model, adapter = _adapted(load, kind, "lora")
    _step(model, adapter, 0.5)
    on = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the error, which another test reads
        peftree.export(adapter, tmp_path / "m", "merged", how)
    again = type(load("none")).from_pretrained(tmp_path / "m")
    assert ("quantization_config" in vars(again.config)) == (how == "requantize")
    assert float((logits(again) - on).abs().max()) < (0.02 if how == "dequantize" else 0.5) * float(on.abs().max())


def test_a_base_is_known_by_its_values(load: Loader, tmp_path: Path) -> None:
    """Packed in the same way it is the same; in another way it is accepted with a warning; another base is refused."""
    for made, used in itertools.product(("none", "nf4", "int8"), repeat=2):
        model, adapter = _adapted(load, made, "lora")
        peftree.save(adapter, tmp_path / f"{made}-{used}")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", PeftreeWarning)
            peftree.load(load(used), tmp_path / f"{made}-{used}")
        assert [w.category for w in told if issubclass(w.category, PeftreeWarning)] == [PeftreeWarning] * (made != used)
    other = load("none")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.normal_(std=0.02)
    with pytest.raises(StoreError, match=r"layers\.1\.mlp\.up_proj\.weight are not those of its base"):
        peftree.load(other, tmp_path / "nf4-none")
    with torch.no_grad():
        model.model.norm.weight.add_(0.01)
    with pytest.raises(StoreError, match=r"norm\.weight are not those of its base"):
        peftree.load(model, tmp_path / "nf4-nf4", name="second")


def test_the_pages_lines_run(folder: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "quantized.md").read_text("utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict[str, Any] = {"name": str(folder)}
    exec(lines, found)
    assert found["adapter"].method.name == "dora" and is_packed(found["model"].model.layers[0].mlp.up_proj.weight)


def test_a_quick_form_unpacks_nothing(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def counted(module: Any, tensor: Any) -> Any:
        seen.append(type(tensor).__name__)
        return dense(module, tensor)

    for module in (place, weights):
        monkeypatch.setattr(module, "dense", counted)
    for method, unpacked in (("lora", 0), ("ia3", 0), ("oft", 0), ("dora", 4), ("full", 14)):
        model, _ = _adapted(load, "nf4", method)
        seen.clear()
        model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
        assert seen.count("Params4bit") == unpacked, method


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["dequantize", "requantize"])
@pytest.mark.filterwarnings("ignore:Packing the merged weights again")  # another test reads it
def test_a_merged_base_is_known_too(kind: str, how: str, load: Loader) -> None:
    """What is recorded is the base as it was before merging, whatever became of its weights."""
    model, _ = _adapted(load, kind, "lora")
    before = fingerprint(model)
    peftree.merge(model, how)
    assert fingerprint(model) == before and len(before.packed) == 14


def test_merging_says_when_nothing_is_left(load: Loader) -> None:
    """A change far below the step of four bits is lost by packing again, which the error tells."""
    model, adapter = _adapted(load, "nf4", "lora")
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=1e-3)
    with pytest.warns(PeftreeWarning):
        assert peftree.merge(model, "requantize") > 1


def test_peft_reads_what_was_trained_on_four_bits(load: Loader, tmp_path: Path) -> None:
    model, adapter = _adapted(load, "nf4", "lora")
    _step(model, adapter, 0.5)
    _step(model, adapter, 0.5)
    peftree.export(adapter, tmp_path / "p")
    plain = load("nf4")
    for module in plain.modules():
        keep_gradients(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of transformers
        theirs = PeftModel.from_pretrained(plain, str(tmp_path / "p")).eval()
    mine = load("nf4")
    peftree.load(mine, tmp_path / "p")
    torch.testing.assert_close(logits(theirs), logits(mine), rtol=0, atol=1e-5)
