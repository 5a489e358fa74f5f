"""A step is the mean over its labelled items however it is split, for every kind of loss that a model may have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

import peftree
from peftree.data.rows import load_data
from peftree.errors import ConfigError, TrainError
from peftree.settings import RunConfig
from peftree.tasks import Options, build_task
from peftree.tasks.base import pad
from peftree.train.run import run
from peftree.train.share import items, shifts
from peftree.train.trainer import AdapterTrainer
from sampled import quick
from train.tiny import SHAPE, reviews, write_csv

Feature = dict[str, Any]
SPLITS = ((8, 1), (1, 8), (3, 3))  # the last: of 3, 3 and 2 rows
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LENGTHS = (3, 9, 4, 12, 5, 3, 7, 11)


def texts(labels: Callable[[Tensor], Any]) -> list[Feature]:
    """Eight texts of unequal lengths with what `labels` makes of each."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 60, (n,), generator=draw) for n in LENGTHS]
    return [{"input_ids": row.tolist(), **labels(row)} for row in rows]


def padded(features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Pad texts, and labels that are as long or lists of another length."""
    batch = pad([f["input_ids"] for f in features], 0)
    for name in features[0].keys() - {"input_ids"}:
        values = [f[name] for f in features]
        lists = isinstance(values[0], list) and isinstance(values[0][0], int)
        batch[name] = pad(values, -100)["input_ids"] if lists else torch.tensor(values)
    return batch


def llama() -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=64, num_key_value_heads=2, **SHAPE))


def gpt2() -> nn.Module:
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=40, **off))


def t5() -> nn.Module:
    ends = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=64, dropout_rate=0.0, **shape, **ends))


def bert(kind: str, **more: Any) -> nn.Module:
    made: nn.Module = getattr(tf, kind)(
        tf.BertConfig(vocab_size=64, max_position_embeddings=40, **SHAPE, **STILL, **more)
    )
    return made


def segmenter() -> nn.Module:
    return tf.SegformerForSemanticSegmentation(
        tf.SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[1, 1], hidden_sizes=[16, 32], patch_sizes=[3, 3],
            strides=[2, 2], num_attention_heads=[2, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3,
            drop_path_rate=0.0, classifier_dropout_prob=0.0, **STILL,
        )
    )  # fmt: skip


def pictures(features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stack images and the classes of their pixels."""
    return {name: torch.stack([f[name] for f in features]) for name in ("pixel_values", "labels")}


def masks() -> list[Feature]:
    """Eight images whose unlabelled part differs."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for n in LENGTHS:
        labels = torch.randint(0, 3, (16, 16), generator=draw)
        labels[n:] = 255
        rows.append({"pixel_values": torch.randn(3, 16, 16, generator=draw), "labels": labels})
    return rows


def half(row: Tensor) -> dict[str, Any]:
    """A prompt of one or two tokens, the rest in the loss."""
    return {"labels": [-100] * (1 + len(row) % 2) + row.tolist()[1 + len(row) % 2 :]}


def drawn(row: Tensor) -> float:
    return float(row.float().mean() / 30 - 1)


CASES: dict[str, tuple[Callable[[], nn.Module], list[Feature], Any]] = {
    "causal": (llama, texts(half), padded),
    "causal, whole text": (llama, texts(lambda row: {"labels": row.tolist()}), padded),
    "causal whose class has no known loss": (gpt2, texts(lambda row: {"labels": row.tolist()}), padded),
    "encoder-decoder": (t5, texts(lambda row: {"labels": [5] * (14 - len(row)) + [2]}), padded),
    "tokens": (lambda: bert("BertForTokenClassification"), texts(lambda row: {"labels": (row % 2).tolist()}), padded),
    "masked": (lambda: bert("BertForMaskedLM"), texts(half), padded),
    "classes": (lambda: bert("BertForSequenceClassification"), texts(lambda row: {"labels": len(row) % 2}), padded),
    "classes, one row without": (
        lambda: bert("BertForSequenceClassification"),
        texts(lambda row: {"labels": -100 if len(row) == 4 else len(row) % 2}), padded,
    ),
    "several classes": (
        lambda: bert("BertForSequenceClassification", problem_type="multi_label_classification"),
        texts(lambda row: {"labels": [1.0, float(len(row) % 2)]}), padded,
    ),
    "scores": (
        lambda: bert("BertForSequenceClassification", num_labels=1, problem_type="regression"),
        texts(lambda row: {"labels": -100.0 if len(row) == 4 else drawn(row)}), padded,
    ),
    "answers": (
        # Without padding, which has a part in these models' own loss.
        lambda: bert("BertForQuestionAnswering"),
        texts(lambda row: {"input_ids": row.tolist()[:3], "start_positions": len(row) % 2, "end_positions": 2}), padded,
    ),
    "pixels": (segmenter, masks(), pictures),
}  # fmt: skip


class Keep(TrainerCallback):
    """Notes the gradients before each step of the optimizer."""

    def __init__(self, adapter: Any) -> None:
        self.adapter = adapter
        self.steps: list[list[Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, **more: Any) -> None:
        self.steps.append([p.grad.clone() for p in self.adapter.parameters()])


def gradients(model: nn.Module, rows: Any, collate: Any, folder: Path, batch: int, passes: int) -> list[Tensor]:
    """Return the gradients of a step; nothing of the adapter is at zero."""
    adapter = peftree.adapt(model, "lora", r=2, sites="linear", head=False)
    model.double()  # so that nothing is left but what the split does
    for i, parameter in enumerate(adapter.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    args = TrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=passes,
        max_grad_norm=0.0, lr_scheduler_type="constant", report_to="none", disable_tqdm=True, save_strategy="no",
        remove_unused_columns=False, dataloader_pin_memory=False, logging_strategy="no",
    )  # fmt: skip
    keep = Keep(adapter)

    def wide(features: Any) -> dict[str, Any]:
        made = collate(features).items()
        return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in made}

    AdapterTrainer(adapter, args, lr=1e-3, quiet=True, train_dataset=rows, data_collator=wide, callbacks=[keep]).train()
    return keep.steps[0]


@pytest.mark.parametrize("case", quick(CASES))
def test_any_split_of_a_step_is_the_same_step(case: str, tmp_path: Path) -> None:
    build, rows, collate = CASES[case]
    found = []
    for batch, passes in SPLITS:
        torch.manual_seed(0)
        found.append(gradients(build(), rows, collate, tmp_path, batch, passes))
    whole = torch.cat([g.flatten() for g in found[0]])
    for other in found[1:]:
        gap = torch.cat([g.flatten() for g in other]) - whole
        assert float(gap.norm() / whole.norm()) < 1e-6
    assert float(whole.norm()) > 1e-4


@pytest.mark.parametrize(
    "name", quick(["captioning", "text-classification", "text-regression", "image-classification"])
)
def test_so_it_is_for_the_tasks(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    made = {"text-classification": ("encoder", "review_data"), "text-regression": ("encoder", "review_data"),
            "captioning": ("llava", "pair_data"), "image-classification": ("vit", "image_data")}  # fmt: skip
    model, folder = (request.getfixturevalue(n) for n in made[name])
    if name == "text-regression":
        scored = [(text, f"{len(text)}.5") for text, _ in reviews(12)]
        folder = write_csv(tmp_path / "scores.csv", scored, ("text", "score"))
    data = load_data(folder, task=name)  # type: ignore[arg-type]
    found = []
    for batch, passes in (SPLITS[0], SPLITS[-1]):
        task = build_task(model, data, Options())
        for module in task.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        found.append(gradients(task.model, task.items(data.train[:8]), task.collate, tmp_path, batch, passes))
    for one, two in zip(*found, strict=True):
        assert torch.allclose(one, two, rtol=1e-6, atol=1e-6 * float(one.abs().max()))


def test_a_contrastive_loss_is_not_split(dual: str, pair_data: Path, tmp_path: Path) -> None:
    settings = {"model": dual, "data": str(pair_data), "task": "image-text-retrieval", "quiet": True, "batch_size": 4}
    with pytest.raises(ConfigError, match=r"accumulation=2: .*compares the rows of one forward pass.*raise batch_size"):
        run(RunConfig(**settings, accumulation=2, output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
    data = load_data(pair_data, task="image-text-retrieval")
    task = build_task(dual, data)
    with pytest.raises(TrainError, match=r"2 per step are not a larger batch.*raise batch_size"):
        gradients(task.model, task.items(data.train[:8]), task.collate, tmp_path, 4, 2)


def test_a_pass_without_a_label_has_no_part() -> None:
    """Its mean is not a number; the other passes of the step count alone."""
    rows = texts(half)
    rows[3]["labels"] = [-100] * len(rows[3]["labels"])
    found = []
    for batch, passes in ((8, 1), (1, 8)):
        torch.manual_seed(0)
        model = llama()
        adapter = peftree.adapt(model, "lora")
        args = TrainingArguments("x", per_device_train_batch_size=batch, report_to="none", disable_tqdm=True,
                                 gradient_accumulation_steps=passes)  # fmt: skip
        trainer = AdapterTrainer(adapter, args, quiet=True, train_dataset=rows, data_collator=padded)
        trainer.health.done = True
        trainer.create_optimizer()
        parts = [padded(rows[i : i + batch]) for i in range(0, 8, batch)]
        count = trainer._get_num_items_in_batch(parts, torch.device("cpu"))
        found.append(sum(float(trainer.training_step(model, part, count)) for part in parts))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_counts_by_hand() -> None:
    labels = torch.tensor([[7, -100, 3], [-100, 4, 5]])
    model = llama()
    assert shifts(model) and shifts(gpt2()) and not shifts(t5()) and not shifts(bert("BertForMaskedLM"))
    assert items({"labels": labels}, model) == 3
    assert items({"labels": labels, "shift_labels": labels}, model) == 4
    assert items({"labels": labels}, t5()) == 4
    assert items({"labels": torch.tensor([-100.0, 1.0])}, model) == 2
    assert items({"flag": True, "pixel_values": torch.zeros(5, 3)}, model) == 5
    assert shifts(peftree.adapt(gpt2(), "prompt_tuning").model)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["XLNet", "XLM"])
def test_language_models_that_predict_in_place_count_their_first_token(name: str) -> None:
    """Their own loss has a value where the first token alone is labelled; of a shifted one nothing would be left."""
    shape = (
        {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}
        if name == "XLNet"
        else {"emb_dim": 16, "n_layers": 1, "n_heads": 2}
    )
    model = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model(name.lower(), vocab_size=30, **shape)).eval()
    ids, labels = torch.arange(6, 12)[None], torch.tensor([[7, -100, -100, -100, -100, -100]])
    with torch.no_grad():
        out = model(input_ids=ids, labels=labels)
    assert torch.allclose(out.loss, torch.nn.functional.cross_entropy(out.logits[:, 0], labels[:, 0]))
    assert items({"labels": labels}, model) == 1
