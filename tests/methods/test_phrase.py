"""Virtual tokens that start from a phrase: the frozen model that has read the phrase is the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import peftree
import zoo
from methods.tools import near, run
from peftree.errors import MethodError, SiteError

PHRASE = [7, 3, 11, 3]
IDS = " ".join(map(str, PHRASE))
TWO_STACKS = ("t5", "bart")


def read(key: str) -> Tensor:
    """Return what the bare model says of the text behind the phrase."""
    batch = dict(zoo.batch(key))
    rows = len(batch["input_ids"])
    batch["input_ids"] = torch.cat([torch.tensor([PHRASE]).expand(rows, -1), batch["input_ids"]], 1)
    batch["attention_mask"] = functional.pad(batch["attention_mask"], (len(PHRASE), 0), value=1)
    if key not in TWO_STACKS:
        batch.pop("labels", None)
    with torch.no_grad():
        out = zoo.output(key, zoo.build(key).eval()(**batch))
    return out if key in TWO_STACKS else out[:, len(PHRASE) :]


@pytest.mark.parametrize("key", ["llama", "gpt2", "opt", "gemma", "gemma3", "bert", *TWO_STACKS])
def test_untrained_it_is_the_phrase_read_before_the_text(key: str) -> None:
    model = zoo.build(key).eval()
    where = {"sites": "encoder:stack"} if key in TWO_STACKS else {}
    peftree.adapt(model, "sk_tuning", ids=IDS, **where)
    real = slice(None) if key in TWO_STACKS else zoo.batch(key)["attention_mask"].bool()
    near(run(key, model)[real], read(key)[real], run(key, zoo.build(key).eval())[real])


def test_a_phrase_is_the_start_whatever_start_says() -> None:
    model: Any = zoo.build("llama")
    for start in ("vocabulary", "uniform"):
        (delta,) = peftree.adapt(model, "prompt_tuning", name=start, ids=IDS, start=start).deltas.values()
        assert torch.equal(delta.P.detach(), model.get_input_embeddings().weight[PHRASE])


def test_the_dropout_is_on_the_tokens_and_in_training_only() -> None:
    model: Any = zoo.build("llama")  # has no dropout of its own
    adapter = peftree.adapt(model, "sk_tuning", ids=IDS, dropout=0.5)
    seen: list[Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0][:, : len(PHRASE)].detach()))
    torch.manual_seed(0)
    for training in (True, False):
        model.train(training)(**zoo.batch("llama"))
    (P,) = (d.P.detach() for d in adapter.deltas.values())
    trained, used = (t[0] for t in seen)
    assert torch.equal(used, P)
    dropped = trained == 0
    assert 0.25 < dropped.float().mean() < 0.75
    torch.testing.assert_close(trained, torch.where(dropped, 0.0, 2 * P))


def test_the_start_is_of_the_base_whatever_else_is_on() -> None:
    model: Any = zoo.build("llama")
    want = model.get_input_embeddings().weight[PHRASE].detach().clone()
    other = peftree.adapt(model, "lora", name="a", sites="embed")
    for p in other.parameters():
        p.data += 1.0
    (delta,) = peftree.adapt(model, "sk_tuning", name="b", ids=IDS).deltas.values()
    assert torch.equal(delta.P.detach(), want)


@pytest.mark.parametrize(
    ("key", "fields", "said"),
    [
        ("llama", {"ids": "3 64"}, "no token 64: its ids are 0 to 63"),
        ("clip", {"ids": "3", "sites": "vision:stack"}, "its ids are unknown"),
    ],
)
def test_a_token_that_is_not_there_is_refused(key: str, fields: dict[str, str], said: str) -> None:
    model = zoo.build(key)
    with pytest.raises(MethodError, match=said):
        peftree.adapt(model, "prompt_tuning", **fields)
    assert not peftree.adapters(model)


def test_where_no_optional_site_is_there_nothing_is_adapted_without_a_word() -> None:
    model = zoo.build("vit")
    with pytest.raises(SiteError, match=r"No site matches 'text:stack\? encoder:stack\?"):
        peftree.adapt(model, "sk_tuning", ids=IDS)
    assert not peftree.adapters(model)


def test_a_pooler_that_picks_a_token_by_its_id_picks_that_token() -> None:
    """CLIP pools at the end of the text. Oracle: the hidden states at the highest id, projected."""
    model, batch = zoo.build("clip"), zoo.batch("clip")
    peftree.adapt(model, "prompt_tuning", sites="text:stack", length=3)
    seen: dict[str, torch.Tensor] = {}
    model.text_model.register_forward_hook(lambda m, a, out: seen.update(h=out.last_hidden_state))
    with torch.no_grad():
        got = model.eval()(**batch).text_embeds
        want = model.text_projection(seen["h"][torch.arange(3), batch["input_ids"].argmax(-1)])
    torch.testing.assert_close(got, want / want.norm(dim=-1, keepdim=True))
