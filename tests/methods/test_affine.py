"""Scales and shifts of several adapters: the next one sees what the one before made of the output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import peftree
from contract.case import shake


class Maps(nn.Module):
    """A convolution and a map; with or without biases."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2, bias=bias)
        self.line = nn.Linear(4, 5, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.line(self.conv(x).flatten(2).mT)
        return out


@pytest.mark.parametrize("bias", [False, True])
def test_two_are_one_after_the_other(bias: bool) -> None:
    model, x = Maps(bias).eval(), torch.randn(2, 3, 5, 5)
    bare = Maps(bias)
    bare.load_state_dict(model.state_dict())
    made = [peftree.adapt(model, "ssf", sites="conv line", name=name, head=False) for name in "ab"]
    for seed, adapter in enumerate(made):
        shake(adapter, 0.5, seed)
    peftree.switch(model, ["a", "b"])
    scales = [{site.path: (d.scale, d.shift) for _, site, d in adapter.entries} for adapter in made]
    want = bare.conv(x)
    for found in scales:
        want = want * found["conv"][0][:, None, None] + found["conv"][1][:, None, None]
    want = bare.line(want.flatten(2).mT)
    for found in scales:
        want = want * found["line"][0] + found["line"][1]
    torch.testing.assert_close(model(x), want)
    peftree.merge(model)
    torch.testing.assert_close(model(x), want)


def test_a_shift_follows_the_model_to_another_dtype() -> None:
    model = Maps(False).eval()
    peftree.adapt(model, "ssf", sites="conv line", head=False)
    assert model.double()(torch.randn(1, 3, 5, 5, dtype=torch.float64)).dtype == torch.float64
