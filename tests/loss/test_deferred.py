"""A model whose logits are deferred has the loss and the gradients of the model as it is, for many families."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import peftree
import zoo
from peftree.errors import AdapterError
from peftree.loss import Logits, deferred, obstacle

_BLOOM: dict[str, Any] = {"vocab_size": zoo.VOCAB, "hidden_size": zoo.HIDDEN, "n_layer": 2, "n_head": 4}
_GPTJ: dict[str, Any] = {"vocab_size": zoo.VOCAB, "n_embd": zoo.HIDDEN, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
MORE = {
    "cohere": ("CohereForCausalLM", "CohereConfig", zoo.LLAMA | {"logit_scale": 0.3}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", zoo.LLAMA | {"logits_scaling": 6.0}),
    "gemma2 capped": ("Gemma2ForCausalLM", "Gemma2Config", zoo._GEMMA | {"final_logit_softcapping": 0.7}),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", _GPTJ | zoo.QUIET),
    "bloom": ("BloomForCausalLM", "BloomConfig", _BLOOM | {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", zoo.LLAMA),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", zoo.LLAMA),
    "phi": ("PhiForCausalLM", "PhiConfig", zoo.LLAMA | {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "bert decoder": ("BertLMHeadModel", "BertConfig", zoo.BERT | {"is_decoder": True}),
    "t5 untied": ("T5ForConditionalGeneration", "T5Config", zoo._T5 | {"tie_word_embeddings": False}),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", zoo._T5),
    "marian": ("MarianMTModel", "MarianConfig", zoo.BART),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", zoo.BART),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", zoo.BART),
    "blenderbot": ("BlenderbotForConditionalGeneration", "BlenderbotConfig", zoo.BART),
}
KNOWN = [*zoo.DECODERS, "t5", "bart", "whisper", *zoo.VLM]
PAIRS = ("t5 untied", "mt5", "marian", "mbart", "pegasus", "blenderbot")


def _made(name: str) -> tuple[nn.Module, dict[str, Any]]:
    if name not in MORE:
        return zoo.build(name), zoo.batch(name)
    kind, config, fields = MORE[name]
    return zoo._make(kind, config, **fields), zoo.batch("t5" if name in PAIRS else "llama")


def _fill(model: nn.Module) -> None:
    """Give every tensor of an adapter a value, so that all get a gradient, and BART's bias one that is not zero."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1)
    for name, buffer in model.named_buffers():
        if name == "final_logits_bias":
            buffer.normal_()


def _step(model: nn.Module, batch: dict[str, Any], on: bool, **more: Any) -> tuple[Tensor, list[Tensor], Any]:
    model.zero_grad()
    with deferred(model, on):
        out = model(**batch, **more)
        out.loss.backward()
    return out.loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None], out


def _compare(model: nn.Module, batch: dict[str, Any], tolerance: float = 1e-6, **more: Any) -> None:
    plain, wanted, whole = _step(model, batch, False, **more)
    loss, found, out = _step(model, batch, True, **more)
    assert isinstance(out.logits, Logits) and out.logits._whole is None, "the logits were computed"
    torch.testing.assert_close(loss, plain, rtol=tolerance, atol=tolerance)
    scale = max(float(g.abs().max()) for g in wanted)
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * max(scale, 1.0))
    assert torch.equal(out.logits + 0, whole.logits)  # whatever else reads them


@pytest.mark.parametrize("name", [*KNOWN, *MORE])
def test_loss_and_gradients_of_an_adapter(name: str) -> None:
    model, batch = _made(name)
    peftree.adapt(model, "lora", sites="linear")
    _fill(model)
    _compare(model, batch)
    if name not in ("marian", *zoo.VLM):  # which take no count of a step's items, or were tried enough
        with contextlib.suppress(TypeError):
            _compare(model, batch, num_items_in_batch=torch.tensor(17))


@pytest.mark.parametrize("name", ["llama", "gemma2 capped", "granite", "t5", "bart"])
def test_loss_and_gradients_under_autocast(name: str) -> None:
    """The products are those of the model, in bfloat16; what differs is how gradients of one token are rounded."""
    model, batch = _made(name)
    peftree.adapt(model, "lora", sites="linear")
    _fill(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain, wanted, whole = _step(model, batch, False)
        loss, found, out = _step(model, batch, True)
        assert out.logits.dtype == whole.logits.dtype and torch.equal(out.logits * 1, whole.logits)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    assert loss.dtype == plain.dtype
    for mine, other in zip(found, wanted, strict=True):
        assert float((mine - other).norm()) <= 0.02 * float(other.norm()) + 1e-6


def _llama(**fields: Any) -> nn.Module:
    model = zoo._make("LlamaForCausalLM", "LlamaConfig", **zoo.LLAMA | fields)
    peftree.adapt(model, "lora", sites="linear")
    _fill(model)
    return model


BATCH = zoo.batch("llama")
READS: dict[str, Any] = {
    "a mean": lambda z: z.mean(),
    "one word": lambda z: z[..., 3].sum(),
    "words after places": lambda z: z[:, 1:, 2:5].square().sum(),
    "words of chosen places": lambda z: z[BATCH["attention_mask"].bool()].logsumexp(-1).sum(),
    "a mask of words": lambda z: z[:, :, torch.arange(zoo.VOCAB) > 9].sum(),
    "a new dimension": lambda z: z[None, :, 1].sum(),
    "a list": lambda z: z[[0, 1]].tanh().sum(),
    "log-softmax": lambda z: z.log_softmax(-1)[:, :, 4].sum(),
    "rows one by one": lambda z: sum(row[2].square().sum() for row in z),
    "another shape": lambda z: z.view(-1, 8).amax(1).sum(),
    "a transpose": lambda z: functional.cross_entropy(z.transpose(1, 2), BATCH["input_ids"]),
    "shifted": lambda z: functional.cross_entropy(z[:, :-1].reshape(-1, zoo.VOCAB), BATCH["labels"][:, 1:].flatten()),
    "smoothed": lambda z: functional.cross_entropy(
        z.flatten(0, 1), BATCH["labels"].flatten(), label_smoothing=0.1, reduction="sum"
    ),
    "smoothed in chunks": lambda z: functional.cross_entropy(
        z.view(-1, zoo.VOCAB), BATCH["labels"].view(-1), label_smoothing=0.1
    ),
    "one by one": lambda z: (
        functional.cross_entropy(z.view(-1, zoo.VOCAB) * 2, BATCH["labels"].view(-1), reduction="none")[3:]
        .square()
        .sum()
    ),
    "weights of words": lambda z: functional.cross_entropy(
        z.view(-1, zoo.VOCAB), BATCH["labels"].view(-1), torch.arange(zoo.VOCAB) + 1.0
    ),
    "soft targets": lambda z: functional.cross_entropy(z.view(-1, zoo.VOCAB), torch.eye(zoo.VOCAB)[:21]),
    "changed in place": lambda z: (z.mul_(3), z.square().mean())[1],
    "set in place": lambda z: (z.__setitem__((slice(None), slice(None), 4), -9.0), z.logsumexp(-1).sum())[1],
    "divided in place": lambda z: z.__itruediv__(3).exp().mean(),
    "a number's tensor": lambda z: (z * torch.tensor(3.0)).square().mean(),
    "a trained scale": lambda z: (z + torch.ones(zoo.VOCAB, requires_grad=True)).square().mean(),
    "double": lambda z: functional.cross_entropy(z.double().view(-1, zoo.VOCAB), BATCH["labels"].view(-1)).float(),
    "cut": lambda z: functional.cross_entropy(
        z[..., :-1, :].tanh().contiguous().view(-1, zoo.VOCAB) * 2, BATCH["labels"][..., 1:].reshape(-1)
    ),
}


@pytest.mark.parametrize("name", READS)
def test_whatever_reads_the_logits_gets_them_with_their_gradient(name: str) -> None:
    """Code that knows nothing of this: a method's own term, a custom loss, a callback."""
    model = _llama()
    values, gradients = [], []
    for on in (False, True):
        model.zero_grad()
        with deferred(model, on):
            logits = model(**{k: v for k, v in BATCH.items() if k != "labels"}).logits
            assert isinstance(logits, Logits) is on
        values.append(READS[name](logits))  # after the pass, as callbacks do
        values[-1].backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(values[1], values[0], rtol=1e-6, atol=1e-6)
    for mine, other in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6 * max(1.0, float(other.abs().max())))


def test_only_labelled_places_are_multiplied_and_never_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    own = functional.linear
    monkeypatch.setattr(functional, "linear", lambda x, *a: (sizes.append(x.shape[0]), own(x, *a))[1])
    monkeypatch.setattr("peftree.loss.chunked.rows", lambda *_: 2)
    model, labels = _llama(), BATCH["labels"].clone()
    labels[:, :4] = -100
    wanted = int(labels[:, 1:].ne(-100).sum())
    with deferred(model):
        model(**BATCH | {"labels": labels}).loss.backward()
    own_head = [n for n in sizes if n <= 2]
    assert sum(own_head) == wanted == 6 and max(own_head) == 2


def test_a_batch_without_labels_that_count_has_the_same_loss() -> None:
    model, none = _llama(), torch.full_like(BATCH["labels"], -100)
    with deferred(model):
        mean = model(**BATCH | {"labels": none}).loss
        total = model(**BATCH | {"labels": none}, num_items_in_batch=torch.tensor(3)).loss
    assert mean.isnan() and total == 0


def test_logits_that_are_read_without_a_graph_first_keep_their_graph() -> None:
    model = _llama()
    with deferred(model):
        logits = model(**BATCH).logits
    with torch.no_grad():
        shown = float(logits.mean())
    assert logits.requires_grad and logits.mean().grad_fn is not None and float(logits.mean().detach()) == shown


@pytest.mark.parametrize("change", [lambda z: z.view(-1, zoo.VOCAB).mul_(2), lambda z: (z[:, 1:], z.mul_(2))])
def test_what_cannot_be_followed_is_an_error(change: Any) -> None:
    model = _llama()
    with deferred(model):
        logits = model(**BATCH).logits
    with pytest.raises(AdapterError, match="chunked_loss=false"):
        change(logits)


class _Blind(torch.autograd.Function):
    """A kernel that is not asked by Python."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return torch.ones(3, 7, zoo.VOCAB)


def test_a_gradient_that_would_be_lost_is_an_error() -> None:
    model = _llama()
    with deferred(model):
        logits = model(**BATCH).logits
    with pytest.raises(AdapterError, match="chunked_loss=false"):
        _Blind.apply(logits).backward()  # type: ignore[no-untyped-call]


def test_the_head_runs_as_ever_outside_and_where_it_cannot_wait() -> None:
    model = _llama()
    with pytest.raises(ZeroDivisionError), deferred(model):
        raise ZeroDivisionError
    assert type(model(**BATCH).logits) is Tensor and "forward" not in vars(model.lm_head)
    frozen = zoo.build("llama").requires_grad_(False)
    frozen.lm_head.register_forward_hook(lambda *_: None)
    adapted = zoo.build("llama")
    peftree.adapt(adapted, "lora", sites="head")
    packed = _llama()
    packed.lm_head = nn.Sequential(packed.lm_head)
    own = _llama()
    own.lm_head.__class__ = type("Own", (nn.Linear,), {})
    assert obstacle(own) == "the head is a Own"
    for why, odd in {"trained": zoo.build("llama"), "hooks": frozen, "adapter": adapted, "Sequential": packed}.items():
        assert why in obstacle(odd)
        with deferred(odd):
            assert type(odd(**BATCH).logits) is Tensor
    classifier = zoo.build("bert_cls")
    assert not obstacle(classifier)
    with deferred(classifier):
        assert type(classifier(**zoo.batch("bert_cls")).logits) is Tensor


@pytest.mark.parametrize("what", ["hidden", "weight"])
def test_what_the_logits_come_from_may_not_change_before_they_are_read(what: str) -> None:
    model = _llama()
    with deferred(model):
        logits = model(**BATCH).logits
    with torch.no_grad():
        (logits.hidden if what == "hidden" else model.lm_head.weight).mul_(2)
    for read in (lambda: logits + 0, lambda: functional.cross_entropy(logits[0], BATCH["labels"][0])):
        with pytest.raises(AdapterError, match="chunked_loss=false"):
            read()


@pytest.mark.parametrize("hear", [lambda z: z.retain_grad(), lambda z: z.register_hook(print)])
def test_a_hook_on_logits_that_get_no_gradient_is_an_error(hear: Any) -> None:
    model = _llama()
    with deferred(model):
        logits = model(**BATCH).logits
    with pytest.raises(AdapterError, match="chunked_loss=false"):
        hear(logits)
    with deferred(model):
        logits = model(**{k: v for k, v in BATCH.items() if k != "labels"}).logits
    logits.retain_grad()
    functional.cross_entropy(logits.view(-1, zoo.VOCAB), BATCH["labels"].view(-1)).backward()
    assert logits.grad is not None and logits.grad.any()


def test_the_head_may_be_called_with_a_keyword_and_within_torch_func() -> None:
    model, x = _llama(), torch.randn(2, zoo.HIDDEN)
    wanted = torch.func.grad(lambda x: model.lm_head(x).square().sum())(x)
    with deferred(model):
        assert torch.equal(model.lm_head(input=x) + 0, model.lm_head(x) + 0)
        assert torch.equal(torch.func.grad(lambda x: model.lm_head(x).square().sum())(x), wanted)


def test_logits_that_were_made_without_a_graph_have_a_loss_without_one() -> None:
    model, x = _llama(), torch.randn(2, zoo.HIDDEN, requires_grad=True)
    with deferred(model):
        with torch.no_grad():
            logits = model.lm_head(x)
        assert not functional.cross_entropy(logits, torch.tensor([3, 4])).requires_grad
