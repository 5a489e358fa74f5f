"""Low-rank rows of a mixed batch are served together: equal to dense weights, never stale, gone in the end."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftree
import zoo
from graft.helpers import far, product, put
from graft.test_memory import GREEDY, text
from peftree.graft.mixed import Mixed
from peftree.graft.program import Route
from sampled import quick

Row = str | list[str] | None
ROWS: list[Row] = ["a", None, "c", "b", ["a", "c"], "a", "b", None, "c"]


def several(name: str = "llama", dtype: torch.dtype = torch.float32, **more: tuple[str, dict[str, Any]]) -> nn.Module:
    """A model with adapters of other ranks, scales and places."""
    model = zoo.build(name).to(dtype)
    put(model, "lora", name="a", seed=1, std=0.2, head=False, sites="linear", r=5, alpha=15)
    put(model, "lora", name="b", seed=2, std=0.2, head=False, sites="linear", r=8, alpha=4)
    put(model, "lora", name="c", seed=3, std=0.2, head=False, sites="attn.q ffn.down", r=1, alpha=1)
    for seed, (key, (method, fields)) in enumerate(more.items(), 4):
        put(model, method, name=key, seed=seed, std=0.1, head=False, **fields)
    return model


def dense(model: nn.Module, name: str, row: Row) -> nn.Module:
    """A plain model with the weights `W + s Bᵀ A` of a row's adapters."""
    plain = zoo.build(name).to(next(model.parameters()).dtype)
    with torch.no_grad():
        for key in [row] if isinstance(row, str) else row or []:
            for _, site, delta in peftree.adapters(model)[key].entries:
                W = plain.get_parameter(f"{site.path}.{site.parameter}")
                W = W.t() if site.kind == "conv1d" else W
                a, z = site.rows or (0, len(W))
                W[a:z] += product(delta)
    return plain


def one_by_one(name: str, rows: list[Row], batch: dict[str, Tensor], of: Callable[[Row], nn.Module]) -> Tensor:
    """The rows' outputs, each of a batch of its own."""
    with torch.no_grad():
        each = [of(row)(**{k: v[i : i + 1] for k, v in batch.items()}) for i, row in enumerate(rows)]
    return torch.cat([zoo.output(name, out) for out in each])


def alone(model: nn.Module, name: str, rows: list[Row], batch: dict[str, Tensor]) -> Tensor:
    """The rows' outputs, each in a route of its own, with a graph: nothing is held there."""
    out = []
    for i, row in enumerate(rows):
        with peftree.route(model, [row]), torch.enable_grad():
            out.append(zoo.output(name, model(**{k: v[i : i + 1] for k, v in batch.items()})).detach())
    return torch.cat(out)


def routes(model: nn.Module) -> Route:
    """The route that is open."""
    found = next(iter(peftree.adapters(model).values())).graft.shared.now.route
    assert found is not None
    return found


def forms(model: nn.Module) -> list[int]:
    """The number of dimensions of every A that is held: 2 masked, 3 by blocks."""
    return [stack.A.dim() for mixed in routes(model).mixed.values() for stack in mixed.stacks.values()]


@pytest.mark.parametrize("name", quick(["llama", "phi3", "gpt2", "bert_cls", "t5"], 2))
@pytest.mark.parametrize("rows", [ROWS, ["b", "b", "a", "a", None, None], ["a", "b", "c"], ["b", "b", None]])
def test_rows_equal_dense_weights(name: str, rows: list[Row]) -> None:
    """Other ranks, scales, orders, padding, base rows, stacked adapters, fused and transposed maps."""
    model = several(name, torch.float64)
    batch = zoo.batch(name, n=len(rows))
    want = one_by_one(name, rows, batch, lambda row: dense(model, name, row))
    with torch.no_grad(), peftree.route(model, rows):
        got = [zoo.output(name, model(**batch)) for _ in range(2)][1]
        assert forms(model)
    real = batch["attention_mask"].bool() if name in zoo.DECODERS else slice(None)
    assert far(got[real], want[real]) < 1e-13 and far(want[:1], want[-1:]) > 1e-3


@pytest.mark.parametrize("name", quick(["llama", "gpt2", "bert_cls"]))
@pytest.mark.parametrize("rows", [ROWS, ["b", "b", "a", "a", "a"]])
def test_single_precision_differs_by_rounding(name: str, rows: list[Row]) -> None:
    model = several(name)
    batch = zoo.batch(name, n=len(rows))
    want = alone(model, name, rows, batch)
    with torch.no_grad(), peftree.route(model, rows):
        got = zoo.output(name, model(**batch))
        assert forms(model)
    real = batch["attention_mask"].bool() if name in zoo.DECODERS else slice(None)
    assert far(got[real], want[real]) < 1e-6


def test_the_shape_chooses_the_form_and_neighbours_are_a_block() -> None:
    model = several()
    ids = zoo.batch("llama", n=8)["input_ids"]
    with torch.no_grad(), peftree.route(model, [None, "b"] * 4):
        model(ids)
        assert set(forms(model)) == {2}
    with torch.no_grad(), peftree.route(model, ["a", "a", "b", "b", "a", "a", None, None]):
        model(ids)
        stacks = [s for mixed in routes(model).mixed.values() for s in mixed.stacks.values()]
    blocks = [s for s in stacks if s.A.dim() == 3]
    assert blocks and all(len(s.A) == 4 and s.A.shape[1] == 8 for s in blocks)


MORE = {"d": ("dora", {"sites": "linear"}), "i": ("ia3", {}), "s": ("adalora", {"sites": "linear"}),
        "p": ("lora", {"sites": "linear", "start": "pissa"}), "h": ("hydra", {"sites": "linear"})}  # fmt: skip


def test_other_forms_run_by_groups_in_the_same_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch with other methods, the low-rank rows are served together, whatever the method is called."""
    model, seen = several(**MORE), []
    add = Mixed.add
    monkeypatch.setattr(Mixed, "add", lambda self, x, y: seen.append(len(x)) or add(self, x, y))
    rows: list[Row] = ["d", "a", "i", None, ["b", "d"], "s", "p", "h"]
    batch = zoo.batch("llama", n=len(rows))
    want = alone(model, "llama", rows, batch)
    assert not seen
    with torch.no_grad(), peftree.route(model, rows):
        got = zoo.output("llama", model(**batch))
    assert set(seen) == {4, 5}  # a, None, s and p; and i, where IA3 changes nothing
    real = batch["attention_mask"].bool()
    assert far(got[real], want[real]) < 1e-5


def elsewhere(change: Callable[[nn.Module], Any], model: nn.Module) -> None:
    """Change the model in another thread, where no block is open: here a switch would end the route."""
    thread = threading.Thread(target=change, args=(model,))
    thread.start()
    thread.join()


def _added(model: nn.Module) -> None:
    with torch.no_grad():
        [p.add_(0.1) for p in peftree.adapters(model)["b"].parameters()]


def _replaced(model: nn.Module) -> None:
    peftree.replace(peftree.adapters(model)["b"], peftree.adapters(model)["again"])


def _scaled(model: nn.Module) -> None:
    for delta in peftree.adapters(model)["b"].deltas.values():
        delta.scale *= 3  # type: ignore[operator,assignment]


def _other_object(model: nn.Module) -> None:
    for delta in peftree.adapters(model)["b"].deltas.values():
        delta.B = nn.Parameter(delta.B.detach() * 3)  # type: ignore[operator,union-attr]


def _other_memory(model: nn.Module) -> None:
    for p in peftree.adapters(model)["b"].parameters():
        p.data = p.data * 3


def _in_the_table(model: nn.Module) -> None:
    for delta in peftree.adapters(model)["b"].deltas.values():
        delta._parameters["B"] = nn.Parameter(delta.B.detach() * 3)  # type: ignore[operator,union-attr]


def _trained(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(peftree.adapters(model)["b"].parameters(), lr=0.1, fused=True)
    with torch.enable_grad():
        model(**zoo.batch("llama", n=3)).logits.square().mean().backward()
    optimizer.step()


def _attached(model: nn.Module) -> None:
    put(model, "lora", name="new", sites="linear")


def _detached(model: nn.Module) -> None:
    peftree.detach(model, "b")


CHANGES = [_added, _replaced, _scaled, _other_object, _other_memory, _in_the_table, _trained, _attached, _detached]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("rows", quick([["b", None, "a"], ["a", "b", "c"]]))
def test_a_changed_adapter_is_not_served_stale(change: Callable[[nn.Module], None], rows: list[Row]) -> None:
    model = several(again=("lora", {"sites": "linear", "r": 8, "alpha": 4}))
    batch = zoo.batch("llama")
    with peftree.route(model, rows), torch.no_grad():
        before = [zoo.output("llama", model(**batch)) for _ in range(2)][1]
        elsewhere(change, model) if change in (_attached, _detached) else change(model)
        got = zoo.output("llama", model(**batch))
        assert forms(model)
    if change is _detached:
        rows = [None if row == "b" else row for row in rows]
    want = alone(model, "llama", rows, batch)
    real = batch["attention_mask"].bool()
    assert far(got[real], want[real]) < 1e-6
    assert change is _attached or far(got[real], before[real]) > 1e-3


@pytest.mark.parametrize("rows", [["c", "b", None], ["a", "b", "c"]])
@pytest.mark.parametrize(("value", "factor"), [(float("nan"), "A"), (float("inf"), "A"), (float("nan"), "B")])
def test_a_broken_adapter_reaches_its_own_rows_only(rows: list[Row], value: float, factor: str) -> None:
    model = several()
    batch = zoo.batch("llama")
    want = alone(model, "llama", rows, batch)
    for delta in peftree.adapters(model)["b"].deltas.values():
        delta.get_parameter(factor).data[0, 0] = value
    with torch.no_grad(), peftree.route(model, rows):
        got = zoo.output("llama", model(**batch))
        assert forms(model)
    real = batch["attention_mask"].bool()
    assert not got[1].isfinite().all()
    for i in (0, 2):
        assert far(got[i][real[i]], want[i][real[i]]) < 1e-6


def test_stacks_end_with_the_block_or_the_adapter() -> None:
    model = several()
    batch = zoo.batch("llama")

    def held() -> list[weakref.ref[Tensor]]:
        return [weakref.ref(s.A) for m in routes(model).mixed.values() for s in m.stacks.values()]

    with torch.no_grad():
        with peftree.route(model, ["a", "b", None]):
            model(**batch)
            first = held()
            elsewhere(_detached, model)
            model(**batch)
            assert first and not any(ref() is not None for ref in first)
            second = held()
        assert second and not any(ref() is not None for ref in second)


def test_a_step_of_training_ends_them_too() -> None:
    """With gradients the rows run by groups, and nothing that was held before is used after."""
    model = several()
    rows, batch = ["a", "b", "c"], zoo.batch("llama")
    with peftree.route(model, rows):
        with torch.no_grad():
            model(**batch)
            assert forms(model)
        model(**batch).logits[:, 1].square().sum().backward()
        assert not forms(model)
        got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    for i, row in enumerate(rows):
        peftree.switch(model, row)
        model(**{k: v[i : i + 1] for k, v in batch.items()}).logits[:, 1].square().sum().backward()
    want = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys() and max(far(got[n], g) for n, g in want.items()) < 1e-5


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize("rows", [["a", None, "b"], ["c", ["a", "b"], "b"]])
def test_generation_and_beams(rows: list[Row], options: dict[str, Any]) -> None:
    model = several()
    ids = text("left")
    with peftree.route(model, rows):
        got = model.generate(**ids, max_new_tokens=6, **GREEDY, **options)
        assert forms(model)
    k = len(got) // len(rows)
    for i, row in enumerate(rows):
        plain = dense(model, "llama", row)
        want = plain.generate(**{n: v[i : i + 1] for n, v in ids.items()}, max_new_tokens=6, **GREEDY, **options)
        assert torch.equal(got[i * k : i * k + k], want)


@pytest.mark.parametrize("rows", [["a", "b", "c"], ["a", None, None]])
def test_half_precision(rows: list[Row]) -> None:
    """In bfloat16 the rows differ from float32 no more than when they are alone."""
    model, batch = several(), zoo.batch("llama")
    exact = alone(model, "llama", rows, batch)
    model = model.to(torch.bfloat16)
    single = alone(model, "llama", rows, batch)
    with torch.no_grad(), peftree.route(model, rows):
        got = zoo.output("llama", model(**batch))
        assert forms(model) and got.dtype == torch.bfloat16
    real = batch["attention_mask"].bool()
    assert far(got[real].float(), exact[real]) < 1.5 * far(single[real].float(), exact[real]) + 1e-3
    with torch.no_grad(), peftree.route(model, rows):
        model(**batch)
        model.float()  # in the same block; the values stay rounded
        again, want = zoo.output("llama", model(**batch)), alone(model, "llama", rows, batch)
    assert far(again[real], want[real]) < 1e-6


def test_where_it_cannot_rows_run_by_groups() -> None:
    model, batch = several(), zoo.batch("llama")
    rows: list[Row] = ["a", "b", None]
    want = alone(model, "llama", rows, batch)
    real = batch["attention_mask"].bool()
    with peftree.route(model, rows):
        got = zoo.output("llama", model(**batch)).detach()
        assert not forms(model) and far(got[real], want[real]) < 1e-6
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            half = zoo.output("llama", model(**batch)).float()
        assert not forms(model) and far(half[real], want[real]) < 0.1
        twin = copy.deepcopy(model)
    with torch.inference_mode():
        put(twin, "lora", name="i", seed=9, std=0.2, sites="linear")  # its tensors count no changes
    with torch.no_grad(), peftree.route(twin, ["i", "a", None]):
        got = zoo.output("llama", twin(**batch))
        assert not forms(twin)
    for i, row in enumerate(["i", "a", None]):
        peftree.switch(twin, row)
        with torch.no_grad():
            one = zoo.output("llama", twin(**{k: v[i : i + 1] for k, v in batch.items()}))[0]
        assert far(got[i][real[i]], one[real[i]]) < 1e-6
