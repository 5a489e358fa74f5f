"""One adapter of several tasks: each row gets what its task's number says, as Hugging Face PEFT's Poly has it."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftree
import zoo
from graft.helpers import put
from peftree.deltas import relaxed
from peftree.errors import AdapterError, MethodError
from store import tools

METHODS: dict[str, dict[str, Any]] = {
    "mhr": {"skills": 3, "splits": 2, "r": 2},
    "moelora": {"experts": 2, "r": 4, "embedding": 4},
    "hyperformer": {"embedding": 4, "hidden": 8, "projected": 4, "reduction": 8},
}


def adapted(method: str, tasks: int = 3) -> nn.Module:
    model = zoo.build("llama")
    put(model, method, std=0.3, tasks=tasks, **METHODS[method])
    return model.eval()


def run(model: nn.Module, rows: slice = slice(None)) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**{k: v[rows] for k, v in zoo.batch("llama").items() if k != "labels"}).logits
    return out


@pytest.mark.parametrize("method", METHODS)
def test_a_row_is_what_it_is_alone_with_its_task(method: str) -> None:
    model = adapted(method)
    with peftree.context(model, task=[2, 0, 1]):
        got = run(model)
    for i, task in enumerate((2, 0, 1)):
        with peftree.context(model, task=[task]):
            alone = run(model, slice(i, i + 1))[0]
        real = zoo.batch("llama")["attention_mask"][i].bool()
        assert torch.allclose(got[i][real], alone[real], atol=1e-5)
        with peftree.context(model, task=[(task + 1) % 3]):
            assert (run(model, slice(i, i + 1))[0] - alone).abs().max() > 1e-4


def test_rows_of_images_whose_maps_have_their_channels_last() -> None:
    model: Any = zoo.build("convnext")
    put(model, "mhr", std=0.3, tasks=2, skills=3, splits=2, r=2)
    pixels = zoo.batch("convnext")["pixel_values"]
    model.eval()
    with torch.no_grad():
        with peftree.context(model, task=[1, 0, 1]):
            got = model(pixels).logits
        for i, task in enumerate((1, 0, 1)):
            with peftree.context(model, task=[task]):
                alone = model(pixels[i : i + 1]).logits[0]
            assert torch.allclose(got[i], alone, atol=1e-5)
    assert (got[1] - alone).abs().max() > 1e-4


def test_each_place_of_a_map_with_its_channels_last_gets_its_own_product() -> None:
    """What mhr adds at a place is x A B / r there, for the mean skill of the row's task."""
    model: Any = zoo.build("convnext")
    adapter = put(model, "mhr", std=0.3, tasks=2, skills=3, splits=2, r=2, head=False)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for _, site, _ in adapter.entries:
        keep = lambda m, args, y, path=site.path: seen.__setitem__(path, (args[0], y))  # noqa: E731
        model.get_submodule(site.path).register_forward_hook(keep)
    with torch.no_grad(), peftree.context(model, task=[1, 0, 1]):
        model.eval()(zoo.batch("convnext")["pixel_values"])
    maps = dict(seen)
    for _, site, d in adapter.entries:
        x, y = maps[site.path]
        with torch.no_grad(), peftree.disabled(model):
            added = y - model.get_submodule(site.path)(x)
        for row, task in enumerate((1, 0, 1)):
            share = d.Z[task].sigmoid().view(2, 3)
            share = share / share.sum(1, keepdim=True)
            A = torch.cat([sum(share[s, k] * d.A[s, k] for k in range(3)) for s in range(2)], 0)
            B = torch.cat([sum(share[s, k] * d.B[s, k] for k in range(3)) for s in range(2)], 1)
            for i, j in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[1:3])):
                torch.testing.assert_close(added[row, i, j], x[row, i, j] @ A @ B / 2, rtol=1e-3, atol=1e-4)
    assert any(min(x.shape[1:3]) > 1 for x, _ in maps.values()) and all(x.dim() == 4 for x, _ in maps.values())


@pytest.mark.parametrize("splits", [1, 2])
def test_the_same_as_pefts_poly(splits: int) -> None:
    model = zoo.build("llama")
    adapter = put(model, "mhr", std=0.3, tasks=3, skills=3, splits=splits, r=2, sites="attn.q attn.v")
    config = peft.PolyConfig(n_tasks=3, n_skills=3, n_splits=splits, r=2, target_modules=["q_proj", "v_proj"])
    with tools.Quiet():
        theirs: Any = peft.get_peft_model(zoo.build("llama"), config).eval()
    names = {"A": "poly_lora_A", "B": "poly_lora_B", "Z": "poly_router"}
    for _, site, delta in adapter.entries:
        layer = theirs.base_model.model.get_submodule(site.path)
        for ours, name in names.items():
            held = getattr(layer, name)["default"]
            (held if ours != "Z" else held.module_logits).data.copy_(getattr(delta, ours).data)
    task = torch.tensor([2, 0, 1])
    batch = zoo.batch("llama")
    with peftree.context(model, task=task.tolist()):
        mine = model.eval()(**batch)
    other = theirs.base_model(**batch, task_ids=task)
    assert torch.allclose(mine.logits, other.logits, atol=1e-5)
    mine.loss.backward()
    other.loss.backward()
    for _, site, delta in adapter.entries:
        layer = theirs.base_model.model.get_submodule(site.path)
        for ours, name in names.items():
            held = getattr(layer, name)["default"]
            want = (held if ours != "Z" else held.module_logits).grad
            assert torch.allclose(getattr(delta, ours).grad, want, atol=1e-6)


def test_each_skill_is_drawn_by_itself_from_the_relaxed_distribution() -> None:
    """The share of draws below t is sigmoid(logit(t) - a) (Maddison et al. 2017, with the temperature 1)."""
    torch.manual_seed(0)
    a = torch.tensor([-1.0, 0.0, 2.0]).expand(20_000, 3)
    drawn = relaxed(a, True)
    assert torch.equal(relaxed(a, False), a.sigmoid())
    assert bool((torch.corrcoef(drawn.T) - torch.eye(3)).abs().max() < 0.03)
    for t in (0.1, 0.5, 0.9):
        below = (drawn < t).float().mean(0)
        torch.testing.assert_close(below, torch.sigmoid(torch.tensor(t).logit() - a[0]), atol=0.015, rtol=0)


@pytest.mark.parametrize("method", ["mhr", "orchmoe"])
def test_skills_are_drawn_in_training_only(method: str) -> None:
    model: Any = zoo.build("llama")  # has no dropout
    put(model, method, std=0.3, tasks=2, skills=3)
    batch = {k: v for k, v in zoo.batch("llama").items() if k != "labels"}
    with torch.no_grad(), peftree.context(model, task=[0, 1, 0]):
        trained, still = ([model.train(on)(**batch).logits for _ in range(2)] for on in (True, False))
    assert torch.equal(*still) and not torch.allclose(*trained, atol=1e-4)


def test_tasks_go_with_routes_and_beams_and_generation() -> None:
    model = adapted("mhr")
    put(model, "lora", name="other")
    batch = zoo.batch("llama")
    with peftree.context(model, task=[2, 0, 1]):
        peftree.switch(model, "default")
        mine = run(model)
        with peftree.route(model, ["default", "other", "default"]):
            routed = run(model)
        with peftree.disabled(model):
            bare = run(model)
    with peftree.route(model, ["default", "other", "default"]), peftree.context(model, task=[2, 0, 1]):
        assert torch.equal(run(model), routed), "whichever of the two is said first"
    assert torch.allclose(routed[[0, 2]], mine[[0, 2]], atol=1e-5)
    assert torch.equal(bare, run(zoo.build("llama").eval()))
    ids = batch["input_ids"][2:]
    found = {}
    for task in (0, 1, 2):
        with peftree.context(model, task=[task]):
            found[task] = model.generate(ids, max_new_tokens=4, do_sample=False, num_beams=2)  # type: ignore[operator]
            again = model.generate(ids, max_new_tokens=4, do_sample=False, num_beams=2, use_cache=False)  # type: ignore[operator]
        assert torch.equal(found[task], again)
    assert len({tuple(f[0].tolist()) for f in found.values()}) > 1


def test_checkpointed_layers_have_the_same_tasks() -> None:
    gradients = []
    for on in (False, True):
        model: Any = adapted("mhr").train()
        if on:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        with peftree.context(model, task=[2, 0, 1]):
            loss = model(**zoo.batch("llama"), use_cache=False).loss
        loss.backward()
        gradients.append([p.grad for p in peftree.adapters(model)["default"].parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


BAD: list[tuple[Any, type[Exception], str]] = [
    ([0, 1], AdapterError, "3 rows, but 2 have a task"),
    ([0, 1, 3], MethodError, "a row has task 3"),
    ([], AdapterError, "not a list of numbers"),
    ("012", AdapterError, "not a list of numbers"),
    ([0, -1, 2], AdapterError, "not a list of numbers"),
    ([0, True, 2], AdapterError, "not a list of numbers"),
    (torch.tensor([0, 1, 2]), AdapterError, "not a list of numbers"),
    (1, AdapterError, "not a list of numbers"),
]


@pytest.mark.parametrize(("task", "error", "words"), BAD)
def test_bad_tasks(task: Any, error: type[Exception], words: str) -> None:
    model = adapted("mhr")
    with pytest.raises(error, match=words), peftree.context(model, task=task):
        run(model)


def test_several_tasks_and_no_one_said_which() -> None:
    with pytest.raises(MethodError, match=r"has tasks 0 to 2, but no row has one.*peftree\.context"):
        run(adapted("mhr"))


def test_no_context_on_a_bare_model() -> None:
    with pytest.raises(AdapterError, match="no adapter"), peftree.context(zoo.build("llama"), task=[0]):
        pass
