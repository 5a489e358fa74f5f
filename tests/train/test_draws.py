"""Random numbers of a user's data set: a resumed run sees those that the uninterrupted run saw."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    TrainingArguments,
)

import peftree
from peftree.train.checkpoint import newest_checkpoint
from peftree.train.draws import Draws
from peftree.train.trainer import AdapterTrainer
from train.tiny import Break, tokenizer

ROWS, BATCH = 20, 4


def augmented(index: int) -> dict[str, Any]:
    """Return a row of which every source of random numbers has a part."""
    words = [random.randrange(3, 30), int(np.random.randint(3, 30)), int(torch.randint(3, 30, ()))]
    return {"input_ids": [3 + index, *words][: 3 + index % 2], "labels": index % 2}


class Augmented(Dataset[Any]):
    """A user's own data set, augmented as it is read."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        return augmented(range(ROWS)[index])


class Streamed(IterableDataset[Any]):
    """The same as a stream, in an order that it draws too."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from (augmented(i) for i in random.sample(range(ROWS), ROWS))


class Own(AdapterTrainer):
    """Notes what it trains on."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **more: Any) -> Any:
        self.read.append(inputs["input_ids"].tolist())
        return super().compute_loss(model, inputs, *args, **more)


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Pad, and hide words at random, from torch's stream."""
    ids = [row["input_ids"] for row in rows]
    mask = DataCollatorForLanguageModeling(tokenizer_with_mask(), mlm_probability=0.3)
    hidden, _ = mask.torch_mask_tokens(torch.tensor([i + [0] * (4 - len(i)) for i in ids]))
    return {"input_ids": hidden, "labels": torch.tensor([row["labels"] for row in rows])}


def tokenizer_with_mask() -> Any:
    """Return the tiny tokenizer with a token that hides others."""
    made = tokenizer()
    made.add_special_tokens({"mask_token": "w19"})
    return made


def trained(output: Path, rows: Any, *, stop: int = 99, resume: bool = False, seed: int = 0, **more: Any) -> Own:
    """Train 13 steps of a BERT with dropout; an epoch has five."""
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=37, **shape))
    adapter = peftree.adapt(model, "lora")
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(len(output.name))  # type: ignore[operator]
    args = TrainingArguments(
        str(output), max_steps=13, per_device_train_batch_size=BATCH, save_strategy="steps", save_steps=4, seed=seed,
        report_to="none", remove_unused_columns=False, dataloader_pin_memory=False, **more,
    )  # fmt: skip
    made = Own(adapter, args, quiet=True, train_dataset=rows, data_collator=collate, callbacks=[Break(stop)])
    made.read = []
    if stop < 13:
        with pytest.raises(KeyboardInterrupt):
            made.train()
    else:
        made.train(resume_from_checkpoint=resume)
    return made


def same(one: AdapterTrainer, two: AdapterTrainer) -> bool:
    """Whether two trainers hold the same adapter, to the bit."""
    return all(torch.equal(tensor, two.adapter.state()[name]) for name, tensor in one.adapter.state().items())


@pytest.mark.parametrize(
    ("workers", "stop"),
    [(0, 6), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, 11), (1, 6), (2, 11)])],
)
def test_a_resumed_run_reads_what_the_uninterrupted_one_read(workers: int, stop: int, tmp_path: Path) -> None:
    settings = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers == 2}
    whole = trained(tmp_path / "whole", Augmented(), **settings)
    trained(tmp_path / "killed", Augmented(), stop=stop, **settings)
    found = newest_checkpoint(tmp_path / "killed", print)
    assert found is not None
    begun = int(found.name.removeprefix("checkpoint-"))
    resumed = trained(tmp_path / "killed", Augmented(), resume=True, **settings)
    assert resumed.read == whole.read[begun:]
    assert same(whole, resumed)
    assert len({str(batch) for batch in whole.read}) == 13, "each batch of each epoch has numbers of its own"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "more"),
    [
        (Augmented, {"gradient_accumulation_steps": 2}),
        (Augmented, {"train_sampling_strategy": "group_by_length"}),
        (Streamed, {}),
        (Streamed, {"dataloader_num_workers": 1}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(f"{k}={v}" for k, v in value.items()),
)
def test_however_rows_come(rows: Any, more: dict[str, Any], tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", rows(), **more)
    trained(tmp_path / "killed", rows(), stop=7, **more)
    resumed = trained(tmp_path / "killed", rows(), resume=True, **more)
    assert resumed.read == whole.read[-len(resumed.read) :]
    assert same(whole, resumed)


@pytest.mark.slow
def test_workers_change_nothing_and_the_seed_does(tmp_path: Path) -> None:
    plain = trained(tmp_path / "a", Augmented())
    assert trained(tmp_path / "bbb", Augmented(), dataloader_num_workers=2).read == plain.read
    assert trained(tmp_path / "c", Augmented(), seed=1).read != plain.read


def drawn(seed: int, epoch: int, *key: object) -> tuple[float, ...]:
    """Return a number of each stream."""
    draws = Draws(seed)
    draws.epoch = epoch
    with draws.of(*key):
        return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_another_seed_epoch_or_row_has_other_numbers_of_every_kind() -> None:
    """Else each epoch would augment a row as the first one did, and every seed would."""
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    cases = [(0, 0, "rows", 1), (1, 0, "rows", 1), (0, 1, "rows", 1), (0, 0, "rows", 2), (0, 0, "collate", 1)]
    found = [drawn(*case) for case in cases]
    assert all(len(set(numbers)) == len(cases) for numbers in zip(*found, strict=True))
    assert [drawn(*case) for case in cases] == found
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_orders_of_seeds_and_epochs_differ() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        draws = Draws(seed)
        sampler = draws.order(SimpleNamespace(generator=None))
        draws.epoch = epoch
        return torch.randperm(20, generator=sampler.generator).tolist()

    assert len({tuple(order(*case)) for case in [(0, 0), (0, 1), (5, 0)]}) == 3 and order(5, 2) == order(5, 2)
    plain = SequentialSampler(range(3))
    assert Draws(0).order(plain) is plain


class Numbers(IterableDataset[Any]):
    """A stream of drawn numbers, the same code in every worker."""

    def __iter__(self) -> Iterator[float]:
        yield from (random.random() for _ in range(4))


def test_workers_of_a_stream_do_not_draw_the_same() -> None:
    """As it is with torch's own loader, which seeds each worker with its number."""
    loader = DataLoader(Numbers(), batch_size=2, num_workers=2, collate_fn=lambda rows: [*rows, random.random()])
    Draws(0).on(SimpleNamespace(base_dataloader=loader))
    numbers = [number for batch in loader for number in batch]
    assert len(numbers) == 12 == len(set(numbers))


def test_a_loader_leaves_the_stream_of_training_alone() -> None:
    """Torch's own takes a seed for its workers from that stream, so dropout would be another after a resume."""
    loader = DataLoader(Augmented(), batch_size=4, collate_fn=collate)
    before = torch.get_rng_state()
    next(iter(loader))
    assert not torch.equal(torch.get_rng_state(), before)
    Draws(0).on(SimpleNamespace(base_dataloader=loader))
    before = torch.get_rng_state()
    assert len(list(loader)) == 5
    assert torch.equal(torch.get_rng_state(), before)
