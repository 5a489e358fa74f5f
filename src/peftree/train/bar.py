"""The progress bar of training."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback


class Bar(ProgressCallback):
    """The Trainer's progress bar, with the newest figures at its end instead of a line for each."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """Show the loss or the score."""
        if self.training_bar is not None and logs:
            shown = {k: f"{v:.4g}" for k, v in logs.items() if k in ("loss", "eval_score")}
            self.training_bar.set_postfix(shown)

    def close(self) -> None:
        """Leave the bar where a broken run ended."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None
