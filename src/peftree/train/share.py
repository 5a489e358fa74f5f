"""The share of an optimizer step's loss that one forward pass has: its share of the labelled items."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from peftree.errors import TrainError
from peftree.train.parts import Weightless

IGNORED = -100
COUNT = "peftree_items"  # the entry of a batch with its number of items

# Language models that predict each place from others, not from those before it.
_ALIGNED = {"XLMWithLMHeadModel", "XLNetLMHeadModel"}
_CAUSAL = {
    *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
    *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
} - _ALIGNED


def shifts(model: nn.Module) -> bool:
    """Return True if the model's loss predicts each label from the positions before it, so the first does not count."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    by_loss = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss
    return by_loss or any(kind.__name__ in _CAUSAL for kind in type(model).__mro__)


def items(batch: Mapping[str, Any], model: nn.Module) -> int:
    """Return the number of items that the model's loss on a batch averages: its labelled tokens, rows or values.

    For a batch without `labels` it is the number of rows.
    """
    if isinstance(batch, Weightless):
        return 0
    return int(batch[COUNT]) if COUNT in batch else _count(batch, shifts(model), _ignored(model))


class Counted:
    """A collator that counts the items of its batches as it makes them: on a device, a count waits for its work."""

    def __init__(self, collate: Callable[[Any], Mapping[str, Any]], model: nn.Module) -> None:
        self.collate = collate
        self.rule = shifts(model), _ignored(model)  # not the model, which workers would get a copy of

    def __call__(self, rows: Any) -> dict[str, Any]:
        batch = self.collate(rows)
        kind = Weightless if isinstance(batch, Weightless) else dict
        return kind({**batch, COUNT: _count(batch, *self.rule)})


def _ignored(model: nn.Module) -> int:
    """Return the class of a pixel that the loss leaves out."""
    return int(getattr(getattr(model, "config", None), "semantic_loss_ignore_index", IGNORED))


def _count(batch: Mapping[str, Any], shifted: bool, ignored: int) -> int:
    labels = batch.get("shift_labels", batch.get("labels"))
    if labels is None:
        return next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()), 1)
    if not isinstance(labels, Tensor):
        return len(labels)
    if labels.is_floating_point():
        return labels.numel()
    if labels.dim() == 2 and "shift_labels" not in batch and shifted:
        labels = labels[:, 1:]
    return int(labels.ne(ignored if labels.dim() == 3 else IGNORED).sum())


def check_splits(batch: Mapping[str, Any], passes: int) -> None:
    """Raise TrainError if several forward passes cannot replace one large one, whatever their shares."""
    if passes > 1 and batch.get("return_loss") is True:
        raise TrainError(
            f"A contrastive loss compares the rows of one forward pass: {passes} per step are not a larger batch.",
            "Set accumulation (gradient_accumulation_steps) to 1 and raise batch_size; gradient_checkpointing saves "
            "memory.",
        )
