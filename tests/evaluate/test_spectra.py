"""Spectra of updates, intruder dimensions and CKA against numpy and known cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

import peftree
import zoo
from evaluate import tiny
from peftree.evaluate.hidden import by_layer, cka
from peftree.evaluate.spectra import _spread, changed_places, figures, spectra, weights
from peftree.evaluate.subject import Unmeasured
from peftree.probes import run_probes


def matrix(*sigma: float, n: int = 6) -> torch.Tensor:
    """Return an n x n matrix with these singular values, in random directions."""
    U, V = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for _ in range(2))
    return U[:, : len(sigma)] @ torch.diag(torch.tensor(sigma, dtype=torch.float64)) @ V[:, : len(sigma)].T


def test_figures_of_known_updates() -> None:
    W = matrix(6, 5, 4, 3, 2, 1)
    equal = figures(W, W + matrix(2, 2, 2), 3)
    assert equal["effective_rank"] == pytest.approx(3) and equal["stable_rank"] == pytest.approx(3)
    assert equal["relative_update"] == pytest.approx(12**0.5 / 91**0.5)
    uneven = figures(W, W + matrix(3, 1), 3)
    assert uneven["effective_rank"] == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))
    assert uneven["stable_rank"] == pytest.approx(10 / 9)


def test_an_update_of_nothing() -> None:
    W = matrix(3, 2, 1)
    found = figures(W, W.clone(), 10)
    assert set(found.values()) == {0.0}


def test_intruders_against_numpy() -> None:
    draw = np.random.default_rng(0)
    W = draw.normal(size=(8, 12))
    new = W + 3 * np.outer(draw.normal(size=8), draw.normal(size=12))
    U, V = np.linalg.svd(W)[0], np.linalg.svd(new)[0]
    closest = [max(abs(U[:, i] @ V[:, j]) for i in range(8)) for j in range(4)]
    found = figures(torch.from_numpy(W), torch.from_numpy(new), 4)
    for e in (0.3, 0.5, 0.7, 0.9):
        assert found[f"intruders_{e}"] == sum(c < e for c in closest)


def test_a_strong_new_direction_intrudes_and_a_grown_old_one_does_not() -> None:
    W = torch.diag(torch.linspace(1, 2, 50, dtype=torch.float64))
    new = torch.ones(50, dtype=torch.float64) / 50**0.5  # its cosine with every old direction is 0.14
    assert figures(W, W + 100 * torch.outer(new, new), 1)["intruders_0.3"] == 1
    old = torch.eye(50, dtype=torch.float64)[3]
    assert figures(W, W + 100 * torch.outer(old, old), 1)["intruders_0.9"] == 0


def test_the_update_is_that_of_merging(tmp_path: Path) -> None:
    """For slices of GPT-2's fused, transposed projection too."""
    model = zoo.build("gpt2")
    adapter = peftree.adapt(model, "lora", r=2, sites="attn.q attn.v ffn.up")
    tiny.move(adapter, 0.3)
    places = changed_places(adapter)
    assert [s.role for s in places] == ["attn.q", "attn.v", "ffn.up"] * 2
    pairs = [weights(adapter, place) for place in places]
    peftree.merge(model)
    for place, (before, after) in zip(places, pairs, strict=True):
        merged = model.get_submodule(place.path).get_parameter(place.parameter).T.double()
        merged = merged if place.rows is None else merged[slice(*place.rows)]
        assert torch.allclose(after, merged, atol=1e-6) and not torch.allclose(before, merged, atol=1e-3)


def test_lora_has_its_rank_and_full_covers_the_same_places() -> None:
    model = zoo.build("llama")
    adapter = peftree.adapt(model, "lora", r=3)
    tiny.move(adapter, 0.3)
    found = spectra(adapter, 12, 5)
    assert found["matrices"] == found["of"] == 4 and 1 <= found["effective_rank"] <= 3
    assert list(found["by_role"]) == ["attn.q", "attn.v"] and list(found["by_layer"]) == ["0", "1"]
    low, high = sorted(found["by_role"][r]["relative_update"] for r in found["by_role"])
    assert low <= found["relative_update"] <= high
    peftree.detach(model)
    whole = peftree.adapt(model, "full")
    assert {s.role for s in changed_places(whole)} >= {"attn.q", "attn.v", "ffn.up", "ffn.down"}
    still = spectra(whole, 12, 5)
    assert (still["relative_update"], still["effective_rank"], set(still["intruders"].values())) == (0, 0, {0})


@pytest.mark.parametrize("method", ["prefix_tuning", "pfeiffer", "bitfit", "head_only"])
def test_methods_without_a_dense_update_say_so(method: str) -> None:
    adapter = peftree.adapt(zoo.build("bert_cls"), method)
    assert spectra(adapter, 12, 5) == Unmeasured(why=f"{method} changes no weight matrix inside the layers.")


def test_stacked_experts_are_seen() -> None:
    adapter = peftree.adapt(zoo.build("mixtral"), "lora", sites="ffn.up", r=2)
    tiny.move(adapter, 0.2)
    assert 1 <= spectra(adapter, 12, 5)["effective_rank"] <= 2


def test_places_are_spread_over_roles() -> None:
    assert _spread(5, 12) == [0, 1, 2, 3, 4]
    chosen = _spread(84, 12)  # twelve layers of seven roles
    assert len(set(chosen)) == 12 and len({i % 7 for i in chosen}) >= 5 and len({i // 7 for i in chosen}) >= 8


def test_cka_is_invariant_to_rotation_shift_and_scale_and_no_more() -> None:
    draw = np.random.default_rng(0)
    X = draw.normal(size=(200, 5))
    Q = np.linalg.qr(draw.normal(size=(5, 5)))[0]
    assert cka(X, 3 * X @ Q + 7) == pytest.approx(1)
    assert cka(X, draw.normal(size=(200, 5))) < 0.1
    Y = X @ draw.normal(size=(5, 3))
    K, L = (Z @ Z.T for Z in (X - X.mean(0), Y - Y.mean(0)))
    assert cka(X, Y) == pytest.approx((K * L).sum() / np.linalg.norm(K) / np.linalg.norm(L))  # the other form
    constant = np.ones((200, 5))
    assert cka(constant, constant) == 1 and cka(constant, X) == 0


def test_states_of_every_layer_without_padding(tmp_path: Path) -> None:
    subject = tiny.subject("bert_cls", "lora", tmp_path)
    seen = by_layer(subject, subject.rows)
    letters = sum(len(tiny.ids(r.source)) for r in subject.rows)
    assert [s.shape for s in seen] == [(letters, zoo.HIDDEN)] * zoo.LAYERS


def test_a_single_layer(tmp_path: Path) -> None:
    model: Any = tf.BertForSequenceClassification(tf.BertConfig(**(zoo.BERT | {"num_hidden_layers": 1}))).eval()
    adapter = peftree.adapt(model, "lora")
    rows = tiny.lines("text-classification", tmp_path)
    subject = tiny.of(model, adapter, "text-classification", rows, tmp_path)
    found: Any = run_probes(subject, {"interpretability": {}})["interpretability"]
    assert found["cka"] == [pytest.approx(1)] and found["knockout"] == {"0": 0.0}
    assert found["relative_update"] == 0 and set(found["intruders"].values()) == {0}
