"""What is worked out between traces is what a trace there finds, for every method; in doubt nothing is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import transformers as tf

from peftree import registry
from peftree.errors import SiteError
from peftree.plan import estimate, fit, plan, request, sizes
from peftree.plan.ledger import Timeline
from plan.test_fit import BERT, LLAMA
from sampled import quick

BATCHES, LENGTHS = (1, 3, 8), (10, 32, 48)
PEFT = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
CONFIGS: dict[str, Any] = {
    "llama": LLAMA,
    "bert": tf.BertConfig(**(BERT.to_dict() | {"max_position_embeddings": 128})),
    "vit": tf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8,
        architectures=["ViTForImageClassification"],
    ),
    "windows": tf.Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, sliding_window=20, layer_types=["sliding_attention", "full_attention"] * 2,
        architectures=["Gemma3ForCausalLM"],
    ),
}  # fmt: skip
CASES = [("llama", "lora"), ("windows", "lora"), ("bert", "mam")]
# A few methods: a table of each is traced at twelve sizes.
REST = [("vit", "lora"), *[("llama", name) for name in list(registry.methods())[::36] if name != "lora"]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {name: tmp_path_factory.mktemp(name) for name in CONFIGS}
    for name, config in CONFIGS.items():
        config.save_pretrained(made[name])
    return {name: str(folder) for name, folder in made.items()}


@pytest.fixture(autouse=True)
def _alone() -> None:
    sizes.forget()
    estimate._planned.cache_clear()


@pytest.mark.parametrize(("model", "method"), quick([*CASES, *REST]))
def test_the_cells_of_a_table_are_plans(folders: dict[str, str], model: str, method: str) -> None:
    small = {} if (model, method) in CASES else dict(registry.get(method).tags.small)  # that it fits a tiny model
    asked = request(model=folders[model], method={"name": method, "fields": small})
    cells = list(fit.table(asked, [method], BATCHES, LENGTHS))
    assert [(c.batch, c.length) for c in cells] == [(b, n) for n in LENGTHS for b in BATCHES]
    inner = [c for c in cells if c.expected is not None and c.batch > 1 and c.length < max(LENGTHS)]
    for cell in inner[:3]:
        rows = {"batch_size": cell.batch, "eval_batch_size": cell.batch}
        made = plan(asked.model_copy(update=rows | {"max_length": cell.length}))
        assert (cell.expected, cell.trainable) == (made.expected, made.trainable)
    assert inner or method in ("bitfit", "conv_adapter", "convpass", "s_bitfit", "vpt", "xattn_tuning")


def test_few_cells_are_traced(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[Any] = []
    real = estimate.trace
    monkeypatch.setattr(estimate, "trace", lambda *given: (traced.append(given), real(*given))[1])
    list(fit.table(request(model=folders["llama"], method="lora"), ["lora"], BATCHES, LENGTHS))
    assert len(traced) == 2 * (4 + 2)  # two depths; three corners, and one, for a single row makes fewer copies; scores


@pytest.mark.parametrize(
    ("key", "setting"),
    quick((k, s) for s in ({"method": "dora"}, {"peft": PEFT}) for k in ("batch_size", "max_length")),
)
def test_the_largest_is_exact_and_needs_few_traces(
    folders: dict[str, str], key: Any, setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(model=folders["llama"], batch_size=4, max_length=32, **setting)
    memory = plan(asked.model_copy(update={key: 50})).expected
    sizes.forget()
    runs: list[Any] = []
    real = sizes.remember
    monkeypatch.setattr(sizes, "remember", lambda *given: (runs.append(given), real(*given))[1])
    most = fit.largest(asked, memory, key)
    assert len(runs) <= (4 if "peft" in setting else 16)
    at, over = (plan(asked.model_copy(update={key: n})).expected for n in (most, most + 1))
    assert at <= memory < over


def test_pefts_plan_is_derived_too(folders: dict[str, str]) -> None:
    asked = request(model=folders["llama"], batch_size=2, max_length=16, peft=PEFT)
    for batch, length in ((2, 16), (8, 48), (2, 48)):
        plan(asked.model_copy(update={"batch_size": batch, "max_length": length}))
    wanted = asked.model_copy(update={"batch_size": 5, "max_length": 23})
    quick = estimate.plan(wanted, quick=True)
    sizes.forget()
    assert quick.parts == plan(wanted).parts and quick.expected == plan(wanted).expected


def line(*shapes: tuple[int, ...]) -> Timeline:
    sizes = [4 * math.prod(s) for s in shapes]
    number = list(range(len(shapes)))
    return Timeline(number, list(sizes), [0] * len(shapes), ["forward"], sizes, list(shapes), [], {})


def seen(*lines: tuple[int, int, Timeline]) -> list[sizes.Seen]:
    return [sizes.Seen(batch, length, made, 0, None) for batch, length, made in lines]


def test_each_reading() -> None:
    def shapes(b: int, n: int) -> list[tuple[int, ...]]:
        return [(b, n, 7), (b * n, 3), (5,), (b, n + 2), (2 * b, n), (b, 4, n, n)]

    known = seen(*((b, n, line(*shapes(b, n))) for b, n in ((2, 11), (9, 90), (2, 90))))
    found = sizes.derived(known, 5, 31)
    assert found is not None and found.shape == shapes(5, 31)
    assert found.size == found.change == [4 * math.prod(s) for s in shapes(5, 31)]


def test_outside_of_what_was_seen_nothing_is_derived() -> None:
    known = seen(*((b, n, line((b, n))) for b, n in ((2, 8), (6, 50))))
    assert sizes.derived(known, 4, 20) is not None
    assert [sizes.derived(known, b, n) for b, n in ((7, 20), (1, 20), (4, 51), (4, 7))] == [None] * 4
    assert sizes.derived(known[:1], 4, 20) is None


def test_what_can_be_read_in_two_ways_is_not() -> None:
    two = seen((2, 8, line((8,))), (4, 16, line((16,))))  # four times the rows, or the tokens
    assert sizes.derived(two, 3, 9) is None
    assert sizes.derived([*two, *seen((2, 16, line((16,))))], 3, 9) is not None


def test_what_fits_no_reading_is_not_derived() -> None:
    steps = seen((2, 8, line((7,))), (4, 16, line((64,))))
    assert sizes.derived(steps, 3, 9) is None


def test_traces_with_other_events_are_not_mixed() -> None:
    sizes.remember("one", 2, 8, line((2, 8)))
    sizes.remember("one", 6, 50, line((6, 50), (1,)))
    ran = line((4, 20))
    assert sizes.line("one", 4, 20, lambda: (ran, None))[0] is ran


def test_the_order_of_releases_does_not_matter() -> None:
    base = line((2, 8), (3,))
    ends = [replace(base, owner=[0, 1, *o], change=[64, 12, *c], phase=[0] * 4) for o, c in (
        ([0, 1], [-64, -12]), ([1, 0], [-12, -64]),
    )]  # fmt: skip
    for made in ends:
        sizes.remember("two", 2, 8, made)
    assert len({one.events for one in sizes._HELD["two"]}) == 1


def test_traces_of_few_settings_are_held() -> None:
    for number in range(sizes.KEPT + 3):
        sizes.remember(str(number), 1, 1, line((1,)))
    assert len(sizes._HELD) == sizes.KEPT and "0" not in sizes._HELD


def test_a_method_that_fits_nothing_is_said_so_once(folders: dict[str, str]) -> None:
    cells = list(fit.table(request(model=folders["llama"]), ["vpt"], BATCHES, LENGTHS))
    assert len(cells) == 9 and {c.expected for c in cells} == {None}
    with pytest.raises(SiteError):
        plan(request(model=folders["llama"], method="vpt"))
