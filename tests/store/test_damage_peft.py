"""Bad folders in PEFT's format without a manifest of ours: the config is all there is, and is trusted with nothing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
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
    "ranks by module": ({"rank_pattern": {"q_proj": 10**9}}, "1000000000.*less than or equal to 65536"),
    "scales by an evil pattern": ({"alpha_pattern": {EVIL: 4.0}}, "of a kind that is not supported here"),
    "escapes in a pattern": ({"rank_pattern": {"\x1b[31m": "x"}}, r"rank_pattern=.*\\x1b"),
    "targets a list of patterns": ({"target_modules": [".*_proj"]}, "not the name of a module"),
    "targets nothing": ({"target_modules": ["nope"]}, "matches no module"),
    "targets in part": ({"target_modules": ["q_proj", "v_prj"]}, r"4 unexpected \(first: '.*v_proj"),
    "no targets": ({"target_modules": []}, "matches no module"),
    "targets a number": ({"target_modules": [3]}, "target_modules"),
    "targets other modules": ({"target_modules": ["k_proj"]}, "missing"),
    "targets no site": ({"target_modules": ["mlp"]}, "not sites of this model"),
    "layer 999": ({"layers_to_transform": [999]}, "matches no module"),
    "layers text": ({"layers_to_transform": "0"}, "layers_to_transform='0'"),
    "saves all": ({"modules_to_save": [".*"]}, "'.\\*', which is not the name"),
    "saves by pattern": ({"modules_to_save": [EVIL]}, "not the name of a module"),
    "saves the head": ({"modules_to_save": ["lm_head"]}, "lm_head, which has no tensors"),
    "bias": ({"bias": "evil"}, "bias='evil'"),
    "init unknown": ({"init_lora_weights": "evil"}, "init_lora_weights='evil'"),
    "PiSSA by iteration": ({"init_lora_weights": "pissa_niter_16"}, "plain LoRA"),
    "DoRA is text": ({"use_dora": "yes"}, "use_dora='yes'"),
    "DoRA without magnitudes": ({"use_dora": True}, "4 missing"),
    "replicated layers": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "parameters": ({"target_parameters": ["x"]}, "target_parameters"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "its own bias": ({"lora_bias": True}, "missing"),
    "a misspelt key": ({"lora_alphe": 16}, "'lora_alphe' is not a key.*'lora_alpha'"),
    "a misspelt switch": ({"use_rslor": True}, "'use_rslor' is not a key.*'use_rslora'"),
    "CorDA": ({"init_lora_weights": "corda"}, "changed base"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "changed base"),
    "its own step": ({"use_qalora": True}, "use_qalora=True changes what an adapter computes"),
}


HARMLESS: dict[str, dict[str, Any]] = {
    "targets a pattern": {"target_modules": EVIL},
    "targets everything": {"target_modules": ".*"},
    "targets null": {"target_modules": None},
    "excludes a pattern": {"exclude_modules": EVIL},
    "layers by pattern": {"layers_to_transform": [0], "layers_pattern": EVIL},
    "ranks by pattern": {"rank_pattern": {EVIL: 4}},
    "saves nothing": {"modules_to_save": ["nope"]},
    "biases, of which none is there": {"bias": "all"},
}


@pytest.mark.parametrize("case", HARMLESS)
def test_no_pattern_is_run_where_tensors_say_it_all(case: str, tmp_path: Path) -> None:
    folder = tools.saved(tmp_path / "a", form="peft")
    wanted = zoo.build("llama")
    store.load(wanted, folder)
    peft_config(**HARMLESS[case])(folder)
    model = zoo.build("llama")
    store.load(model, folder)
    assert torch.equal(tools.output("llama", model), tools.output("llama", wanted))


@pytest.mark.filterwarnings("ignore:.*has unknown keys")
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
        with pytest.warns(UserWarning, match="no effect: something_new="):
            adapter = store.load(zoo.build("llama"), folder)
    finally:
        sys.path.remove(str(tmp_path))
    assert "planted" not in sys.modules
    again = store.save(adapter, tmp_path / "b", format="peft")
    assert json.loads((again / CONFIG).read_text())["something_new"] == {"path": str(tmp_path / "fifo")}
    assert json.loads((again / MANIFEST).read_text())["kept"]["something_new"] == {"path": str(tmp_path / "fifo")}


def test_copies_of_the_base_count_where_they_differ(tmp_path: Path) -> None:
    folder = tools.saved(tmp_path / "a", form="peft", sites="embed")
    (folder / MANIFEST).unlink()
    given = unpack((folder / PEFT).read_bytes())
    weight = zoo.build("llama").state_dict()["model.embed_tokens.weight"]
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    (folder / PEFT).write_bytes(pack(given | {key: weight.clone()}))
    assert store.load(zoo.build("llama"), folder).method.name == "lora"
    (folder / PEFT).write_bytes(pack(given | {key: weight + 1}))
    model = zoo.build("llama")
    assert [part.name for part in store.load(model, folder).method.parts()] == ["full", "lora"]
    with tools.Quiet():
        theirs = peft.PeftModel.from_pretrained(zoo.build("llama"), folder).eval()
        assert float((tools.output("llama", theirs) - tools.output("llama", model)).abs().max()) < 1e-5
    (folder / PEFT).write_bytes(pack(given | {key: weight[:-1]}))
    refused(folder, "has the shape")


def test_frozen_bases_that_another_seed_gives_are_refused(tmp_path: Path) -> None:
    folder = tools.saved(tmp_path / "a", method="vera", form="peft", r=4)
    peft_config(projection_prng_key=1)(folder)
    refused(folder, "vera_A is not what the config's seed generates")
