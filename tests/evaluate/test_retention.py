"""Retention: perplexity of general texts and nearest neighbours of general rows, adapter on and off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

import peftree
from evaluate import tiny
from peftree.evaluate.hidden import pooled
from peftree.evaluate.subject import Subject
from peftree.probes import run_probes
from peftree.probes.retention import nearest

TEXTS = ["a film was great", "never the plot", "poor cast", "the awful fine film was bad"]


def retained(subject: Subject, **settings: int) -> dict[str, object]:
    return dict(run_probes(subject, {"retention": settings})["retention"])


@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbours_are_those_of_scikit_learn(k: int) -> None:
    """Two classes and odd k: no ties."""
    draw = np.random.default_rng(k)
    targets = draw.integers(0, 2, 40)
    features = draw.normal(size=(40, 6)) + 0.8 * targets[:, None]
    reference = KNeighborsClassifier(k, metric="cosine")
    assert (nearest(features, targets, k) == cross_val_predict(reference, features, targets, cv=LeaveOneOut())).all()


def test_the_nearer_one_wins_a_tie_and_few_rows_suffice() -> None:
    angles = np.array([0.0, 0.1, -0.2, 1.0])
    features = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert nearest(features, np.array([0, 1, 2, 3]), 3)[0] == 1
    assert nearest(features, np.array([0, 1, 2, 2]), 9)[0] == 2
    assert nearest(np.zeros((3, 2)), np.array([1, 1, 0]), 1).shape == (3,)


def test_an_adapter_that_changes_nothing_keeps_everything(tmp_path: Path) -> None:
    for base, measure in (("llama", "perplexity"), ("bert_cls", "knn accuracy"), ("vit", "knn accuracy")):
        rows = tiny.lines(tiny.TASKS[base], tmp_path)
        found = retained(tiny.subject(base, "lora", tmp_path, general=rows))
        assert found["measure"] == measure and found["before"] == found["after"]
        assert (found["change"], found["low"], found["high"]) == (0, 0, 0)
        assert found["shown"] == "no difference shown" and found["items"] == 10


def test_perplexity_of_bare_texts(tmp_path: Path) -> None:
    subject = tiny.subject("llama", "lora", tmp_path, moved=0.3, general=TEXTS)
    found = retained(subject)

    def losses() -> list[float]:
        out = []
        for text in TEXTS:
            batch = tiny.prompt_batch([tiny.Line("", text)])
            with torch.no_grad():
                out.append(float(subject.model(**batch).loss))
        return out

    on = losses()
    with peftree.disabled(subject.model):
        off = losses()
    assert found["after"] == pytest.approx(np.exp(np.mean(on)), rel=1e-4)
    assert found["before"] == pytest.approx(np.exp(np.mean(off)), rel=1e-4)
    assert found["change"] == pytest.approx(np.mean(on) - np.mean(off), abs=1e-4) and found["change"] != 0


def test_general_targets_need_not_be_those_of_the_task(tmp_path: Path) -> None:
    rows = [
        tiny.Line(row.source, f"topic {i % 2}") for i, row in enumerate(tiny.lines("text-classification", tmp_path))
    ]
    found = retained(tiny.subject("bert_cls", "lora", tmp_path, moved=0.5, general=rows), neighbours=3, limit=8)
    assert (found["classes"], found["k"], found["items"], found["chance"]) == (2, 3, 8, 0.5)


def test_features_leave_padding_and_the_head_out(tmp_path: Path) -> None:
    subject = tiny.subject("bert_cls", "head_only", tmp_path, moved=1.0)
    long, short = (tiny.Line(t, "0") for t in ("the film was great", "bad"))
    alone, beside = pooled(subject, [short])[0], pooled(subject, [long, short])[1]
    assert alone == pytest.approx(beside, abs=1e-5)
    with peftree.disabled(subject.model):
        assert pooled(subject, [short])[0] == pytest.approx(alone, abs=0)
    with torch.no_grad():
        inner = subject.model.bert(**{k: v for k, v in tiny.text_batch([short]).items() if k != "labels"})  # type: ignore[operator]
    assert alone == pytest.approx(inner.last_hidden_state[0].mean(0).numpy(), abs=1e-5)


def test_bare_texts_for_a_captioner_are_not_measured(tmp_path: Path) -> None:
    subject = replace(tiny.subject("llama", "lora", tmp_path, general=TEXTS), task="captioning")
    assert retained(subject) == {"not measured": "A captioner reads images; bare texts have none."}
