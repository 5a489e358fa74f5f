"""Convolutions beside convolutions: the contract on networks of them, of which its own models are none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peftree
import zoo
from contract.case import small
from contract.checks import CHECKS
from contract.test_contract import DEAR
from peftree.errors import MethodError
from sampled import quick

CASES = [(model, check) for model in ("convnext", "resnet") for check in sorted(CHECKS)]
CASES.remove(("resnet", "compiled_passes"))
CASES.sort(key=lambda case: case[1] in DEAR)


@pytest.mark.parametrize(("model", "check"), quick(CASES, 2 * len(CHECKS.keys() - DEAR)))
def test_the_contract_on_networks_of_convolutions(model: str, check: str) -> None:
    CHECKS[check](small("conv_adapter", model))


class Waves(nn.Module):
    """Convolutions of one dimension with stride and dilation, one that pads with what it sees, and one of kernel 1."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv1d(6, 8, 3, stride=2, padding=1)
        self.dilated = nn.Conv1d(8, 8, 3, dilation=2, groups=4)
        self.point = nn.Conv1d(8, 4, 1)
        self.round = nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.round(self.point(self.dilated(self.strided(x))))
        return out


def test_one_dimension_with_stride_and_dilation() -> None:
    """Against torch's own modules with the adapter's tensors."""
    torch.manual_seed(0)
    model, x = Waves().eval(), torch.randn(2, 6, 21)
    adapter = peftree.adapt(model, "conv_adapter", sites="strided dilated point", reduction=2)
    first, second, none = adapter.deltas.values()
    assert [tuple(d.D.shape) for d in (first, second)] == [(3, 6), (4, 6)] and not list(none.parameters())
    beside = nn.Conv1d(6, 3, 3, stride=2, padding=1, groups=3), nn.Conv1d(8, 4, 3, dilation=2, groups=4)
    want, plain = x, Waves()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".deltas." not in f".{k}"})
    for frozen, conv, d in zip((plain.strided, plain.dilated), beside, (first, second), strict=True):
        torch.nn.init.normal_(d.a)
        conv.load_state_dict({"weight": d.D.view(conv.weight.shape), "bias": d.b})
        more = d.U @ conv(want).relu() + d.c[:, None]
        want = frozen(want) + d.a[:, None] * more
    assert torch.allclose(model(x), plain.round(plain.point(want)), atol=1e-5)


def test_what_is_no_such_convolution_is_refused() -> None:
    with pytest.raises(MethodError, match="pads with values other than"):
        peftree.adapt(Waves(), "conv_adapter", sites="round")
    with pytest.raises(MethodError, match="changes conv"):
        peftree.adapt(zoo.build("vit"), "conv_adapter", sites="ffn.up")
    with pytest.raises(MethodError, match="not one vector per token"):
        peftree.adapt(zoo.build("convnext"), "pfeiffer", sites="conv")
