"""Doctor: what this machine has, and whether one adapter works from end to end on it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from peftree.errors import PeftreeError

EXTRAS = {"demo": ("gguf", "onnx", "PIL"), "data": ("pyarrow", "PIL")}


@dataclass(frozen=True)
class Finding:
    """One finding about this machine."""

    name: str
    state: str
    advice: str = ""
    failed: bool = False


def examine() -> list[Finding]:
    """Return the findings, the end-to-end check last."""
    rows = [Finding("python", platform.python_version())]
    rows += [_package(n) for n in ("torch", "transformers", "accelerate", "safetensors", "pydantic")]
    rows += [_extra(name, modules) for name, modules in EXTRAS.items()]
    rows += [_threads(), _memory(), _disk(), _cache(), _device(), _works()]
    return rows


def _package(name: str) -> Finding:
    try:
        return Finding(name, version(name))
    except PackageNotFoundError:
        return Finding(name, "missing", f"pip install {name}", failed=True)


def _extra(name: str, modules: tuple[str, ...]) -> Finding:
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    state, advice = f"without {', '.join(missing)}", f"pip install 'peftree[{name}]' if you need it"
    return Finding(f"extra {name}", state, advice) if missing else Finding(f"extra {name}", "installed")


def _threads() -> Finding:
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    advice = "set OMP_NUM_THREADS to the number of free cores" if threads > cores else ""
    return Finding("threads", f"{threads} of {cores} cores", advice)


def _memory() -> Finding:
    pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * size / 2**30
    return Finding("memory", f"{pages * size / 2**30:.1f} of {total:.1f} GiB free")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return Finding("disk", f"{free:.1f} GiB free here", "free some space before training" if free < 2 else "")


def _cache() -> Finding:
    folder = Path(os.environ.get("PEFTREE_CACHE", Path.home() / ".cache" / "peftree"))
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    if os.access(parent, os.W_OK):
        return Finding("cache", str(folder))
    return Finding("cache", f"{folder} is not writable", "set PEFTREE_CACHE to a writable folder", failed=True)


def _device() -> Finding:
    return Finding("device", torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU only")


def _works() -> Finding:
    """Adapt a tiny random model, train a step, save, load, compare."""
    try:
        error = _round_trip()
    except (PeftreeError, RuntimeError, OSError, ImportError) as failure:
        state = f"{type(failure).__name__}: {failure}"
    else:
        if error == 0:
            return Finding("end to end", "adapt, train, save, load: equal")
        state = f"outputs differ by {error:.1e}"
    return Finding("end to end", state, "report this with the lines above", failed=True)


def _round_trip() -> float:
    from transformers import LlamaConfig, LlamaForCausalLM

    import peftree

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    ids = torch.arange(3, 19)[None]
    adapter = peftree.adapt(model, "lora")
    optimizer = torch.optim.AdamW(adapter.param_groups())
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.train(False)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        before = model(input_ids=ids).logits
        peftree.save(adapter, Path(folder) / "a")
        peftree.detach(model)
        peftree.load(model, Path(folder) / "a")
        return float((model(input_ids=ids).logits - before).abs().max())
