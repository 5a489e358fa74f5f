"""Factors of a combination: the search against a known answer and a closed form, the choice against plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftree
import zoo
from methods.tools import run
from peftree import factors
from peftree.errors import AdapterError


def several(*names: str) -> nn.Module:
    """Return a model with moved LoRAs of one seed; none is on."""
    model = zoo.build("llama").eval()
    for i, name in enumerate(names):
        adapter = peftree.adapt(model, "lora", name=name, r=2, sites="attn.v")
        draw = torch.Generator().manual_seed(i)
        for p in adapter.parameters():
            p.data += 0.3 * torch.randn(p.shape, generator=draw)
    peftree.switch(model, None)
    return model


def far(model: nn.Module, want: Tensor) -> Callable[[], Tensor]:
    """Return a score: how far the output is from `want`, times 1,000."""
    return lambda: 1000 * (run("llama", model) - want).square().mean()


def test_the_search_finds_the_factors_that_made_the_output() -> None:
    model = several("a", "b")
    made = {"a": 0.9, "b": -0.6}
    peftree.combine(model, made, name="made", how="weights")
    want = run("llama", model)
    peftree.detach(model, "made")
    score = far(model, want)
    found = factors.search(model, ["a", "b"], score, steps=120, penalty=0.0)
    assert found["b"] / found["a"] == pytest.approx(-2 / 3, abs=0.02)  # all of them turned over make the same product
    peftree.combine(model, found, name="again", how="weights")
    near_it = float(score())
    peftree.switch(model, None)
    assert near_it < 1e-3 * float(score()), "beside the base"


def test_no_search_where_rows_are_routed() -> None:
    model = several("a", "b")
    with peftree.route(model, ["a", None, "b"]):
        routed = run("llama", model)
        with pytest.raises(AdapterError, match="rows are being routed"):
            factors.search(model, ["a", "b"], lambda: run("llama", model).sum())
        assert torch.equal(run("llama", model), routed)
    assert set(peftree.adapters(model)) == {"a", "b"}


def candidate(model: nn.Module, names: list[str]) -> Tensor:
    """Return the factors of the adapter that is on, from its first B, by least squares."""
    (now,) = peftree.active(model)
    B = {n: next(iter(a.deltas.values())).B.detach().flatten() for n, a in peftree.adapters(model).items()}
    solved: Tensor = torch.linalg.lstsq(torch.stack([B[n] for n in names], 1), B[now][:, None]).solution
    return solved[:, 0]


def test_it_minimises_the_score_and_the_mean_size_of_the_factors_within_the_bound() -> None:
    model, names = several("a", "b", "c"), ["a", "b", "c"]
    center, seen = torch.tensor([1.2, -0.09, 9.0]), []

    def score() -> float:
        assert not torch.is_grad_enabled()
        seen.append(candidate(model, names))
        return float((seen[-1] - center).square().sum())

    found = factors.search(model, names, score, steps=100, penalty=0.6, bound=1.5)
    best = torch.tensor([1.2 - 0.1, 0.0, 1.5])  # soft threshold by penalty / (2 n), then the bound
    torch.testing.assert_close(torch.tensor([found[n] for n in names]), best, atol=0.02, rtol=0)
    assert 4 < len(seen) <= 100 and not seen[0].any()
    assert all(float(w.abs().max()) < 1.5 + 1e-4 for w in seen)
    seen.clear()
    factors.search(model, names, score, steps=7)
    assert len(seen) == 7


def test_the_best_of_the_steps_is_returned_and_the_model_stays_as_it_was() -> None:
    model, names, seen = several("a", "b"), ["a", "b"], []
    peftree.switch(model, ["b"])
    before, values = run("llama", model), iter([3.0, float("nan"), 5.0, 1.0, *[2.0] * 20])

    def score() -> float:
        seen.append(candidate(model, names))
        return next(values)

    found = factors.search(model, names, score, steps=8, penalty=0.0)
    torch.testing.assert_close(torch.tensor([found[n] for n in names]), seen[3])
    assert peftree.active(model) == ("b",) and set(peftree.adapters(model)) == {"a", "b"}
    assert torch.equal(run("llama", model), before)

    def fails() -> float:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        factors.search(model, names, fails)
    assert peftree.active(model) == ("b",) and set(peftree.adapters(model)) == {"a", "b"}


def test_a_score_that_is_not_finite_lures_the_search_nowhere() -> None:
    model, names = several("a", "b"), ["a", "b"]

    def score() -> float:
        a, b = candidate(model, names).tolist()
        return float("nan") if a > 0.4 else 5 + (a - 0.35) ** 2 + (b + 0.5) ** 2

    found = factors.search(model, names, score, penalty=0.0)
    assert found == pytest.approx({"a": 0.35, "b": -0.5}, abs=0.01)


@pytest.mark.parametrize(
    ("names", "more", "said"),
    [
        ([], {}, "are not a search"),
        (["a", "a"], {}, "are not a search"),
        (["a", "b"], {"steps": 2}, "more steps than adapters"),
        (["a", "b"], {"bound": 0.0}, "bound > 0"),
        (["a", "z"], {}, "'z'"),
        (["a", "b"], {"score": lambda: float("inf")}, "finite score"),
    ],
)
def test_what_cannot_be_searched_is_refused(names: list[str], more: dict[str, Any], said: str) -> None:
    model = several("a", "b")
    with pytest.raises(AdapterError, match=said):
        factors.search(model, names, more.pop("score", lambda: 0.0), **({"steps": 5} | more))
    assert set(peftree.adapters(model)) == {"a", "b"}


def test_a_soup_is_the_mean_of_the_adapters_whose_texts_are_alike() -> None:
    draw = torch.Generator().manual_seed(0)
    centres = {"law": [1.0, 0.1, 0.0], "news": [0.7, 0.7, 0.0], "code": [-1.0, 0.3, 1.0], "web": [0.4, 0.1, 0.9]}
    known = {n: torch.tensor(c) + 0.2 * torch.randn(7, 3, generator=draw) for n, c in centres.items()}
    new = torch.tensor([0.9, 0.3, 0.1]) + 0.2 * torch.randn(5, 3, generator=draw)
    like = {
        n: sum(float(torch.cosine_similarity(x, y, dim=0)) for x in new for y in ys) / (5 * len(ys))
        for n, ys in known.items()
    }
    order = sorted(like, key=lambda n: -like[n])
    assert list(factors.similar(new, known, most=2)) == order[:2]
    at = (like[order[2]] + like[order[3]]) / 2
    assert factors.similar(new, known, least=at) == dict.fromkeys(order[:3], 1 / 3)
    with pytest.raises(AdapterError, match=rf"'{order[0]}', is at {like[order[0]]:.2f}"):
        factors.similar(new, known, least=0.999)
    model = several(*known)
    made = peftree.combine(model, factors.similar(new, known, most=2), name="soup", how="weights")
    first, second = (peftree.adapters(model)[n].state() for n in order[:2])
    for key, tensor in made.state().items():
        torch.testing.assert_close(tensor, (first[key] + second[key]) / 2)


@pytest.mark.parametrize("shape", [(4,), (4, 6), (0, 8)])
def test_embeddings_that_cannot_be_compared_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(AdapterError, match=r"shapes .* cannot be compared"):
        factors.similar(torch.ones(3, 8), {"a": torch.ones(shape)})
    with pytest.raises(AdapterError, match=r"at most -1"):  # a slice would leave out the least like of them
        factors.similar(torch.ones(3, 8), {"a": torch.ones(4, 8), "b": torch.ones(4, 8)}, most=-1)
