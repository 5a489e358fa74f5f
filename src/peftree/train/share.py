"""The share of an optimizer step's loss that one forward pass has: its share of the labelled items."""

from __future__ import annotations

from collections.abc import Mapping
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
    labels = batch.get("shift_labels", batch.get("labels"))
    if labels is None:
        return next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()), 1)
    if not isinstance(labels, Tensor):
        return len(labels)
    if labels.is_floating_point():
        return labels.numel()
    ignored = IGNORED
    if labels.dim() == 3:  # a class for each pixel
        ignored = getattr(getattr(model, "config", None), "semantic_loss_ignore_index", IGNORED)
    if labels.dim() == 2 and "shift_labels" not in batch and shifts(model):
        labels = labels[:, 1:]
    return int(labels.ne(ignored).sum())


def check_splits(batch: Mapping[str, Any], passes: int) -> None:
    """Raise TrainError if several forward passes cannot replace one large one, whatever their shares."""
    if passes > 1 and batch.get("return_loss") is True:
        raise TrainError(
            f"A contrastive loss compares the rows of one forward pass: {passes} per step are not a larger batch.",
            "Set accumulation (gradient_accumulation_steps) to 1 and raise batch_size; gradient_checkpointing saves "
            "memory.",
        )
