"""Bad folders in PEFT's format without a manifest of ours: the config is all there is, and is trusted with nothing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load as unpack
from safetensors.torch import save as pack

import zoo
from peftree import store
from peftree.store.folder import CONFIG, MANIFEST, PEFT
from store import tools
from store.tools import refused

Damage = Callable[[Path], None]


def peft_config(**changes: Any) -> Damage:
    """Return the damage of a PEFT folder without our manifest whose config has these keys (None: without it)."""

    def apply(folder: Path) -> None:
        (folder / MANIFEST).unlink()
        config = json.loads((folder / CONFIG).read_text())
        for key, value in changes.items():
            config.pop(key, None)
            if value is not ...:
                config[key] = value
        (folder / CONFIG).write_text(json.dumps(config))

    return apply


EVIL = "(a+)+$" * 20 + "b"
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no type": ({"peft_type": ...}, "peft_type 'None'"),
    "unknown type": ({"peft_type": "EVIL"}, "peft_type 'EVIL'"),
    "another method's type": ({"peft_type": "IA3"}, "missing"),
    "unknown task": ({"task_type": "EVIL"}, "task_type='EVIL'"),
    "r 0": ({"r": 0}, "r=0"),
    "r negative": ({"r": -4}, "r=-4"),
    "r text": ({"r": "4"}, "r='4'"),
    "r broken": ({"r": 4.5}, "r=4.5"),
    "r null": ({"r": None}, "r=None"),
    "r true": ({"r": True}, "r=True"),
    "r huge": ({"r": 10**9}, "r=1000000000"),
    "r large": ({"r": 65536}, "has the shape"),
    "r another": ({"r": 4}, "has the shape"),
    "alpha text": ({"lora_alpha": "8"}, "lora_alpha='8'"),
    "alpha negative": ({"lora_alpha": -1}, "lora_alpha=-1"),
    "dropout 2": ({"lora_dropout": 2.0}, "lora_dropout=2.0"),
    "ranks by module": ({"rank_pattern": {"q_proj": 10**9}}, "different ranks"),
    "rank by pattern": ({"rank_pattern": {EVIL: 4}}, "different ranks"),
    "escapes in a pattern": ({"rank_pattern": {"\x1b[31m": "x"}}, r"rank_pattern=.*\\x1b"),
    "targets a pattern": ({"target_modules": EVIL}, "runs no pattern"),
    "targets everything": ({"target_modules": ".*"}, "runs no pattern"),
    "targets a list of patterns": ({"target_modules": [".*_proj"]}, "runs no pattern"),
    "excludes a pattern": ({"exclude_modules": EVIL}, "runs no pattern"),
    "layers by pattern": ({"layers_to_transform": [0], "layers_pattern": EVIL}, "runs no pattern"),
    "targets nothing": ({"target_modules": ["nope"]}, "matches no module"),
    "targets in part": ({"target_modules": ["q_proj", "v_prj"]}, "names 'v_prj'"),
    "no targets": ({"target_modules": []}, "matches no module"),
    "targets null": ({"target_modules": None}, "matches no module"),
    "targets a number": ({"target_modules": [3]}, "target_modules"),
    "targets other modules": ({"target_modules": ["k_proj"]}, "missing"),
    "targets no site": ({"target_modules": ["mlp"]}, "no sites of this model"),
    "layer 999": ({"layers_to_transform": [999]}, "matches no module"),
    "layers text": ({"layers_to_transform": "0"}, "layers_to_transform='0'"),
    "saves all": ({"modules_to_save": [".*"]}, "pattern '.\\*'"),
    "saves by pattern": ({"modules_to_save": [EVIL]}, "has the pattern"),
    "saves nothing": ({"modules_to_save": ["nope"]}, "whole task heads"),
    "saves the head": ({"modules_to_save": ["lm_head"]}, "whole task heads"),
    "bias": ({"bias": "evil"}, "bias='evil'"),
    "biases": ({"bias": "all"}, "bias='all'"),
    "init unknown": ({"init_lora_weights": "evil"}, "init_lora_weights='evil'"),
    "PiSSA in its residual form": ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
    "PiSSA by iteration": ({"init_lora_weights": "pissa_niter_16"}, "plain LoRA"),
    "OLoRA": ({"init_lora_weights": "olora"}, "plain LoRA"),
    "DoRA is text": ({"use_dora": "yes"}, "use_dora='yes'"),
    "DoRA without magnitudes": ({"use_dora": True}, "4 missing"),
    "replicated layers": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "parameters": ({"target_parameters": ["x"]}, "target_parameters"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "its own bias": ({"lora_bias": True}, "lora_bias"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_peft_configs_are_refused(case: str, tmp_path: Path) -> None:
    changes, words = CONFIGS[case]
    folder = tools.saved(tmp_path / "a", form="peft")
    peft_config(**changes)(folder)
    refused(folder, words)


LONG = b'{"a":"' + b"x" * (2 << 20)


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"[" * 200_000, b"\xff", b'{"r": 1e999}', LONG])
def test_files_that_are_no_config_are_refused(raw: bytes, tmp_path: Path) -> None:
    folder = tools.saved(tmp_path / "a", form="peft")
    (folder / MANIFEST).unlink()
    (folder / CONFIG).write_bytes(raw)
    refused(folder, "not valid JSON|not an object|at most|peft_type")


def test_an_infinite_alpha_is_refused(tmp_path: Path) -> None:
    folder = tools.saved(tmp_path / "a", form="peft")
    (folder / MANIFEST).unlink()
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace('"lora_alpha": 16.0', '"lora_alpha": 1e999'))
    assert "1e999" in (folder / CONFIG).read_text()
    refused(folder, "lora_alpha=inf")


def test_a_config_changed_after_saving_is_refused(tmp_path: Path) -> None:
    folder = tools.saved(tmp_path / "a", form="peft")
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace('"lora_alpha": 16.0', '"lora_alpha": 17.0'))
    refused(folder, "not the file that was saved.*remove manifest.json")
    (folder / MANIFEST).unlink()
    assert store.load(zoo.build("llama"), folder).method.alpha == 17.0  # type: ignore[attr-defined]


def test_code_and_paths_in_a_config_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text("raise SystemExit('ran')")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "fifo")
    folder = tools.saved(tmp_path / "a", form="peft")
    peft_config(
        auto_mapping={"base_model_class": "X", "parent_library": "planted"},
        megatron_core="planted",
        base_model_name_or_path=str(tmp_path / "fifo"),
        something_new={"path": str(tmp_path / "fifo")},
    )(folder)
    sys.path.insert(0, str(tmp_path))
    try:
        adapter = store.load(zoo.build("llama"), folder)
    finally:
        sys.path.remove(str(tmp_path))
    assert "planted" not in sys.modules
    again = store.save(adapter, tmp_path / "b", format="peft")
    assert json.loads((again / CONFIG).read_text())["something_new"] == {"path": str(tmp_path / "fifo")}
    assert json.loads((again / MANIFEST).read_text())["kept"]["something_new"] == {"path": str(tmp_path / "fifo")}


def test_copies_of_the_base_in_a_peft_file_must_be_the_base(tmp_path: Path) -> None:
    folder = tools.saved(tmp_path / "a", form="peft", sites="embed")
    (folder / MANIFEST).unlink()
    given = unpack((folder / PEFT).read_bytes())
    weight = zoo.build("llama").state_dict()["model.embed_tokens.weight"]
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    (folder / PEFT).write_bytes(pack(given | {key: weight.clone()}))
    assert store.load(zoo.build("llama"), folder).method.name == "lora"
    (folder / PEFT).write_bytes(pack(given | {key: weight + 1}))
    refused(folder, "1 not part of it")


def test_frozen_bases_that_another_seed_gives_are_refused(tmp_path: Path) -> None:
    folder = tools.saved(tmp_path / "a", method="vera", form="peft", r=4)
    peft_config(projection_prng_key=1)(folder)
    refused(folder, "vera_A is not what the seed in the config gives")
