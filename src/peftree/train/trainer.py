"""AdapterTrainer: transformers' Trainer that trains one adapter, checks its health, and saves the adapter only."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback
from transformers.trainer_utils import rotate_checkpoints

from peftree import store
from peftree.adapter import Adapter
from peftree.errors import TrainError
from peftree.evaluate.quality import Scores
from peftree.train import checkpoint as checkpoints
from peftree.train.health import STEPS, Health, check_weights, first_line, names, not_finite

INIT_BATCHES = 32
STOPPED = 143  # the exit code of a process that SIGTERM ended
_DEFAULT_LR = TrainingArguments.learning_rate


class AdapterTrainer(Trainer):
    """Trains one adapter with transformers' Trainer.

    What is added: the method's parameter groups and default learning rate, its schedule, extra loss,
    work on data before and work after training; checks that say by step 3 whether anything would
    fail silently; a stop within one step when a loss, gradient or weight is not finite; checkpoints
    that hold the adapter and the state of training, written whole or not at all; on SIGTERM a
    checkpoint and exit code 143.

    Args:
        adapter: on a model, and switched on.
        args: transformers' arguments.
        lr: learning rate; None: `args.learning_rate` if it is not transformers' default, else the
            method's default.
        stop: id of the token that ends a completion, to check that it is in the loss.
        score: scores the model on the validation items; replaces the Trainer's own evaluation.
            Its score is `eval_score` to `metric_for_best_model`.
        quiet: print nothing but errors.
        more: the Trainer's own arguments: train_dataset, data_collator, callbacks ...

    Raises:
        TrainError: from `train`, when training would fail silently.
    """

    def __init__(
        self,
        adapter: Adapter,
        args: TrainingArguments,
        *,
        lr: float | None = None,
        stop: int | None = None,
        score: Callable[[], Scores] | None = None,
        quiet: bool = False,
        **more: Any,
    ) -> None:
        if adapter.model is None:
            raise TrainError(f"Adapter '{adapter.name}' is on no model.", "Put it on with peftree.adapt.")
        self.adapter = adapter
        self.lr = lr if lr is not None or args.learning_rate == _DEFAULT_LR else args.learning_rate
        self.quiet = quiet
        self.score = score
        self.health = Health(adapter, stop)
        self.stopped = False
        self._labels = {id(p): n for n, p in names(adapter).items()}
        self._last: Mapping[str, Any] = {}
        # A loss that is not finite stops the run; the Trainer would log it as 0.
        args.logging_nan_inf_filter = False
        super().__init__(model=adapter.model, args=args, **more)
        # Only the causal loss is a sum over tokens that the Trainer may divide for a whole step.
        self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs and self._loss_shifts_labels
        self.add_callback(_Hooks(self))
        for shown in (PrinterCallback, ProgressCallback):
            if quiet or shown is PrinterCallback:
                self.remove_callback(shown)
        self._bar = _Bar()
        if not quiet and self.pop_callback(ProgressCallback):
            self.add_callback(self._bar)

    def say(self, line: str) -> None:
        """Print one line above the progress bar, unless the trainer is quiet."""
        if not self.quiet:
            tqdm.write(line, file=sys.stderr)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **more: Any) -> Any:
        """Train; see `transformers.Trainer.train`.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the newest whole one in the output folder
                (none there: training starts at step 0).

        Raises:
            TrainError: training would fail silently, or the run to resume is finished or damaged.
            SystemExit: with code 143 after SIGTERM, once the checkpoint is written.
        """
        self.say(first_line(self._base, self.adapter))
        source = self._resume(resume_from_checkpoint)
        if source is None:
            self._see_data()
        try:
            with _terminated(self._stop):
                result = super().train(source, *args, **more)
        finally:
            self._bar.close()
        if self.stopped:
            self.say(f"stopped by SIGTERM at step {self.state.global_step}; resume goes on from there")
            raise SystemExit(STOPPED)
        self.adapter.finish()
        return result

    @property
    def _base(self) -> nn.Module:
        model = self.adapter.model
        assert model is not None
        return model

    def _stop(self) -> None:
        self.stopped = True

    def _resume(self, wanted: str | bool | None) -> str | None:
        """Return the checkpoint to go on from."""
        output = str(self.args.output_dir)
        checkpoints.clear_stages(output)
        if not wanted:
            return None
        found = checkpoints.newest_checkpoint(output, self.say) if wanted is True else Path(wanted)
        if found is None:
            self.say(f"no checkpoint in {output}: starting at step 0")
            return None
        problem = checkpoints.damage(found)
        if problem:
            raise TrainError(f"{found} cannot be resumed: {problem}.", "Resume from an older checkpoint.")
        self.say(f"resuming from {found}")
        return str(found)

    def _see_data(self) -> None:
        """Let a method that needs data see the first batches; random numbers stay as they were."""
        method = self.adapter.method
        if not any(part.tags.needs_data for part in (method, *method.parts())):
            return
        with torch.random.fork_rng():
            batches = [
                self._prepare_inputs(batch)
                for _, batch in zip(range(INIT_BATCHES), self.get_train_dataloader(), strict=False)
            ]
            training = self._base.training
            self._base.eval()
            self.adapter.init([functools.partial(self._loss, batch) for batch in batches])
            self._base.train(training)
        self._base.zero_grad()

    def _loss(self, batch: Mapping[str, Any]) -> Tensor:
        loss: Tensor = self._base(**batch).loss
        return loss

    # What follows overrides steps of transformers' Trainer, under its names.

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer from the method's parameter groups; checks one that was passed in."""
        self.health.check_adapter(self._base)
        if self.optimizer is None:
            base: Any = self._base
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, base)
            settings["weight_decay"] = self.args.weight_decay
            groups = self.adapter.param_groups(self.lr)
            self.optimizer = kind(groups, **settings)
        self.health.check_optimizer(self.optimizer)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Build the schedule; a single step has no warm-up, whose first rate is zero."""
        if num_training_steps == 1:
            self.args.warmup_steps = 0
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:  # fmt: skip
        """Return the model's loss plus the method's own term."""
        watching = model.training and not self.health.done
        if watching:
            self.health.see_batch(inputs)
            self._last = inputs
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not model.training:
            return (loss, outputs) if return_outputs else loss
        step, total = self.state.global_step, self.state.max_steps
        extra = self.adapter.aux_loss(step, total, outputs, functools.partial(model, **inputs))
        if extra is not None:
            # With a count of items the loss is a share of the whole step's; the term must be one too.
            whole = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            loss = loss + (extra / self.current_gradient_accumulation_steps if whole else extra)
        if watching:
            self.health.see_loss(loss)
        if not bool(torch.isfinite(loss.detach())):
            raise not_finite(f"The loss of step {step + 1}")
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Stop on a gradient that is not finite, before the optimizer uses it."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        if not self.health.done:
            self.health.see_gradients()
        if not bool(torch.isfinite(torch.as_tensor(norm))):
            raise not_finite(f"The gradient of step {self.state.global_step + 1}")
        return norm

    def after_step(self) -> None:
        """Run the method's schedule and look at the weights; gradients are still there."""
        step = self.state.global_step + 1
        self.adapter.step(step, self.state.max_steps)
        check_weights([p for p in self.adapter.parameters() if p.requires_grad], self._labels)
        last = min(STEPS, self.state.max_steps)
        if not self.health.done and self.health.steps >= last:
            self.say(self.health.report(self.health.effect(self._base, self._last)))
            self.health.done, self._last = True, {}

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate with `score` if the trainer has one and no other data is given, else as transformers does."""
        if self.score is None or eval_dataset is not None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        scores = self.score()
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in scores.values.items()}
        metrics[f"{metric_key_prefix}_score"] = scores.score
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, and nothing of the base."""
        store.save(self.adapter, output_dir or str(self.args.output_dir), format="native")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output = Path(str(self.args.output_dir))
        target = output / f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(target)
        self._note_callbacks()
        state = json.dumps(dataclasses.asdict(self.state), indent=1, sort_keys=True)
        assert self.optimizer is not None
        checkpoints.write_checkpoint(target, self.adapter, self.optimizer, self.lr_scheduler, state)
        rotate_checkpoints(
            output_dir=str(output), save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )  # fmt: skip

    def _note_callbacks(self) -> None:
        """Put what callbacks must remember (the patience of early stopping) into the state."""
        state: Any = self.state
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                state.stateful_callbacks[type(callback).__name__] = callback.state()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoints.fill_adapter(self.adapter, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None:
            checkpoints.fill_adapter(self.adapter, best)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.optimizer is not None:
            checkpoints.fill_training(checkpoint, self.adapter, self.optimizer, self.lr_scheduler)
            if self.state.global_step >= self.state.max_steps:
                raise TrainError(
                    f"The run is finished: step {self.state.global_step} of {self.state.max_steps}.",
                    "Raise epochs or steps to go on, or train anew in another output folder.",
                )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.fill_random(checkpoint)


class _Hooks(TrainerCallback):
    """Calls the trainer where the loop has no method to override."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.trainer.after_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.trainer.stopped:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False


class _Bar(ProgressCallback):
    """The Trainer's progress bar with the newest figures at its end instead of a line for each."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        if self.training_bar is not None and logs:
            shown = {k: f"{v:.4g}" for k, v in logs.items() if k in ("loss", "eval_score")}
            self.training_bar.set_postfix(shown)

    def close(self) -> None:
        """Leave the bar where a broken run ended."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


@contextlib.contextmanager
def _terminated(stop: Callable[[], None]) -> Iterator[None]:
    """Inside, SIGTERM calls `stop` instead of ending the process (main thread only)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
