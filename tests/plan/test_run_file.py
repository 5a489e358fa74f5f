"""A plan follows the run that it is asked for: the model's changed config, its head, its rows, a budget in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from typer.testing import CliRunner

from peftree.adapter import adapt, detach
from peftree.assets import models
from peftree.cli import app
from peftree.errors import ConfigError, MethodError
from peftree.plan import calibrate as module
from peftree.plan import plan, request, show
from peftree.plan.question import Request
from peftree.registry import make
from peftree.settings import read_settings
from peftree.tasks import loading
from plan.test_fit import BERT, LLAMA, saved
from train import tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory, LLAMA)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory, BERT)


def run(*words: str) -> Any:
    result = CliRunner().invoke(app, ["plan", *words, "--json"], catch_exceptions=False)
    return json.loads(result.stdout)


def test_changes_of_the_models_config_are_planned(llama: Path, tmp_path: Path) -> None:
    tf.LlamaConfig(**LLAMA.to_dict() | {"num_hidden_layers": 2}).save_pretrained(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {llama}\ndata: nowhere\nconfig: {{num_hidden_layers: 2}}\nmax_length: 16\n")
    found = plan(read_settings(Request, file))
    wanted = plan(request(model=str(tmp_path), max_length=16))
    assert (found.total, found.sites, found.parts) == (wanted.total, wanted.sites, wanted.parts)
    assert found.total < plan(request(model=str(llama), max_length=16)).total


@pytest.mark.parametrize("changes", [{"layers": 2}, {"num_hidden_layers": "two"}, {"rope_parameters": 3}], ids=str)
def test_a_change_that_training_refuses_a_plan_refuses(llama: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^config\.") as trained:
        loading.read_config(str(llama), changes, ())
    with pytest.raises(ConfigError) as planned:
        plan(request(model=str(llama), config=changes))
    assert str(planned.value) == str(trained.value)


def test_the_head_is_planned_as_it_is_trained(llama: Path, bert: Path) -> None:
    model = tf.BertForSequenceClassification(tf.BertConfig(**BERT.to_dict()))
    words: dict[str, Any] = {"model": str(bert), "task": "text-classification", "max_length": 16}
    for head in (None, True, False):
        adapter = adapt(model, make("lora", {}), head=head)
        wanted = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
        assert plan(request(**words, head=head)).trainable == wanted
        detach(model)
    with pytest.raises(MethodError, match="no task head"):
        plan(request(model=str(llama), head=True, max_length=16))


def test_real_steps_have_the_head_too(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(model=str(bert), task="text-classification", head=False, max_length=8, batch_size=1, device="cpu")
    given = []
    monkeypatch.setattr(module, "adapt", lambda model, method, head: given.append(head) or adapt(model, method))
    module.calibrate(asked, plan(asked))
    assert given == [False]


def test_an_adapters_file_says_whether_there_is_a_head(bert: Path) -> None:
    with pytest.raises(ConfigError, match="An adapter's file says what its method and head are"):
        request(model=str(bert), peft={"peft_type": "LORA"}, head=True)


def test_rows_are_cut_at_what_the_model_takes(bert: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"{'x' * n},{n % 2}\n" for n in (40, 41, 401, 800)))
    words = (str(bert), "method=lora", f"data={rows}")
    said = run(*words)
    assert said["request"]["max_length"] == BERT.max_position_embeddings == 64
    virtual = run(str(bert), "method=prompt_tuning", "length=10", f"data={rows}")
    assert virtual["request"]["max_length"] == 54
    assert run(*words, "max_length=24")["request"]["max_length"] == 24
    shown = CliRunner().invoke(app, ["plan", *words])
    assert "planned for 64 (max_length=64 cuts the longest)" in shown.stdout


def test_the_tokenizer_of_a_packaged_model_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = tiny.tokenizer()

    def convert(folder: Path) -> None:
        tf.BertConfig(vocab_size=len(words), max_position_embeddings=64, **tiny.SHAPE).save_pretrained(folder)
        words.save_pretrained(folder)

    monkeypatch.setenv("PEFTREE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(models.CONVERTERS, "tiny", convert)
    packaged = models.DemoModel("", "", 0, "", "tiny")
    monkeypatch.setitem(models.MODELS, "tiny-packaged", packaged)
    rows = tiny.write_csv(tmp_path / "rows.csv", [("good " * 9 + "film", "a"), ("bad " * 4, "b")] * 4)
    asked, said = show.with_data(read_settings(Request, None, ["model=tiny-packaged", f"data={rows}"]))
    assert asked.max_length == 10 and "at most 10" in said
    tiny.write_csv(rows, [("good " * 50, "a"), ("bad " * 4, "b")] * 4)
    asked, said = show.with_data(read_settings(Request, None, ["model=tiny-packaged", f"data={rows}"]))
    assert asked.max_length == words.model_max_length == 40 and "max_length=40 cuts the longest" in said, "as training"


def test_a_budget_is_read_in_words_and_files(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {llama}\ndata: d\nmemory: 1.5 GiB\n")
    assert read_settings(Request, file).memory == 1610612736
    assert read_settings(Request, file, ["memory=24GB"]).memory == 24_000_000_000
    assert request(model=str(llama), memory=8).memory == 8
    with pytest.raises(ConfigError, match="memory='lots': 'lots' is not an amount of memory"):
        read_settings(Request, file, ["memory=lots"])


@pytest.mark.slow
def test_a_budget_on_the_command_line(llama: Path) -> None:
    assert run(str(llama), "method=lora", "max_length=8", "memory=24GB")["fits"] is True
