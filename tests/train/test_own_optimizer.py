"""Methods with an optimizer of their own, and batches beside the steps: trained, resumed, refused, planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers as tf
from torch.optim import Optimizer

import peftree
from peftree import registry
from peftree.data.rows import load_data
from peftree.deltas import LowRank
from peftree.errors import ConfigError, MethodError, TrainError
from peftree.methods.contract import Deltas, Method, Moment, Place, Tags
from peftree.plan import plan, request
from peftree.plan.fit import ways
from peftree.tasks import build_task
from sampled import quick
from train.tiny import Break, trainer

TOTALS = {"steps": 7, "batch": 4, "save_strategy": "steps", "save_steps": 3, "quiet": True}


class RowSums(Optimizer):
    """Steps by the mean of the gradients so far; keeps one number a row too, and how many steps there were."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"weight_decay": 0.5})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state["rows"] = state.get("rows", 0) + p.grad.square().sum(-1)
                state["sum"] = state.get("sum", 0) + p.grad
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * state["sum"] / state["count"] / (state["rows"].sqrt().unsqueeze(-1) + 1e-8))


class Own(Method):
    name: ClassVar[str] = "own_steps"
    tags: ClassVar[Tags] = Tags("reparameterized", "none", True, True, lr=3e-3)
    seen: ClassVar[dict[tuple[bool, int], list[float]]] = {}
    sites: str = "attn.q attn.v"

    def build(self, place: Place) -> LowRank:
        return LowRank(place, place.kaiming(2, place.site.in_features), place.zeros(2, place.site.out_features), 1.0)

    def optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        return RowSums(groups)

    def schedule(self, deltas: Deltas, moment: Moment) -> None:
        before = torch.get_rng_state()
        losses = [float(batch().detach()) for batch in moment.batches]
        assert torch.equal(before, torch.get_rng_state()), "random numbers stay as they were"
        self.seen[moment.start, moment.step] = losses
        assert moment.start or all(type(moment.optimizer) is RowSums for _ in losses)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.methods(), "own_steps", Own)
    Own.seen.clear()


def run(encoder: str, folder: Path, output: Path, resume: bool = False, **more: Any) -> Any:
    task = build_task(encoder, load_data(folder))
    adapter = peftree.adapt(task.model, Own())
    made = trainer(adapter, task, folder, output, **(TOTALS | more))
    made.train(resume_from_checkpoint=resume)
    return made


def test_it_steps_as_a_loop_by_hand(encoder: str, review_data: Path, tmp_path: Path) -> None:
    """Against the formula on gradients noted in the run: the run's rate (linear to zero) and weight decay are used."""
    noted: list[list[torch.Tensor]] = []

    class Note(tf.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **k: Any) -> None:
            noted.append([p.grad.clone() for p in held])

    task = build_task(encoder, load_data(review_data))
    adapter = peftree.adapt(task.model, Own(), head=False)
    held = [p for p in adapter.parameters() if p.requires_grad]
    values = [p.detach().clone() for p in held]
    trainer(adapter, task, review_data, tmp_path, steps=3, quiet=True, weight_decay=0.1, callbacks=[Note()]).train()
    for i, value in enumerate(values):
        total, rows = torch.zeros_like(value), torch.zeros(len(value))
        for t, grads in enumerate(noted):
            rate = 3e-3 * (3 - t) / 3
            total, rows = total + grads[i], rows + grads[i].square().sum(-1)
            value = value * (1 - rate * 0.1) - rate * total / (t + 1) / (rows.sqrt()[:, None] + 1e-8)
        assert (value - held[i]).abs().max() < 1e-6


def test_resuming_is_exact(encoder: str, review_data: Path, tmp_path: Path) -> None:
    whole = run(encoder, review_data, tmp_path / "whole")
    seen = dict(Own.seen)
    with pytest.raises(KeyboardInterrupt):
        run(encoder, review_data, tmp_path / "broken", callbacks=[Break(5)])
    torch.manual_seed(99)
    again = run(encoder, review_data, tmp_path / "broken", resume=True)
    one, two = whole.adapter.state(), again.adapter.state()
    assert all(torch.equal(one[k], two[k]) for k in one)
    first, second = whole.optimizer.state_dict()["state"], again.optimizer.state_dict()["state"]
    assert set(first[0]) == {"count", "rows", "sum"} and first[0]["count"] == second[0]["count"] == 7
    assert all(torch.equal(first[i][k], second[i][k]) for i in first for k in ("rows", "sum"))
    assert all(Own.seen[False, n] == seen[False, n] for n in range(1, 8)), "the batches beside the steps are the same"


def test_batches_beside_a_step_are_all_rows_once(encoder: str, review_data: Path, tmp_path: Path) -> None:
    made = run(encoder, review_data, tmp_path, steps=2, batch=5)
    rows = len(made.train_dataset)
    first, second = Own.seen[False, 1], Own.seen[False, 2]
    assert len(first) == len(second) == -(-rows // 5) and first != second
    made._base.eval()
    batch = made.data_collator([made.train_dataset[i] for i in range(rows)])
    with torch.no_grad():
        want = float(made._base(**batch).loss)
    sizes = [min(5, rows - 5 * i) for i in range(len(second))]
    assert sum(n * x for n, x in zip(sizes, second, strict=True)) / rows == pytest.approx(want, abs=1e-5)
    assert made._base.training is False


def test_another_optimizer_is_refused(encoder: str, review_data: Path, tmp_path: Path) -> None:
    task = build_task(encoder, load_data(review_data))
    adapter = peftree.adapt(task.model, Own())
    with pytest.raises(TrainError, match=r"own_steps has an optimizer of its own, RowSums; the run asks for optim=sgd"):
        trainer(adapter, task, review_data, tmp_path, optim="sgd")
    other = torch.optim.SGD(adapter.param_groups())
    with pytest.raises(TrainError, match="asks for SGD"):
        trainer(adapter, task, review_data, tmp_path, optimizers=(other, None))
    given = RowSums(adapter.param_groups(1e-4))
    made = trainer(adapter, task, review_data, tmp_path, optimizers=(given, None))
    assert made.create_optimizer() is given
    peftree.detach(task.model)
    both = peftree.adapt(task.model, Own() + peftree.get("ia3")())
    with pytest.raises(MethodError, match="own_steps has an optimizer of its own, which does not know the other parts"):
        trainer(both, task, review_data, tmp_path)
    assert peftree.adapt(task.model, "lora", name="b").optimizer() is None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["galore", "spiel", "ivon_lora"])
def test_a_plan_counts_what_a_step_leaves(method: str, tmp_path: Path) -> None:
    """Bytes of whole storages: a slice of singular vectors would hold all of them."""
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    model, ids = tf.LlamaForCausalLM(config).train(), torch.arange(8)[None]
    adapter = peftree.adapt(model, method)
    optimizer = adapter.optimizer()
    assert optimizer is not None
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    held = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    want = sum(v.untyped_storage().nbytes() for v in held)
    assert plan(request(model=str(tmp_path), method=method, max_length=8)).parts["optimizer"] == want
    if method == "galore":
        full = sum(2 * p.numel() * 4 for p in model.parameters() if not p.requires_grad)
        assert want < full


@pytest.mark.slow
def test_a_plan_counts_what_it_keeps(tmp_path: Path) -> None:
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    asked = {"model": str(tmp_path), "method": "own_steps", "max_length": 8}
    made = plan(request(**asked))
    per_site = 2 * 32 + 2 * 32 + 2 + 2  # sums of A and B, and of their rows
    assert made.parts["optimizer"] == 4 * 2 * 2 * per_site
    assert not any("optimizer" in way.changes for way in ways(request(**asked), int(made.expected * 0.6), 40))
    with pytest.raises(ConfigError, match="own_steps has an optimizer of its own, but optimizer=sgd"):
        plan(request(**asked, optimizer="sgd"))


@pytest.mark.parametrize(
    ("method", "fields"),
    quick([("periodic_lora", {"period": 2}), ("fish_dip", {"period": 2}), ("spiel", {"period": 3, "window": 2}),
     ("galore", {"period": 2}), ("ist", {"period": 2})]),
)  # fmt: skip
def test_what_grew_or_moved_before_a_checkpoint_comes_back(
    method: str, fields: dict[str, Any], encoder: str, review_data: Path, tmp_path: Path
) -> None:
    """Resuming after entries moved or tensors grew gives the weights of a run that was not broken off, to the bit."""
    ends = []
    for name, resume in (("whole", False), ("broken", False), ("broken", True)):
        torch.manual_seed(99 if resume else 0)
        task = build_task(encoder, load_data(review_data))
        adapter = peftree.adapt(task.model, method, **fields)
        stop = [Break(5)] if name == "broken" and not resume else None
        made = trainer(adapter, task, review_data, tmp_path / name, callbacks=stop, **TOTALS)
        if stop:
            with pytest.raises(KeyboardInterrupt):
                made.train()
            continue
        made.train(resume_from_checkpoint=resume)
        ends.append(adapter.state())
    one, two = ends
    assert set(one) == set(two)
    assert all(torch.equal(one[k], two[k]) for k in one)
