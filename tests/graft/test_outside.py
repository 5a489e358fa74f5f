"""Weights that the model reads outside their module's own forward: changed as a merge changes them, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from torch import Tensor, nn

import peftree
from graft.helpers import put
from peftree.errors import AdapterError, PeftreeWarning

Run = Callable[[], Tensor]


def siglip() -> tuple[nn.Module, Run]:
    model = T.SiglipVisionModel(
        T.SiglipVisionConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=16,
            patch_size=8,
        )
    )  # fmt: skip
    x = torch.randn(2, 3, 16, 16)
    return model, lambda: model(x).pooler_output


def mamba() -> tuple[nn.Module, Run]:
    model = T.MambaForCausalLM(T.MambaConfig(vocab_size=96, hidden_size=32, state_size=8, num_hidden_layers=2))
    return model, lambda: model(torch.arange(5, 13)[None]).logits


def wavlm() -> tuple[nn.Module, Run]:
    model = T.WavLMModel(
        T.WavLMConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, conv_dim=(16, 16),
            conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        )
    )  # fmt: skip
    x = torch.randn(1, 800)
    return model, lambda: model(x).last_hidden_state


class Encoder(nn.Module):
    """torch's encoder, whose layers hand their weights to one kernel in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0), 2)

    def forward(self, x: Tensor, pad: Tensor | None) -> Tensor:
        out: Tensor = self.enc(x, src_key_padding_mask=pad)
        return out[:, :4]  # padded positions are zeros, or not, as torch likes


def encoder(pad: bool) -> tuple[nn.Module, Run]:
    model, x = Encoder(), torch.randn(2, 6, 32)
    mask = (torch.arange(6) >= 4).expand(2, 6) if pad else None
    return model, lambda: model(x, mask)


class Recurrent(nn.Module):
    """A recurrent module keeps its weights in a list of its own."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.rnn = kind(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rnn(x)[0]
        return out


def recurrent(kind: Any) -> tuple[nn.Module, Run]:
    model, x = Recurrent(kind), torch.randn(2, 5, 8)
    return model, lambda: model(x)


MODELS: dict[str, Callable[[], tuple[nn.Module, Run]]] = {
    "siglip": siglip, "mamba": mamba, "wavlm": wavlm, "encoder": lambda: encoder(False),
    "padded": lambda: encoder(True), "lstm": lambda: recurrent(nn.LSTM), "gru": lambda: recurrent(nn.GRU),
}  # fmt: skip
CASES = [
    *(("siglip", "head.attention.out_proj", m) for m in ("lora", "dora", "ia3", "full")),
    *(("mamba", f"*.{w}", m) for w in ("dt_proj", "conv1d", "out_proj") for m in ("lora", "dora")),
    *(("wavlm", "*.q_proj *.v_proj *.out_proj", m) for m in ("lora", "full")),
    *((e, w, m) for e in ("encoder", "padded") for w in ("*.out_proj", "*.1.linear2") for m in ("lora", "ia3")),
    *((k, f"rnn.{w}", "full") for k in ("lstm", "gru") for w in ("weight_ih_l0", "weight_hh_l0")),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "sites", "method"), CASES)
def test_the_model_runs_as_it_would_merged(name: str, sites: str, method: str) -> None:
    torch.manual_seed(0)
    model, run = MODELS[name]()
    model.eval()
    with torch.no_grad():
        base = run()
    adapter = put(model, method, std=0.3, sites=sites)
    run().sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    with torch.no_grad():
        on = run()
        peftree.merge(model)
        merged = run()
        peftree.unmerge(model)
        with peftree.disabled(model):
            assert torch.allclose(run(), base, atol=1e-6)
        assert torch.allclose(run(), on, atol=1e-6)
    assert (on - merged).abs().max() < 1e-5 and (on - base).abs().max() > 1e-4
    for parameter, value in model.named_parameters():
        if "deltas" not in parameter.split("."):
            assert value is model.get_parameter(parameter)
    peftree.detach(model)
    with torch.no_grad():
        assert torch.equal(run(), base)


@pytest.mark.parametrize(("name", "sites"), [("siglip", "head.attention.out_proj"), ("wavlm", "*.q_proj")])
def test_what_changes_no_weight_is_refused(name: str, sites: str) -> None:
    model, run = MODELS[name]()
    put(model, "parallel_adapter", sites=sites)
    with pytest.raises(AdapterError, match=r"(out|q)_proj outside that module's forward"):
        run()
    with peftree.disabled(model):
        run()


class Attending(nn.Module):
    """torch's attention hands the weight of its `out_proj` to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.attn(x, x, x, need_weights=False)[0])
        return out


PEFT_WARNS = "PEFT will give other outputs: the model reads the weight of"


def test_saving_for_peft_warns_where_peft_changes_nothing(tmp_path: Path) -> None:
    """Known without a run; PEFT, the oracle, computes what its bare base does."""
    model, bare, x = Attending().eval(), Attending().eval(), torch.randn(2, 3, 16)
    bare.load_state_dict(model.state_dict())
    adapter = put(model, "lora", std=0.3, sites="attn.out_proj")
    with pytest.warns(PeftreeWarning, match=f"{PEFT_WARNS} attn.out_proj without") as seen:
        peftree.save(adapter, tmp_path / "a")
    assert seen[0].filename == __file__
    with pytest.warns(PeftreeWarning, match=PEFT_WARNS):
        peftree.export(adapter, tmp_path / "a")
    peftree.save(adapter, tmp_path / "native", format="native")
    theirs = peft.PeftModel.from_pretrained(bare, tmp_path / "a")
    with torch.no_grad(), theirs.disable_adapter():
        base = theirs(x)
    assert torch.equal(theirs(x), base) and (model(x) - base).abs().max() > 1e-2
    peftree.detach(model)
    peftree.save(put(model, "lora", std=0.3, sites="out"), tmp_path / "b", format="peft")


@pytest.mark.parametrize(
    ("name", "sites", "read"),
    [("wavlm", "*.k_proj *.intermediate_dense", "k_proj"), ("mamba", "*.dt_proj *.in_proj", "dt_proj")],
)
def test_a_run_shows_what_is_read_without_a_call(name: str, sites: str, read: str, tmp_path: Path) -> None:
    model, run = MODELS[name]()
    adapter = put(model.eval(), "lora", std=0.3, sites=sites)
    peftree.save(adapter, tmp_path / "before")
    run()
    with pytest.warns(PeftreeWarning, match=PEFT_WARNS) as seen:
        peftree.save(adapter, tmp_path / "after")
    told = str(seen[0].message).partition("weight of ")[2].partition(" without")[0]
    assert {path.rpartition(".")[2] for path in told.split(", ")} == {read}
    peftree.detach(model)
    peftree.load(model, tmp_path / "after")
    run()  # our own file
    peftree.detach(model)
    (tmp_path / "after" / "manifest.json").unlink()
    peftree.load(model, tmp_path / "after")
    with peftree.disabled(model):
        run()
    with pytest.warns(PeftreeWarning, match=rf"{read} has a weight .* adapter 'default' it gives") as seen:
        run()
    assert len(seen) == 1
    run()
    peftree.detach(model)
    peftree.load(model, tmp_path / "after")
    peftree.detach(model)
    put(model, "lora", std=0.3, sites=sites)
    run()


def test_a_weight_cannot_differ_by_row() -> None:
    torch.manual_seed(0)
    model, run = siglip()
    for name in ("a", "b"):
        put(model, "lora", std=0.3, name=name, sites="head.attention.out_proj")
    with peftree.route(model, ["a", "b"]), pytest.raises(AdapterError, match=r"out_proj.*differ by row"):
        run()
    peftree.switch(model, "a")
    want = run()
    peftree.switch(model, "b")
    with peftree.route(model, ["a", "a"]):
        assert torch.allclose(run(), want, atol=1e-6)


def test_looking_at_a_weight_builds_nothing() -> None:
    """T5 asks `wo` for its dtype, and an adapter on its output is none of that question's business."""
    config = T.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = T.T5ForConditionalGeneration(config).eval()
    ids = torch.arange(1, 7)[None]
    adapter = put(model, "parallel_adapter", sites="*.wo")
    seen: list[Any] = []
    model(input_ids=ids, labels=ids)
    peftree.detach(model)
    adapter = put(model, "lora", sites="*.wo")
    for delta in adapter.deltas.values():
        vars(delta)["weight"] = seen.append
    model(input_ids=ids, labels=ids)
    assert not seen


def test_a_linear_map_whose_weight_is_made_before_it_runs() -> None:
    """Torch's older weight norm has no parameter `weight`; the oracle is a bare model with the values written in."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        with pytest.warns(FutureWarning, match="weight_norm"):
            made.append(nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 6)), nn.Linear(6, 2)).eval())
    (model, bare), x = made, torch.randn(3, 4)
    base = model(x).detach()
    adapter = put(model, "full", sites="all", std=0.3)
    with torch.no_grad():
        for _, site, delta in adapter.entries:
            own = bare.get_submodule(site.path).get_parameter(site.parameter)
            own.copy_(next(delta.parameters()).reshape(own.shape))
    assert (model(x) - bare(x)).abs().max() < 1e-6 < (model(x) - base).abs().max()
