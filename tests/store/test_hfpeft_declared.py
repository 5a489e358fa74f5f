"""Methods whose file declares PEFT's names for them: the same output, gradients and steps as PEFT's own, both ways."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.c3a import layer as c3a
from peft.tuners.c3a.utils import BlockCircularConvolution
from safetensors.torch import load_file
from torch import Tensor, nn

import zoo
from peftree import registry, store
from peftree.store.folder import CONFIG, MANIFEST
from peftree.store.hfpeft.declared import _made, declared
from store import tools

TOLERANCE = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # PEFT's SHiRA makes sparse tensors
NAMES = [d.ours[0] for d in declared()]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("miss", {"variant": "bat"}),
    ("miss", {"variant": "mini", "columns": 4}),
    ("lokr", {"factor": 0, "r": 3}),
    ("lokr", {"both": False}),
    ("glora", {"matrices": "vector"}),
    ("glora", {"matrices": "constant"}),
    ("road", {"variant": "road_1"}),
    ("road", {"variant": "road_4"}),
]
ONE: dict[str, dict[str, Any]] = {"boft": {"factors": 1}}  # PEFT has no more without a compiler for CUDA
CASES = [*((name, ONE.get(name, {})) for name in NAMES), *VARIANTS]
IDS = [" ".join([name, *(f"{k}={v}" for k, v in fields.items())]) for name, fields in CASES]


@pytest.fixture(autouse=True)
def c3a_as_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PEFT's C3A have the gradient of its own forward; the one it gives for the input is another (below)."""
    own = c3a.BlockCircularConvolution
    monkeypatch.setattr(c3a, "BlockCircularConvolution", SimpleNamespace(apply=partial(own.forward, Saver())))


class Saver:
    """The context of an autograd function, for a forward that autograd itself looks through."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keep nothing."""


def fields_of(name: str) -> dict[str, Any]:
    return dict(registry.get(name).tags.small) | {"sites": "attn.q attn.v"}


def pairs(name: str, more: dict[str, Any], tmp_path: Path) -> tuple[nn.Module, Any, nn.Module]:
    """Our adapted model, its adapter, and PEFT's model made from the file that it is saved to; both train."""
    ours, adapter = tools.adapted("llama", name, **fields_of(name) | more)
    folder = store.save(adapter, tmp_path / "ours", format="peft")
    (folder / MANIFEST).unlink()
    with tools.Quiet():
        theirs = peft.PeftModel.from_pretrained(zoo.build("llama"), folder, is_trainable=True)
    return ours.eval(), adapter, theirs.eval()


def output(model: nn.Module) -> Tensor:
    return tools.output("llama", model)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("name", "more"), CASES, ids=IDS)
def test_peft_computes_and_learns_the_same(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    ours, adapter, theirs = pairs(name, more, tmp_path)
    bare = output(zoo.build("llama").eval())
    assert (output(ours) - bare).abs().max() > 1e-3
    assert (output(ours) - output(theirs)).abs().max() < TOLERANCE
    assert len(adapter.parameters()) == len(trained(theirs))
    for number in range(2):
        before = in_pefts_names(adapter, theirs, tmp_path / f"before{number}")
        for model in (ours, theirs):
            model.zero_grad()
            zoo.output("llama", model(**zoo.batch("llama"))).float().square().mean().backward()
            scale = max(float(p.grad.abs().max()) for p in trained(model).values() if p.grad is not None)
            torch.optim.SGD(trained(model).values(), lr=0.1 / scale).step()  # the largest step of a number is 0.1
        after = in_pefts_names(adapter, theirs, tmp_path / f"after{number}")
        for key, (mine, other) in after.items():
            assert ((mine - before[key][0]) - (other - before[key][1])).abs().max() < TOLERANCE, key
        assert max(float((mine - before[key][0]).abs().max()) for key, (mine, _) in after.items()) > 1e-3
    assert (output(ours) - output(theirs)).abs().max() < 3 * TOLERANCE


def in_pefts_names(adapter: Any, theirs: nn.Module, folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Every tensor of our adapter and of PEFT's, as each writes it to a file."""
    ours = load_file(store.save(adapter, folder, format="peft") / "adapter_model.safetensors")
    found = peft.get_peft_model_state_dict(theirs)
    both = ours.keys() & found.keys()
    assert len(both) >= len(adapter.parameters())
    return {key: (ours[key], found[key].detach().clone()) for key in both}


@pytest.mark.parametrize(("name", "more"), CASES, ids=IDS)
def test_what_peft_saves_is_read(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    tags = registry.get(name).tags.peft
    assert tags is not None
    made = registry.make(name, fields_of(name) | more)
    config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(tags.type)]
    fields = {key: getattr(made, ours) for key, ours in tags.fields.items()}
    fields = {key: tags.values.get(key, {}).get(value, value) for key, value in fields.items()}
    with tools.Quiet():
        model = peft.get_peft_model(
            zoo.build("llama"), config(target_modules=["q_proj", "v_proj"], **fields, **tags.fixed)
        )
        tools.shake([p for p in model.parameters() if p.requires_grad])
        want = output(model.eval())
        model.save_pretrained(tmp_path / "theirs")
    reader = zoo.build("llama").eval()
    store.load(reader, tmp_path / "theirs")
    assert (output(reader) - want).abs().max() < TOLERANCE
    assert (want - output(zoo.build("llama").eval())).abs().max() > 1e-3


def written(name: str, tmp_path: Path, changes: dict[str, Any]) -> Path:
    """Return a folder of an adapter in PEFT's format alone, with `changes` in its configuration."""
    _, adapter = tools.adapted("llama", name, **fields_of(name))
    folder = store.save(adapter, tmp_path / "-".join(changes), format="peft")
    (folder / MANIFEST).unlink()
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_value_that_makes_it_another_method_is_refused(name: str, tmp_path: Path) -> None:
    tags = registry.get(name).tags.peft
    assert tags is not None
    for key, value in tags.fixed.items():
        other = {"a.*": 3} if isinstance(value, dict) else (not value if isinstance(value, bool) else "other")
        folder = written(name, tmp_path, {key: other})
        with pytest.raises(store.StoreError, match=key):
            store.load(zoo.build("llama"), folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_fixed_value_that_says_nothing_may_be_left_out_and_no_other(name: str, tmp_path: Path) -> None:
    """PEFT writes None for a switch that is off or a pattern that is empty; None is not another value, as True."""
    tags = registry.get(name).tags.peft
    assert tags is not None
    for key, value in tags.fixed.items():
        folder = written(name, tmp_path, {key: None})
        if value:
            with pytest.raises(store.StoreError, match=key):
                store.load(zoo.build("llama"), folder)
        else:
            store.load(zoo.build("llama"), folder)


def test_none_for_a_switch_that_is_on_is_another_value(tmp_path: Path) -> None:
    """No method here fixes a value that says something; one of a user's own may, as MiSS's `init_weights` does."""
    miss = registry.get("miss")
    assert miss.tags.peft is not None
    fixed = dataclasses.replace(miss.tags.peft, fields={"r": "r"}, values={}, fixed={"switch": True})
    made = _made(type("Switched", (miss,), {"tags": dataclasses.replace(miss.tags, peft=fixed)}))
    given = {"peft_type": "MISS", "target_modules": ["q_proj"], "r": 4}
    assert made.method(made.schema(**given, switch=True), zoo.build("llama"), tmp_path)[1]["r"] == 4
    for other in (None, False):
        with pytest.raises(store.StoreError, match="switch"):
            made.method(made.schema(**given, switch=other), zoo.build("llama"), tmp_path)


@pytest.mark.xfail(strict=True, reason="PEFT 0.21.2's C3A, see above")
def test_the_gradient_of_pefts_c3a_is_that_of_its_forward() -> None:
    generator = torch.Generator().manual_seed(0)
    x, k = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((3, 8), (2, 2, 4)))
    torch.autograd.gradcheck(BlockCircularConvolution.apply, (x.requires_grad_(), k.requires_grad_()))
