"""MV-Adapter on videos of several frames: against its equation, and which images one another see."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import peftree
import reference_model as bench
import zoo
from methods.tools import shaken
from peftree.errors import MethodError

FIELDS: dict[str, Any] = {"size": 8, "frames": 3, "words": 64, "tied": 1, "factor": 4}


def moved(key: str) -> tuple[Any, Any]:
    return shaken(key, "mv_adapter", **FIELDS)


@pytest.mark.parametrize("key", ["vit", "clip"])
def test_three_frames_are_a_video(key: str) -> None:
    model, adapter = moved(key)
    leaves: dict[int, Tensor] = {}
    parts = bench.parts_of(adapter, leaves)
    own = list(adapter.parameters())
    got = zoo.output(key, model(**zoo.batch(key)))
    want = bench.forward(key, importlib.import_module("reference.mv_adapter"), parts, adapter.method)
    assert bench.close(got, want) <= 1e-5
    theirs = bench.gradients(want.square().mean(), [leaves[id(p)] for p in own])
    ours = bench.gradients(got.square().mean(), own)
    size = max(float(t.abs().max()) for t in theirs)
    assert all(float((a - b).abs().max()) <= 1e-5 * size for a, b in zip(ours, theirs, strict=True))


def test_an_image_sees_those_of_its_video_alone() -> None:
    model, _ = moved("vit")
    images = zoo.batch("vit", n=6)["pixel_values"]
    with torch.no_grad():
        before = model(pixel_values=images).logits
        images[4] += 1.0
        after = model(pixel_values=images).logits
        alone = model(pixel_values=images[3:]).logits
    assert torch.equal(before[:3], after[:3]), "to the bit"
    assert bool((before[3:] != after[3:]).any(1).all()), "each frame of that video changes"
    torch.testing.assert_close(after[3:], alone)


def test_the_towers_share_one_factor_in_the_top_layer() -> None:
    _, adapter = moved("clip")
    found = [(site.tower, site.layer, delta.v) for _, site, delta in adapter.entries if "v" in delta._parameters]
    assert [(tower, layer) for tower, layer, _ in found] == [("text", zoo.LAYERS - 1), ("vision", zoo.LAYERS - 1)]
    assert found[0][2] is found[1][2]


def test_part_of_a_video_and_a_text_that_is_too_long_are_refused() -> None:
    model, _ = moved("vit")
    with pytest.raises(MethodError, match=r"videos of 3 frames, but the batch has 4 images"):
        model(pixel_values=zoo.batch("vit", n=4)["pixel_values"])
    model = zoo.build("siglip")
    peftree.adapt(model, "mv_adapter", size=8, frames=3)
    with pytest.raises(MethodError, match=r"vision:.* sees 4 tokens of an image, which are not \[CLS\] and a square"):
        model(**zoo.batch("siglip"))
    model = zoo.build("llama")
    peftree.adapt(model, "mv_adapter", size=8, words=4)
    with pytest.raises(MethodError, match="4 positions"):
        model(**zoo.batch("llama"))


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_the_block_starts_as_the_code_of_the_authors_has_it(tower: str) -> None:
    """Calibration 1 + 0 for images; CLIP's widths of the draw for T, by the width d of the tower, its biases 0."""
    adapter = peftree.adapt(zoo.build("clip"), "mv_adapter", head=False, size=32, frames=4, words=64)
    d = zoo.HIDDEN
    wide = {"p": 0.01, "T.qkv": d**-0.5, "T.o": (2 * d) ** -0.5, "T.up": (2 * d) ** -0.5, "T.down": (2 * d) ** -0.5}
    for _, site, delta in adapter.entries:
        if site.tower != tower:
            continue
        t = {name: p.detach() for name, p in delta.T.named_parameters()}
        for name, std in wide.items():
            assert float(t[name].std()) == pytest.approx(std, rel=0.2), name
        assert not t["T.qkv_bias"].any() and not t["T.o_bias"].any() and not delta.U.any() and not delta.c.any()
        assert "B" not in t or not t["B"].any()


def test_tied_layers_are_counted_from_the_top_of_each_tower() -> None:
    """Two layers of text and three of images: the last of each are the pair that shares v."""
    config = zoo.build("clip").config
    config.vision_config.num_hidden_layers = zoo.LAYERS + 1
    model = type(zoo.build("clip"))(config)
    adapter = peftree.adapt(model, "mv_adapter", head=False, **FIELDS)
    found = [(site.tower, site.layer, delta.v) for _, site, delta in adapter.entries if "v" in delta._parameters]
    assert [(tower, layer) for tower, layer, _ in found] == [("text", zoo.LAYERS - 1), ("vision", zoo.LAYERS)]
    assert found[0][2] is found[1][2]
