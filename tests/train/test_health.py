"""Silent failures: each has a run here that would fail silently, and a sentence that stops it by step 3."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers import TrainingArguments

import peftree
from peftree import registry
from peftree.data.rows import load_data
from peftree.deltas import LowRank, turn
from peftree.errors import TrainError
from peftree.methods.contract import Deltas, Method, Moment, Place, Tags
from peftree.tasks import Task, build_task
from peftree.train.trainer import AdapterTrainer
from train.tiny import SHAPE, trainer


@pytest.fixture
def classifier(encoder: str, review_data: Path) -> Task:
    return build_task(encoder, load_data(review_data))


@pytest.fixture
def generator(decoder: str, prompt_data: Path) -> Task:
    return build_task(decoder, load_data(prompt_data))


def test_a_healthy_run_says_so(generator: Task, prompt_data: Path, tmp_path: Path, capsys: Any) -> None:
    adapter = peftree.adapt(generator.model, "lora", r=2, name="x")
    trainer(adapter, generator, prompt_data, tmp_path, steps=4, batch=4).train()
    said = capsys.readouterr().err
    count = sum(p.numel() for p in adapter.parameters())
    assert f"adapter 'x' (lora): 4 sites, {count:,} trainable parameters, " in said
    assert "step 3: gradients 8/8 finite and non-zero, optimizer 8/8 tensors, labels " in said
    assert "stop token in 12/12 rows, output changed by up to " in said


def test_quiet_says_nothing(generator: Task, prompt_data: Path, tmp_path: Path, capsys: Any) -> None:
    adapter = peftree.adapt(generator.model, "lora", r=2)
    trainer(adapter, generator, prompt_data, tmp_path, steps=3, quiet=True).train()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def fails(match: str, *args: Any, **more: Any) -> None:
    """Train and expect a TrainError by step 3, with nothing saved."""
    made = trainer(*args, **more)
    with pytest.raises(TrainError, match=match) as caught:
        made.train()
    assert caught.value.fix
    assert made.state.global_step <= 3
    assert not list(Path(made.args.output_dir).glob("checkpoint-*"))


def checkpointing(task: Task, reentrant: bool) -> None:
    model: Any = task.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.disable_input_require_grads()  # transformers' own remedy, which older releases lack


def test_1_reentrant_checkpointing_cuts_the_adapter_off(generator: Task, prompt_data: Path, tmp_path: Path) -> None:
    adapter = peftree.adapt(generator.model, "lora")
    checkpointing(generator, reentrant=True)
    with pytest.warns(UserWarning, match="requires_grad"):
        fails("depends on no trainable tensor|had no gradient", adapter, generator, prompt_data, tmp_path)


def test_1_non_reentrant_checkpointing_works(generator: Task, prompt_data: Path, tmp_path: Path) -> None:
    adapter = peftree.adapt(generator.model, "lora")
    checkpointing(generator, reentrant=False)
    trainer(adapter, generator, prompt_data, tmp_path, steps=3).train()


def test_2_optimizer_built_before_the_adapter(classifier: Task, review_data: Path, tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW(classifier.model.parameters(), lr=1e-3)
    adapter = peftree.adapt(classifier.model, "lora")
    fails(
        r"The optimizer lacks \d+.*Build it after peftree\.adapt",
        adapter, classifier, review_data, tmp_path, optimizers=(optimizer, None),
    )  # fmt: skip


def test_2_optimizer_with_too_much(classifier: Task, review_data: Path, tmp_path: Path) -> None:
    adapter = peftree.adapt(classifier.model, "lora")
    extra = {"params": [nn.Parameter(torch.zeros(2))], "lr": 1e-3}
    optimizer = torch.optim.AdamW([*adapter.param_groups(), extra])
    fails("holds more than the", adapter, classifier, review_data, tmp_path, optimizers=(optimizer, None))


def collating(task: Task, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Any], dict[str, Tensor]]:
    def collate(features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = task.collate(features)
        change(batch)
        return batch

    return collate


def test_3_all_labels_masked(generator: Task, prompt_data: Path, tmp_path: Path) -> None:
    adapter = peftree.adapt(generator.model, "lora")
    masked = collating(generator, lambda b: b["labels"].fill_(-100))
    match = r"All \d+ labels of a batch are masked.*Raise max_length or shorten the rows"
    fails(match, adapter, generator, prompt_data, tmp_path, collate=masked)


def test_3_mask_all_zero(generator: Task, prompt_data: Path, tmp_path: Path) -> None:
    adapter = peftree.adapt(generator.model, "lora")
    empty = collating(generator, lambda b: b["attention_mask"][0].zero_())
    fails("attention mask is all zero", adapter, generator, prompt_data, tmp_path, collate=empty)


def test_4_stop_token_outside_the_loss(generator: Task, prompt_data: Path, tmp_path: Path) -> None:
    adapter = peftree.adapt(generator.model, "lora")
    # Padding masked by id, where the pad token is the stop token: the usual mistake.
    by_id = collating(generator, lambda b: b["labels"].masked_fill_(b["input_ids"] == generator.stop, -100))
    said = r"The stop token 2 is not in the loss of any.*Raise max_length or shorten the rows"
    fails(said, adapter, generator, prompt_data, tmp_path, collate=by_id)


def test_9_loaded_adapter_that_is_frozen(classifier: Task, review_data: Path, tmp_path: Path) -> None:
    adapter = peftree.adapt(classifier.model, "lora").requires_grad(False)
    fails(r"has no trainable tensor.*requires_grad\(True\)", adapter, classifier, review_data, tmp_path)


def test_adapter_that_is_not_on(classifier: Task, review_data: Path, tmp_path: Path) -> None:
    adapter = peftree.adapt(classifier.model, "lora", name="a")
    peftree.adapt(classifier.model, "lora", name="b")
    fails(r"'a' is trained but not switched on.*switch", adapter, classifier, review_data, tmp_path)


def test_second_adapter_trains_beside_an_idle_one(classifier: Task, review_data: Path, tmp_path: Path) -> None:
    first = peftree.adapt(classifier.model, "lora", name="a")
    before = {k: t.clone() for k, t in first.state().items()}
    second = peftree.adapt(classifier.model, "lora", name="b")
    trainer(second, classifier, review_data, tmp_path, steps=3).train()
    assert all(torch.equal(t, before[k]) for k, t in first.state().items())


def test_stacked_adapter_below_must_be_frozen(classifier: Task, review_data: Path, tmp_path: Path) -> None:
    first = peftree.adapt(classifier.model, "lora", name="a")
    second = peftree.adapt(classifier.model, "lora", name="b")
    peftree.switch(classifier.model, ["a", "b"])
    fails("are not part of adapter 'b'", second, classifier, review_data, tmp_path)
    first.requires_grad(False)
    trainer(second, classifier, review_data, tmp_path / "2", steps=3).train()


def test_base_made_trainable_again(classifier: Task, review_data: Path, tmp_path: Path) -> None:
    adapter = peftree.adapt(classifier.model, "lora")
    classifier.model.get_parameter("bert.pooler.dense.weight").requires_grad_(True)
    fails("trainable tensors, such as .* are not part of adapter", adapter, classifier, review_data, tmp_path)


class Lifeless(Method):
    """A low-rank method whose second factor never moves, or which has no effect at all."""

    name: ClassVar[str] = "lifeless"
    tags: ClassVar[Tags] = Tags("reparameterized", "none", True, True, lr=1e-3)
    sites: str = "attn.q attn.v"
    dead: str = "B"

    def build(self, place: Place) -> LowRank:
        A, B = place.kaiming(2, place.site.in_features), place.zeros(2, place.site.out_features)
        return (Cut if self.dead == "B" else Nothing)(place, A, B, 1.0)


class Cut(LowRank):
    """B is detached: it gets no gradient."""

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        return A, B.detach()


class Nothing(LowRank):
    """Both factors get gradients, but their product is added and taken away again."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.quick = False

    def weight(self, W: Tensor) -> Tensor:
        A, B = super().factors()
        return W + ((A.sum() + B.sum()) * 0.0 + Straight.apply(A, B))


class Straight(torch.autograd.Function):
    """Zero forward, ones backward."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(A, B)
        return A.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ones_like(t) for t in ctx.saved_tensors)


def test_tensor_without_gradient(generator: Task, prompt_data: Path, tmp_path: Path) -> None:
    adapter = peftree.adapt(generator.model, Lifeless())
    match = r"8 of 8 trainable tensors had no gradient in 3 steps"  # B stays zero, so A has none either
    fails(match, adapter, generator, prompt_data, tmp_path, steps=4)


def test_14_adapter_that_changes_nothing(generator: Task, prompt_data: Path, tmp_path: Path) -> None:
    adapter = peftree.adapt(generator.model, Lifeless(dead="all"))
    fails("but the output equals the base's", adapter, generator, prompt_data, tmp_path, steps=4)


def test_checks_leave_the_run_as_it_is(encoder: str, review_data: Path, tmp_path: Path) -> None:
    """The same weights come out with and without the checks, dropout and all."""
    states = []
    for watched in (True, False):
        task = build_task(encoder, load_data(review_data))
        adapter = peftree.adapt(task.model, "lora", dropout=0.1)
        made = trainer(adapter, task, review_data, tmp_path / str(watched), steps=5)
        made.health.done = not watched
        made.train()
        states.append(adapter.state())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("name", ["pfeiffer", "prompt_tuning", "prefix_tuning", "head_only", "full", "rslora", "pissa"])
def test_no_false_alarm(name: str, encoder: str, review_data: Path, tmp_path: Path) -> None:
    task = build_task(encoder, load_data(review_data))
    adapter = peftree.adapt(task.model, registry.get(name)())
    made = trainer(adapter, task, review_data, tmp_path, steps=4)
    made.train()
    assert made.health.done


def t5() -> nn.Module:
    """Return a tiny T5, which cannot run without decoder inputs or labels."""
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    ends = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=64, dropout_rate=0.0, **shape, **ends))


def fit(
    model: nn.Module, rows: list[dict[str, Any]], collate: Any, folder: Path, method: str = "lora", **args: Any
) -> AdapterTrainer:
    """Train three steps on `rows` as they are."""
    settings: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    settings |= {"remove_unused_columns": False, "dataloader_pin_memory": False}
    made = TrainingArguments(str(folder), max_steps=3, per_device_train_batch_size=2, **settings | args)
    adapter = peftree.adapt(model, method)
    done = AdapterTrainer(adapter, made, train_dataset=rows, data_collator=collate)
    done.train()
    assert done.health.done
    return done


@pytest.mark.parametrize("method", ["full", "child_tuning", "galore", "lisa"])
def test_a_part_for_another_task_is_no_alarm_where_every_parameter_trains(method: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    model = tf.Dinov2ForImageClassification(tf.Dinov2Config(**shape, num_labels=3))
    rows = [{"pixel_values": torch.randn(3, 28, 28), "labels": i % 3} for i in range(6)]
    done = fit(model, rows, None, tmp_path, method, learning_rate=1e-2)
    unused = [n for n in done.health.names if "mask_token" in n]
    assert unused and not set(unused) & done.health.alive


def test_layers_that_rest_in_the_first_steps_are_no_alarm(tmp_path: Path) -> None:
    """AdapterDrop leaves adapters out of a drawn number of layers; those neither move nor count as dead."""
    shape = {"hidden_size": 16, "num_hidden_layers": 30, "num_attention_heads": 2, "intermediate_size": 16}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=32, **shape))
    rows = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6) + i} for i in range(6)]
    done = fit(model, rows, None, tmp_path, "adapter_drop", learning_rate=1e-2)
    held = {s.layer: list(d.parameters()) for _, s, d in done.adapter.entries}
    stepped = {layer for layer, own in held.items() if any(p in done.optimizer.state for p in own)}
    assert stepped == set(range(14, 30))  # 14, 25 and 18 are drawn
    done.adapter.finish()
    assert all(p.requires_grad for own in held.values() for p in own)


class ThreeSided(nn.Module):
    """A model whose positions are `[3, rows, tokens]` and which answers with a tuple: loss, then what matters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=64, num_key_value_heads=2, **SHAPE))
        self.config = self.inner.config

    def forward(self, input_ids: Tensor, places: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Return loss and logits; all three sets of positions must be there."""
        assert places.shape == (3, *input_ids.shape)
        out = self.inner(input_ids=input_ids, position_ids=places.amax(0), labels=labels)
        return out.loss, out.logits


def test_the_check_gives_the_model_what_training_gave_it(tmp_path: Path, capsys: Any) -> None:
    ids = [[5, 6, 7, 2], [8, 9, 2, 2], [3, 4, 5, 6]]
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def labelled(features: Any) -> dict[str, Tensor]:
        return {k: torch.tensor([f[k] for f in features]) for k in ("input_ids", "labels")}

    def sided(features: Any) -> dict[str, Tensor]:
        batch = labelled(features)
        return batch | {"places": torch.arange(4).expand(3, len(features), 4)}

    fit(t5(), rows, labelled, tmp_path)
    fit(ThreeSided(), rows, sided, tmp_path)
    assert capsys.readouterr().err.count("output changed by up to") == 2


def test_a_pass_without_a_label_or_stop_token_is_no_dead_step(tmp_path: Path) -> None:
    """Of a step's four passes one has both."""
    rows = [{"input_ids": [5, 6, 7, 2], "labels": labels} for labels in ([-100] * 4, [-100, 6, 7, 2])] * 4

    def collate(features: Any) -> dict[str, Tensor]:
        return {k: torch.tensor([f[k] for f in features]) for k in ("input_ids", "labels")}

    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=64, num_key_value_heads=2, **SHAPE))
    made = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=8, report_to="none",
        disable_tqdm=True, save_strategy="no", remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = AdapterTrainer(peftree.adapt(model, "lora"), made, stop=2, train_dataset=rows, data_collator=collate)
    trainer.train()
    assert trainer.health.stops == [12, 24] and trainer.health.labels == [36, 96]


class Turns(Method):
    """One site trains at a time, so that no A has had a gradient by step 3: each B was zero in its one step."""

    name: ClassVar[str] = "turns"
    tags: ClassVar[Tags] = Tags("reparameterized", "none", True, True, lr=1e-3)
    sites: str = "attn.q attn.v"

    def build(self, place: Place) -> LowRank:
        return LowRank(place, place.kaiming(2, place.site.in_features), place.zeros(2, place.site.out_features), 1.0)

    def schedule(self, deltas: Deltas, moment: Moment) -> None:
        for number, delta in enumerate(deltas.values()):
            turn(delta, number == moment.step % 4)


def test_tensors_that_take_turns_are_not_dead(generator: Task, prompt_data: Path, tmp_path: Path) -> None:
    adapter = peftree.adapt(generator.model, Turns())
    made = trainer(adapter, generator, prompt_data, tmp_path, steps=4, quiet=True)
    made.train()
    assert made.state.global_step == 4
    assert all(bool(d.B.any()) for d in adapter.deltas.values())
