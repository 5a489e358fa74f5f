"""Checks on what lies around a pass: the layout of its input, what is left after it, and other processes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftree
from contract.case import Case, close
from peftree import registry
from peftree.deltas import LINEAR

TESTS = Path(__file__).parents[1]
CHILD = """
import importlib, sys, torch
sys.path.insert(0, {tests!r})
import peftree
from contract.case import Case
from peftree import registry
torch.set_num_threads(1)
name, model, folder = sys.argv[1:]
for each in {folders!r}:
    registry.register_folder(each)
if name not in registry.methods():
    registry.methods()[name] = getattr(importlib.import_module({module!r}), {qualname!r})
method = registry.from_spec({spec!r})
peftree.adapt(Case(method, model).base(), method, seed=5)  # another adapter comes first
case = Case(method, model)
base = case.base()
peftree.load(base, folder)
torch.save(case.run(base.eval()), folder + "/output.pt")
"""


def strides(case: Case) -> None:
    """An input that is a transposed view gives what its copy gives."""
    model, adapter = case.adapted(shaken=True)
    want = case.run(model)
    found: Counter[bool] = Counter()

    def turned(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.dim() < 2:
            return args
        view = x.mT.contiguous().mT
        found[view.is_contiguous()] += 1
        return (view, *args[1:])

    paths = {site.path for _, site, _ in adapter.entries if site.kind in LINEAR}
    hooks = [model.get_submodule(path).register_forward_pre_hook(turned) for path in paths]
    got = case.run(model)
    for hook in hooks:
        hook.remove()
    assert close(got, want), "an input that is no copy but a view gives another output"
    assert not paths or found[False] or case.model == "clip", "no input was turned"


def live() -> int:
    gc.collect()
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


def forgets(case: Case) -> None:
    """After more passes no more tensors are alive."""
    model, adapter = case.adapted(shaken=True)

    def passes(count: int) -> None:
        for _ in range(count):
            model.train().zero_grad(set_to_none=True)
            extra = adapter.aux_loss(outputs=None, again=lambda: model(**case.batch))
            loss = case.loss(model)
            (loss if extra is None else loss + extra).backward()
            case.run(model.eval())
        model.zero_grad(set_to_none=True)

    passes(2)
    before = live()
    passes(4)
    after = live()
    assert after <= before + 1, f"four more passes leave {after - before} more tensors alive; keep nothing of a pass"


def elsewhere(case: Case) -> None:
    """A saved adapter acts the same in a new process, which made another one first and hashes strings otherwise."""
    model, adapter = case.adapted(shaken=True, seed=3)
    want, cls = case.run(model), type(case.method)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "adapter"
        peftree.save(adapter, folder, format="native")
        code = CHILD.format(
            tests=str(TESTS),
            module=cls.__module__,
            qualname=cls.__qualname__,
            spec=registry.spec(case.method),
            folders=[str(folder) for folder in registry._FOLDERS],
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, cls.name, case.model, str(folder)],
            env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"it cannot be loaded in a new process: {done.stderr[-300:]}"
        got = torch.load(folder / "output.pt")
    assert torch.equal(got, want), (
        f"loaded in a new process the output differs by {float((got - want).abs().max()):.1e}; draw what is not saved "
        "from the place, and keep nothing that is made between adapters"
    )
