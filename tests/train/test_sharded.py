"""A run whose processes divide the layers of the base equals one whose processes hold all; what cannot is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as tf
from torch import nn

import peftree
from peftree import store
from peftree.adapter import record_of
from peftree.errors import ConfigError, TrainError
from peftree.plan.layers import divided
from peftree.settings import load_config
from peftree.store.fingerprint import difference, fingerprint
from peftree.train.processes import Team, noticing
from peftree.train.run import complete, open_run, run
from peftree.train.sharded import shard
from train.test_processes import HERE, far, many, rows, words
from train.tiny import SHAPE

__all__ = ["rows"]  # a fixture
# method, settings, and whether rows are reviews (else prompts): each verb, and what reads weights in its own way.
CASES: dict[str, tuple[list[str], bool]] = {
    "lora": ([], True),
    "houlsby": (["base_score=true", "eval_every=2", "save_every=2", "early_stopping=2"], True),
    "prefix_tuning": (["method.length=2", "generate=2"], False),
    "prompt_tuning": (["method.length=2", "precision=bf16"], False),
    "lst": (["accumulation=2"], True),
    "dora": (["gradient_checkpointing=true"], False),
    "full": ([], False),
    "fishmask": ([], True),
    "spiel": (["method.share=0.05", "method.period=3", "method.window=1"], True),
}


@pytest.mark.slow
def test_a_sharded_base_changes_nothing(rows: Path, encoder: str, decoder: str) -> None:
    """The adapter, the losses and the scores are those of processes that hold all; several.py compares the base."""
    jobs = [
        words(rows, encoder if text else decoder, text, rows / how / name, f"method={name}", "batch_size=4", *more,
              f"shard={how}")
        for name, (more, text) in CASES.items() for how in ("none", "fsdp")
    ]  # fmt: skip
    many(rows, jobs)
    for name in CASES:
        plain, sharded = (rows / how / name for how in ("none", "fsdp"))
        one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (plain, sharded))
        assert (one["score"], one["base_score"]) == (two["score"], two["base_score"]), name
        losses = [[p["loss"] for p in metrics["curve"] if p["loss"] is not None] for metrics in (one, two)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6), name
        assert far(plain / "adapter", sharded / "adapter") < 1e-6, name
        opened = open_run(sharded)  # in one process
        assert opened.score().score == pytest.approx(two["score"], rel=1e-6)


@pytest.mark.slow
def test_sharded_then_one_process_then_sharded(rows: Path, encoder: str) -> None:
    """A run may be continued by processes that divide the base, or by one that does not."""
    whole = words(rows, encoder, True, rows / "whole", "method=adalora", "epochs=2", "batch_size=4")
    run(load_config(None, [*whole, "accumulation=2"]))
    parts = [*whole, f"output={rows / 'parts'}", "resume=true"]
    many(rows, [[*parts, "shard=fsdp"]], code=1, PEFTREE_TEST="2:1:SIGTERM")
    (rows / "alone.json").write_text(json.dumps([[*parts, "accumulation=2"]]))
    path = os.pathsep.join([str(HERE.parent), *sys.path])
    alone = [sys.executable, str(HERE / "several.py"), str(rows / "alone.json")]
    stopped = subprocess.run(alone, env=os.environ | {"PEFTREE_TEST": "4:0:SIGTERM", "PYTHONPATH": path})
    assert stopped.returncode == 143
    assert [p.name for p in sorted((rows / "parts").glob("checkpoint-*"))] == ["checkpoint-3", "checkpoint-5"]
    many(rows, [[*parts, "shard=fsdp"]])
    assert json.loads((rows / "parts" / "metrics.json").read_text())["steps"] == 8
    assert far(rows / "whole" / "adapter", rows / "parts" / "adapter") < 1e-6


@pytest.mark.slow
def test_a_killed_process_ends_the_others(rows: Path, encoder: str) -> None:
    job = words(rows, encoder, True, rows / "out", "method=lora", "save_every=2", "batch_size=4", "shard=fsdp")
    many(rows, [job], code=1, PEFTREE_TEST="3:1:SIGKILL")
    assert [p.name for p in (rows / "out").iterdir() if p.is_dir()] == ["checkpoint-2"]


def test_an_error_of_a_lost_connection_says_so() -> None:
    """Wherever torch meets it; any other error stays what it is."""
    for error in (
        RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error"),
        dist.DistBackendError(),
    ):
        with pytest.raises(TrainError, match="Another process of this run ended"), noticing():
            raise error
    with pytest.raises(RuntimeError, match=r"^out of memory$"), noticing():
        raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["processes=1"], r"'shard=fsdp': shard=fsdp: this run has one process.*Set processes to 2 or more"),
        ([], r"this run has one process.*Set processes to 2 or more"),
        (["quantize=int8"], r"quantize=int8 packs weights"),
        (["compile=true"], r"compile=true was not tried"),
        (["method=id3"], r"id3 reads weights of the base between its passes.*choose another method"),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_the_model_is_read(
    rows: Path, more: list[str], said: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    job = words(rows, "no-such-model", True, rows / "out", "shard=fsdp", *more)
    alone = more in ([], ["processes=1"])
    monkeypatch.setattr("peftree.train.run.join", lambda config: Team() if alone else Team(0, 2))
    with pytest.raises(ConfigError, match=said):
        complete(load_config(None, job))
    assert not (rows / "out").exists()


def test_a_word_that_is_no_way_to_shard_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'shard=true'.*'none' or 'fsdp'"):
        load_config(None, ["model=m", "data=d", "shard=true"])


class Unknown(nn.Module):
    """A model without layers that are known."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.config = nn.Linear(4, 4), tf.PretrainedConfig()


def bert(**more: Any) -> Any:
    """Return a tiny BERT."""
    return tf.BertForSequenceClassification(tf.BertConfig(**SHAPE, vocab_size=20, **more))


def test_a_model_that_processes_would_run_differently_is_refused() -> None:
    """Nothing is divided then."""
    with pytest.raises(ConfigError, match=r"Unknown has no stack of layers.*Set shard to none"):
        shard(peftree.adapt(Unknown(), "lora", sites="linear"), Team(0, 2))
    config = tf.BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                           decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=20,
                           decoder_layerdrop=0.1)  # fmt: skip
    bart = tf.BartForConditionalGeneration(config)
    with pytest.raises(ConfigError, match=r"leaves out layers by chance.*Set config.decoder_layerdrop: 0"):
        shard(peftree.adapt(bart, "lora"), Team(0, 2))
    assert record_of(bart).base is None


def test_each_weight_of_a_layer_is_divided_once() -> None:
    """Not what lies around the layers, is shared, or belongs to an adapter; ALBERT runs one layer several times."""
    model = bert()
    layers = model.bert.encoder.layer
    layers[1].output.dense.bias = layers[0].output.dense.bias  # shared
    own = {n: p for n, p in model.named_parameters() if ".layer." in n and not n.endswith("0.output.dense.bias")}
    found = divided(peftree.adapt(model, "lora", r=2))
    assert [layer for layer, _ in found] == list(layers)
    assert {id(p) for _, weights in found for p in weights} == {id(p) for p in own.values()}
    albert = tf.AlbertForSequenceClassification(tf.AlbertConfig(**SHAPE, embedding_size=8, vocab_size=20))
    assert len(divided(peftree.adapt(albert, "lora", r=2))) == 1


def test_a_base_that_was_divided_is_known_by_its_fingerprint(tmp_path: Path) -> None:
    """It is taken before; an adapter is saved with it, and a resumed run compares with it, also in another dtype."""
    torch.manual_seed(0)
    model = bert()
    adapter = peftree.adapt(model, "lora", r=2)
    before = record_of(model).base = fingerprint(model)
    other = bert()
    changed = fingerprint(other)
    for _, weights in divided(adapter):
        for parameter in weights:
            parameter.data = torch.empty(0)  # as where another process has it
    assert fingerprint(model) is before
    assert difference(before, model) == ""
    assert "the values of bert.embeddings.word_embeddings.weight are not" in difference(changed, model)
    store.save(adapter, tmp_path / "saved", format="native")
    torch.manual_seed(0)
    again = bert().to(torch.bfloat16)
    peftree.load(again, tmp_path / "saved")
    assert difference(fingerprint(again), model) == ""


def test_a_divided_model_still_gives_what_it_records(tmp_path: Path) -> None:
    """Hidden states, and the routers' logits that the loss of a mixture of experts needs."""
    config = tf.MixtralConfig(
        **SHAPE, num_key_value_heads=2, num_local_experts=4, vocab_size=20, output_router_logits=True
    )
    ids, found = torch.arange(3, 12)[None], []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        for divides in (False, True):
            torch.manual_seed(0)
            model = tf.MixtralForCausalLM(config)
            adapter = peftree.adapt(model, "lora", r=2)
            if divides:
                shard(adapter, Team(0, 1))
            found.append(model(input_ids=ids, labels=ids, output_hidden_states=True))
    finally:
        dist.destroy_process_group()
    plain, divided_one = found
    assert len(divided_one.hidden_states) == 3 and len(divided_one.router_logits) == 2
    assert float(divided_one.aux_loss.detach()) > 0 and torch.equal(divided_one.loss, plain.loss)
