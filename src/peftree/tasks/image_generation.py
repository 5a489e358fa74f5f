"""Image generation: a class-conditional diffusion transformer learns the images of each class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from peftree.data.images import Images, read_look
from peftree.data.rows import Data, Example
from peftree.errors import ConfigError, DivergedError, TrainError
from peftree.evaluate import quality
from peftree.tasks.base import Batch, Items, Options, Task
from peftree.tasks.diffusion import DiffusionConfig, DiffusionTransformer, flow, sample
from peftree.tasks.loading import is_local, load, read_config

NO_CLASS = 0.1  # share of the training rows whose class is hidden, for guidance without a class
LEVELS = 8  # noise levels at which each item is scored
SAMPLES, STEPS, COMPONENTS = 64, 16, 16
Values = npt.NDArray[np.float64]


class ImageGeneration(Task):
    """A diffusion transformer; batches are noisy images with their times, classes and target velocities.

    `collate` draws noise and times from torch's generator, as training needs them; `batches` and `score` draw them
    from fixed seeds, so that every method and every call sees the same.
    """

    name = "image-generation"
    modality = "vision"
    kind = "generation"
    metric = "denoising_loss"
    higher_is_better = False
    classes = True
    model: DiffusionTransformer

    def __init__(self, model: DiffusionTransformer, look: Any, labels: Sequence[str]) -> None:
        super().__init__(model, labels)
        self.look = look

    @classmethod
    def load(cls, model: str, data: Data, options: Options) -> tuple[Task, list[str]]:
        """Load a diffusion transformer with the classes of `data`; classes that it knows keep their vectors.

        Raises:
            ConfigError: it is not a diffusion transformer, or its images do not have the requested size.
        """
        config = read_config(model, options.config, ())
        if not isinstance(config, DiffusionConfig):
            what = f"model: {model} is a {type(config).__name__}."
            raise ConfigError(what, "Use a diffusion transformer: model=dit-fashion.")
        look = read_look(model, is_local(model), config, options.image_size)
        if look.size != config.image_size:
            raise ConfigError(f"image_size={look.size}: the model makes {config.image_size} pixels.", "Leave it unset.")
        net, fresh = load(DiffusionTransformer, model, config, options)
        assert isinstance(net, DiffusionTransformer)
        new = net.rename(list(data.labels))
        fresh += [f"class_vectors.weight for {', '.join(new)}"] if new else []
        return cls(net, look, data.labels), fresh

    def items(self, rows: Sequence[Example]) -> Images:
        """Return the images as a data set; small sets are decoded once."""
        index = {name: i for i, name in enumerate(self.labels)}
        return Images([(row.source, index[row.target]) for row in rows], self.look)

    def collate(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """Return x_t, t, the classes (a tenth hidden) and, as `labels`, the velocities; times cover 0..1 evenly."""
        return self._noisy(features, torch.default_generator, NO_CLASS)

    def batches(self, items: Items, batch_size: int) -> Iterator[Batch]:
        """Yield `items` in their order, batch by batch, with noise from a fixed seed and no class hidden."""
        count = len(items)  # type: ignore[arg-type]
        for start in range(0, count, batch_size):
            features = [items[i] for i in range(start, min(start + batch_size, count))]
            batch = self._noisy(features, torch.Generator().manual_seed(start), 0.0)
            yield {name: value.to(self.model.device) for name, value in batch.items()}

    def _noisy(self, features: Sequence[Mapping[str, Any]], draw: torch.Generator, hidden: float) -> Batch:
        pixels, classes = self._pixels(features)
        n = len(pixels)
        times = (torch.randperm(n, generator=draw) + torch.rand(n, generator=draw)) / n
        noisy, target = flow(pixels, torch.randn(pixels.shape, generator=draw), times)
        classes = classes.masked_fill(torch.rand(n, generator=draw) < hidden, -1)
        return {"pixel_values": noisy, "timesteps": times, "classes": classes, "labels": target}

    def _pixels(self, features: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
        """Return images `[n, channels, side, side]` and classes `[n]`; a grey model sees the mean of the colours."""
        pixels = torch.stack([f["pixel_values"] for f in features])
        if self.model.config.num_channels == 1:
            pixels = pixels.mean(1, keepdim=True)
        return pixels, torch.tensor([f["labels"] for f in features])

    def score(self, items: Items, batch_size: int = 32) -> quality.Scores:
        """Denoising loss of each item, and how close a few generated images are to the scored ones.

        An item's loss is the mean of the training loss over eight evenly spaced times, each with its own noise, fixed
        by the item's place. `frechet_pixels` and `class_match` are those of `compare_images` for 64 images drawn
        with a fixed seed in 16 steps without guidance, for the classes of the items.

        Raises:
            TrainError: there is nothing to score.
            DivergedError: a velocity is not finite.
        """
        count = len(items)  # type: ignore[arg-type]
        if not count:
            raise TrainError("There is nothing to score.", "Give a test or validation file that has rows.")
        losses: list[float] = []
        with quality.evaluating(self.model):
            for start in self.bar(range(0, count, max(1, batch_size // LEVELS))):
                losses += self._losses(items, range(start, min(start + max(1, batch_size // LEVELS), count)))
            pixels, classes = self._pixels([items[i] for i in range(count)])
            wanted = classes[torch.arange(SAMPLES) * count // SAMPLES]
            drawn = sample(self.model, wanted.tolist(), STEPS, guidance=1.0).cpu()
        values = {"denoising_loss": float(np.mean(losses))}
        return quality.Scores(
            "denoising_loss", tuple(losses), values | compare_images(drawn, wanted, pixels, classes),
            higher_is_better=False,
        )  # fmt: skip

    def largest_scored(self, items: Items, batch_size: int) -> Batch:
        """Return noisy images, as many as the noise levels of some items or as are drawn at once."""
        count = len(items)  # type: ignore[arg-type]
        rows = max(SAMPLES, LEVELS * min(max(1, batch_size // LEVELS), count))
        return self._noisy([items[i % count] for i in range(rows)], torch.Generator().manual_seed(0), 0.0)

    def _losses(self, items: Items, places: range) -> list[float]:
        """Return the mean loss over all noise levels of the items at `places`."""
        pixels, classes = self._pixels([items[i] for i in places])
        shape = (LEVELS, *pixels.shape[1:])
        noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in places])
        times = ((torch.arange(LEVELS) + 0.5) / LEVELS).repeat(len(places))
        noisy, target = flow(pixels.repeat_interleave(LEVELS, 0), noise, times)
        device = self.model.device
        known = classes.repeat_interleave(LEVELS).to(device)
        velocity = self.model(noisy.to(device), times.to(device), known).velocity.float().cpu()
        if not bool(torch.isfinite(velocity).all()):
            raise DivergedError("A velocity is not finite.", "The adapter diverged: lower lr, or use float32.")
        found: list[float] = (velocity - target).square().view(len(places), -1).mean(1).tolist()
        return found


def compare_images(drawn: Tensor, wanted: Tensor, real: Tensor, classes: Tensor) -> dict[str, float]:
    """Compare generated images with real ones by pixels alone.

    `frechet_pixels` is the Frechet distance between Gaussians fitted to both sets in the space of the leading 16
    principal components of the real pixels. It is not FID: it uses no network's features. With few images it is
    biased upwards: compare methods only on the same rows. `class_match` is the share of generated images whose
    nearest real image, by pixel distance, has the wanted class.

    Args:
        drawn, real: `[n, channels, side, side]`, `[m, ...]`.
        wanted, classes: class indices, `[n]` and `[m]`.
    """
    nearest = torch.cdist(drawn.flatten(1), real.flatten(1)).argmin(1)
    match = float((classes[nearest] == wanted).float().mean())
    made, true = (t.flatten(1).double().numpy() for t in (drawn, real))
    centre = true.mean(0)
    axes = np.linalg.svd(true - centre, full_matrices=False)[2][: min(COMPONENTS, len(true))]
    return {"frechet_pixels": frechet((made - centre) @ axes.T, (true - centre) @ axes.T), "class_match": match}


def frechet(one: Values, two: Values) -> float:
    """Return |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two sets of vectors `[n, d]` (Frechet 1957)."""
    means = float(np.square(one.mean(0) - two.mean(0)).sum())
    S1, S2 = (np.atleast_2d(np.cov(part, rowvar=False, bias=True)) for part in (one, two))
    roots = np.sqrt(np.linalg.eigvals(S1 @ S2).real.clip(0)).sum()
    return max(0.0, means + float(np.trace(S1) + np.trace(S2) - 2 * roots))
