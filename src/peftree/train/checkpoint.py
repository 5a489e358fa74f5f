"""Checkpoints: an adapter and the state of its training in one sealed folder, written completely or not at all."""

from __future__ import annotations

import errno
import json
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftree.adapter import Adapter
from peftree.deltas import Sensitivity
from peftree.errors import BusyError, PeftreeError, TrainError, unwritten
from peftree.files import atomic_write, read_bytes, read_json, sha256, stage_for, sync_folder
from peftree.store import native
from peftree.store.folder import put_in_place
from peftree.store.tensors import header, pack, view

SEAL, STATE, TENSORS, TRAINER = (
    "checkpoint.json",
    "training.json",
    "training.safetensors",
    "trainer_state.json",
)
ADAPTER = "adapter.safetensors"
MAX_BYTES = 1 << 40
_FOLDER = re.compile(r"checkpoint-(\d+)\Z")


def write_checkpoint(
    folder: str | Path,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    trainer_state: str,
    scaler: Any = None,
    streams: Mapping[str, Tensor] = MappingProxyType({}),
) -> Path:
    """Write `checkpoint-N`: the adapter as `peftree.load` reads it, and what resuming needs.

    Everything is written next to the target, hashed into `checkpoint.json`, made durable, and renamed.

    Args:
        trainer_state: transformers' `TrainerState` as JSON.
        scaler: scales the loss, in fp16.
        streams: random states of several processes by name (`random/...`).

    Raises:
        StoreError: a tensor is not finite, or the disk is full; an older checkpoint is unchanged.
    """
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = stage_for(target)
    try:
        plain, tensors = _optimizer_state(optimizer)
        tensors |= streams
        for index, running in enumerate(_running(adapter)):
            for kind, means in (("mean", running.mean), ("spread", running.spread)):
                tensors |= {f"running/{index}/{kind}/{name}": t for name, t in means.items()}
        plain |= {"scheduler": scheduler.state_dict(), "random": _random_state(tensors)}
        plain |= {"scaler": scaler.state_dict()} if scaler is not None else {}
        for name, data in native.files(adapter).items():
            atomic_write(stage / name, data)
        atomic_write(stage / TENSORS, pack(tensors))
        atomic_write(stage / STATE, json.dumps(plain))
        atomic_write(stage / TRAINER, trainer_state)
        seal = {p.name: sha256(p.read_bytes()) for p in sorted(stage.iterdir())}
        atomic_write(stage / SEAL, json.dumps({"sha256": seal}, indent=1))
        stage.chmod(0o755)
        put_in_place(stage, target)  # the same step may be there, after a resume
        sync_folder(target.parent)
    except (OSError, BusyError) as error:
        cause = error if isinstance(error, OSError) else OSError(errno.ENOSPC, "no space left on device")
        raise unwritten(target, cause, "Earlier checkpoints are complete; resume continues from them.") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return target


def newest_checkpoint(output: str | Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest complete checkpoint in `output`; damaged ones are named and skipped.

    Raises:
        TrainError: there are checkpoints, but all are damaged.
    """
    found = [(int(m[1]), p) for p in Path(output).glob("checkpoint-*") if (m := _FOLDER.match(p.name))]
    for _, path in sorted(found, reverse=True):
        problem = damage(path)
        if not problem:
            return path
        say(f"{path} is skipped: {problem}")
    if found:
        raise TrainError(
            f"All {len(found)} checkpoints in {output} are damaged.",
            "Start again in another output folder, or restore one of them.",
        )
    return None


def damage(checkpoint: str | Path) -> str:
    """Return what is wrong with a checkpoint, or an empty string if every file is as written."""
    folder = Path(checkpoint)
    try:
        seal = read_json(folder / SEAL).get("sha256")
        if not isinstance(seal, dict) or not {ADAPTER, STATE, TENSORS, TRAINER} <= set(seal):
            return f"{SEAL} does not list all files"
        for name, wanted in seal.items():
            if Path(name).name != name or sha256(read_bytes(folder / name, MAX_BYTES)) != wanted:
                return f"{name} was changed after it was written"
    except (PeftreeError, OSError) as error:
        return str(error)
    return ""


def fill_adapter(adapter: Adapter, checkpoint: str | Path) -> None:
    """Copy the checkpoint's tensors into `adapter`, in place.

    Raises:
        TrainError: they are not the tensors of this adapter; nothing is changed then.
    """
    path = Path(checkpoint) / ADAPTER
    saved = _read(path)
    state = adapter.state()
    wrong = sorted(set(saved) ^ set(state))
    grown = {f"{key}/{name}": (delta, name) for key, delta in adapter.deltas.items() for name in delta.elastic}
    other = [k for k in set(saved) & set(state) if saved[k].shape != state[k].shape]
    wrong += sorted(k for k in other if k not in grown)
    if wrong:
        raise TrainError(
            f"{path} belongs to another adapter: {wrong[0]} and {len(wrong) - 1} more tensors differ.",
            "Resume with the method and fields of the first run, or choose another output folder.",
        )
    for key in other:  # sizes that training decides
        delta, name = grown[key]
        delta.resize({name: tuple(saved[key].shape)})
    with torch.no_grad():
        for key, tensor in adapter.state().items():
            tensor.copy_(saved[key])


def fill_training(checkpoint: str | Path, adapter: Adapter, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Restore the optimizer, the learning rate schedule, and running means that a method ranks by.

    Raises:
        TrainError: the optimizer's tensors are not those of this checkpoint.
    """
    plain = _state(checkpoint)
    tensors = _read(Path(checkpoint) / TENSORS)
    fresh = optimizer.state_dict()["param_groups"]
    groups = [g | {"betas": tuple(g["betas"])} if "betas" in g else g for g in plain["groups"]]
    if [g["params"] for g in groups] != [g["params"] for g in fresh]:
        raise TrainError(f"{checkpoint} has different optimizer groups.", "Resume with the first run's method.")
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    state: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in plain["scalars"].items()}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        if part == "optimizer":
            number, *places, key = rest.split("/")
            into = state.setdefault(int(number), {})
            for place in places:
                into = into.setdefault(place, {})
            into[key] = _like(parameters[int(number)], tensor)
    for index, running in enumerate(_running(adapter)):
        for kind, means in (("mean", running.mean), ("spread", running.spread)):
            start = f"running/{index}/{kind}/"
            means |= {k.removeprefix(start): t.clone() for k, t in tensors.items() if k.startswith(start)}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    scheduler.load_state_dict(plain["scheduler"])


def fill_scaler(checkpoint: str | Path, scaler: Any) -> None:
    """Restore the scale of the loss."""
    scaler.load_state_dict(_state(checkpoint)["scaler"])


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a copy of `value` in the memory layout of `parameter`; another layout rounds sums differently."""
    if value.shape != parameter.shape:
        return value.clone()
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def fill_random(checkpoint: str | Path, devices: bool = True) -> dict[str, Tensor]:
    """Restore the random numbers of Python, numpy and torch, and return all tensors of the checkpoint's training.

    Args:
        devices: also those of the devices; of several processes, only the first one's are saved under these names.
    """
    saved, tensors = _state(checkpoint)["random"], _read(Path(checkpoint) / TENSORS)
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words), gauss))
    name, position, has_gauss, cached = saved["numpy"]
    keys = tensors["random/numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, cached))
    torch.set_rng_state(tensors["random/torch"].clone())
    there = sorted(k for k in tensors if k.startswith("random/cuda"))
    for index, key in enumerate(there[: torch.cuda.device_count() if devices else 0]):  # there may be fewer now
        torch.cuda.set_rng_state(tensors[key].clone(), index)
    return tensors


def _running(adapter: Adapter) -> list[Sensitivity]:
    """Return the running means of an adapter in a fixed order; they are not part of what a trained adapter is."""
    modules = (m for delta in adapter.deltas.values() for m in delta.modules())
    return [value for module in modules for value in vars(module).values() if isinstance(value, Sensitivity)]


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split an optimizer's state into plain data and tensors named `optimizer/<index>/<key>`."""
    whole = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in whole["state"].items():
        if plain := _without_tensors(entries, f"optimizer/{index}", tensors):
            scalars[str(index)] = plain
    return {"groups": whole["param_groups"], "scalars": scalars}, tensors


def _without_tensors(entries: Mapping[str, Any], path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return what is plain data; the tensors go into `tensors`. bitsandbytes has some in a dictionary of their own."""
    plain: dict[str, Any] = {}
    for key, value in entries.items():
        if isinstance(value, Tensor):
            tensors[f"{path}/{key}"] = value
        else:
            plain[key] = _without_tensors(value, f"{path}/{key}", tensors) if isinstance(value, dict) else value
    return plain


def _random_state(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the random state as plain data; its long arrays go into `tensors`."""
    legacy: Mapping[str, Any] = np.random.get_state(legacy=False)
    tensors["random/torch"] = torch.get_rng_state()
    tensors["random/numpy"] = torch.from_numpy(legacy["state"]["key"].astype(np.int64))
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"random/cuda{index:03}"] = state
    numpy = [legacy["bit_generator"], legacy["state"]["pos"], legacy["has_gauss"], legacy["gauss"]]
    return {"python": random.getstate(), "numpy": numpy}


def _state(checkpoint: str | Path) -> dict[str, Any]:
    return read_json(Path(checkpoint) / STATE, limit=1 << 28)


def _read(path: Path) -> dict[str, Tensor]:
    data = bytearray(read_bytes(path, MAX_BYTES))
    return {name: view(data, name, entry) for name, entry in header(data, str(path)).items()}
