"""An adapter trained by two processes (DDP, FSDP2) equals the one trained by one process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from graft.helpers import far

HERE = Path(__file__).resolve().parent


def trained(kind: str, world: int, folder: Path) -> dict[str, Tensor]:
    """Run the processes of one training and return the adapter's tensors."""
    out, store = folder / f"{kind}.safetensors", folder / f"{kind}.store"
    path = os.pathsep.join([str(HERE.parent), *sys.path])
    said = [folder / f"{kind}{rank}.err" for rank in range(world)]
    with ExitStack() as files:
        runs = [
            subprocess.Popen(
                [sys.executable, str(HERE / "ranks.py"), kind, str(rank), str(world), str(store), str(out)],
                env=os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"},
                stderr=files.enter_context(said[rank].open("wb")),
            )
            for rank in range(world)
        ]
    end = time.monotonic() + 300
    while any(run.poll() is None for run in runs) and time.monotonic() < end:
        time.sleep(0.1)
    for run in runs:
        run.kill()
        run.wait()
    assert [run.returncode for run in runs] == [0] * world, [p.read_text() for p in said]
    return load_file(out)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    want = trained("plain", 1, tmp_path)
    for kind in ("ddp", "fsdp"):
        got = trained(kind, 2, tmp_path)
        assert got.keys() == want.keys() and len(got) == 2 * 14
        assert max(far(got[k], want[k]) for k in want) < 1e-6, kind
