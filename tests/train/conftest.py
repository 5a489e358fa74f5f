"""Tiny saved models with tokenizers, and tiny data files, for the tests of training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

from peftree.assets import composed
from train.tiny import PIXELS, SHAPE, WORDS, reviews, save, tokenizer, write_csv, write_jsonl, write_pairs


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Give every test the threads it found; tiny models are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved BertModel without a head."""
    still = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config = tf.BertConfig(vocab_size=64, max_position_embeddings=40, **SHAPE, **still)
    return save("BertModel", config, tmp_path_factory.mktemp("bert"), tokenizer())


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved Llama whose pad token is its eos token."""
    config = tf.LlamaConfig(
        vocab_size=64, max_position_embeddings=40, num_key_value_heads=2, eos_token_id=2, pad_token_id=2, **SHAPE
    )
    return save("LlamaForCausalLM", config, tmp_path_factory.mktemp("llama"), tokenizer(eos_is_pad=True))


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved ViTModel with a preprocessor's settings."""
    folder = tmp_path_factory.mktemp("vit")
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    save("ViTModel", tf.ViTConfig(image_size=PIXELS, patch_size=8, **SHAPE, **still), folder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": PIXELS, "width": PIXELS},
                "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "resample": 2}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="session")
def dino(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved Dinov2Model with a preprocessor's settings."""
    folder = tmp_path_factory.mktemp("dino")
    shape = {k: v for k, v in SHAPE.items() if k != "intermediate_size"}
    save("Dinov2Model", tf.Dinov2Config(image_size=28, patch_size=14, mlp_ratio=2, **shape), folder)
    settings = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 28},
                "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="session")
def dual(dino: str, encoder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dual encoder made of the tiny vision model and the tiny BERT."""
    folder = tmp_path_factory.mktemp("dual")
    composed.dual(Path(dino), Path(encoder), folder)
    return str(folder)


@pytest.fixture(scope="session")
def llava(dino: str, decoder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LLaVA made of the tiny vision model and the tiny Llama."""
    folder = tmp_path_factory.mktemp("llava")
    composed.llava(Path(dino), Path(decoder), folder)
    return str(folder)


@pytest.fixture
def pair_data(tmp_path: Path) -> Path:
    """A folder with train/, valid/ and test/ of images whose shade tells the text."""
    for split, n, seed in (("train", 24, 0), ("valid", 8, 1), ("test", 8, 2)):
        write_pairs(tmp_path / "pairs" / split, n, seed)
    return tmp_path / "pairs"


@pytest.fixture
def review_data(tmp_path: Path) -> Path:
    """A folder with train.csv, valid.csv and test.csv."""
    folder = tmp_path / "reviews"
    folder.mkdir()
    for split, n, seed in (("train", 48, 0), ("valid", 16, 1), ("test", 20, 2)):
        write_csv(folder / f"{split}.csv", reviews(n, seed))
    return folder


@pytest.fixture
def prompt_data(tmp_path: Path) -> Path:
    """A folder with train.jsonl, valid.jsonl and test.jsonl."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    for split, n in (("train", 40), ("valid", 8), ("test", 8)):
        rows = [(f"the {WORDS[i % 4]} film w{i % 20}", f"{WORDS[i % 4]} a plot"[: 20 - i % 3]) for i in range(n)]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture
def image_data(tmp_path: Path) -> Path:
    """A folder with train/, valid/ and test/ of dark and light images."""
    draw = np.random.default_rng(0)
    for split, n in (("train", 16), ("valid", 6), ("test", 8)):
        for i in range(n):
            name, low = (("dark", 0), ("light", 120))[i % 2]
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(low, low + 130, (PIXELS + i % 3, PIXELS, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "images"
