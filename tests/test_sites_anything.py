"""Sites of models whose structure is not known: kinds, paths, parameters, layers, and whole lives of adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional

import peftree
from peftree import sites
from peftree.errors import MethodError, SiteError
from peftree.sites import Site


def paths(found: list[Site]) -> list[str]:
    return [site.path for site in found]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


class Mixed(nn.Module):
    """Convolutions of one and three dimensions, grouped and transposed, a norm by shape, stacked matrices, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv1d(4, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1, groups=8)])
        self.back = nn.ConvTranspose1d(8, 2, 2)
        self.deep = nn.Conv3d(2, 3, 1)
        self.scale = Scale(3)
        self.experts = nn.Parameter(torch.randn(3, 5, 4))
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, 4, time]` to `[batch, 2]`."""
        h = self.back(self.stages[1](self.stages[0](x)))
        h = self.deep(h[..., None, None])[..., 0, 0].mT
        h = self.scale(h).mT[..., :4]
        out: Tensor = self.head(torch.einsum("bct,cot->bo", h, self.experts))
        return out


class Scale(nn.Module):
    """What scales channels by a vector is a norm, whatever it is called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        """Scale."""
        return x * self.weight


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        """Apply it twice."""
        out: Tensor = self.again(self.first(x).relu())
        return out


class Normed(nn.Linear):
    """A linear map whose weight is normalised before use."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return functional.linear(x, self.weight / self.weight.norm(), self.bias)


class Doubled(nn.Linear):
    """A linear map whose output is doubled."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return 2 * super().forward(x)


def gptj() -> nn.Module:
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return tf.GPTJForCausalLM(tf.GPTJConfig(vocab_size=64, n_embd=16, n_head=2, n_layer=3, rotary_dim=4, **ids))


def albert() -> nn.Module:
    wide = {"embedding_size": 8, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    return tf.AlbertForSequenceClassification(tf.AlbertConfig(vocab_size=64, num_hidden_layers=3, **wide))


def fnet() -> nn.Module:
    wide = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "tpu_short_seq_length": 8}
    return tf.FNetForSequenceClassification(tf.FNetConfig(vocab_size=64, max_position_embeddings=16, **wide))


IDS = torch.arange(5, 13)[None]
ROWS, SERIES = torch.randn(4, 6), torch.randn(2, 4, 9)
LIVES = [
    (mlp, ROWS, "lora", {"sites": "linear"}),
    (mlp, ROWS, "lora", {"sites": "2"}),
    (lambda: nn.Linear(6, 3), ROWS, "dora", {"sites": "linear"}),
    (mlp, ROWS, "full", {}),
    (mlp, ROWS, "ia3", {"sites": "*"}),
    (Mixed, SERIES, "lora", {"sites": "conv experts head"}),
    (Mixed, SERIES, "ia3", {"sites": "conv experts"}),
    (Mixed, SERIES, "layernorm", {}),
    (Mixed, SERIES, "full", {"sites": "back.weight head.bias"}),
    (Twice, ROWS, "lora", {"sites": "again"}),
    (lambda: nn.Sequential(Doubled(6, 8), Normed(8, 3)), ROWS, "lora", {"sites": "linear"}),
    (gptj, IDS, "lora", {"sites": "*.q_proj", "layers": ":2"}),
    (albert, IDS, "lora", {"sites": "linear"}),
    (fnet, IDS, "lora", {"sites": "linear"}),
]


@pytest.mark.parametrize(("make", "x", "method", "fields"), LIVES)
def test_an_adapter_lives_on_any_module(
    make: Any, x: Tensor, method: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    twin, keys = copy.deepcopy(model), list(model.state_dict())

    def run(of: nn.Module) -> Tensor:
        out = of(x)
        tensor: Tensor = out if isinstance(out, Tensor) else out.logits
        return tensor.detach()

    base = run(model)
    adapter = peftree.adapt(model, method, **fields)
    torch.testing.assert_close(run(model), base)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    on = run(model)
    assert (on - base).abs().max() > 1e-3
    peftree.save(adapter, tmp_path / "a")
    peftree.load(twin, tmp_path / "a")
    assert torch.equal(run(twin), on)
    peftree.merge(model)
    torch.testing.assert_close(run(model), on)
    peftree.unmerge(model)
    peftree.detach(model)
    assert torch.equal(run(model), base) and list(model.state_dict()) == keys


def test_a_map_with_its_own_forward_gets_the_changed_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Doubled(6, 8), Normed(8, 3))
    adapter = peftree.adapt(model, "lora", sites="linear", r=2, alpha=4)
    for p in adapter.parameters():
        p.data.normal_()
    first, second = (d.weight(m.weight) for d, m in zip(adapter.deltas.values(), model, strict=True))
    want = functional.linear(2 * functional.linear(ROWS, first, model[0].bias), second / second.norm(), model[1].bias)
    torch.testing.assert_close(model(ROWS), want)


def test_kinds_and_widths() -> None:
    model = Mixed()
    found = {s.path: s for s in sites.tree(model)}
    assert [(s.role, s.kind, s.in_features, s.out_features) for s in found.values()] == [
        ("conv", "conv", 12, 8), ("conv", "conv", 3, 8), ("conv", "conv", 2, 3), ("norm", "norm", 3, 3),
        ("linear", "linear", 5, 2),
    ]  # fmt: skip
    experts, bias = sites.resolve(model, "experts head.bias")
    assert (experts.kind, experts.parameter, experts.in_features, experts.out_features) == ("expert", "experts", 4, 5)
    assert (bias.kind, bias.path, bias.parameter) == ("raw", "head", "bias")
    assert sites.resolve(model, "head.weight") == [found["head"]]
    assert {s.tower for s in found.values()} == {"model"} and sites.task_head(model) == []


def test_layers_are_counted_in_lists() -> None:
    model = gptj()
    last = ["transformer.h.1.attn.q_proj", "transformer.h.2.attn.q_proj"]
    assert paths(sites.resolve(model, "q_proj", "-2:")) == paths(sites.resolve(model, "h.*.q_proj@1:")) == last
    assert paths(sites.resolve(model, "attn.q_proj", ":-1")) == paths(sites.resolve(model, "q_proj@0-1"))
    assert paths(sites.resolve(model, "q_proj@1:2")) == last[:1]
    assert paths(sites.resolve(fnet(), "linear", ":1")) == [
        f"fnet.encoder.layer.0.{name}.dense" for name in ("intermediate", "output")
    ]  # fmt: skip
    with pytest.raises(SiteError, match="layers '3'"):
        sites.resolve(fnet(), "linear@3")
    assert paths(sites.resolve(mlp(), "linear", "2")) == ["2"]
    for layers in ("3", "0-3", ":", "2:1", ":0", "1:x"):
        with pytest.raises(SiteError, match=layers):
            sites.resolve(model, "q_proj", layers)


def test_heads_of_unknown_transformers_models() -> None:
    causal, classifier = tf.MambaForCausalLM(tf.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2)), fnet()
    assert paths(sites.resolve(causal, "head")) == ["lm_head"] and sites.task_head(causal) == []
    assert paths(sites.task_head(classifier)) == paths(sites.resolve(classifier, "head")) == ["classifier"]
    assert "lm_head" not in paths(sites.resolve(causal, "linear"))
    assert peftree.adapt(classifier, "lora", sites="linear").head


def test_a_module_in_two_places_is_one_site() -> None:
    model = Twice()
    assert sites.resolve(model, "again") == sites.resolve(model, "first") == sites.resolve(model, "linear")
    assert len(sites.resolve(model, "first again")) == 1


@pytest.mark.parametrize(
    ("make", "method", "fields", "parts"),
    [
        (mlp, "lora", {}, ["'attn.q'", "'Sequential' is not known", "or `linear`"]),
        (fnet, "prefix_tuning", {}, ["'attn'", "'fnet' is not known", "example *.dense"]),
        (fnet, "lora", {"sites": "text:ffn.up vision:attn.q"}, ["'text:ffn.up'", "is not known"]),
        (fnet, "lora", {"sites": "vision:attn.q"}, ["'vision:attn.q'", "is not known"]),
        (
            fnet,
            "lora",
            {"sites": "fnet.encoder.layer.0.fourier"},
            ["It is a FNetFourier", "fnet.encoder.layer.0.fourier.*"],
        ),
        (Mixed, "lora", {"sites": "back"}, ["It is a ConvTranspose1d", "back.weight"]),
        (mlp, "lora", {"sites": "1"}, ["It is a ReLU", "no parameters"]),
    ],
)
def test_what_is_refused_says_what_works(make: Any, method: str, fields: dict[str, Any], parts: list[str]) -> None:
    model = make()
    with pytest.raises(SiteError) as error:
        peftree.adapt(model, method, **fields)
    for part in parts:
        assert part in str(error.value)
    assert "_peftree" not in vars(model)


def test_a_method_says_which_kinds_it_changes() -> None:
    with pytest.raises(MethodError, match="is of kind 'raw'"):
        peftree.adapt(Mixed(), "lora", sites="back.weight")
    with pytest.raises(MethodError, match="convolution"):
        peftree.adapt(Mixed(), "pfeiffer", sites="conv")
