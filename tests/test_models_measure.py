"""What the models page is measured with: it tells a model's own rounding and idle weights from a wrong adapter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tools import models_page
from tools.models import measure
from tools.models.measure import IdleError, Subject, WrongError, cell, lora
from tools.models.named import missing, supplied
from torch import Tensor, nn

from test_models_page import ROOT  # noqa: F401  the tools are on the path


class Toy(nn.Module):
    """Two maps, and something that is done with their output."""

    def __init__(self, then: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.then = nn.Linear(6, 16), nn.Linear(16, 6), then

    def forward(self, inputs: Tensor) -> Tensor:
        return self.then(self.down(self.up(inputs).relu()))  # type: ignore[no-any-return]


def subject(then: Any) -> Subject:
    return Subject(Toy(then).eval(), {"inputs": torch.randn(4, 6, generator=torch.Generator().manual_seed(1))})


def magnified(h: Tensor) -> Tensor:
    """Add a chaotic map's value: two sums in another order give another one in float32, and not in float64."""
    x = h.sigmoid()
    for _ in range(24):
        x = 3.9 * x * (1 - x)
    return x


def test_what_a_model_magnifies_is_measured_in_float64() -> None:
    toy = subject(magnified)
    with pytest.raises(WrongError):
        measure._lora(toy, "linear", False)
    assert cell(lambda: lora(toy, "linear")) == "works"
    assert cell(lambda: lora(toy, "linear", merging=True)) == "works"


@pytest.mark.parametrize("then", [lambda h: h, magnified])
def test_a_wrong_adapter_is_wrong_in_float64_too(then: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, inner = subject(then), measure._written

    def off(dense: nn.Module, site: Any, delta: Any) -> Any:
        delta.scale *= 1 + 1e-2  # what is written is not what the adapter computes with
        found = inner(dense, site, delta)
        delta.scale /= 1 + 1e-2
        return found

    monkeypatch.setattr(measure, "_written", off)
    assert cell(lambda: lora(toy, "linear")).startswith("wrong: the output is")


def test_weights_on_which_nothing_depends_are_no_fault() -> None:
    with pytest.raises(IdleError):
        lora(subject(lambda h: h * 0), "linear")
    assert cell(lambda: lora(subject(lambda h: h * 0), "linear")).startswith("-: the bare model's output")


def test_an_output_whose_length_the_weights_decide_has_no_bound() -> None:
    assert measure.gap([torch.zeros(2)], [torch.zeros(3)]) == float("inf")


def test_a_gate_of_one_map_is_no_attention() -> None:
    class GatedAttention(nn.Sequential):
        pass

    assert not measure.has_attention(GatedAttention(nn.Linear(4, 4)))
    assert measure.has_attention(GatedAttention(nn.Linear(4, 12), nn.Linear(4, 4)))


def test_what_a_model_says_it_lacks_is_made_from_its_name() -> None:
    def forward(inputs: Tensor, prompt_masks: Tensor, query_embeds: Tensor) -> None: ...

    with pytest.raises(TypeError) as caught:
        forward(torch.zeros(1))  # type: ignore[call-arg]
    names = missing(str(caught.value))
    assert names == ["prompt_masks", "query_embeds"]
    pixels = torch.randn(3, 3, 8, 8)
    made = supplied(names, {"pixel_values": pixels}, lambda *n: 20 if "hidden_size" in n else 0)
    assert made is not None and made["prompt_masks"].shape == pixels.shape and made["query_embeds"].shape == (3, 8, 20)
    assert supplied(["unheard_of"], {}, lambda *n: 0) is None
    assert missing("Input language unknown.") == []


def test_cells_measured_alone_join_those_of_the_same_model() -> None:
    common = {"built": "small", "inputs": ["x"], "parameters": 3}
    old = common | {"name": "A", "linear": "refused: x", "prefix": "works", "state": "a"}
    new = common | {"name": "A", "linear": "works", "state": "b"}
    assert models_page.joined(old, new) == new | {"prefix": "works"}
    assert models_page.joined(old, new | {"parameters": 4}) == new | {"parameters": 4}
    assert models_page.joined(old, {"name": "A", "unbuilt": "why"}) == {"name": "A", "unbuilt": "why"}


def test_idle_cells_are_not_counted_and_their_reason_stands() -> None:
    row = {"model_type": "a", "mappings": ["M"], "state": "s", "name": "A", "linear": "-: nothing depends on it"}
    text = models_page.page({"torch": "1", "transformers": "2", "classes": [row]})
    assert "| M | 1 | 1 | - |" in text and "nothing depends on it" in text


def test_a_kind_of_each_layer_and_the_sections_of_rotary_are_filled_in() -> None:
    from tools.models.shrink import _of_layers

    config = SimpleNamespace(num_hidden_layers=4, layer_types=["full_attention"] * 4, rope_parameters={})
    found = _of_layers(config, {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2})
    assert found["rope_parameters"]["full_attention"]["mrope_section"] == [3, 3, 2]
