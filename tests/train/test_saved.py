"""What a run measures of its passes as they happen, without passes of its own."""

from __future__ import annotations

import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerState

import peftree
import zoo
from peftree.errors import TrainError
from peftree.settings import load_config
from peftree.train import health
from peftree.train.health import Health, first_rows
from peftree.train.measure import Saved
from peftree.train.run import run


class _Held:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _kept(model: Any, batch: Any) -> int:
    """Return the bytes of storages, but for the model's own, that autograd still holds after a pass."""
    seen: list[weakref.ref[_Held]] = []

    def pack(tensor: torch.Tensor) -> _Held:
        held = _Held(tensor)
        seen.append(weakref.ref(held))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        loss = model(**batch).loss
    storages = [held.tensor.untyped_storage() for each in seen if (held := each()) is not None]
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    loss.backward()
    model.zero_grad()
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own}.values())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_first_training_pass_is_counted_and_no_other(checkpointed: bool) -> None:
    model: Any = zoo.build("llama")
    peftree.adapt(model, "pfeiffer")  # whose forms keep the same with hooks as without
    if checkpointed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = zoo.batch("llama")
    batch["labels"] = batch["input_ids"]
    wanted = _kept(model.train(), batch)
    saved, state = Saved(model), TrainerState()
    saved.on_train_begin(None, state, None)
    with torch.no_grad():
        model(**batch)
    model.eval()(**batch)
    assert saved.bytes is None
    model.train()
    model(**batch).loss.backward()
    assert saved.bytes == pytest.approx(wanted, rel=1e-3) and wanted > 10_000
    assert not model._forward_hooks and not model._forward_pre_hooks
    found = saved.bytes
    model(**{k: v[:1] for k, v in batch.items()})
    assert saved.bytes == found
    state.stateful_callbacks = {"Saved": saved.state()}
    later = Saved(model)
    later.on_train_begin(None, state, None)
    assert later.bytes == found and not model._forward_hooks


def test_a_run_that_asks_for_nothing_runs_no_pass_but_its_own(
    encoder: str, review_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in training mode are those of the steps; the check of the third step runs two rows twice."""
    from transformers import BertForSequenceClassification

    seen: list[tuple[bool, int]] = []
    own = BertForSequenceClassification.forward

    def watched(self: Any, *args: Any, **more: Any) -> Any:
        seen.append((self.training, len(more["input_ids"])))
        return own(self, *args, **more)

    monkeypatch.setattr(BertForSequenceClassification, "forward", watched)
    words = ["steps=5", "batch_size=4", "threads=1", "eval_every=0", "save_every=0", "eval_batch_size=10"]
    run(load_config(None, [f"model={encoder}", f"data={review_data}", f"output={tmp_path / 'o'}", *words]))
    assert [rows for training, rows in seen if training] == [4] * 5
    assert [rows for training, rows in seen if not training] == [10, 10, 2, 2, 10, 10]


def test_first_rows_are_taken_only_where_all_tensors_have_them() -> None:
    rows = {"input_ids": torch.ones(4, 3), "labels": torch.ones(4), "return_loss": True}
    assert {k: len(v) for k, v in first_rows(rows).items() if k != "return_loss"} == {"input_ids": 2, "labels": 2}
    patches = rows | {"pixel_values": torch.ones(9, 2)}
    assert first_rows(patches) is patches
    scalar = rows | {"scale": torch.ones(())}
    assert first_rows(scalar) is scalar
    nested = rows | {"more": [1, 2, 3, 4]}
    assert first_rows(nested) is nested


def test_rows_that_do_not_change_are_not_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama")
    watch = Health(peftree.adapt(model, "lora"))
    monkeypatch.setattr(Health, "_effect", lambda self, model, batch: float(len(batch["input_ids"]) > 2))
    assert watch.effect(model, {"input_ids": torch.ones(3, 2)}) == 1.0
    with pytest.raises(TrainError, match="the output equals the base's"):
        watch.effect(model, {"input_ids": torch.ones(2, 2)})
    assert health.first_rows({"input_ids": torch.ones(3, 2)})["input_ids"].shape == (2, 2)
