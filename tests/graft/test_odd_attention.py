"""XLNet, whose maps are parameters of three dimensions and whose layers take a text's length first; JetMoe's keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn
from torch.func import functional_call

import peftree
from graft.helpers import far, put
from peftree import sites, store
from peftree.errors import AdapterError, SiteError, StoreError

IDS = torch.arange(8, 26).view(3, 6)  # six tokens, so that three rows could be taken for groups of the length
SIZES = {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "dropout": 0.0}


def build() -> Any:
    torch.manual_seed(0)
    return T.XLNetLMHeadModel(T.XLNetConfig(**SIZES)).eval()


def two_streams() -> dict[str, Tensor]:
    """The last token is predicted by a second stream, which goes through the same maps."""
    mapping = torch.zeros(3, 1, 6)
    mapping[:, :, -1] = 1
    return {"target_mapping": mapping, "perm_mask": torch.zeros(3, 6, 6)}


def dense(model: nn.Module, adapter: peftree.Adapter) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Each map with `scale B A` added in the parameter's own layout, and the factors that it is made of."""
    changed, factors = {}, []
    for _, site, delta in adapter.entries:
        name = f"{site.path}.{site.parameter}"
        old = model.get_parameter(name)
        A, B = (p.detach().clone().requires_grad_() for p in (delta.A, delta.B))
        first, last = (B, A) if site.role == "attn.o" or old.dim() == 2 else (A, B)  # what the first dimension counts
        term = torch.einsum("rh,rx->hx", first, last)
        changed[name] = old.detach() + delta.scale * term.view(old.shape)
        factors += [A, B]
    return changed, factors


@pytest.mark.parametrize("more", [{}, two_streams()], ids=["one stream", "two streams"])
def test_lora_is_the_dense_update_of_every_map(more: dict[str, Tensor]) -> None:
    bare, model = build(), build()
    base = bare(IDS, **more).logits.detach()
    adapter = put(model, "lora", std=0.3, sites="linear", r=3, alpha=5)
    assert [s.role for _, s, _ in adapter.entries].count("attn.q") == 2 and len(adapter.entries) == 2 * 7
    changed, factors = dense(bare, adapter)
    want = functional_call(bare, changed, (IDS,), more).logits
    got = model(IDS, **more).logits
    want.square().sum().backward()
    got.square().sum().backward()
    want = want.detach()
    assert far(got.detach(), want) < 1e-5 and far(want, base) > 1e-2
    for (_, _, delta), A, B in zip(adapter.entries, factors[::2], factors[1::2], strict=True):
        assert far(delta.A.grad, A.grad) < 1e-4 * A.grad.abs().max() and A.grad.abs().max() > 0
        assert far(delta.B.grad, B.grad) < 1e-4 * B.grad.abs().max()
    peftree.merge(model)
    assert far(model(IDS, **more).logits.detach(), want) < 1e-5
    assert max(far(model.get_parameter(n).detach(), v.detach()) for n, v in changed.items()) < 1e-6
    peftree.unmerge(model)
    peftree.detach(model)
    assert torch.equal(model(IDS, **more).logits, base)


@pytest.mark.parametrize("method", ["lora", "full", "dora", "oft"])
def test_it_is_saved_and_read_back_and_not_written_as_what_peft_would_misread(method: str, tmp_path: Path) -> None:
    model, reader = build(), build()
    fields = {"block": 4} if method == "oft" else {}
    adapter = put(model, method, std=0.3, sites="attn.q attn.o", **fields)
    want = model(IDS).logits.detach()
    peftree.load(reader, peftree.save(adapter, tmp_path / "own"))
    assert far(reader(IDS).logits.detach(), want) < 1e-6 and far(build()(IDS).logits.detach(), want) > 1e-4
    with pytest.raises(StoreError):
        store.save(adapter, tmp_path / "theirs", format="peft")


def test_nothing_takes_its_length_for_its_rows() -> None:
    for method in ("lora", "pfeiffer", "bitfit"):
        model = build()
        put(model, method)
        rows = peftree.route(model, ["default", None, "default"])
        with rows, pytest.raises(AdapterError, match="takes the length of a text first"):
            model(IDS)
    for method, why in (
        ("prompt_tuning", "length of a text"),
        ("lst", "length of a text"),
        ("prefix_tuning", "'attn'"),
    ):
        model = build()
        with pytest.raises(SiteError, match=f"No site matches.*{why}"):
            peftree.adapt(model, method)
        assert not peftree.adapters(model)
    assert all(s.length_first for s in sites.tree(build()) if s.role != "head")


class Plain(nn.Module):
    """A model of torch's own layers, which take the length first by default."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(3, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)
        self.after, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
        self.swaps = not batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = self.after(self.encoder(x.transpose(0, 1) if self.swaps else x))
        out: Tensor = self.head(x.transpose(0, 1) if self.swaps else x)
        return out


def test_layers_of_torch_that_take_the_length_first_route_no_rows() -> None:
    draw = torch.Generator().manual_seed(0)
    names = ["default", None, None, "default"]
    for where in ("encoder.layers.*.linear1", "encoder.layers.1.linear2 head", "encoder.norm", "after"):
        for tokens in (4, 8):  # as many as rows, and twice as many
            model = Plain(batch_first=False).eval()
            put(model, "ssf" if "norm" in where else "lora", sites=where, std=0.3)
            with peftree.route(model, names), pytest.raises(AdapterError, match="takes the length of a text first"):
                model(torch.randn(4, tokens, 3, generator=draw))
    x = torch.randn(4, 8, 3, generator=draw)
    for batch_first in (True, False):
        model = Plain(batch_first).eval()
        put(model, "lora", sites="embed encoder.layers.*.linear1" if batch_first else "embed head", std=0.3)
        got = []
        for on in (None, "default"):
            peftree.switch(model, on)
            got.append(model(x).detach())
        with peftree.route(model, names):
            mixed = model(x).detach()
        assert far(mixed, torch.stack([got[n is not None][i] for i, n in enumerate(names)])) < 1e-6
        assert far(got[0], got[1]) > 1e-2


def test_a_table_that_swin_v2_turns_into_biases_for_all_rows_is_not_routed_and_no_feed_forward_network() -> None:
    config = T.Swinv2Config(image_size=32, patch_size=4, embed_dim=16, depths=[1], num_heads=[2], window_size=4)
    model: Any = T.Swinv2Model(config).eval()
    maps = "continuous_position_bias_mlp"
    assert [s.role for s in sites.tree(model) if maps in s.path] == ["linear", "linear"]
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    put(model, "lora", sites="ffn.up ffn.down attn.q", std=0.3)
    with torch.no_grad():
        want = []
        for name in ("default", None):
            peftree.switch(model, name)
            want.append(model(x).last_hidden_state)
        with peftree.route(model, ["default", None]):
            got = model(x).last_hidden_state
    assert far(got[0], want[0][0]) < 1e-5 and far(got[1], want[1][1]) < 1e-5 and far(want[0], want[1]) > 1e-2
    put(model, "lora", name="b", sites=f"*.{maps}.2", std=0.3)
    with peftree.route(model, ["b", None]), pytest.raises(AdapterError, match=r"one table .* for a batch of 2 rows"):
        model(x)


def test_what_lies_beside_a_recurrence_that_takes_the_length_first_routes_no_rows() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.head = nn.LSTM(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.cells(x)[0])
            return out

    model = Recurrent()
    put(model, "lora", sites="head", std=0.3)
    with peftree.route(model, ["default", None]), pytest.raises(AdapterError, match="head takes the length"):
        model(torch.randn(4, 2, 3))


def test_attention_that_takes_the_length_first_within_routes_no_rows() -> None:
    """Longformer and FSMT turn their hidden states themselves: eight tokens of two rows are not eight rows of four."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = T.LongformerModel(T.LongformerConfig(**sizes, intermediate_size=48, attention_window=4)).eval()
    put(model, "lora", std=0.3)
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    with peftree.route(model, ["default", None]), pytest.raises(AdapterError, match=r"query takes the length"):
        model(ids)


def jetmoe() -> Any:
    torch.manual_seed(0)
    config = T.JetMoeConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8, intermediate_size=12,
        num_local_experts=3, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    return T.JetMoeForCausalLM(config).eval()


def test_a_prefix_of_jetmoe_is_a_cache_of_keys_and_values() -> None:
    """Each chosen expert makes queries for all heads, and the module repeats the heads of keys for each of them."""
    model = jetmoe()
    adapter = put(model, "prefix_tuning", std=1.0, length=3)
    cache = T.DynamicCache()
    for _, site, delta in adapter.entries:
        assert (site.heads, site.kv_heads, site.copies) == (2, 2, 2)
        K, V = (t.detach().transpose(0, 1).expand(3, -1, -1, -1) for t in delta.memory(torch.zeros(3, 1, 16), None))
        cache.update(K, V, site.layer)
    with torch.no_grad():
        want = jetmoe()(IDS, past_key_values=cache).logits
        assert far(model(IDS).logits, want) < 1e-5 and far(jetmoe()(IDS).logits, want) > 1e-3


@pytest.mark.parametrize("method", ["llama_adapter", "prompt_tuning", "lst", "mam"])
def test_what_goes_into_jetmoe_s_stack_trains_and_generates(method: str) -> None:
    model = jetmoe()
    base = model(IDS).logits.detach()
    adapter = put(model, method, std=0.3)
    assert far(model(IDS).logits.detach(), base) > 1e-4
    full = model(IDS).logits[:, -1].argmax(-1)
    made = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False)
    again = model(made[:, :-1]).logits.argmax(-1)[:, -3:]
    assert torch.equal(made[:, 6], full) and torch.equal(made[:, 6:], again), "with a cache and without"
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters() if p.requires_grad)
    peftree.detach(model)
    assert torch.equal(model(IDS).logits, base)
