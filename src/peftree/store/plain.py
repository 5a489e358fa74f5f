"""What `save_pretrained` of an adapted model writes, also for a plain Trainer's checkpoints and for hubs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from peftree.adapter import Adapter, Record, adapters, record_of
from peftree.store.build import bare


def install(save: Callable[[Adapter, Path], Any]) -> None:
    """Let `save_pretrained` of adapted models write adapters with `save`."""

    def write(model: nn.Module, folder: Any, asked: dict[str, Any]) -> None:
        """Write the adapter, or each of several to its own folder; write a merged model as a whole, without adapters.

        For a Trainer (it passes `state_dict`) also write the adapters' tensors by their names in the model, to the file
        that it resumes from.
        """
        path = Path(folder)
        if record_of(model).merged:
            plain: Any = bare(model)
            plain.save_pretrained(path, **{k: v for k, v in asked.items() if k != "state_dict"})
            return
        if not asked.get("is_main_process", True):
            return
        ours = adapters(model)
        for name, adapter in ours.items():
            save(adapter, path if len(ours) == 1 else path / name)
        if "state_dict" in asked:
            whole = (asked["state_dict"] or model.state_dict()).items()
            mine = {k: v.detach().clone().contiguous() for k, v in whole if ".deltas." in f".{k}"}
            save_file(mine, path / "model.safetensors", {"format": "pt"})

    Record.write = staticmethod(write)
