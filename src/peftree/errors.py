"""The one tree of exceptions: every message says what is wrong, which thing, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PeftreeError(Exception):
    """Base of all errors raised on purpose by peftree.

    Args:
        what: what is wrong, naming the offending thing.
        fix: what to do next; appended to the message.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        self.what = what
        self.fix = fix
        super().__init__(f"{what} {fix}".strip())


class ConfigError(PeftreeError, ValueError):
    """A field, key or value given by the user is unknown or out of range."""


class MethodError(PeftreeError, ValueError):
    """A method or recipe is unknown, broken, or does not fit where it was asked to go."""


class SiteError(PeftreeError, ValueError):
    """A requested place in the base model does not exist, or only part of a request matched."""


class AdapterError(PeftreeError, ValueError):
    """An adapter name is unknown, taken, malformed, or in the wrong state for the call."""


class MergeError(PeftreeError, RuntimeError):
    """An adapter cannot be folded into the base weights, or is already."""


class StoreError(PeftreeError, ValueError):
    """A stored adapter is missing, damaged, unsafe, or made for another base model."""


class DataError(PeftreeError, ValueError):
    """A data file is missing, malformed, or does not fit the task."""


class TrainError(PeftreeError, RuntimeError):
    """Training would fail silently: dead gradients, masked labels, non-finite values."""


class DivergedError(TrainError):
    """A loss, gradient, weight or output is not finite: training cannot go on."""


class AssetError(PeftreeError, RuntimeError):
    """A packaged model or data set could not be fetched, verified or converted."""


# What transformers and Hugging Face PEFT call it -> its name here.
ELSEWHERE = {
    "gradient_accumulation_steps": "accumulation", "learning_rate": "lr", "logging_steps": "log_every",
    "lora_alpha": "alpha", "lora_dropout": "dropout", "lr_scheduler_type": "schedule", "max_steps": "steps",
    "num_train_epochs": "epochs", "output_dir": "output", "per_device_eval_batch_size": "eval_batch_size",
    "per_device_train_batch_size": "batch_size", "rank": "r", "target_modules": "sites", "warmup_steps": "warmup",
}  # fmt: skip


def did_you_mean(name: str, known: Iterable[str], label: str = "Known") -> str:
    """Return ``Did you mean 'x'? Known: a, b, c.`` for an unknown `name` among `known`."""
    options = sorted(known)
    close = [ELSEWHERE[name]] if ELSEWHERE.get(name) in options else difflib.get_close_matches(name, options, n=1)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}{label}: {', '.join(options) or 'none'}."
