"""AdapterTrainer: a transformers Trainer that trains one adapter, checks its health, and saves only the adapter."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import signal
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, ProgressCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from peftree import store
from peftree.adapter import Adapter
from peftree.errors import TrainError
from peftree.evaluate.quality import Scores
from peftree.loss import deferred, has_head, obstacle, source
from peftree.precision import autocast
from peftree.train import checkpoint as checkpoints
from peftree.train.bar import Bar
from peftree.train.beside import losses, optimizer
from peftree.train.draws import Draws
from peftree.train.finite import Finite, drop
from peftree.train.health import STEPS, Health, first_line, main_output, names
from peftree.train.hooks import Hooks
from peftree.train.output import finished, held
from peftree.train.share import COUNT, items
from peftree.train.signals import stopping
from peftree.train.together import Together

INIT_BATCHES = 32
_Early = EarlyStoppingCallback
_DEFAULT_LR = TrainingArguments.learning_rate


class AdapterTrainer(Together):
    """Trains one adapter with transformers' Trainer.

    It adds the method's parameter groups and default learning rate, its schedule, extra loss,
    and its work before and after training; checks that say by step 3 whether anything would
    fail silently; a stop within one step when a loss, gradient or weight is not finite; checkpoints
    that hold the adapter and the state of training, written completely or not at all; on SIGTERM or Ctrl-C a
    checkpoint and exit code 143 or 130; and a lock on the output folder against other processes.

    Args:
        adapter: an adapter that is on a model and switched on.
        args: transformers' arguments.
        lr: learning rate; None: `args.learning_rate` if it is not transformers' default, else the
            method's default.
        stop: id of the token that ends a completion, to check that it is in the loss.
        sharded: the base is spread over the processes, which therefore score together.
        compiles: run the training passes compiled; everything else uses the plain model.
        chunked_loss: compute the loss of training passes without whole logits, where the head is a frozen linear map.
        score: scores the model on the validation items; replaces the Trainer's own evaluation.
            Its score is `eval_score` to `metric_for_best_model`.
        quiet: print only errors.
        more: the Trainer's own arguments: train_dataset, data_collator, callbacks ...

    Raises:
        TrainError: raised by `train` if training would fail silently.
    """

    def __init__(
        self,
        adapter: Adapter,
        args: TrainingArguments,
        *,
        lr: float | None = None,
        stop: int | None = None,
        score: Callable[[], Scores] | None = None,
        sharded: bool = False,
        compiles: bool = False,
        chunked_loss: bool = True,
        quiet: bool = False,
        **more: Any,
    ) -> None:
        if adapter.model is None:
            raise TrainError(f"Adapter '{adapter.name}' is not on a model.", "Put it on with peftree.adapt.")
        self.adapter = adapter
        self.lr = lr if lr is not None or args.learning_rate == _DEFAULT_LR else args.learning_rate
        self.join(args)
        self.quiet = quiet = quiet or not self.team.first
        self.score = score
        self.sharded, self.compiles, self.chunked = sharded, compiles, chunked_loss
        self.health = Health(adapter, stop)
        self.ends = False  # whether the caller writes results, which a run may have been killed before
        self.scored_at: int | None = None  # the step that results were written after
        self.finite = Finite({id(p): n for n, p in names(adapter).items()})
        self._last: Mapping[str, Any] = {}
        self.draws = Draws(args.seed)
        self._compiled: Any = None
        # A loss that is not finite stops the run; the Trainer would log it as 0.
        args.logging_nan_inf_filter = False
        super().__init__(model=adapter.model, args=args, **more)
        self.precision = "fp16" if args.fp16 else "bf16" if args.bf16 else "float32"
        if args.fp16 and args.device.type == "cpu":  # where accelerate scales no loss
            self.accelerator.scaler = torch.amp.GradScaler("cpu")
        optimizer(adapter, self.lr, args, self.optimizer)  # what does not fit is refused now
        # Set, the Trainer counts a step's items and does not divide by its passes; `compute_loss` weighs each of them.
        self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs or self.compute_loss_func is None
        self.add_callback(Hooks(self))
        for shown in (PrinterCallback, ProgressCallback):
            if quiet or shown is PrinterCallback:
                self.remove_callback(shown)
        self._bar = Bar()
        if not quiet and self.pop_callback(ProgressCallback):
            self.add_callback(self._bar)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **more: Any) -> Any:
        """Train; see `transformers.Trainer.train`.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the newest complete one in the output folder
                (if there is none, training starts at step 0).

        Raises:
            TrainError: training would fail silently, or the run to resume is finished or damaged.
            BusyError: another process holds the output folder.
            SystemExit: with code 143 after SIGTERM or 130 after SIGINT, once the checkpoint is written.
        """
        output = str(self.args.output_dir)
        with held(output) if self.is_world_process_zero() else contextlib.nullcontext():
            self.say(first_line(self._base, self.adapter))
            self._see_head()
            source = self._resume(resume_from_checkpoint)
            if source is None:
                self._see_data()
            try:
                with stopping(self.stop):
                    over = source is not None and self._over(source)
                    result = self._restore(str(source)) if over else super().train(source, *args, **more)
                    self.agree_to_stop()
                    self.compare("after the last step")
            finally:
                self._bar.close()
            if self.stopped:
                name = signal.Signals(self.stopped).name
                self.say(f"stopped by {name} at step {self.state.global_step}; resume continues from there")
                raise SystemExit(128 + self.stopped)
            self.adapter.finish()
            return result

    def _over(self, source: str) -> bool:
        """Return whether a checkpoint is the last of a run whose results were never written.

        Raises:
            TrainError: it is the last, and the results were written.
        """
        state = TrainerState.load_from_json(f"{source}/{checkpoints.TRAINER}")
        *_, steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        patience = [c.early_stopping_patience for c in self.callback_handler.callbacks if isinstance(c, _Early)]
        waited = (state.stateful_callbacks or {}).get(_Early.__name__, {}).get("attributes", {})
        stopped = any(waited.get("early_stopping_patience_counter", 0) >= most for most in patience)
        if state.global_step < steps and not stopped:
            return False
        if not self.ends or self.scored_at == state.global_step:
            raise finished(state.global_step, steps)
        return True

    def _restore(self, source: str) -> TrainOutput:
        """Restore the state in which training ended."""
        state = TrainerState.load_from_json(f"{source}/{checkpoints.TRAINER}")
        self.create_optimizer_and_scheduler(state.max_steps)
        assert self.optimizer is not None
        checkpoints.fill_training(source, self.adapter, self.optimizer, self.lr_scheduler)
        checkpoints.fill_adapter(self.adapter, source)
        checkpoints.fill_random(source, self.team.first)
        self.state = state
        self.say(f"training had ended at step {state.global_step}")
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        scored = any("eval_score" in entry for entry in state.log_history if entry["step"] == state.global_step)
        if self.args.eval_strategy == "epoch" and self.score is not None and not scored:
            self.evaluate()  # an epoch's end that is not a save's comes after the last save
        if self.args.load_best_model_at_end:
            self._load_best_model()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(state.global_step, 0.0, {})

    @property
    def _base(self) -> nn.Module:
        model = self.adapter.model
        assert model is not None
        return model

    def _resume(self, wanted: str | bool | None) -> str | None:
        """Return the checkpoint to continue from."""
        output = str(self.args.output_dir)
        if not wanted:
            return None
        newest = checkpoints.newest_checkpoint(output, self.say) if wanted is True and self.team.first else None
        found = self.team.told(str(newest) if newest else None) if wanted is True else wanted
        if found is None:
            self.say(f"no checkpoint in {output}: starting at step 0")
            return None
        problem = checkpoints.damage(found)
        if problem:
            raise TrainError(f"{found} cannot be resumed: {problem}.", "Resume from an older checkpoint.")
        self.say(f"resuming from {found}")
        return str(found)

    def _see_head(self) -> None:
        """Say why training passes compute whole logits, if they do although the run asks for none."""
        compiled = "the passes are compiled" if self.compiles or self.args.torch_compile else ""
        self._whole_logits(obstacle(self._base) or (compiled if has_head(self._base) else ""))

    def _whole_logits(self, why: str) -> None:
        if self.chunked and why:
            self.chunked = False
            self.say(f"note: the loss is computed from whole logits: {why}")

    def _see_data(self) -> None:
        """Show the first batches to a method that needs data; random states are not changed."""
        method = self.adapter.method
        if not any(part.tags.needs_data for part in (method, *method.parts())):
            return
        with torch.random.fork_rng():  # every process sees the same batches, so all come to the same choice
            self.adapter.init(list(islice(losses(self, self._base, self.draws, 0), INIT_BATCHES)))
        self._base.zero_grad()

    # What follows overrides steps of transformers' Trainer, under its names.

    def _run_epoch(self, model: Any, epoch: int, *args: Any, **more: Any) -> None:
        self.draws.epoch = epoch
        if self.compiles:  # of all that uses the model, the passes alone
            model = self._compiled = torch.compile(model) if self._compiled is None else self._compiled
        super()._run_epoch(model, epoch, *args, **more)  # type: ignore[no-untyped-call]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the method's own optimizer, or the run's from its parameter groups; checks one that was passed in."""
        self.health.check_adapter(self._base)
        self.accelerator.native_amp = False  # its autocast would stay in the model's forward; ours is around the passes
        self.optimizer = optimizer(self.adapter, self.lr, self.args, self.optimizer)
        if self.optimizer is None:
            base: Any = self._base
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, base)
            settings["weight_decay"] = self.args.weight_decay
            groups = self.adapter.param_groups(self.lr)
            self.optimizer = kind(groups, **settings)
        self.health.check_optimizer(self.optimizer)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Build the schedule; a single step gets no warm-up, since its first rate is zero."""
        if num_training_steps == 1:
            self.args.warmup_steps = 0
        self.accelerator.native_amp = self.accelerator.scaler is not None  # gradients are unscaled then
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:  # fmt: skip
        """Return the model's loss plus the method's own term; in training, scaled to this pass's share of the step.

        A model's own loss is a mean over the labelled items of the batch. Scaled by their share in the step,
        the passes sum to the mean over the step, however it is split.
        """
        weightless = self.weightless(inputs)
        watching = model.training and not self.health.done
        weighed = model.training and self.compute_loss_func is None
        own = items(inputs, self._base) if weighed else 0
        inputs.pop(COUNT, None)
        if watching:
            self._last = inputs
        if watching and not weightless:
            self.health.see_batch(inputs)
        with deferred(self._base, self.chunked and model.training) as waiting:
            loss, outputs = super().compute_loss(model, inputs, True, None if weighed else num_items_in_batch)
            if not model.training:
                return (loss, outputs) if return_outputs else loss
            if weighed and num_items_in_batch is not None:
                world = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
                # The mean over no item is not a number; a pass without one has no part in the step.
                loss = loss * (own * world / num_items_in_batch) if own else source(main_output(outputs)).sum() * 0.0
            step, total = self.state.global_step, self.state.max_steps
            extra = self.adapter.aux_loss(step, total, outputs, functools.partial(model, **inputs))
        self._whole_logits("something else in the pass reads them" if waiting.reads else "")
        if extra is not None:
            loss = loss + extra / self.passes
        if weightless:
            loss = loss * 0.0
        if watching and not weightless:
            self.health.see_loss(loss)
        self.finite.see_loss(loss)
        return (loss, outputs) if return_outputs else loss

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Return the precision's context, which the Trainer enters for each pass."""
        return autocast(self.args.device, self.precision)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Stop on a gradient that is not finite, before the optimizer uses it."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        if not self.finite.check_step(self.state.global_step + 1, norm, self.accelerator.scaler):
            self.say(f"step {self.state.global_step + 1} is dropped: its gradients overflow in fp16 at this loss scale")
            drop(self.adapter.parameters())
        elif not self.health.done:
            self.health.see_gradients(self.counts)
        return norm

    def plain_optimizer(self) -> Any:
        """Return the optimizer itself, which accelerate wraps."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def before_step(self) -> None:
        """Let the method see and change the gradients, after any clipping."""
        with self.streams.alike():
            self.adapter.before_step(self.state.global_step + 1, self.state.max_steps, self.plain_optimizer())

    def after_step(self) -> None:
        """Run the method's schedule and check the weights; gradients are still there."""
        step = self.state.global_step + 1
        beside = losses(self, self._base, self.draws, step)
        with self.streams.alike():
            self.adapter.step(step, self.state.max_steps, self.plain_optimizer(), beside)
        self.finite.see_weights([p for p in self.adapter.parameters() if p.requires_grad])
        last = min(STEPS, self.state.max_steps)
        if not self.health.done and self.health.steps >= last:
            with self.compute_loss_context_manager(), deferred(self._base, self.chunked):
                change = self.health.effect(self._base, self._last) if self._last else None  # of a loss of one's own
            self.say(self.health.report(change))
            self.health.done, self._last = True, {}

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate with `score` if the trainer has one and no other data is given; otherwise as transformers does."""
        if self.score is None or eval_dataset is not None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        scores = self.score() if self.team.first or self.sharded else None
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in scores.values.items()} if scores else {}
        metrics |= {f"{metric_key_prefix}_score": scores.score} if scores else {}
        metrics = dict(self.team.told(metrics))
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, and nothing of the base."""
        if self.team.first:
            store.save(self.adapter, output_dir or str(self.args.output_dir), format="native")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output = Path(str(self.args.output_dir))
        target = output / f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(target)
        self._note_callbacks()
        streams = self.streams.states()
        if not self.team.first:
            return
        state = json.dumps(dataclasses.asdict(self.state), indent=1, sort_keys=True)
        assert self.optimizer is not None
        scaler = self.accelerator.scaler
        checkpoints.write_checkpoint(target, self.adapter, self.optimizer, self.lr_scheduler, state, scaler, streams)
        rotate_checkpoints(
            output_dir=str(output), save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )  # fmt: skip

    def _note_callbacks(self) -> None:
        """Save what callbacks must remember (the patience of early stopping) in the state."""
        state: Any = self.state
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                state.stateful_callbacks[type(callback).__name__] = callback.state()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoints.fill_adapter(self.adapter, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None:
            self.team.sum(0)  # the first process may still be writing it
            checkpoints.fill_adapter(self.adapter, best)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.optimizer is not None:
            checkpoints.fill_training(checkpoint, self.adapter, self.optimizer, self.lr_scheduler)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            checkpoints.fill_scaler(checkpoint, self.accelerator.scaler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.streams.begin(self.state.global_step, checkpoints.fill_random(checkpoint, self.team.first))
