"""Hooks: calls the trainer at points where the Trainer's loop has no method to override."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class Hooks(TrainerCallback):
    """The adapter's hooks, the checks and a stop, at the places in the loop where each belongs."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Let the method's schedule begin."""
        trainer = self.trainer
        trainer.streams.begin(state.global_step, {})
        with trainer.streams.alike():
            trainer.adapter.start(state.global_step, state.max_steps, trainer.plain_optimizer())
        trainer.compare("before the first step")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Let the method change the gradients."""
        self.trainer.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Let the method change the weights."""
        self.trainer.after_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Stop if a signal asked for it; look at the weights now if they are used before the next step."""
        if self.trainer.stopped:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self.trainer.finite.check_weights()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Look at the weights, which may be saved or scored now."""
        self.trainer.finite.check_weights()
