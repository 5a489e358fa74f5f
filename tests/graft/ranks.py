"""One process of a small training run: `ranks.py KIND RANK WORLD STORE OUT`, KIND plain, ddp or fsdp."""

from __future__ import annotations

import sys
from typing import Any

# Nothing here needs them, and transformers imports what is installed: a third of the seconds of a start.
if __name__ == "__main__":
    sys.modules.update(dict.fromkeys(("peft", "bitsandbytes", "torchao", "datasets", "scipy", "sklearn")))

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import zoo
from graft.helpers import digest, put

STEPS, ROWS = 3, 4


def main(kind: str, rank: int, world: int, store: str, out: str) -> None:
    """Train a LoRA adapter for a few steps on this process's share of the rows; the first one writes it."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model: Any = zoo.build("llama")
    adapter = put(model, "lora", sites="linear", r=4)
    before = digest(model)
    run = model
    if kind == "ddp":
        run = DistributedDataParallel(model)
    elif kind == "fsdp":
        mesh = dist.init_device_mesh("cpu", (world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    ids = torch.randint(8, zoo.VOCAB, (ROWS, 6), generator=torch.Generator().manual_seed(5))
    mine = ids[rank * ROWS // world : (rank + 1) * ROWS // world]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        run(mine).logits.square().mean().backward()
        optimizer.step()
    full = {k: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for k, t in adapter.state().items()}
    if kind != "fsdp":
        assert digest(model) == before
    if rank == 0:
        save_file(full, out)
    if world > 1:
        del run  # DDP's reducer must not outlive the group: torch's last owner waits for a thread that waits for it
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
