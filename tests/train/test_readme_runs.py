"""The README's commands and Python, run as they stand on a tiny model and tiny data."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from typer.testing import CliRunner

import peftree
from peftree.cli import app
from peftree.train.run import open_run
from train.tiny import reviews, write_csv

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
QUICK = "steps=2 batch_size=4 max_length=16 eval_every=0 save_every=0 quiet=true".split()


def commands(start: str) -> list[list[str]]:
    """Return the words of every command of a block that begins with `start`."""
    block = next(text for kind, text in BLOCKS if not kind and text.startswith(start))
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines()]


@pytest.fixture
def here(encoder: str, decoder: str, review_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the README takes for granted."""
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "reviews.csv", reviews(30))
    for name in ("train.csv", "test.csv"):
        shutil.copy(review_data / name, tmp_path)
    shutil.copytree(encoder, tmp_path / "my-model")
    return tmp_path


def test_the_first_screen(here: Path) -> None:
    installed, *others = commands("pip install .")
    assert installed == ["install", "."]
    for words in others:
        done = CliRunner().invoke(app, [*words, *(QUICK if words[0] == "train" else [])])
        assert done.exit_code == 0, (words, done.output)
    assert (here / "report.html").stat().st_size > 1000 and (here / "runs/lora/adapter").is_dir()


def test_the_first_run(here: Path) -> None:
    for words in commands("peftree train model=./my-model"):
        done = CliRunner().invoke(app, [*words, *(QUICK if words[0] == "train" else [])])
        assert done.exit_code == 0, (words, done.output)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (here / "out").iterdir()}
    assert (here / "report.html").stat().st_size > 1000


def test_the_file_of_settings(here: Path) -> None:
    (here / "run.yaml").write_text(next(text for kind, text in BLOCKS if kind == "yaml"))
    command = re.search(r"`(peftree train run\.yaml [^`]*)`", README)
    assert command is not None
    done = CliRunner().invoke(app, [*command[1].split()[1:], *QUICK])
    assert done.exit_code == 0, done.output
    opened = open_run("runs/reviews")
    assert opened.config.method.fields["r"] == 32 and opened.data.scored[0] == "test"


@pytest.mark.slow
def test_plans(here: Path, decoder: str) -> None:
    words = commands("peftree plan")[0]
    assert words[:2] == ["plan", "./my-model"]
    shutil.rmtree(here / "my-model")
    shutil.copytree(decoder, here / "my-model")
    words[words.index("max_length=768")] = "max_length=32"  # the tiny model has no more positions
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "peak" in done.output.lower(), done.output


def test_the_python(here: Path, decoder: str) -> None:
    shutil.rmtree(here / "my-model")
    shutil.copytree(decoder, here / "my-model")
    first, second = (text for kind, text in BLOCKS if kind == "python")
    names: dict[str, object] = {}
    exec(first, names)
    model = names["model"]
    assert isinstance(model, tf.LlamaForCausalLM)
    peftree.detach(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("task", "de"):
        peftree.adapt(model, "lora", name=name, r=16, sites="attn.q attn.v")
    names["batch"] = {"input_ids": torch.tensor([[5, 6, 7]] * 3)}
    exec(second, names)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
