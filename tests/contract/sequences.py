"""Checks on texts: padding, later tokens, other rows, a cache kept over turns, the last position, tokens in a heap."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import zoo
from contract.case import Case, close, shake
from peftree.errors import PeftreeError

TEXTS = ("decoder", "encoder", "encoder_decoder")
SIDES = ("right", "left")
LENGTHS = (3, 5, 7)


def text(side: str) -> dict[str, Tensor]:
    """Rows of 3, 5 and 7 real tokens, padded on one side."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(8, zoo.VOCAB, (3, 7), generator=draw)
    place = torch.arange(7)
    mask = torch.stack([(place if side == "right" else 6 - place) < n for n in LENGTHS]).long()
    return {"input_ids": ids.masked_fill(mask == 0, zoo.PAD), "attention_mask": mask}


def strong(case: Case, dtype: torch.dtype = torch.float64) -> nn.Module:
    """An adapted model far from its start, in double precision: a wrong token shows, and rounding does not."""
    model, adapter = case.adapted()
    shake(adapter, std=0.2)
    return model.to(dtype)


def read(case: Case, model: nn.Module, **batch: Tensor) -> Tensor:
    """What stands at every token `[b, s, d]`: logits, or the hidden states below a pooling head."""
    pooled = case.key in zoo.CLASSIFIERS
    if case.model == "encoder_decoder" and "decoder_input_ids" not in batch:
        batch["decoder_input_ids"] = torch.tensor([[0, 9, 8, 11]]).expand(len(batch["input_ids"]), -1)
    if case.key in (*zoo.CLASSIFIERS, "gpt2"):  # a learned position is the caller's to give beside padding
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out: Any = model(**batch, output_hidden_states=pooled)
    found: Tensor = out.hidden_states[-1] if pooled else out.logits
    return found


def alone(batch: dict[str, Tensor]) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
    """Each row of `batch`: its number, which tokens are real, and the row by itself without padding."""
    for i, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        real = mask.bool()
        yield i, real, {"input_ids": ids[real][None], "attention_mask": mask[real][None]}


def row_gaps(case: Case, model: nn.Module, tolerance: float = 1e-6, sides: tuple[str, ...] = SIDES) -> list[str]:
    """Say which rows of a padded batch differ from the same rows alone."""
    found = []
    for side in sides:
        batch = text(side)
        got = read(case, model, **batch)
        for i, real, row in alone(batch):
            want = read(case, model, **row)[0]
            mine = got[i] if case.model == "encoder_decoder" else got[i][real]
            if not close(mine, want, tolerance):
                found.append(f"{side} padding, row {i}: {float((mine - want).abs().max()):.1e}")
    return found


def padding(case: Case) -> None:
    if case.model not in TEXTS:
        return
    model = strong(case)
    for mode in modes(case, model):
        gaps = row_gaps(case, model)
        if gaps and row_gaps(case, case.base().double(), sides=("left",)):
            gaps = [gap for gap in gaps if not gap.startswith("left")]  # this base counts places from the first
        assert not gaps, (
            f"in {mode} a padded row is not what it is alone ({'; '.join(gaps)}); "
            "count only the tokens that `attention_mask` marks, and no other row's"
        )


def modes(case: Case, model: nn.Module) -> Iterator[str]:
    """Put the model in evaluation, then in training if it draws nothing there."""
    yield "evaluation"
    model.train()
    seen = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        seen.append(read(case, model, **text("right")))
    if torch.equal(*seen):
        yield "training"
    model.eval()


def causal(case: Case) -> None:
    if case.model not in ("decoder", "encoder_decoder"):
        return
    model, name = strong(case), "decoder_input_ids" if case.model == "encoder_decoder" else "input_ids"
    ids = text("right")["input_ids"][2:].repeat(2, 1)
    ids[1, 4:] = ids[1, 4:].flip(0) + 1
    full = {"input_ids": ids[:1].expand(2, -1), "attention_mask": torch.ones_like(ids)} | {name: ids}
    for mode in modes(case, model):
        one, other = read(case, model, **full)
        assert close(one[:4], other[:4], 1e-6), (
            f"in {mode} later tokens change earlier outputs by {float((one[:4] - other[:4]).abs().max()):.1e}; "
            "what is made from the text may read the tokens up to its own place only"
        )
    one = read(case, model, **full)[0]
    cut = full | {name: ids[:, :4]} | ({"attention_mask": torch.ones_like(ids)[:, :4]} if name == "input_ids" else {})
    assert close(read(case, model, **cut)[0], one[:4], 1e-6), (
        "outputs depend on how long the text is; divide by the tokens so far, not by the length"
    )


def rows(case: Case) -> None:
    if case.model == "clip":
        return  # its output compares the rows of a batch
    model = strong(case)
    batch = {
        k: v.double() if v.is_floating_point() else v
        for k, v in case.batch.items()
        if k != "labels" or case.model == "encoder_decoder"
    }
    others = {k: torch.cat([v[:1], v[1:].flip(-1)]) if k != "attention_mask" else v for k, v in batch.items()}
    for mode in ("inference", "training"):
        model.train(mode == "training")
        outs = []
        for inputs in (batch, others):
            torch.manual_seed(0)
            with torch.no_grad():
                outs.append(zoo.output(case.key, model(**inputs))[0])
        assert close(*outs, 1e-6), (
            f"in {mode} a row depends on the other rows of its batch, by {float((outs[0] - outs[1]).abs().max()):.1e}; "
            "take no mean, norm or statistic over the batch"
        )
    model.eval()
    with torch.no_grad():
        together, single = (zoo.output(case.key, model(**{k: v[:n] for k, v in batch.items()}))[0] for n in (3, 1))
    assert close(single, together, 1e-6), "a row by itself is not the row in a batch; do not read the batch's size"


def turns(case: Case) -> None:
    if case.model not in ("decoder", "encoder_decoder"):
        return
    model: Any = strong(case)
    ids = text("right")["input_ids"][2:]
    seen: dict[str, Any] = {}
    name = "input_ids"
    with torch.no_grad():
        if case.model == "encoder_decoder":
            name = "decoder_input_ids"
            read_once = model(input_ids=ids, decoder_input_ids=ids[:, :1])
            seen["encoder_outputs"] = BaseModelOutput(last_hidden_state=read_once["encoder_last_hidden_state"])
        want = model(**seen, **{name: ids}).logits
        cache, parts = None, []
        for part in ids.split([2, 1, 1, 3], dim=1):
            out = model(**seen, **{name: part}, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    got = torch.cat(parts, 1)
    gaps = (got - want).abs().amax((0, 2)).tolist()
    assert close(got, want, 1e-6), (
        f"read in turns with a cache, the tokens differ from one pass by {[f'{g:.0e}' for g in gaps]}; "
        "what a token needs of those before it must lie in the cache, and places count from its length"
    )


def last_position(case: Case) -> None:
    if case.model not in ("decoder", "encoder"):
        return
    case = Case(case.method, "gpt2") if case.model == "decoder" else case  # Llama's positions have no table
    model, most = strong(case), 40
    ids = torch.randint(8, zoo.VOCAB, (1, most), generator=torch.Generator().manual_seed(1))
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    refusal = None
    try:
        got = read(case, model, **whole)
    except PeftreeError as error:
        refusal = error
    if refusal is not None:
        fits = re.search(r"(\d+) tokens at most", refusal.fix or "")
        assert fits, f"the refusal of a text that leaves no room must say how many tokens fit: {refusal}"
        most = int(fits[1])
        got = read(case, model, **{k: v[:, :most] for k, v in whole.items()})
    assert got.shape[1] == most and torch.isfinite(got).all(), "the output has other places than the text"
    if case.key == "gpt2":
        made: Any = model
        with torch.no_grad():
            cache = made(ids[:, : most - 1], use_cache=True).past_key_values
            step = made(ids[:, most - 1 : most], past_key_values=cache).logits
        assert torch.isfinite(step).all(), "a step with a cache onto the last position of the table fails"


def heaps(case: Case) -> None:
    """Experts get tokens `[n, d]` without rows; a method must take them or refuse by name."""
    if case.model != "decoder":
        return
    here = "sites" in type(case.method).model_fields
    for sites in ("ffn", "ffn.gate", "ffn.down") if here else ("",):
        moe = Case(case.method.model_copy(update={"sites": sites} if sites else {}), "mixtral")
        try:
            model = strong(moe, torch.float32)  # torch multiplies groups in no wider type
        except PeftreeError:
            continue
        gaps = row_gaps(moe, model, 1e-5)
        assert not gaps, (
            f"in a mixture of experts a row is not what it is alone ({'; '.join(gaps)}); "
            "experts are given the tokens of all rows as `[n, d]`"
        )
        moe.loss(model.train()).backward()
