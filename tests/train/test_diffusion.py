"""Image generation: the diffusion transformer, its task, and what adapters do to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tools.train_dit import ABOUT, FOLDER, HELD_OUT
from torch import Tensor

import peftree
from peftree import registry, sites
from peftree.adapter import adapt, detach, disabled
from peftree.assets.data import write_data
from peftree.data.rows import Data, load_data
from peftree.errors import ConfigError, DataError, DivergedError, TrainError
from peftree.settings import RunConfig
from peftree.tasks import Options, build_task
from peftree.tasks.diffusion import DiffusionConfig, DiffusionTransformer, flow, sample
from peftree.tasks.image_generation import LEVELS, ImageGeneration, compare_images, frechet
from peftree.train.health import names
from peftree.train.run import open_run, run
from train.tiny import PIXELS

TINY: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": PIXELS,
}  # fmt: skip


def tiny(**fields: Any) -> DiffusionTransformer:
    """Return a small model none of whose weights is zero, in eval mode."""
    torch.manual_seed(0)
    model = DiffusionTransformer(DiffusionConfig(**(TINY | fields)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def batch(n: int = 4) -> dict[str, Tensor]:
    """Return noisy images with times, classes (the last has none) and targets."""
    draw = torch.Generator().manual_seed(1)
    shape = (n, 1, PIXELS, PIXELS)
    noisy, target = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
    classes = torch.tensor([*(i % 2 for i in range(n - 1)), -1])
    return {
        "pixel_values": noisy,
        "timesteps": torch.rand(n, generator=draw),
        "classes": classes,
        "labels": target,
    }


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A saved tiny model that knows the class dark and another."""
    tiny(id2label={0: "cat", 1: "dark"}, label2id={"cat": 0, "dark": 1}).save_pretrained(tmp_path / "dit")
    return str(tmp_path / "dit")


def images(folder: Path) -> Data:
    return load_data(folder, task="image-generation")


def task_of(model: str, folder: Path, **options: Any) -> tuple[ImageGeneration, Data]:
    data = images(folder)
    task = build_task(model, data, Options(**options))
    assert isinstance(task, ImageGeneration)
    return task, data


def test_a_fresh_model_predicts_zero_and_a_saved_one_is_itself(tmp_path: Path) -> None:
    row = batch()
    assert not DiffusionTransformer(DiffusionConfig(**TINY))(**row).velocity.any()
    model = tiny()
    model.save_pretrained(tmp_path / "a")
    again = DiffusionTransformer.from_pretrained(tmp_path / "a")
    assert torch.equal(model(**row).velocity, again(**row).velocity)
    out = model(**row)
    torch.testing.assert_close(out.loss, (out.velocity - row["labels"]).square().mean())
    assert list(model(row["pixel_values"], row["timesteps"])) == ["velocity"]
    states = model(**row, output_hidden_states=True).hidden_states
    assert [s.shape for s in states] == [(4, 16, 32)] * 3
    assert torch.equal(states[0], model.backbone.embeddings(row["pixel_values"]))


def test_condition_and_position_reach_the_output() -> None:
    model, row = tiny(), batch()
    base = model(**row).velocity
    for change in ({"timesteps": row["timesteps"].flip(0)}, {"classes": torch.tensor([1, 0, 1, 0])}):
        assert not torch.allclose(model(**(row | change)).velocity, base, atol=1e-3)
    none = torch.full((4,), -1)
    plain = model(row["pixel_values"], row["timesteps"]).velocity
    assert torch.equal(model(row["pixel_values"], row["timesteps"], none).velocity, plain)
    # One changed patch changes that patch most, and every other through attention.
    one = row["pixel_values"].clone()
    one[:, :, 4:8, 8:12] += 3
    change = (model(**(row | {"pixel_values": one})).velocity - base).abs().amax((0, 1))
    patches = change.unfold(0, 4, 4).unfold(1, 4, 4).amax((2, 3))
    assert (patches > 0).all()
    assert patches.argmax() == 1 * 4 + 2


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_attention_forms_and_checkpointing_agree() -> None:
    row = batch()
    found = []
    for form in ("sdpa", "eager", "checkpointed"):
        model = tiny().train()
        model.set_attn_implementation("eager" if form == "eager" else "sdpa")
        if form == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**row).loss.backward()
        found.append(model.backbone.layers[0].attention.q_proj.weight.grad)  # type: ignore[union-attr]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


def test_flow_runs_from_image_to_noise_along_its_velocity() -> None:
    pixels, noise = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    t = torch.tensor([0.0, 0.25, 1.0])
    noisy, velocity = flow(pixels, noise, t)
    assert torch.equal(noisy[0], pixels[0]) and torch.equal(noisy[2], noise[2])
    torch.testing.assert_close(noisy - t.view(-1, 1, 1, 1) * velocity, pixels)


def test_sampling_follows_the_velocity_and_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    assert torch.equal(sample(model, [0, 1], steps=3), sample(model, [0, 1], steps=3))
    assert not torch.equal(sample(model, [0, 1], steps=3), sample(model, [0, 1], steps=3, seed=1))
    torch.testing.assert_close(sample(model, [-1], 3, guidance=3.0), sample(model, [-1], 3, guidance=1.0))
    goal = torch.rand(2, 1, PIXELS, PIXELS) - 0.5

    def exact(x: Tensor, t: Tensor, classes: Tensor | None = None) -> Any:
        """Return the velocity of the straight path to `goal`, and without a class to the origin."""
        wanted = goal if classes is not None else torch.zeros_like(goal)
        return type("Out", (), {"velocity": (x - wanted) / t.view(-1, 1, 1, 1)})

    monkeypatch.setattr(model, "forward", exact)
    torch.testing.assert_close(sample(model, [0, 1], steps=7, guidance=1.0), goal, atol=1e-5, rtol=0)
    torch.testing.assert_close(sample(model, [0, 1], steps=7, guidance=2.0), (2 * goal).clamp(-1, 1), atol=1e-5, rtol=0)


def test_known_classes_keep_their_vectors() -> None:
    model = tiny(id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    before = model.class_vectors.weight.clone()
    assert model.rename(["bag", "dog", "cat"]) == ["bag"]
    assert torch.equal(model.class_vectors.weight[:, 1:], before.flip(1))
    assert not model.class_vectors.weight[:, 0].any()
    assert model.config.id2label == {0: "bag", 1: "dog", 2: "cat"} and model.config.num_labels == 3


def test_sites_are_found_and_the_class_vectors_are_the_head() -> None:
    model = tiny()
    roles = {site.role for site in sites.tree(model)}
    assert roles == {
        *("stack", "layer", "attn", "attn.q", "attn.k", "attn.v", "attn.o", "ffn", "ffn.up", "ffn.down"),
        *("norm", "conv", "head"),
    }
    assert [site.path for site in sites.task_head(model)] == ["class_vectors"]
    attn = sites.resolve(model, "attn@1")[0]
    assert (attn.heads, attn.head_dim, attn.causal) == (4, 8, False)


# Nothing there is encoded, no token is embedded, no layer has a convolution, and no image a [CLS].
@pytest.mark.parametrize(
    "name", sorted(set(registry.methods()) - {"xattn_tuning", "conv_adapter", "dept", "sk_tuning", "mv_adapter"})
)
def test_every_method_trains_without_the_head_and_comes_off(name: str) -> None:
    model, row = tiny(), batch()
    base = model(**row).velocity
    grid = {"lead": 0} if name == "convpass" else {}  # no class token stands before the patches here
    adapter = adapt(model, name, head=False, **registry.get(name).tags.small, **grid)
    with disabled(model):
        assert torch.equal(model(**row).velocity, base)
    adapter.init([lambda: model(**row).loss] * 2)
    model.zero_grad()
    optimizer = torch.optim.AdamW(adapter.param_groups(1e-2))
    alive, trained = set[str](), set[str]()
    model.train()
    for step in range(3):
        trained |= {n for n, p in names(adapter).items() if p.requires_grad}
        loss = model(**row).loss
        extra = adapter.aux_loss(step, 3, None, lambda: model(**row))
        (loss if extra is None else loss + extra).backward()
        alive |= {n for n, p in names(adapter).items() if p.grad is not None and bool(p.grad.any())}
        optimizer.step()
        adapter.step(step + 1, 3, batches=[lambda: model(**row).loss])
        optimizer.zero_grad()
    assert alive == trained
    assert not torch.equal(model.eval()(**row).velocity, base)
    detach(model)
    assert torch.equal(model(**row).velocity, base)


def test_data_may_have_one_class_and_is_read_as_folders(image_data: Path, saved: str, tmp_path: Path) -> None:
    one = tmp_path / "one"
    for split in ("train", "test"):
        (one / split).mkdir(parents=True)
        (one / split / "dark").symlink_to(image_data / split / "dark")
    task, data = task_of(saved, one)
    assert task.labels == data.labels == ("dark",)
    assert task.notes == []
    with pytest.raises(DataError, match="at least two"):
        load_data(one)


def test_new_classes_start_at_none_and_are_told(image_data: Path, saved: str) -> None:
    task, _ = task_of(saved, image_data)
    assert task.labels == ("dark", "light")
    assert task.notes == ["new tensors, not in the model's files: class_vectors.weight for light"]
    old = DiffusionTransformer.from_pretrained(saved).class_vectors.weight[:, 1]
    assert torch.equal(task.model.class_vectors.weight[:, 0], old)
    assert not task.model.class_vectors.weight[:, 1].any()


def test_training_batches_are_drawn_and_scoring_batches_are_fixed(image_data: Path, saved: str) -> None:
    task, data = task_of(saved, image_data)
    items = task.items(data.train)
    features = [items[i] for i in range(16)]
    one, two = task.collate(features), task.collate(features)
    assert not torch.equal(one["pixel_values"], two["pixel_values"])
    times = one["timesteps"].sort().values * 16
    assert torch.equal(times.floor(), torch.arange(16.0))  # one time in every sixteenth of 0..1
    clean = one["pixel_values"] - one["timesteps"].view(-1, 1, 1, 1) * one["labels"]
    grey = torch.stack([f["pixel_values"].mean(0, keepdim=True) for f in features])
    torch.testing.assert_close(clean, grey, atol=1e-5, rtol=0)
    hidden = torch.cat([task.collate(features)["classes"] for _ in range(50)]).eq(-1).float().mean()
    assert 0.06 < float(hidden) < 0.14
    for first, second in zip(task.batches(items, 6), task.batches(items, 6), strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert (first["classes"] >= 0).all()


def test_an_items_score_is_the_mean_over_times_whatever_the_batch(image_data: Path, saved: str) -> None:
    task, data = task_of(saved, image_data)
    items = task.items(data.test)
    scores = task.score(items, batch_size=16)
    small = task.score(items, batch_size=1)
    assert scores.items == pytest.approx(small.items, rel=1e-4)
    assert scores.values == pytest.approx(small.values, rel=1e-3)
    assert task.score(items, batch_size=16) == scores
    assert not scores.higher_is_better and scores.aggregate == "mean"
    assert scores.score == pytest.approx(np.mean(scores.items)) == scores.values["denoising_loss"]
    draw, losses = torch.Generator().manual_seed(3), []
    noise = torch.randn(LEVELS, 1, PIXELS, PIXELS, generator=draw)
    pixels = items[3]["pixel_values"].mean(0)[None, None]
    for level in range(LEVELS):
        t = torch.tensor([(level + 0.5) / LEVELS])
        noisy, target = flow(pixels, noise[level : level + 1], t)
        with torch.no_grad():
            losses.append(float(task.model(noisy, t, torch.tensor([items[3]["labels"]]), target).loss))
    assert scores.items[3] == pytest.approx(np.mean(losses), rel=1e-5)


def test_frechet_distance_by_hand() -> None:
    draw = np.random.default_rng(0)
    one = draw.normal(size=(400, 3)) * [1.0, 2.0, 3.0]
    assert frechet(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet(one, one + np.array([3.0, 0.0, 4.0])) == pytest.approx(25)
    # Scaled by 2: each deviation s becomes 2 s, so (2 s - s)^2 = s^2 is added for each axis.
    centred = one - one.mean(0)
    assert frechet(centred, 2 * centred) == pytest.approx(float(centred.var(0).sum()))


def test_generated_images_are_compared_by_pixels() -> None:
    real = torch.cat([torch.full((20, 1, 4, 4), -0.5), torch.full((20, 1, 4, 4), 0.5)])
    real = real + 0.05 * torch.randn(real.shape)
    classes = torch.arange(40) // 20
    good = compare_images(real, classes, real, classes)
    assert good["class_match"] == 1 and good["frechet_pixels"] == pytest.approx(0, abs=1e-6)
    swapped = compare_images(real.flip(0), classes, real, classes)
    assert swapped["class_match"] == 0 and swapped["frechet_pixels"] == pytest.approx(0, abs=1e-6)
    collapsed = compare_images(real[:1].expand(40, -1, -1, -1), classes, real, classes)
    assert collapsed["class_match"] == 0.5 and collapsed["frechet_pixels"] > 1


def test_what_is_refused(image_data: Path, saved: str, vit: str) -> None:
    with pytest.raises(ConfigError, match=r"is a ViTConfig.*Use a diffusion transformer"):
        task_of(vit, image_data)
    with pytest.raises(ConfigError, match=r"image_size=24: the model makes 16 pixels"):
        task_of(saved, image_data, image_size=24)
    task, data = task_of(saved, image_data)
    with pytest.raises(TrainError, match="nothing to score"):
        task.score(task.items([]))
    with torch.no_grad():
        task.model.backbone.output.bias.fill_(float("nan"))
    with pytest.raises(DivergedError, match="not finite"):
        task.score(task.items(data.test))


def test_a_run_trains_saves_and_opens_again(image_data: Path, saved: str, tmp_path: Path) -> None:
    config = RunConfig.model_validate({
        "model": saved, "data": str(image_data), "task": "image-generation", "output": str(tmp_path / "run"),
        "method": {"name": "lora", "r": 4}, "lr": 1e-2, "steps": 30, "batch_size": 8, "quiet": True, "save_every": 0,
    })  # fmt: skip
    result = run(config)
    assert result.base_score is not None
    assert result.score < result.base_score
    assert (result.metric, result.higher_is_better, len(result.items)) == ("denoising_loss", False, 8)
    assert {"frechet_pixels", "class_match"} < set(result.values)
    opened = open_run(tmp_path / "run")
    assert opened.score().items == pytest.approx(result.items, rel=1e-5)


def test_the_packaged_weights_are_whole_and_small() -> None:
    model, info = DiffusionTransformer.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == 758_064
    assert (FOLDER / "model.safetensors").stat().st_size < 1.6e6
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert file.metadata()["about"] == ABOUT
    assert not set(HELD_OUT) & set(json.loads((FOLDER / "config.json").read_text())["id2label"].values())
    # Nothing but learned weights makes shoes flat and trousers high: the mean of a few generated images shows it.
    drawn = sample(model.eval(), [model.config.label2id[n] for n in ("sneaker",) * 4 + ("trouser",) * 4], steps=8)
    shoes, trousers = ((part > 0).float().mean(0)[0] for part in drawn.split(4))
    assert shoes[:7].mean() < 0.1 < trousers[:7].mean()
    assert shoes[:, :5].mean() > trousers[:, :5].mean()


@pytest.mark.slow
@pytest.mark.enable_socket
def test_adapting_to_held_out_classes_helps(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", "fashion-mnist", {"classes": list(HELD_OUT)}, {"train": 64, "test": 64})
    config = RunConfig.model_validate({
        "model": str(FOLDER), "data": str(data), "task": "image-generation", "output": str(tmp_path / "run"),
        "method": "lora", "steps": 100, "batch_size": 32, "quiet": True, "save_every": 0, "eval_every": 0,
    })  # fmt: skip
    result = run(config)
    assert result.base_score is not None
    assert result.score < 0.95 * result.base_score
    assert result.values["frechet_pixels"] < result.base_values["frechet_pixels"]
    opened = open_run(tmp_path / "run")
    with disabled(opened.task.model):
        assert opened.score().score == pytest.approx(result.base_score)
    assert isinstance(opened.task.model, DiffusionTransformer)
    assert peftree.adapters(opened.task.model).keys() == {"default"}
