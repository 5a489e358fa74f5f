"""Run configurations: strict YAML with file and line, overrides, and a resolved file that is the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import peftree
from peftree import registry
from peftree.errors import ELSEWHERE, ConfigError, PeftreeError
from peftree.named_method import make_method
from peftree.settings import RENAMED, RunConfig, load_config, write_resolved

GOOD = """\
model: ./minilm
data:
  train: train.csv
  test: test.csv
method:
  name: lora
  r: 16
epochs: 2
lr: 1e-4
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_reads_and_fills_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    assert config.method.fields == {"r": 16}
    assert config.lr == 1e-4  # YAML 1.1 reads 1e-4 as a word; the field makes it a number
    assert config.batch_size == 16
    assert config.data.valid is None


def test_short_forms() -> None:
    config = load_config(None, ["model=m", "data=reviews.csv", "method=dora"])
    assert config.data.train == "reviews.csv"
    assert config.method.name == "dora"


@pytest.mark.parametrize(
    ("file", "words", "want"),
    [
        ("", [], "exact"),
        ("activations: recompute", [], "recompute"),
        ("gradient_checkpointing: true", [], "checkpoint"),
        ("gradient_checkpointing: false", [], "exact"),
        ("activations: checkpoint\ngradient_checkpointing: true", [], "checkpoint"),
        ("activations: recompute\ngradient_checkpointing: false", [], "recompute"),
        ("activations: recompute", ["gradient_checkpointing=true"], "checkpoint"),
        ("activations: recompute", ["gradient_checkpointing=false"], "recompute"),
        ("activations: checkpoint", ["gradient_checkpointing=false"], "exact"),
        ("gradient_checkpointing: true", ["activations=recompute"], "recompute"),
        ("gradient_checkpointing: true", ["gradient_checkpointing=false"], "exact"),
    ],
)
def test_gradient_checkpointing_is_one_of_the_activations(
    tmp_path: Path, file: str, words: list[str], want: str
) -> None:
    config = load_config(write(tmp_path, GOOD + file), words)
    assert (config.activations, config.gradient_checkpointing) == (want, want == "checkpoint")
    plain = config.resolved({}, 1e-3)
    assert plain["activations"] == want and "gradient_checkpointing" not in plain
    assert load_config(write_resolved(tmp_path / "resolved.yaml", plain)).activations == want


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("activations: recompute\ngradient_checkpointing: true", "differ: say one of them"),
        ("activations: checkpoint\ngradient_checkpointing: false", "differ: say one of them"),
        ("gradient_checkpointing: some", "is not true or false"),
        ("activations: recompute\ncompile: true", "activations=recompute does nothing in a compiled model"),
        ("activations: none", "activations"),
    ],
)
def test_activations_that_cannot_be(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(write(tmp_path, GOOD + text))


def test_overrides_reach_every_level(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    texts = ["epochs=5", "data.valid=v.csv", "method.alpha=4", "r=32", "sites=attn.q attn.v", "task=generation"]
    config = load_config(path, texts)
    assert config.epochs == 5
    assert (config.data.train, config.data.valid) == ("train.csv", "v.csv")
    assert config.method.fields == {"r": 32, "alpha": 4, "sites": "attn.q attn.v"}
    assert config.task == "generation"


def test_another_method_drops_the_first_ones_fields(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert load_config(path, ["method=pfeiffer"]).method.fields == {}
    assert load_config(path, ["method=lora"]).method.fields == {"r": 16}


BAD = [
    ("model: m\ndata: d\nepoch: 3\n", [], r"run\.yaml:3: there is no key 'epoch'.*Did you mean 'epochs'"),
    ("model: m\ndata:\n  trian: a\n", [], r"run\.yaml:3: there is no key 'data\.trian'.*Did you mean 'train'"),
    ("modle: m\ndata: d\n", [], r"run\.yaml:1: there is no key 'modle'.*Did you mean 'model'"),
    ("model: m\ndata: d\nepochs: -1\n", [], r"run\.yaml:3: epochs=-1: .*greater than 0"),
    ("model: m\ndata: d\nbatch_size: 2.5\n", [], r"run\.yaml:3: batch_size=2\.5"),
    ("model: m\ndata: d\nschedule: linaer\n", [], r"run\.yaml:3: schedule='linaer'"),
    ("model: m\ndata: d\nmodel: n\n", [], r"run\.yaml:3: model: is set twice.*run\.yaml:1"),
    ("data: d\n", [], r"model is missing. Add model: folder of a transformers model"),
    ("model: &a m\ndata: *a\n", [], "anchors or aliases"),
    ("model: [m\n", [], r"run\.yaml:\d: "),
    ("- model\n", [], "holds no keys"),
    ("", [], "holds no keys"),
    ("? [a]\n: b\n", [], "a key is not a plain word"),
    ("model: m\ndata: d\nlr: !!python/object:os.system x\n", [], r"run\.yaml:3: could not determine a constructor"),
    ("model: m\ndata: d\nadapter: ../x\n", [], r"run\.yaml:3: adapter='\.\./x'"),
    ("model: m\ndata: d\nseed: " + "1" * 40 + "\n", [], r"run\.yaml:3: seed"),
    ("model: m\ndata: d\nlr: .nan\n", [], r"run\.yaml:3: lr=nan: Input should be a finite number"),
    ("a: {" * 40 + "}" * 40 + "\n", [], "nested too deeply"),
    ("a: " + "[" * 20000 + "]" * 20000 + "\n", [], "nested too deeply"),
    ("model: m\ndata: d\nearly_stopping: 2\neval_every: 0\n", [], "early_stopping needs evaluations"),
    (GOOD, ["epochs"], "'epochs' is not an override"),
    (GOOD, ["epochs=x"], r"'epochs=x': epochs='x'"),
    (GOOD, ["batch_sise=4"], "a run has no key 'batch_sise'.*Did you mean 'batch_size'"),
    (GOOD, ["data.trian=x"], r"'data\.trian=x': there is no key 'data\.trian'.*Did you mean 'train'"),
]


@pytest.mark.parametrize(("text", "overrides", "message"), BAD)
def test_bad_files_are_one_error(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text), overrides)


def test_file_limits(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match="more than"):
        load_config(write(tmp_path, "# " + "x" * (1 << 20)))
    (tmp_path / "run.yaml").write_bytes(b"model: \xff\xfe\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(("theirs", "ours"), [pair for pair in ELSEWHERE.items() if pair[1] not in peftree.__all__])
def test_names_of_other_libraries_are_answered_with_ours(theirs: str, ours: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{theirs}=1': lora has no field '{theirs}'.*Did you mean '{ours}'\?"):
        make_method(load_config(None, ["model=m", "data=d", f"{theirs}=1"]))


@pytest.mark.parametrize(("word", "value"), [("length=5", 5), ("columns=ff.out", "ff.out")])
def test_a_field_with_the_name_of_an_old_setting_is_the_methods(word: str, value: object) -> None:
    method = "prefix_tuning" if "length" in word else "ia3"
    name = word.partition("=")[0]
    config = load_config(None, ["model=m", "data=d", f"method={method}", word])
    assert getattr(make_method(config), name) == value and config.max_length is None


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_is_answered_with_the_new_one(tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.yaml:3: {old}: was renamed\. Write {new}\."):
        load_config(write(tmp_path, f"model: m\ndata: d\n{old}: 8\n"))
    if old != "fields":
        with pytest.raises(ConfigError, match=rf"'{old}=8': lora has no field '{old}'\. Write {new}\."):
            make_method(load_config(None, ["model=m", "data=d", f"{old}=8"]))


def test_method_fields_are_checked_with_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("r: 16", "rank: 16"))
    with pytest.raises(ConfigError, match=r"run\.yaml:7: lora has no field 'rank'"):
        make_method(load_config(path))
    with pytest.raises(ConfigError, match=r"run\.yaml:7: lora: r=0: .*r: rank\. The default is 8"):
        make_method(load_config(write(tmp_path, GOOD.replace("r: 16", "r: 0"))))
    with pytest.raises(ConfigError, match=r"'alhpa=3': lora has no field 'alhpa'.*Did you mean 'alpha'"):
        make_method(load_config(None, ["model=m", "data=d", "alhpa=3"]))
    with pytest.raises(PeftreeError, match=r"^'method=lorra': There is no method 'lorra'.*Did you mean 'lora'"):
        make_method(load_config(path, ["method=lorra"]))
    with pytest.raises(PeftreeError, match=r"run\.yaml:6: There is no method 'lorra'"):
        make_method(load_config(write(tmp_path, GOOD.replace("name: lora", "name: lorra"))))
    with pytest.raises(ConfigError, match="alpha=nan: Input should be a finite number"):
        make_method(load_config(None, ["model=m", "data=d", "alpha=.nan"]))


@pytest.mark.parametrize("layers", ["-1:", "3", "0-1,3", "1:30", "-4:"])
def test_layers_are_text_however_they_are_written(tmp_path: Path, layers: str) -> None:
    """YAML reads 3 as a number, 1:30 as one to the base 60, and -1: as a mapping."""
    written = GOOD.replace("r: 16", "layers: " + (f'"{layers}"' if layers.endswith(":") else layers))
    found = [load_config(write(tmp_path, written)), load_config(None, ["model=m", "data=d", f"layers={layers}"])]
    assert [make_method(config).layers for config in found] == [layers, layers]
    sites = load_config(None, ["model=m", "data=d", f"sites=attn.q@{layers}"])
    assert make_method(sites).sites == f"attn.q@{layers}"


def test_resolved_file_is_the_same_run(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    method = make_method(config)
    resolved = config.resolved(registry.spec(method)["fields"], 1e-4)
    path = write_resolved(tmp_path / "resolved.yaml", resolved)
    again = load_config(path)
    assert again.resolved(registry.spec(make_method(again))["fields"], 1e-4) == resolved
    assert set(yaml.safe_load(path.read_text())) == set(RunConfig.model_fields)
    assert set(resolved["method"]["fields"]) == set(registry.get("lora").model_fields) - {"by_site"}


def test_is_read_without_torch() -> None:
    code = "import sys, peftree.settings; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
