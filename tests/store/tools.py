"""What the tests of the store share: adapted tiny models with random values, snapshots, resealed folders."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from peftree import adapter as adapters
from peftree import store
from peftree.adapter import Adapter
from peftree.errors import PeftreeError
from peftree.store import manifest as manifests
from peftree.store.folder import CONFIG, MANIFEST, NATIVE, PEFT


def output(name: str, model: nn.Module) -> Tensor:
    """Return the main output of a zoo model on its batch, labels left out where they are not inputs."""
    needed = ("t5", "bart", "whisper")
    batch = {k: v for k, v in zoo.batch(name).items() if k != "labels" or name in needed}
    with torch.no_grad():
        return zoo.output(name, model(**batch))


def shake(parameters: list[nn.Parameter], seed: int = 1) -> None:
    """Add noise to parameters, so that nothing is at its start."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)


def adapted(name: str, method: str, **fields: Any) -> tuple[nn.Module, Adapter]:
    """Return a tiny model with a shaken adapter."""
    model = zoo.build(name)
    adapter = adapters.adapt(model, method, **fields)
    shake(adapter.parameters())
    return model, adapter


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """Return all that must not change when a load is refused: values, flags, classes, what hangs on the model."""
    values = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [(n, p.requires_grad, id(p)) for n, p in model.named_parameters()]
    classes = [type(m) for m in model.modules()]
    return values, flags, classes, sorted(model.__dict__), adapters.active(model), list(adapters.adapters(model))


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Return whether two snapshots are equal, tensors to the bit."""
    return a[1:] == b[1:] and a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


def tree(folder: Path) -> set[str]:
    """Return every path below `folder`, hidden ones too."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def saved(folder: Path, name: str = "llama", method: str = "lora", form: Any = "native", **fields: Any) -> Path:
    """Save a shaken adapter and return its folder."""
    return store.save(adapted(name, method, **fields)[1], folder, format=form)


def weights_of(folder: Path) -> Path:
    """Return the weights file of a saved adapter."""
    return folder / (NATIVE if (folder / NATIVE).exists() else PEFT)


def reseal(folder: Path, raw: bytes | None = None, list_tensors: bool = True, **changes: Any) -> None:
    """Write other weights or manifest keys with hashes that fit, so that the checks behind the hashes are reached."""
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    content.pop("seal")
    if raw is not None:
        weights_of(folder).write_bytes(raw)
        content["weights"] = hashlib.sha256(raw).hexdigest()
        if list_tensors:
            content["tensors"] = listed(raw)
    if (folder / CONFIG).exists():
        config = json.loads((folder / CONFIG).read_text())
        content["config"] = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    content |= changes
    path.write_text(json.dumps(content | {"seal": manifests._seal(content)}))


def listed(weights: bytes) -> dict[str, Any]:
    """Return what a manifest lists for a safetensors file."""
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    header.pop("__metadata__", None)
    return {n: {"shape": e["shape"], "dtype": e["dtype"]} for n, e in header.items()}


class Quiet(warnings.catch_warnings):
    """Silences the warnings of peft and transformers inside a `with` block."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")


def refused(folder: Path, words: str, name: str = "llama", **options: Any) -> PeftreeError:
    """Load `folder`, expect an error with these words, and check that nothing else happened."""
    model = zoo.build(name)
    before, files = snapshot(model), tree(folder.parent)
    with pytest.raises(PeftreeError, match=words) as caught:
        store.load(model, folder, **options)
    assert same(before, snapshot(model)), "the model was changed"
    assert tree(folder.parent) == files, "a file was left or taken"
    assert caught.value.fix, "the error says no next step"
    assert len(str(caught.value)) < 2000
    assert str(caught.value).replace("\n", "").isprintable()
    return caught.value


def cache(folder: Path, blobs: Path, at: str) -> Path:
    """Copy the files of `folder` to `blobs`, link to them from `at` beside it, as Hugging Face's cache does."""
    snapshot = blobs.parent / at
    snapshot.mkdir(parents=True)
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    return snapshot
