"""What this machine must be able to do for a run, checked before a model is loaded."""

from __future__ import annotations

import torch

from peftree.precision import check_precision
from peftree.settings import RunConfig


def training_device() -> torch.device:
    """Return the device that the Trainer puts a model on."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found or torch.device("cpu")


def check_machine(config: RunConfig) -> None:
    """Raise ConfigError if a run asks for what the machine lacks, with what to do instead."""
    check_precision(config.precision, training_device(), config.where("precision"))
