"""What every test gets: one thread, fixed seeds, no network, no deadline."""

from __future__ import annotations

import gc
import os
import random

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PEFTREE_FAST": os.environ.get("PEFTREE_FAST", "all"),  # the fast forms for tiny inputs too
    "PEFTREE_BASE_SCORES": "0",  # tests change what scores
    "CUDA_VISIBLE_DEVICES": os.environ.get("PEFTREE_GPU", ""),  # which one `make test-gpu` uses
}  # before torch is imported; processes that a test starts inherit it

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
os.fsync = lambda _fd: None  # no test pulls the plug, and a disk takes its time
settings.register_profile("house", deadline=None, derandomize=True, database=None)
settings.load_profile("house")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Start every test from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _heap() -> None:
    """Let the collections that every run asks for pass over the modules that are loaded by now."""
    gc.collect()
    gc.freeze()


# Their tests start processes; at the end other workers would wait for them.
SEVERAL = ("test_demo.py", "test_distributed.py", "test_killed.py", "test_processes.py", "test_sharded.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest; let only browser tests open a socket: their driver talks to Chromium."""
    items.sort(key=lambda item: item.path.name not in SEVERAL)
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.enable_socket)
