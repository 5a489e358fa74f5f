"""What this machine must be able to do for a run, checked before a model is loaded."""

from __future__ import annotations

import torch

from peftree.errors import ConfigError
from peftree.methods.contract import Method, Union
from peftree.optimizers import DEFAULT, check_optimizer
from peftree.precision import check_precision
from peftree.settings import RunConfig
from peftree.tasks.quantized import check_quantized
from peftree.train.compiled import check_compiler


def training_device() -> torch.device:
    """Return the device that the Trainer puts a model on."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found or torch.device("cpu")


def check_machine(config: RunConfig, method: Method) -> None:
    """Raise ConfigError if a run asks for what the machine or the method lacks, with what to do instead."""
    device = training_device()
    check_precision(config.precision, device, config.where("precision"))
    check_quantized(config)
    check_optimizer(config.optimizer, device, config.where("optimizer"))
    if config.compile:
        check_compiler(device, config.where("compile"))
    own = [
        part.name
        for part in (method, *method.parts())
        if type(part).optimizer not in (Method.optimizer, Union.optimizer)
    ]
    if own and config.optimizer != DEFAULT:
        raise ConfigError(
            f"{config.where('optimizer')}optimizer={config.optimizer}: {own[0]} has an optimizer of its own.",
            "Leave the optimizer out.",
        )
