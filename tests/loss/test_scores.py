"""Scores of completions whose logits are computed some tokens at a time are those of whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peftree
import zoo
from loss.test_deferred import _fill, _made
from peftree.errors import DivergedError
from peftree.evaluate.quality import complete, completed, evaluating
from peftree.loss import chunked
from sampled import quick

NAMES = ["llama", "gpt2", "gemma2 capped", "granite", "cohere", "bart", "t5", "t5 untied", "marian", *zoo.VLM]


def _asked(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model with an adapter, and a batch as tasks make it: labels on some places, -100 on the rest."""
    model, batch = _made(name)
    peftree.adapt(model, "lora", sites="linear")
    _fill(model)
    labels = batch["labels"].clone()
    labels[:, :2] = -100
    pair = bool(model.config.is_encoder_decoder)  # type: ignore[union-attr]
    more = {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])} if pair else {}
    return model, {**batch, **more, "labels": labels}


class Rows(TorchDispatchMode):
    """The most rows that a tensor over the vocabulary had."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in [] if func.is_view else tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[-1] == zoo.VOCAB and leaf.is_floating_point():
                self.most = max(self.most, leaf.numel() // zoo.VOCAB)
        return out


@pytest.mark.parametrize("name", quick(NAMES, 6))
def test_scores_are_those_of_whole_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = _asked(name)
    monkeypatch.setattr(chunked, "_FEWEST", 3)
    monkeypatch.setitem(chunked._CHUNK, "cpu", 0)
    with evaluating(model):
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        labels = batch["labels"]
        if "decoder_input_ids" not in batch:
            logits, labels = logits[:, :-1], labels[:, 1:]
        with Rows() as seen:
            losses, hits = completed(model, batch)
    kept = labels.ne(-100)
    wanted = -logits.double().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    right = logits.argmax(-1).eq(labels) & kept
    torch.testing.assert_close(losses, ((wanted * kept).sum(1) / kept.sum(1)).tolist(), rtol=2e-6, atol=2e-6)
    assert hits == pytest.approx((right.sum(1) / kept.sum(1)).tolist())
    assert kept.sum() > 3 >= seen.most > 0, "more logits were there than a chunk has"


def test_the_switch_computes_whole_logits() -> None:
    model, batch = _asked("llama")
    with Rows() as seen:
        whole = complete(model, [batch], chunked=False)
    assert seen.most >= batch["input_ids"].numel()
    found = complete(model, [batch])
    assert found.values == pytest.approx(whole.values, rel=1e-6) and found.items == pytest.approx(whole.items, rel=1e-6)


@pytest.mark.parametrize("row", [0, -1])
@pytest.mark.parametrize("name", ["llama", "gemma2 capped"])
def test_a_value_that_is_not_finite_is_seen_in_any_chunk(name: str, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = _asked(name)
    monkeypatch.setattr(chunked, "_FEWEST", 3)
    monkeypatch.setitem(chunked._CHUNK, "cpu", 0)
    at = int(batch["labels"][row].ne(-100).nonzero()[row]) - 1  # the first or the last scored place

    def spoil(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[row, at] = torch.nan
        return out

    model.model.norm.register_forward_hook(spoil)  # type: ignore[union-attr,operator]
    with pytest.raises(DivergedError, match="not finite"):
        complete(model, [batch])
