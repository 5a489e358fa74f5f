"""The scores of the base, kept between runs: found again by the content of all that they depend on (decision 0046)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftree import sites
from peftree.data.picture import content
from peftree.errors import PeftreeError
from peftree.evaluate.quality import Scores
from peftree.files import atomic_write, cache_root, read_json, sha256
from peftree.settings import RunConfig
from peftree.sites.parts import inside, join, modules_of
from peftree.store.digest import digests
from peftree.store.fingerprint import fingerprint
from peftree.tasks import Items, Options, Task
from peftree.train.draws import unmoved
from peftree.train.measure import environment
from peftree.train.output import beside

OFF = "PEFTREE_BASE_SCORES"  # environment variable: 0 keeps and reads none
MOST = 512  # files
_OURS = {"transformers", "torch", "peftree"}  # packages whose version or source the key holds
_IDLE = ("notes", "progress")  # attributes of a task that no score depends on
Plain = str | int | float | bool | None


def base_scores(config: RunConfig, task: Task, items: Items, measure: Callable[[], Scores]) -> tuple[Scores, bool]:
    """Return the scores of the model without adapters, and whether an earlier run measured them.

    Random states are not changed, so that training is the same either way.

    Args:
        config: the run.
        task: with the model.
        items: the scored rows.
        measure: scores the model without adapters.
    """
    with unmoved(), torch.random.fork_rng():
        key = _key(config, task, items)
        path = cache_root() / "scores" / f"{key}.json"
        if key and (found := _read(path)):
            return found, True
        scores = measure()
        if key:
            _write(path, scores)
    return scores, False


def _key(config: RunConfig, task: Task, items: Items) -> str:
    """Return the SHA-256 of all that the scores depend on; empty if that is not known, or none are kept."""
    model: Any = task.model
    packages = {type(module).__module__.partition(".")[0] for module in modules_of(model).values()}
    files = beside(config.model)
    reads = config.generate or "processor" in vars(task)
    unread = reads and not files  # of a hub name: the tokenizer that turns tokens to texts, or what reads images
    if os.environ.get(OFF) == "0" or config.shard != "none" or packages - _OURS or unread:
        return ""
    base, rows = fingerprint(model, again=True), _hash(_whole(items[i]) for i in range(len(items)))  # type: ignore[arg-type]
    if base.quantized or not rows:
        return ""
    settings = [model.config, *([model.generation_config] if config.generate else [])]
    facts = {
        "base": base.model_dump(), "rest": _rest(model), "rows": rows, "files": files, "source": _source(),
        "model": [type(model).__module__, model.config._attn_implementation],
        "configs": [each.to_dict() | {"_name_or_path": ""} for each in settings],
        "task": [type(task).__qualname__, sha256(Path(inspect.getfile(type(task))).read_bytes())],
        "settings": {k: v for k, v in vars(task).items() if k not in _IDLE and _plain(v)},
        "options": [getattr(config, f.name) for f in dataclasses.fields(Options)],
        "eval_batch_size": config.eval_batch_size, "precision": config.precision,
        "device": _device(next(model.parameters()).device), "environment": environment(),
    }  # fmt: skip
    return sha256(json.dumps(facts, sort_keys=True, default=repr).encode())


def _rest(model: nn.Module) -> dict[str, str]:
    """Return digests of what a fingerprint leaves out: task heads, and all buffers."""
    heads = [site.path for site in sites.task_head(model)]
    found: dict[str, str] = {}
    for path, module in modules_of(model).items():
        own = any(path == head or inside(path, head) for head in heads)
        tensors = {**(module._parameters if own else {}), **module._buffers}
        found |= {join(path, name): digests(t)[0].hex() for name, t in tensors.items() if t is not None}
    return found


def _device(device: torch.device) -> list[Plain]:
    """Return the kind of a device, and what decides how it computes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    cpu: Any = torch.backends.mkldnn
    precision = (torch.get_float32_matmul_precision(), cpu.matmul.fp32_precision)
    return [device.type, name, *precision, torch.are_deterministic_algorithms_enabled()]


@functools.cache
def _source() -> str:
    """Return a hash of the source of this package: of one that is changed, the version says little."""
    root = Path(__file__).parents[1]
    return _hash([str(path.relative_to(root)), path.read_text("utf-8")] for path in sorted(root.rglob("*.py")))


def _plain(value: Any) -> bool:
    return isinstance(value, Plain) or (isinstance(value, list | tuple) and all(_plain(each) for each in value))


def _whole(features: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the features of a row with the hashes of the images that a batch reads, not their names."""
    images = features.get("images", ())
    return {**features, "images": [sha256(content(image)) for image in images]} if images else features


def _hash(values: Any) -> str:
    """Return a hash of numbers, texts and tensors in lists and mappings; empty if there is something else."""
    seen = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            feed([str(value.dtype), list(value.shape)])
            seen.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            seen.update(b"{%d" % len(value))
            for name in sorted(value):
                feed(name)
                feed(value[name])
        elif _plain(value):
            text = json.dumps(value).encode()
            seen.update(b"%d:%b" % (len(text), text))
        elif isinstance(value, list | tuple):
            feed(len(value))
            for each in value:
                feed(each)
        else:
            raise TypeError

    try:
        for value in values:
            feed(value)
    except TypeError:
        return ""
    return seen.hexdigest()


def _read(path: Path) -> Scores | None:
    """Return the scores in a file; None if there are none, or they are damaged."""
    with contextlib.suppress(PeftreeError, OSError, TypeError, KeyError):
        held = read_json(path, 1 << 26)
        values = dict(held["scores"])
        if held["sha256"] == _checked(values):
            os.utime(path)
            return Scores(**values | {"items": tuple(values["items"])})
    return None


def _write(path: Path, scores: Scores) -> None:
    """Keep scores, and only the files used last; a folder that cannot be written to does not stop the run."""
    values = dataclasses.asdict(scores)
    with contextlib.suppress(PeftreeError, OSError):
        atomic_write(path, json.dumps({"sha256": _checked(values), "scores": values}))
        for old in sorted(path.parent.glob("*.json"), key=lambda p: -p.stat().st_mtime)[MOST:]:
            old.unlink(missing_ok=True)


def _checked(values: Mapping[str, Any]) -> str:
    return sha256(json.dumps(values, sort_keys=True).encode())
