"""Besides the steps: batches for methods that look at data, and the optimizer that a method or the run asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import IterableDataset
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from peftree.adapter import Adapter
from peftree.errors import TrainError
from peftree.loss import deferred
from peftree.optimizers import check_optimizer
from peftree.train.draws import Draws
from peftree.train.together import Together

_ANY = {"adamw_torch", "adamw_torch_fused"}  # what arguments have that name none


def losses(trainer: Together, model: nn.Module, draws: Draws, step: int) -> Iterator[Callable[[], Tensor]]:
    """Yield callables that return the loss of batches of training rows, each row once, in an order set by the step.

    Batches are made when they are taken and run in eval mode. Random states are not changed, and the order is the
    same in every process and after a resume.
    """
    rows: Any = trainer.train_dataset
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator, "training")
    if isinstance(rows, IterableDataset):
        found = iter(rows)
    else:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(draws.seed + step))
        found = (rows[i] for i in order.tolist())
    taken, number = [None], 0
    while taken:
        with draws.of("beside", step, number):
            taken = list(islice(found, trainer.args.train_batch_size))
            batch = collate(taken) if taken else None
        if batch is not None:
            yield partial(_loss, trainer, model, trainer._prepare_inputs(batch))
        number += 1


def _loss(trainer: Together, model: nn.Module, batch: Any) -> Tensor:
    training = model.training
    model.eval()
    try:
        with trainer.compute_loss_context_manager(), deferred(model, trainer.chunked):
            loss: Tensor = model(**batch).loss
    finally:
        model.train(training)
    return loss


def optimizer(adapter: Adapter, lr: float | None, args: TrainingArguments, given: Any) -> Optimizer | None:
    """Return the method's own optimizer over its groups; if the method has none, return the given one, if any.

    Args:
        lr: the learning rate; None: the method's.
        args: the run's.
        given: an optimizer that the trainer was given.

    Raises:
        TrainError: the run asks for another optimizer.
        ConfigError: no run can use it, or this machine lacks it.
    """
    if given is None:
        check_optimizer(OptimizerNames(args.optim).value, args.device)
    own = adapter.optimizer(lr, weight_decay=args.weight_decay)
    if own is None or type(given) is type(own):
        found: Optimizer | None = given
        return found
    if given is not None or args.optim not in _ANY:
        other = type(given).__name__ if given is not None else f"optim={getattr(args.optim, 'value', args.optim)}"
        raise TrainError(
            f"{adapter.method.name} has an optimizer of its own, {type(own).__name__}; the run asks for {other}.",
            "Leave the optimizer out.",
        )
    return own
