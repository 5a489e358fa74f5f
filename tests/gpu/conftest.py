"""The device of these tests: a CUDA device, or, in the slow suite, a CPU in its place, so that their code is run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

FEW = {"lora", "dora", "houlsby", "prefix_tuning", "prompt_tuning", "lst", "fishmask", "adalora", "molora"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave most methods out where a CPU stands in: what they compute there the contract checks."""
    out = [i for i in items if "gpu" in i.path.parts and (call := getattr(i, "callspec", None)) and _left(call.params)]
    config.hook.pytest_deselected(items=out)
    items[:] = [i for i in items if i not in out]


def _left(params: dict[str, object]) -> bool:
    return params.get("device") == "cpu" and "name" in params and params["name"] not in FEW


@pytest.fixture(params=["cuda", pytest.param("cpu", marks=pytest.mark.slow)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Give the device; the tests of one that is not there are skipped."""
    found = torch.device(request.param)
    if found.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here; `make test-gpu` runs this where there is one")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # convolutions of 10 bits, beside a CPU's of 23
    yield found
    torch.backends.cudnn.allow_tf32 = before
