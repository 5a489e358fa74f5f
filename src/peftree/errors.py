"""The one tree of exceptions: every message says what is wrong, which thing, and what to do next."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable
from pathlib import Path

USAGE, GIVE_UP, TRY_AGAIN = 2, 65, 75  # exit codes: fix the command; fix the data or the run; the same may work later
LONGEST = 200  # characters of a value that a message repeats
_QUOTED = re.compile(rf"(?<!\w)(['\"])((?:(?!\1).){{{LONGEST},}})\1(?!\w)")
_RUN = re.compile(rf"\S{{{LONGEST},}}")


class PeftreeError(Exception):
    """Base of all errors raised on purpose by peftree.

    Long values from users and files are cut in it, and terminal control characters are replaced.

    Args:
        what: what is wrong, naming the offending thing.
        fix: what to do next; appended to the message.

    Attributes:
        exit_code: the exit code of a command that fails with it.
    """

    exit_code = USAGE

    def __init__(self, what: str, fix: str = "") -> None:
        self.what = plain(what)
        self.fix = plain(fix)
        super().__init__(f"{self.what} {self.fix}".strip())


class ConfigError(PeftreeError, ValueError):
    """A field, key or value given by the user is unknown or out of range."""


class MethodError(PeftreeError, ValueError):
    """A method or recipe is unknown, broken, or does not fit the place asked for."""


class SiteError(PeftreeError, ValueError):
    """A requested place in the base model does not exist, or only part of a request matched."""


class AdapterError(PeftreeError, ValueError):
    """An adapter name is unknown, taken, malformed, or in the wrong state for the call."""


class NoNameError(PeftreeError, AttributeError):
    """The package or one of its objects has no attribute of this name."""


class MergeError(PeftreeError, RuntimeError):
    """An adapter cannot be folded into the base weights, or is already folded."""


class StoreError(PeftreeError, ValueError):
    """A stored adapter is missing, damaged, unsafe, or made for another base model."""


class BusyError(StoreError):
    """The disk is full, or another process holds the folder: the same call may work later."""

    exit_code = TRY_AGAIN


class DataError(PeftreeError, ValueError):
    """A data file is missing, malformed, or does not fit the task."""

    exit_code = GIVE_UP


class TrainError(PeftreeError, RuntimeError):
    """Training would fail silently: dead gradients, masked labels, non-finite values."""

    exit_code = GIVE_UP


class DivergedError(TrainError):
    """A loss, gradient, weight or output is not finite: training cannot continue."""


class PeftreeWarning(UserWarning):
    """An adapter is switched on, but part of it has no effect."""


class AssetError(PeftreeError, RuntimeError):
    """A packaged model or data set could not be fetched, verified or converted."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def first_line(error: BaseException) -> str:
    r"""Return the first line of what an error says (with the next, after a colon) or its kind, at most 200 characters.

    >>> first_line(ValueError("No such column.\nSee the log."))
    'No such column'
    """
    return (re.sub(r":\s*\n\s*", ": ", str(error).strip()) or type(error).__name__).splitlines()[0][:200].rstrip(".")


def plain(text: str) -> str:
    r"""Return `text` on one line, without control characters and with long values cut.

    >>> plain("a\x1b[31mb: " + "x" * 1000)[:12]
    'a?[31mb: xxx'
    """
    text = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)
    text = _QUOTED.sub(lambda m: f"{m[1]}{m[2][: LONGEST - 3]}...{m[1]}", text)
    return _RUN.sub(lambda m: f"{m[0][: LONGEST - 3]}...", text)


def unwritten(path: str | Path, error: OSError, advice: str = "What was there before is unchanged.") -> StoreError:
    """Return the error for a file or folder that the system did not let us write."""
    kind = BusyError if error.errno in _FULL else StoreError
    reason = error.strerror or str(error)
    return kind(
        f"{path} could not be written: {reason}.", f"Check the path, its permissions and the free space. {advice}"
    )


# What transformers, Hugging Face PEFT, TRL, LLaMA-Factory and axolotl call it -> its name here.
ELSEWHERE = {
    "activation_checkpointing": "activations", "base_model": "model", "cutoff_len": "max_length",
    "dataset": "data", "datasets": "data", "early_stopping_patience": "early_stopping", "eval_steps": "eval_every",
    "finetuning_type": "method", "gradient_accumulation_steps": "accumulation", "learning_rate": "lr",
    "logging_steps": "log_every", "lora_alpha": "alpha", "lora_dropout": "dropout", "lora_r": "r", "lora_rank": "r",
    "lora_target": "sites", "lora_target_modules": "sites", "lr_scheduler": "schedule", "lr_scheduler_type": "schedule",
    "max_seq_length": "max_length", "max_steps": "steps", "micro_batch_size": "batch_size",
    "model_name_or_path": "model", "num_epochs": "epochs", "num_train_epochs": "epochs", "output_dir": "output",
    "per_device_eval_batch_size": "eval_batch_size", "per_device_train_batch_size": "batch_size", "rank": "r",
    "resume_from_checkpoint": "resume", "save_steps": "save_every", "save_total_limit": "keep",
    "sequence_len": "max_length", "target_modules": "sites", "warmup_ratio": "warmup", "warmup_steps": "warmup",
}  # fmt: skip

# Names that Hugging Face PEFT, transformers and Unsloth have -> the call that does it here. `model` is the base model,
# `adapter` what peftree.adapt or peftree.load returned, `folder` where an adapter lies, `config` one of PEFT's.
CALLS = {
    "AutoPeftModelForCausalLM": "model = transformers.AutoModelForCausalLM.from_pretrained(base); "
    "adapter = peftree.load(model, folder)",
    "FastLanguageModel": "model = transformers.AutoModelForCausalLM.from_pretrained(base); "
    "adapter = peftree.adapt(model, 'lora', r=16)",
    "IA3Config": "adapter = peftree.adapt(model, 'ia3')",
    "AdaLoraConfig": "adapter = peftree.adapt(model, 'adalora')",
    "LoraConfig": "adapter = peftree.adapt(model, 'lora', r=16, alpha=32, sites='*.q_proj *.v_proj')",
    "PeftConfig": "adapter = peftree.from_peft(model, config)",
    "PeftModel": "adapter = peftree.load(model, folder)",
    "PrefixTuningConfig": "adapter = peftree.adapt(model, 'prefix_tuning', length=20)",
    "PromptTuningConfig": "adapter = peftree.adapt(model, 'prompt_tuning', length=20)",
    "active_adapter": "peftree.active(model)",
    "active_adapters": "peftree.active(model)",
    "add_adapter": "adapter = peftree.adapt(model, 'lora', name='b')",
    "add_weighted_adapter": "peftree.combine(model, {'default': 0.7, 'other': 0.3}, name='both')",
    "delete_adapter": "peftree.detach(model, 'default')",
    "disable_adapter": "with peftree.disabled(model): ...",
    "disable_adapters": "peftree.switch(model, None)",
    "enable_adapters": "peftree.switch(model, 'default')",
    "enable_peft_hotswap": "peftree.replace(adapter, folder)",
    "from_pretrained": "adapter = peftree.load(model, folder)",
    "get_adapter_state_dict": "adapter.state()",
    "hotswap_adapter": "peftree.replace(adapter, folder)",
    "get_nb_trainable_parameters": "sum(p.numel() for p in adapter.parameters() if p.requires_grad)",
    "get_peft_model": "adapter = peftree.adapt(model, 'lora', r=16)",
    "get_peft_model_state_dict": "adapter.state()",
    "load_adapter": "adapter = peftree.load(model, folder, name='b')",
    "merge_adapter": "peftree.merge(model)",
    "merge_and_unload": "peftree.merge(model); peftree.detach(model)",
    "peft_config": "peftree.adapters(model)",
    "print_trainable_parameters": "print(peftree.adapters(model))",
    "save_pretrained": "peftree.save(adapter, folder)",
    "set_adapter": "peftree.switch(model, 'default')",
    "trainable_parameters": "adapter.parameters()",
    "unload": "peftree.detach(model)",
    "unmerge_adapter": "peftree.unmerge(model)",
}


def no_model(given: object) -> AdapterError:
    """Return the error for `given` in place of a model."""
    return AdapterError(f"{given!r} is not a model: its type is {type(given).__name__}.", "Pass a torch module.")


def no_name(what: str, name: str, known: Iterable[str]) -> NoNameError:
    """Return the error for an attribute `name` that `what`, whose names are `known`, does not have."""
    hint = f"In peftree: {CALLS[name]}" if name in CALLS else did_you_mean(name, known, "Names")
    return NoNameError(f"{what} has no attribute '{name}'.", hint)


def did_you_mean(name: str, known: Iterable[str], label: str = "Known") -> str:
    """Return ``Did you mean 'x'? Known: a, b, c.`` for an unknown `name` among `known`."""
    options = sorted(known)
    close = [ELSEWHERE[name]] if ELSEWHERE.get(name) in options else difflib.get_close_matches(name, options, n=1)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}{label}: {', '.join(options) or 'none'}."
