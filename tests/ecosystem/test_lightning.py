"""Adapters under Lightning: trained, kept in small checkpoints, continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from ecosystem.common import METHODS, Watched, examples, words

pytestmark = [
    pytest.mark.slow,  # importing Lightning takes seconds
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),  # Lightning's use of torch
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),  # it has eight rows
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # the resumed run's
]


def module(watched: Watched) -> Any:
    """Return what a user writes."""
    import pytorch_lightning as lightning

    class Tuned(lightning.LightningModule):
        strict_loading = False  # a checkpoint holds the adapter alone

        def __init__(self) -> None:
            super().__init__()
            self.model = watched.model

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.model(**batch).loss
            self.log("loss", loss)
            losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(watched.adapter.param_groups(1e-2))

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            kept = {k: v for k, v in checkpoint["state_dict"].items() if ".deltas." in k}
            checkpoint["state_dict"] = kept

    losses: list[float] = []
    made = Tuned()
    made.losses = losses  # type: ignore[assignment]
    watched.model.train()
    return made


def batches() -> DataLoader[Any]:
    tokens = words()
    text = tokens([e["prompt"] + e["completion"] for e in examples(8)], padding=True, return_tensors="pt")
    return DataLoader([{"input_ids": text["input_ids"], "labels": text["input_ids"]}] * 10, batch_size=None)  # type: ignore[arg-type]


def trainer(folder: Path, **more: Any) -> Any:
    import pytorch_lightning as lightning

    return lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, **more,
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_trained(method: str, chat_model: str, tmp_path: Path) -> None:
    watched = Watched(chat_model, method)
    made = module(watched)
    trainer(tmp_path, max_epochs=2, enable_checkpointing=False).fit(made, batches())
    assert made.losses[-1] < made.losses[0]
    watched.check(tmp_path / "adapter")


def test_a_checkpoint_holds_the_adapter_and_training_goes_on_from_it(chat_model: str, tmp_path: Path) -> None:
    def trained(folder: Path, start: Path | None, epochs: int) -> tuple[Watched, Any]:
        watched = Watched(chat_model, "houlsby")
        run = trainer(folder, max_epochs=epochs)
        run.fit(module(watched), batches(), ckpt_path=start, weights_only=False)
        return watched, run

    _, first = trained(tmp_path / "first", None, 1)
    kept = Path(first.checkpoint_callback.best_model_path)
    state = torch.load(kept, weights_only=False)["state_dict"]
    assert state and all(".deltas." in name for name in state)
    again, _ = trained(tmp_path / "first", kept, 2)
    whole, _ = trained(tmp_path / "whole", None, 2)
    assert torch.equal(again.logits(), whole.logits())
