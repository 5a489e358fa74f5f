"""What fits: the largest batch is exact, ways under a budget hold, a table leaves out what does not apply."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers as tf

from peftree.errors import ConfigError
from peftree.plan import fit, plan, request
from peftree.plan.question import Request
from sampled import quick

LLAMA = tf.LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, dtype="float32", architectures=["LlamaForCausalLM"],
)  # fmt: skip
SHORT = tf.LlamaConfig(**LLAMA.to_dict() | {"num_hidden_layers": 3})  # traced whole, and once
BERT = tf.BertConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=64, architectures=["BertForMaskedLM"],
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory, SHORT)


def saved(factory: pytest.TempPathFactory, config: tf.PreTrainedConfig) -> Path:
    """Return a folder that holds a config alone."""
    config.save_pretrained(found := factory.mktemp(config.model_type))
    return found


def asked(folder: Path, **values: object) -> Request:
    return request(model=str(folder), device="cpu", **{"max_length": 32, "batch_size": 8, **values})


@pytest.mark.parametrize("key", quick(["batch_size", "max_length"]))
def test_the_largest_fits_and_one_more_does_not(folder: Path, key: str) -> None:
    made = asked(folder)
    memory = plan(made.model_copy(update={key: 21})).expected + 5
    most = fit.largest(made, memory, key)  # type: ignore[arg-type]
    level = {n: plan(made.model_copy(update={key: n})).expected for n in (most, most + 1)}
    assert level[most] <= memory < level[most + 1]
    assert most >= 21


def test_no_row_fits_into_too_little(folder: Path) -> None:
    made = asked(folder)
    assert fit.largest(made, plan(made).parts["weights"]) == 0


def test_a_length_ends_at_the_models_own(folder: Path) -> None:
    assert fit.largest(asked(folder, batch_size=1), 1 << 40, "max_length") == LLAMA.max_position_embeddings


def test_every_way_is_under_the_budget_and_the_cheapest_comes_first(folder: Path) -> None:
    made = asked(folder, batch_size=16, max_length=128)
    full = plan(made)
    memory = round(full.expected * 0.75)
    found = fit.ways(made, memory)
    assert 1 <= len(found) <= 3
    assert [way.rank for way in found] == sorted(way.rank for way in found)
    for way in found:
        again = plan(made.model_copy(update=way.changes))
        assert again.expected == way.plan.expected <= memory < full.expected, way.what


@pytest.mark.slow
def test_where_one_change_is_too_little_several_are_joined(folder: Path) -> None:
    made = asked(folder, batch_size=32, max_length=256)
    least = plan(made.model_copy(update={"batch_size": 2, "accumulation": 16})).expected
    found = fit.ways(made, round(least * 0.66))
    assert found and all(" and " in way.what for way in found)
    assert all(way.plan.expected <= round(least * 0.66) for way in found)


def test_what_fits_needs_no_way(folder: Path) -> None:
    made = asked(folder)
    assert fit.ways(made, plan(made).expected) == []


def test_a_table_says_why_a_method_is_left_out(folder: Path) -> None:
    cells = list(fit.table(asked(folder), ["lora", "vpt", "full"], (1, 2), (8,)))
    by = {(c.method, c.batch): c for c in cells}
    assert by["vpt", 1].expected is None and "vision" in by["vpt", 1].why
    one, two, full = by["lora", 1].expected, by["lora", 2].expected, by["full", 1].expected
    assert one is not None and two is not None and full is not None
    assert one < two and one < full and by["full", 1].trainable > by["lora", 1].trainable


def test_a_row_longer_than_the_position_table_is_refused(tmp_path: Path) -> None:
    BERT.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"max_length=65: the model has 64 positions\. Ask for 64"):
        plan(request(model=str(tmp_path), max_length=65))
    assert plan(request(model=str(tmp_path), max_length=64)).model == "BertForSequenceClassification"


def test_attention_dropout_stores_nothing_on_cuda_and_does_on_the_cpu(tmp_path: Path) -> None:
    sizes = {}
    for dropout in (0.0, 0.1):
        config = tf.BertConfig(**BERT.to_dict() | {"attention_probs_dropout_prob": dropout})
        config.save_pretrained(tmp_path / str(dropout))
        for device in ("cpu", "cuda"):
            made = plan(
                request(
                    model=str(tmp_path / str(dropout)), max_length=64, batch_size=4, device=device, eval_batch_size=1
                )
            )
            sizes[device, dropout] = made.parts["activations"]
    assert sizes["cuda", 0.1] == sizes["cuda", 0.0]
    assert sizes["cpu", 0.1] > sizes["cpu", 0.0]
