"""Nothing that a model folder names is fetched or run: kernels of a hub, code beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

import zoo
from peftree.data.images import read_look
from peftree.errors import ConfigError
from peftree.plan.question import Request
from peftree.plan.show import with_data
from peftree.plan.skeleton import read_config as planned
from peftree.tasks import loading
from peftree.tasks.base import Options
from peftree.trusted import cleared
from train.tiny import tokenizer, write_jsonl

KERNEL = "someone/kernel"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    zoo.build("llama").save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", [KERNEL, "someone/kernel@v1:function"])
def test_a_kernel_that_a_config_names_is_left_out(folder: Path, key: str, value: str) -> None:
    change(folder, **{key: value})
    config = loading.read_config(str(folder), {}, [])
    model, fresh = loading.load(tf.AutoModelForCausalLM, str(folder), config, Options())
    assert model.config._attn_implementation == "sdpa" and not fresh  # type: ignore[union-attr]
    assert planned(str(folder))._attn_implementation in (None, "sdpa")


def test_a_kernel_for_a_part_and_for_a_missing_package_are_left_out() -> None:
    config = tf.LlavaConfig()
    config.text_config._attn_implementation = KERNEL
    config.vision_config._attn_implementation = "flash_attention_2"
    parts = (cleared(config).text_config, config.vision_config)
    assert [part._attn_implementation for part in parts] == [None, None]
    config.text_config._attn_implementation = "eager"
    assert cleared(config).text_config._attn_implementation == "eager"


def test_code_beside_the_weights_is_not_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "code.py").write_text("raise SystemExit('ran')\n")
    change(folder, model_type="unheard", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    for read in (lambda: loading.read_config(str(folder), {}, []), lambda: planned(str(folder))):
        with pytest.raises(ConfigError):
            read()
    words = {"tokenizer_class": "Unheard", "auto_map": {"AutoTokenizer": ["code.Words", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    with pytest.raises(ConfigError, match="tokenizer"):
        loading.tokenizer(str(folder))
    assert "[y/N]" not in capsys.readouterr().out  # nor is anybody asked


def test_code_beside_images_is_not_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "code.py").write_text("raise SystemExit('ran')\n")
    look = {"image_processor_type": "Unheard", "auto_map": {"AutoImageProcessor": "code.Look"}, "image_mean": [0.1] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(look))
    found = read_look(str(folder), True, tf.ViTConfig(image_size=32, patch_size=16), None)
    assert found.size == 32 and found.processor is None and found.mean == (0.1, 0.1, 0.1)
    assert "[y/N]" not in capsys.readouterr().out


def test_code_beside_words_that_a_plan_counts_is_not_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "code.py").write_text("raise SystemExit('ran')\n")
    tokenizer().save_pretrained(folder)
    words = {"tokenizer_class": "Unheard", "auto_map": {"AutoTokenizer": ["code.Words", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    rows = write_jsonl(folder / "a.jsonl", [("good film", "good")] * 12)
    with pytest.raises(ConfigError, match="tokenizer"):
        with_data(Request(model=str(folder), data=str(rows)))
    assert "[y/N]" not in capsys.readouterr().out
