"""A run's folder: one process at a time, what it was made of, and real kills at the worst moments."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from peftree.data.rows import load_data
from peftree.errors import BusyError, ConfigError, TrainError
from peftree.settings import SETTINGS, RunConfig, load_config, write_resolved
from peftree.train import run as runs
from peftree.train.export import export_run
from peftree.train.output import LOCK, beside, check_inputs, check_place, check_settings, held
from peftree.train.run import open_run, run
from sampled import quick
from train.tiny import reviews, tokenizer, write_csv

# Nothing here needs these packages, and transformers imports what is installed: a third of the seconds of a start.
LEAN = """
import sys
sys.modules.update(dict.fromkeys(("peft", "bitsandbytes", "torchao", "datasets", "sklearn")))
"""
HOLD = """
import sys, time
from peftree.train.output import held
with held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""
MAIN = f"{LEAN}\nfrom peftree.cli import main\nmain()"
# A run that stops, for the test to kill it, where `sys.argv[1]` says.
STOPS = """
import sys, time
from peftree.train import run as runs
def stop(*args, **more):
    print("here", flush=True)
    time.sleep(600)
where = sys.argv[1]
if where == "scoring":
    class Scored(runs.AdapterTrainer):
        def train(self, *args, **more):
            found = super().train(*args, **more)
            runs.store.save = stop
            return found
    runs.AdapterTrainer = Scored
elif where == "metrics":
    runs._write_metrics = stop
runs.run(runs.load_config(None, sys.argv[2:]))
"""


def configured(model: str, data: Path, output: Path, *more: str) -> RunConfig:
    return load_config(None, words(model, data, output, *more))


def words(model: str, data: Path, output: Path, *more: str) -> list[str]:
    common = [f"model={model}", f"data={data}", f"output={output}", "batch_size=8", "quiet=true", "threads=1"]
    return [*common, "epochs=2", "lr=0.01", "r=2", "base_score=false", *more]


def started(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a process and return it once it has printed a line."""
    process = subprocess.Popen([sys.executable, "-c", LEAN + code, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() in ("held", "here")
    return process


def killed(code: str, *arguments: str) -> None:
    """Kill a process where it stands."""
    process = started(code, *arguments)
    process.kill()
    process.communicate()


def results(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """Return the adapter's bytes and what the metrics say, times and sizes of memory left out."""
    found = json.loads((folder / "metrics.json").read_text())
    kept = ("score", "values", "items", "steps", "curve", "trainable_parameters", "gradient_bytes", "optimizer_bytes")
    return (folder / "adapter" / "adapter.safetensors").read_bytes(), {k: found[k] for k in kept}


def test_a_run_that_broke_before_its_scores_is_taken_to_its_end(
    encoder: str, review_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(configured(encoder, review_data, tmp_path / "whole"))
    with monkeypatch.context() as patched:
        patched.setattr(runs, "training_bytes", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(configured(encoder, review_data, tmp_path / "cut"))
    with pytest.raises(ConfigError, match=r"Finish it: peftree train .*resume=true"):
        open_run(tmp_path / "cut")
    run(configured(encoder, review_data, tmp_path / "cut", "resume=true"))
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    with pytest.raises(TrainError, match="The run is finished"):
        run(configured(encoder, review_data, tmp_path / "cut", "resume=true"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "more"),
    [("metrics", []), ("scoring", ["steps=10", "save_every=10"]),
     ("scoring", ["epochs=40", "lr=0.05", "early_stopping=1", "schedule=constant"])],
    ids=["metrics", "within-an-epoch", "early-stop"],
)  # fmt: skip
def test_a_run_killed_after_its_last_step_is_taken_to_its_end(
    where: str, more: list[str], encoder: str, review_data: Path, tmp_path: Path
) -> None:
    run(configured(encoder, review_data, tmp_path / "whole", *more))
    killed(STOPS, where, *words(encoder, review_data, tmp_path / "cut", *more))
    if where == "scoring":
        with pytest.raises(ConfigError, match=r"Finish it: peftree train .*resume=true"):
            open_run(tmp_path / "cut")
    run(configured(encoder, review_data, tmp_path / "cut", *more, "resume=true"))
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    with pytest.raises(TrainError, match="The run is finished"):
        run(configured(encoder, review_data, tmp_path / "cut", *more, "resume=true"))


@pytest.mark.slow
def test_a_longer_run_killed_after_its_last_step_is_taken_to_its_end(
    encoder: str, review_data: Path, tmp_path: Path
) -> None:
    run(configured(encoder, review_data, tmp_path / "out", "schedule=constant", "warmup=0"))
    more = ["schedule=constant", "warmup=0", "epochs=3", "resume=true"]
    killed(STOPS, "scoring", *words(encoder, review_data, tmp_path / "out", *more))
    assert run(configured(encoder, review_data, tmp_path / "out", *more)).steps == 18


def test_a_folder_is_held_by_one_process(encoder: str, review_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(configured(encoder, review_data, tmp_path / "done"))
    other = started(HOLD, str(out))
    try:
        with pytest.raises(BusyError, match="another run trains there"):
            run(configured(encoder, review_data, out))
        for place in (out, out / "adapter"):
            with pytest.raises(BusyError, match="another run trains there"):
                export_run(tmp_path / "done", place)
        assert os.listdir(out) == [LOCK]
    finally:
        other.kill()
        other.communicate()
    assert run(configured(encoder, review_data, out)).steps == 12  # the lock died with its owner
    with held(out), held(out):
        pass


@pytest.mark.slow
def test_two_trainings_into_one_folder_are_one_and_a_refusal(encoder: str, review_data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAIN, "train"]
    pair = [
        subprocess.Popen([*command, *words(encoder, review_data, tmp_path / "out", f"seed={seed}")],
                         stderr=subprocess.PIPE, text=True)
        for seed in (1, 2)
    ]  # fmt: skip
    said = [process.communicate()[1] for process in pair]
    codes = sorted(process.returncode for process in pair)
    assert codes in ([0, 75], [0, 2]), said  # in use; or the first has ended by then: holds a run already
    winner = [seed for seed, process in zip((1, 2), pair, strict=True) if process.returncode == 0]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["seed"] == winner[0]
    assert load_config(tmp_path / "out" / "resolved.yaml").seed == winner[0]


@pytest.mark.parametrize(
    ("files", "data", "said"),
    [
        (["config.json", "vocab.txt"], "rows", "it is the folder of a model, with config.json"),
        (
            ["model-00001-of-00002.safetensors"],
            "rows",
            "it is the folder of a model, with model-00001-of-00002.safetensors",
        ),
        (["train.csv", "notes.txt"], "out", "it is the folder of the data, .*out"),
        (["train.csv", "notes.txt"], "out/train.csv", "it is the folder of the data, .*train.csv"),
        (["a/1.png", "b/2.png"], "out", "it is the folder of the data, .*out"),
    ],
)
def test_a_folder_of_a_model_or_of_data_gets_no_run(files: list[str], data: str, said: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for file in files:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).touch()
    before = sorted(out.rglob("*"))
    for output in (str(out), f"{out}/../out"):
        with pytest.raises(ConfigError, match=f"output: .*: {said}. Name another"):
            run(load_config(None, ["model=none", f"data={tmp_path / data}", f"output={output}"]))
    assert sorted(out.rglob("*")) == before


def test_other_folders_get_a_run(encoder: str, review_data: Path, tmp_path: Path) -> None:
    """One with a run file and logs, one beside the data, and one in which a run was begun beside its rows."""
    for name, more in (("out", ["run.yaml", "train.log", "plots/loss.png"]), ("rows/out", []), ("begun", [SETTINGS])):
        for file in more:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).touch()
        data = shutil.copytree(review_data, tmp_path / Path(name).parts[0], dirs_exist_ok=True)
        rows = data if name == "rows/out" else data / "train.csv" if name == "begun" else review_data
        check_place(load_config(None, [f"model={encoder}", f"data={rows}", f"output={tmp_path / name}"]))


def test_a_refused_start_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), held(tmp_path / "a" / "b"):
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def begun(encoder: str, review_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a run of which only the first part was done; its model lies in `tmp_path / "base"`."""
    base = tmp_path / "base"
    base.symlink_to(encoder)
    given = words(str(base), review_data, tmp_path / "out")
    run(load_config(None, [*given, "epochs=1"]))
    return [*given, "epochs=2", "resume=true"]


def test_moved_data_and_models_that_hold_the_same_resume(
    begun: list[str], encoder: str, review_data: Path, tmp_path: Path
) -> None:
    review_data.rename(tmp_path / "elsewhere")
    again = [*begun, f"model={encoder}", f"data={tmp_path / 'elsewhere'}"]
    assert run(load_config(None, again)).steps == 12


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_other_rows_in_the_same_files_do_not_resume(begun: list[str], review_data: Path, split: str) -> None:
    rows = reviews({"train": 48, "valid": 16, "test": 20}[split], {"train": 0, "valid": 1, "test": 2}[split])
    swapped = [(text, {"pos": "neg", "neg": "pos"}[label]) for text, label in rows[:2]]
    write_csv(review_data / f"{split}.csv", [*swapped, *rows[2:]])
    with pytest.raises(ConfigError, match=f"The {split} rows are not those"):
        run(load_config(None, begun))


def test_another_base_in_the_same_folder_does_not_resume(begun: list[str], tmp_path: Path) -> None:
    import torch
    import transformers as tf

    model = tf.BertModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[63, 5] += 1e-3
    (tmp_path / "base").unlink()
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"another base model: the values of .*word_embeddings"):
        run(load_config(None, begun))


def test_another_tokenizerbeside_the_same_base_does_not_resume(begun: list[str], encoder: str, tmp_path: Path) -> None:
    (tmp_path / "base").unlink()
    (tmp_path / "base").mkdir()
    for path in Path(encoder).iterdir():
        text = path.read_bytes()
        (tmp_path / "base" / path.name).write_bytes(text.replace(b'"good": 3', b'"good": 4').replace(
            b'"fine": 4', b'"fine": 3') if path.name == "tokenizer.json" else text)  # fmt: skip
    with pytest.raises(ConfigError, match=r"tokenizer\.json has changed since the run began"):
        run(load_config(None, begun))


@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model", "chat_template.jinja", "config.json"])
def test_any_small_filebeside_the_base_is_compared(tmp_path: Path, name: str) -> None:
    """What makes inputs lies in files of several kinds; one that comes, changes or goes is seen."""
    (tmp_path / "model.safetensors").write_bytes(b"weights have their own fingerprint")
    seen = [beside(str(tmp_path))]
    for text in (b"a", b"b"):
        (tmp_path / name).write_bytes(text)
        seen.append(beside(str(tmp_path)))
    (tmp_path / name).unlink()
    assert [set(files) for files in seen] == [set(), {name}, {name}]
    assert seen[1] != seen[2] and beside(str(tmp_path)) == seen[0]


@pytest.mark.parametrize("name", ["resolved.yaml", "inputs.json"])
@pytest.mark.parametrize("content", quick([None, b"{", b"", b"[1]", b"a: [", b"\xff\xfe"], 2))
def test_a_missing_or_damaged_record_is_an_error(
    begun: list[str], tmp_path: Path, name: str, content: bytes | None
) -> None:
    path = tmp_path / "out" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name} is missing or damaged"):
        run(load_config(None, begun))


def test_what_killed_saves_left_is_cleared_by_the_next_run(begun: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in (".checkpoint-6.x1", "..checkpoint-6.x1.y2", ".adapter.12-3-z"):
        (out / name).mkdir()
    (out / ".metrics.json.abc").write_text("{")
    (out / ".mine.txt").write_text("kept")
    run(load_config(None, begun))
    hidden = {path.name for path in out.iterdir() if path.name.startswith(".")}
    assert hidden == {LOCK, ".mine.txt"}


@pytest.mark.slow
def test_kills_at_any_time_leave_no_litter_and_resume_to_the_same_end(
    encoder: str, review_data: Path, tmp_path: Path
) -> None:
    more = ["steps=40", "save_every=1"]
    run(configured(encoder, review_data, tmp_path / "whole", *more))
    given = words(encoder, review_data, tmp_path / "cut", *more, "resume=true")
    for number in range(6):
        process = subprocess.Popen([sys.executable, "-c", MAIN, "train", *given], stderr=subprocess.DEVNULL)
        seen = len(list((tmp_path / "cut").glob("checkpoint-*")))
        end = time.monotonic() + 60
        while len(list((tmp_path / "cut").glob("checkpoint-*"))) <= min(seen, 1) and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.05 * number)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(load_config(None, given))
    assert results(tmp_path / "cut")[0] == results(tmp_path / "whole")[0]
    assert not [p for p in (tmp_path / "cut").iterdir() if p.name.startswith(".") and p.name != LOCK]


MOVES: dict[str, Any] = {
    "optimizer": "sgd", "precision": "bf16",
    "config": {"hidden_size": 8}, "adapter": "other", "head": True, "batch_size": 5, "eval_batch_size": 5,
    "accumulation": 2, "lr": 0.5, "weight_decay": 0.1, "schedule": "cosine", "warmup": 0.2, "max_grad_norm": 2.0,
    "max_length": 9, "image_size": 32, "generate": 3, "chat": True, "seed": 1, "dtype": "bfloat16",
    "packing": True, "group_by_length": True, "quantize": "nf4",
    "activations": "checkpoint", "eval_every": 3, "early_stopping": 2,
    "method": {"name": "lora", "fields": {"r": 3}},
}  # fmt: skip
STAYS = {
    "compile": True, "workers": 2, "shard": "fsdp", "chunked_loss": False,
    "output": "o", "task": "text-regression", "resume": True, "quiet": True, "threads": 2, "save_every": 3, "keep": 3,
    "epochs": 9.0, "steps": 99, "base_score": False, "log_every": 3, "data": {"train": "b.csv"}, "model": "m",
    "report_to": ["wandb"], "measure_memory": True,
}  # fmt: skip


def test_a_setting_that_moves_the_result_does_not_change_on_resume(tmp_path: Path) -> None:
    """Where a run is written, how long it is and what it prints may; a new setting has to be put on one side."""
    config = RunConfig(model="a", data={"train": "a.csv"}, output=str(tmp_path), resume=True)  # type: ignore[arg-type]
    resolved = config.resolved({"r": 8}, 0.1)
    assert set(resolved) == {*MOVES, *STAYS, "processes"} and not set(MOVES) & set(STAYS)
    (tmp_path / "checkpoint-1").mkdir()
    write_resolved(tmp_path / "resolved.yaml", resolved)
    assert check_settings(config, resolved) and check_settings(config, resolved | STAYS)
    for name, value in MOVES.items():
        with pytest.raises(ConfigError, match=f"other settings: .*{name}[. ]"):
            check_settings(config, resolved | STAYS | {name: value})
    for before, after in ((False, "exact"), (True, "checkpoint")):  # as older versions called it
        older = {k: v for k, v in resolved.items() if k != "activations"} | {"gradient_checkpointing": before}
        write_resolved(tmp_path / "resolved.yaml", older)
        assert check_settings(config, resolved | {"activations": after})
    write_resolved(tmp_path / "resolved.yaml", older | {"gradient_checkpointing": "on top"})
    with pytest.raises(ConfigError, match=r"resolved\.yaml is missing or damaged.*'on top' is not true or false"):
        check_settings(config, resolved)


def test_another_image_under_the_same_name_does_not_resume(vit: str, image_data: Path, tmp_path: Path) -> None:
    import transformers as tf

    model = tf.ViTModel.from_pretrained(vit)
    config = RunConfig(model=vit, data={"train": str(image_data)}, output=str(tmp_path / "out"))  # type: ignore[arg-type]
    (tmp_path / "out").mkdir()
    check_inputs(config, load_data(image_data), model, used=False)
    shutil.move(image_data, tmp_path / "elsewhere")
    check_inputs(config, load_data(tmp_path / "elsewhere"), model, used=True)
    one, other = sorted((tmp_path / "elsewhere" / "test" / "dark").iterdir())[:2]
    other.write_bytes(one.read_bytes())
    with pytest.raises(ConfigError, match="The test rows are not those"):
        check_inputs(config, load_data(tmp_path / "elsewhere"), model, used=True)
