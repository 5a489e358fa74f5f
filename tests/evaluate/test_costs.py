"""What use costs: latency, the allocator's peak."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftree
from evaluate import tiny
from peftree.evaluate import latency as module
from peftree.evaluate.cost import allocator_peak
from peftree.probes import run_probes


def timed(subject: Any) -> Any:
    return run_probes(subject, {"latency": {"rounds": 3, "seconds": 0, "batch": 3}})["latency"]


def test_latency_of_what_merges_and_what_does_not(tmp_path: Path) -> None:
    found = timed(tiny.subject("bert_cls", "lora", tmp_path, moved=0.1))
    assert (found["unit"], found["rounds"], found["threads"], found["clock"]) == ("ms", 3, 1, "thread")
    assert found["batch"]["rows"] == 3
    for part in (found, found["batch"]):
        assert all(0 < part[k] < 1000 for k in ("off", "on", "merged", "on_ratio", "merged_ratio"))
    beside = timed(tiny.subject("bert_cls", "pfeiffer", tmp_path))
    assert "merged" not in beside and "merged" not in beside["batch"]
    assert beside["why_not_merged"] == "default: Bottleneck cannot be folded into weights."


def test_latency_sees_a_slow_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = tiny.subject("bert_cls", "pfeiffer", tmp_path)
    branch = next(iter(subject.adapter.deltas.values()))
    quick = type(branch).output

    def slow(self: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass
        return quick(self, x, y)

    monkeypatch.setattr(type(branch), "output", slow)
    found = timed(subject)
    assert found["on"] > 40 > found["off"] and found["on_ratio"] > 2  # two layers


def test_states_are_run_in_rotated_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = tiny.subject("bert_cls", "lora", tmp_path)
    order: list[str] = []

    def heard(name: str, state: Any) -> Any:
        def listen(model: nn.Module) -> Any:
            order.append(name)
            return state(model)

        return listen

    monkeypatch.setattr(module, "_STATES", {name: heard(name, state) for name, state in module._STATES.items()})
    timed(subject)
    names = ["off", "on", "merged"]
    assert order == [*names, *names[1:], *names[:1], *names[2:], *names[:2]]
    assert peftree.active(subject.model) == ("default",)


def test_the_peak_of_known_allocations(capfd: pytest.CaptureFixture[str]) -> None:
    kept: list[torch.Tensor] = []

    def step() -> None:
        a = torch.empty(1000, 1000)  # 4 MB
        b = a.neg()  # 8 MB
        del a  # 4 MB
        kept.append(b.double())  # 12 MB
        del b  # 8 MB
        kept.append(torch.empty(250_000))  # 9 MB

    assert allocator_peak(step) == 12_000_000
    assert allocator_peak(lambda: kept.clear()) == 0  # releasing is not a peak
    assert allocator_peak(lambda: None) == 0
    allocator_peak(lambda: kept.append(torch.empty(1000)))

    def swap() -> None:
        kept.clear()  # its release is not taken off
        kept.append(torch.empty(500))

    assert allocator_peak(swap) == 2_000
    assert capfd.readouterr() == ("", "")


def test_the_peak_of_a_training_step() -> None:
    """Input and output of a layer, its gradients: exact to the byte."""
    layer, x = nn.Linear(100, 200, bias=False), torch.randn(50, 100)

    def step() -> None:
        y = layer(x)  # 40,000 bytes
        y.backward(torch.ones_like(y))  # 40,000 of ones, 80,000 of the weight's gradient
        layer.zero_grad()

    step()
    assert allocator_peak(step) == allocator_peak(step) == 160_000
