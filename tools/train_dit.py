"""Trains the packaged diffusion transformer: `python tools/train_dit.py`, about half an hour on one core.

Eight of the ten classes of Fashion-MNIST are learned and two held out, so that adapting to them is a real task. The
weights that are stored, as float16, are the exponential moving average.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from peftree import assets
from peftree.assets.data import fashion_mnist
from peftree.tasks.diffusion import DiffusionConfig, DiffusionTransformer, flow

FOLDER = Path(assets.__file__).parent / "dit_fashion"
ABOUT = "trained by this project on eight of the ten classes of Fashion-MNIST"
HELD_OUT = ("bag", "ankle-boot")
BATCH, RATE, WARMUP, DECAY, NO_CLASS = 64, 2e-3, 200, 0.999, 0.1


def pixels(split: str, held_out: bool) -> tuple[Tensor, Tensor, list[str]]:
    """Return images `[n, 1, 28, 28]` in -1..1, their class indices `[n]`, and the names of the classes."""
    images, labels, names = fashion_mnist(split)
    kept = [name for name in names if (name in HELD_OUT) == held_out]
    order = torch.tensor([kept.index(name) if name in kept else -1 for name in names])
    classes = order[torch.from_numpy(labels).long()]
    values = torch.from_numpy(images).float()[:, None] / 127.5 - 1
    return values[classes >= 0], classes[classes >= 0], kept


@torch.no_grad()
def loss_on(model: DiffusionTransformer, images: Tensor, classes: Tensor) -> float:
    """Return the mean loss over 1,000 images, one noise and one time each, the same at every call."""
    draw = torch.Generator().manual_seed(0)
    images, classes = images[:1000], classes[:1000]
    t = torch.rand(len(images), generator=draw)
    noisy, target = flow(images, torch.randn(images.shape, generator=draw), t)
    return float(model(noisy, t, classes, target).loss)


def train(steps: int) -> DiffusionTransformer:
    """Return the moving average of a model trained for `steps` batches."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, classes, names = pixels("train", held_out=False)
    test = pixels("test", held_out=False)[:2]
    config = DiffusionConfig(id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
    model, average = DiffusionTransformer(config), DiffusionTransformer(config)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start = time.monotonic()
    for step in range(steps):
        course = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / WARMUP, course)
        rows = torch.randint(len(images), (BATCH,))
        t = (torch.arange(BATCH) + torch.rand(BATCH)) / BATCH  # every part of 0..1 in each batch
        noisy, target = flow(images[rows], torch.randn(BATCH, *images.shape[1:]), t)
        known = classes[rows].masked_fill(torch.rand(BATCH) < NO_CLASS, -1)
        loss = model(noisy, t, known, target).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            share = min(DECAY, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - share)
        if step % 250 == 0 or step == steps - 1:
            known_loss, spent = loss_on(average, *test), time.monotonic() - start
            print(f"step {step}: loss {loss:.4f}, average on test {known_loss:.4f}, {spent:.0f} s", flush=True)
    return average


def store(model: DiffusionTransformer, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`; the config says float32, in which the weights are to be used."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures, model.config.dtype = [type(model).__name__], torch.float32
    model.config.save_pretrained(folder)
    half = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(half, folder / "model.safetensors", {"format": "pt", "about": ABOUT})
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    """Train, store, and print the loss on known and held-out classes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--output", type=Path, default=FOLDER)
    options = parser.parse_args()
    model = train(options.steps)
    store(model, options.output)
    stored = DiffusionTransformer.from_pretrained(options.output, dtype=torch.float32)
    known, held = (pixels("test", held_out=held_out)[:2] for held_out in (False, True))
    without = torch.full_like(held[1], -1)
    print(f"stored: test loss {loss_on(stored, *known):.4f}; held-out classes {loss_on(stored, held[0], without):.4f}")


if __name__ == "__main__":
    main()
