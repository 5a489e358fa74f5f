"""MixLoRA and PERFT beyond the reference's default fields: load balance, dropout, starts, PERFT's other ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import peftree
import zoo
from graft.helpers import far, put, run
from peftree.deltas import ExpertTerms


@pytest.mark.parametrize("method", ["mixlora", "perft"])
def test_load_balance_counts_all_experts_of_a_token(method: str) -> None:
    """Oracle: `weight N sum_k F_k P_k` token by token, F_k the share of tokens through k, mean of the layers."""
    model: Any = zoo.build("llama")
    adapter = put(model, method, experts=3, top=2, balance=0.5, sites="ffn", std=0.3)
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().flatten(0, 1)))
    model.train()(**zoo.batch("llama"))
    got, want = adapter.aux_loss(), []
    for x, delta in zip(seen, adapter.deltas.values(), strict=True):
        W = delta.router.W if method == "mixlora" else delta.gate.W
        shares = [torch.softmax(W @ token, 0) for token in x]
        through = [sum(float(p[k] > p.min()) for p in shares) / len(shares) for k in range(3)]
        want.append(0.5 * 3 * sum(F * torch.stack(shares)[:, k].mean() for k, F in enumerate(through)))
    assert len(want) == zoo.LAYERS and got is not None
    torch.testing.assert_close(got, sum(want) / len(want))


@pytest.mark.parametrize("method", ["mixlora", "perft"])
def test_dropout_is_on_the_input_of_the_terms_in_training_only(method: str) -> None:
    adapter = peftree.adapt(zoo.build("llama"), method, experts=4, r=8, dropout=0.25, sites="ffn")
    terms = [m for d in adapter.deltas.values() for m in d.modules() if isinstance(m, ExpertTerms)]
    assert len(terms) == zoo.LAYERS * (3 if method == "mixlora" else 1)
    torch.manual_seed(0)
    for term in terms:
        wide = term.A.shape[1]
        x = torch.randn(50, 3, wide)
        with torch.no_grad():
            term.A.copy_(torch.eye(32, wide))  # what enters the first 32 entries is what comes out
            assert torch.equal(term.eval().inner(x).flatten(-2), x[..., :32])
            got = term.train().inner(x).flatten(-2)
        torch.testing.assert_close(got, torch.where(got == 0, 0.0, x[..., :32] / 0.75))
        assert 0.2 < float((got == 0).float().mean()) < 0.3


def test_perft_starts_as_its_code_does() -> None:
    """A from N(0, 2 / r), B from N(0, 1e-12): both are variances."""
    terms = [d.terms for d in peftree.adapt(zoo.build("llama"), "perft", r=16, experts=16).deltas.values()]
    A, B = (torch.cat([getattr(t, name).detach().flatten() for t in terms]) for name in "AB")
    assert A.std() == pytest.approx((2 / 16) ** 0.5, rel=0.03) and abs(float(A.mean())) < 0.01
    assert B.std() == pytest.approx(1e-6, rel=0.03)


@pytest.mark.parametrize(
    "fields", [{"whole": True}, {"whole": False}, {"route": "all"}, {"route": "all", "experts": 1}]
)
def test_perft_by_shares_that_sum_to_one_and_without_choice(fields: dict[str, Any]) -> None:
    model, bare = zoo.build("llama"), zoo.build("llama").eval()
    adapter = put(model, "perft", **({"r": 4, "experts": 4, "std": 0.3} | fields))
    f = adapter.method
    for _, site, delta in adapter.entries:

        def after(m: Any, args: Any, y: Tensor, d: Any = delta) -> Tensor:
            (x,) = args
            g = torch.ones(*x.shape[:-1], f.experts)
            if f.route == "own":
                g = torch.softmax(x @ d.gate.W.T, -1)
                g = g * (g >= g.sort(-1, descending=True).values[..., f.top - 1 : f.top])
                g = g / g.sum(-1, keepdim=True) if f.whole else g
            A, B = (t.unflatten(0, (f.experts, 4)) for t in (d.terms.A, d.terms.B))
            each = [x @ A[e].T @ B[e] for e in range(f.experts)]
            return y + f.alpha / 4 * sum(g[..., e : e + 1] * z for e, z in enumerate(each))

        bare.get_submodule(site.path).register_forward_hook(after)
    got = run("llama", model)
    assert far(got, run("llama", bare)) < 1e-5 and far(got, run("llama", zoo.build("llama"))) > 1e-3
