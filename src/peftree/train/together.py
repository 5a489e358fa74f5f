"""What a Trainer does together with the other processes of a run: batches, counts, gradients, the end."""

from __future__ import annotations

import signal
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from peftree.adapter import Adapter
from peftree.errors import TrainError, plain
from peftree.train.draws import Draws
from peftree.train.finite import Finite, not_finite
from peftree.train.health import Health
from peftree.train.parts import Weightless, divide
from peftree.train.processes import team
from peftree.train.share import Counted, check_splits, items
from peftree.train.streams import Streams

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Together(Trainer):
    """A Trainer whose processes make each step as one: two all-reduces, of counts before and of gradients after.

    torch's DistributedDataParallel is not used (decision 0032): some methods run a pass twice, or leave tensors of a
    pass without a gradient. With one process, all of this is transformers' Trainer.

    Attributes:
        team, streams: the processes, and what they draw.
        stopped: the number of the signal that all processes stop for; 0: none.
        counts: `health.counts` of all processes, after a step's last pass.
        chunked: whether training passes compute no whole logits, see `peftree.loss`.
    """

    adapter: Adapter
    health: Health
    draws: Draws
    finite: Finite
    quiet: bool
    chunked: bool

    def join(self, args: TrainingArguments) -> None:
        """Find the other processes; call this before the Trainer is made.

        Raises:
            TrainError: some were started that did not join, or transformers sees another number of them.
        """
        self.team = team()
        if args.world_size != self.team.size:
            raise TrainError(
                f"transformers sees {args.world_size} processes, but {self.team.size} joined.",
                "On a CPU, pass use_cpu=True to TrainingArguments; on GPUs, LOCAL_RANK must be set.",
            )
        self.streams = Streams(self.team, args.seed)
        self.stopped = self._asked = 0
        self._passes = 0.0
        self.counts: list[float] = []
        if self.team.size > 1:
            args.accelerator_config.even_batches = False  # type: ignore[union-attr]

    def say(self, *lines: str) -> None:
        """Print lines above the progress bar, unless the trainer is quiet."""
        for line in () if self.quiet else lines:
            tqdm.write(plain(line), file=sys.stderr)

    def stop(self, number: int) -> None:
        """Stop after this step for a signal; of several processes, after the step in which all know of it."""
        self._asked = number
        if self.team.size == 1:
            self.stopped = number

    def agree_to_stop(self) -> None:
        """Find out whether any process was asked to stop since the last step."""
        self._heard(self.team.sum(*(self._asked == each for each in _SIGNALS)))

    def _heard(self, asked: list[float] | list[int]) -> None:
        self.stopped = next((int(s) for s, count in zip(_SIGNALS, asked, strict=True) if count), self.stopped)

    def compare(self, when: str) -> None:
        """Say that all processes hold the same adapter.

        Raises:
            TrainError: they do not.
        """
        if self.team.size > 1:
            self.say(self.team.check_same(self.adapter.state(), when))

    def weightless(self, inputs: Any) -> bool:
        """Return whether a batch is only there so that this process, too, runs a pass."""
        return isinstance(inputs, Weightless)

    # What follows overrides steps of transformers' Trainer, under its names.

    def create_accelerator_and_postprocess(self) -> None:
        """Let accelerate move and cast the model, but not wrap it."""
        super().create_accelerator_and_postprocess()
        if self.team.size > 1:
            vars(self.accelerator)["prepare_model"] = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def get_train_dataloader(self) -> Any:
        """Return this process's batches, with their count; what they draw depends on the seed, the epoch and rows."""
        loader: Any = divide(self.draws.on(super().get_train_dataloader()), self.team)
        model: Any = self.adapter.model
        loader.base_dataloader.collate_fn = Counted(loader.base_dataloader.collate_fn, model)
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = self.draws.order(super()._get_train_sampler(train_dataset))
        if isinstance(sampler, LengthGroupedSampler):  # among the rows of a step, which are those of all processes
            sampler.batch_size *= self.team.size
        return sampler

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Return the number of items that a step's loss averages, in all processes whose gradients are averaged."""
        if self.compute_loss_func is not None or not batch_samples:
            return super()._get_num_items_in_batch([_unlabelled(batch) for batch in batch_samples], device)
        check_splits(batch_samples[0], len(batch_samples))
        model: Any = self.adapter.model
        count = sum(items(batch, model) for batch in batch_samples)
        passes = sum(not self.weightless(batch) for batch in batch_samples)
        if self.args.average_tokens_across_devices:
            count, passes = self.team.sum(count, passes)
            self._passes = passes / self.team.size
        else:
            self._passes = float(passes)
        return count

    @property
    def passes(self) -> float:
        """The passes of this step in each process, on average, without weightless ones."""
        return self._passes or self.current_gradient_accumulation_steps

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run one pass; after the last of a step, average the gradients and hear who must stop.

        Raises:
            DivergedError: the loss of some process, or a weight, is not finite; all processes raise it.
        """
        with self.streams.on():
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.team.size > 1 and self.accelerator.sync_gradients:
            trained = [p for p in self.adapter.parameters() if p.requires_grad] or self.adapter.parameters()[:1]
            asked = [self._asked == each for each in _SIGNALS]
            said = self.team.average(trained, [*asked, self.finite.bad_loss(), *self.health.counts])
            self._heard(said[:2])
            self.counts = said[3:]
            if said[2]:
                self.finite.check_weights()
                raise not_finite(f"The loss of step {self.state.global_step + 1}")
        elif self.team.size == 1:
            self.counts = self.health.counts
        return loss


def _unlabelled(batch: Any) -> Any:
    """Return a weightless batch without labels that count; any other as it is."""
    if not isinstance(batch, Weightless):
        return batch
    return batch | {k: torch.full_like(batch[k], -100) for k in ("labels", "shift_labels") if k in batch}
