"""The adviser: what it looks at, what fits, the order for each goal, run files, and one clear error for each fault."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
import yaml
from typer.testing import CliRunner

from peftree import registry
from peftree.advise import advice as advising
from peftree.advise import cost as costs
from peftree.advise import rules, table
from peftree.advise.advice import Asked, Judged, advise
from peftree.advise.candidates import Candidate, candidates
from peftree.advise.command import seconds
from peftree.advise.cost import Cost, Setting
from peftree.advise.measures import Forgetting, Rate
from peftree.advise.rank import Estimate
from peftree.advise.serve import serving
from peftree.advise.settings import run_settings, write_run
from peftree.advise.situation import data_profile, model_profile
from peftree.advise.table import Context, Measured, Table
from peftree.cli import app
from peftree.data.rows import load_data
from peftree.errors import ConfigError, DataError, PeftreeError
from peftree.plan import Request, request
from peftree.settings import DataConfig, load_config
from peftree.train.run import run
from train import tiny

GOOD: dict[str, float] = {"lora": 0.95, "houlsby": 0.97, "ia3": 0.9, "bitfit": 0.93, "dora": 0.94, "layernorm": 0.5}
LIGHT = {"memory": 1 << 30}


def invented() -> Table:
    """Return evidence on two tasks: what is good, slow and forgetful differs."""
    plain: dict[str, Any] = {
        "source": "our benchmark", "tier": "small", "modality": "language", "kind": "understanding",
        "metric": "accuracy", "model": "other", "parameters": 20_000, "rows": 60, "steps": 10,
        "baseline": "head_only", "forgetting": "rise of the loss",
    }  # fmt: skip
    contexts = {name: Context(group=name, **plain) for name in ("one", "two")}
    rows = []
    for i, (method, value) in enumerate({"full": 1.0, **GOOD}.items()):
        more = {"time": 1.0 - i / 10, "forgets": i / 10, "times": 2.0, "low": value - 0.02, "high": value + 0.02}
        rows += [Measured(task=t, method=method, seeds=5, relative=value, gain=value, **more) for t in contexts]
    return Table(origin="invented", contexts=contexts, results=tuple(rows))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a classifier's config and tokenizer, and no weights."""
    folder = tmp_path_factory.mktemp("model")
    words = tiny.tokenizer()
    tf.BertConfig(vocab_size=len(words), max_position_embeddings=40, **tiny.SHAPE).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of reviews."""
    return str(tiny.write_csv(tmp_path_factory.mktemp("data") / "train.csv", tiny.reviews(60)))


@pytest.fixture
def known_(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the invented evidence is known."""
    monkeypatch.setattr(advising, "known", lambda: (invented(),))


def told(asked: Asked) -> list[str]:
    """Return the labels of what is recommended."""
    return [r.judged.candidate.label for r in advise(asked).recommended]


@pytest.mark.usefixtures("known_")
class TestAdvice:
    """On invented evidence, a tiny model, and the real planner."""

    def test_three_methods_by_quality_with_what_each_takes(self, model: str, data: str) -> None:
        found = advise(Asked(model=model, data=data, **LIGHT))
        labels = [r.judged.candidate.method for r in found.recommended]
        assert len(labels) == len(set(labels)) == 3
        assert labels[0] == "houlsby" and set(labels[1:]) <= {
            *("lora", "dora", "bitfit", "rslora", "lora_plus", "pissa", "clip_lora", "lora_fa", "olora"),
        }
        for each in found.recommended:
            cost = each.judged.cost
            assert cost is not None and cost.fits and 0 < cost.plan.expected <= LIGHT["memory"]
            assert cost.largest is not None and cost.largest >= cost.batch == 16
            assert any(line.startswith("expected quality 0.9") for line in each.why)
        first = found.recommended[0].judged
        assert first.against is not None and first.against[0] == pytest.approx(-0.03, abs=0.03)
        assert any(line.startswith("against full fine-tuning -0.0") for line in found.recommended[0].why)
        assert (first.estimate.tasks, first.estimate.runs) == (2, 10) and first.rate == Rate(
            pytest.approx(2 ** (2 / 3)), 2
        )
        json.dumps(found.to_dict(), default=str)

    def test_what_is_not_separated_says_so(self, model: str, data: str) -> None:
        found = advise(Asked(model=model, data=data, **LIGHT))
        assert [r.separable for r in found.recommended] == [None, False, False]
        assert any(line.startswith("no difference shown in quality between houlsby") for line in found.notes)
        assert any("other models and data than yours" in line for line in found.notes)

    @pytest.mark.slow
    def test_each_goal_has_its_own_order(self, model: str, data: str) -> None:
        leanest = advise(Asked(model=model, data=data, goal="memory", **LIGHT)).recommended
        sizes = [r.judged.cost.plan.expected for r in leanest if r.judged.cost]
        assert sizes == sorted(sizes) and len(sizes) == 3
        quality = advise(Asked(model=model, data=data, **LIGHT)).recommended[0].judged.cost
        assert quality is not None and sizes[0] < quality.plan.expected
        fast = advise(Asked(model=model, data=data, goal="speed", **LIGHT)).recommended
        times = [r.judged.time for r in fast]
        assert times == sorted(times, key=lambda t: t or 9) and times[0] == pytest.approx(0.5)
        assert "layernorm" not in [r.judged.candidate.label for r in fast], "far below the best in quality"
        kept = advise(Asked(model=model, data=data, goal="retention", **LIGHT)).recommended
        places = [r.judged.forgets.place for r in kept if r.judged.forgets]
        assert places == sorted(places) and told(Asked(model=model, data=data, goal="retention", **LIGHT))[0] == "full"
        served = advise(Asked(model=model, data=data, goal="serving", **LIGHT)).recommended
        ranks = [r.judged.serving.rank for r in served]
        assert ranks == sorted(ranks, reverse=True) and ranks[0] > 0

    def test_unknown_methods_come_last_and_are_named(self, model: str, data: str) -> None:
        found = advise(Asked(model=model, data=data, **LIGHT))
        unknown = {j.candidate.label for j in found.others if not j.estimate.known}
        assert {"ssf", "pfeiffer", "prefix_tuning"} <= unknown
        judged = [advising.judge(advising.Evidence((invented(),)), _query(), c, "generation") for c in candidates([])]
        order = advising.ordered(judged, "quality")
        states = [j.estimate.known for j in order]
        assert states == sorted(states, reverse=True)

    def test_what_does_not_apply_or_fit_is_passed_over(
        self, model: str, data: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = costs.plan

        def heavy(asked: Request) -> Any:
            found = real(asked)
            return dataclasses.replace(found, expected=1 << 40) if asked.method.name == "houlsby" else found

        monkeypatch.setattr(costs, "plan", heavy)
        found = advise(Asked(model=model, data=data, **LIGHT))
        assert "houlsby" not in [r.judged.candidate.label for r in found.recommended]
        assert found.misfits["houlsby"].startswith("takes at least 1.1e+03 GB")

    @pytest.mark.slow
    def test_nothing_that_fits_is_an_error_with_the_least(
        self, model: str, data: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = dataclasses.replace(costs.plan(request(model=model)), expected=1 << 40)
        monkeypatch.setattr(costs, "plan", lambda asked: made)
        with pytest.raises(ConfigError, match=r"Nothing fits 1\.07 GB: the smallest candidate takes 1\.1e\+03 GB"):
            advise(Asked(model=model, data=data, **LIGHT))

    def test_full_fine_tuning_stands_behind_what_is_not_separated_from_it(self, model: str, data: str) -> None:
        assert "full" not in told(Asked(model=model, data=data, **LIGHT))
        order = [_judged("full", 1.0, 0.0), _judged("lora", 0.9, 0.01), _judged("ia3", 0.8, 0.3)]
        assert [j.candidate.method for j in advising.ordered(order, "quality")] == ["lora", "ia3", "full"]
        apart = [_judged("full", 1.0, 0.0), _judged("lora", 0.9, 0.01)]
        assert [j.candidate.method for j in advising.ordered(apart, "quality")] == ["full", "lora"]

    def test_the_run_files_train(self, data: str, tmp_path: Path) -> None:
        words = tiny.tokenizer()
        config = tf.BertConfig(vocab_size=len(words), max_position_embeddings=40, **tiny.SHAPE)
        whole = tiny.save("BertModel", config, tmp_path / "model", words)
        found = advise(Asked(model=whole, data=data, **LIGHT))
        for each in found.recommended:
            path = write_run(tmp_path / "runs", each.run, each.judged.candidate, each.why)
            assert path.read_text().startswith(f"# {each.judged.candidate.label}\n# expected")
            settings = load_config(path)
            assert settings.method.name == each.judged.candidate.method and settings.batch_size == 16
        short = ["steps=2", f"output={tmp_path / 'out'}", "quiet=true", "base_score=false"]
        result = run(load_config(path, short))
        assert result.steps == 2 and result.method == found.recommended[-1].judged.candidate.method
        assert result.lr == pytest.approx(registry.get(result.method).tags.lr * 2 ** (2 / 3), rel=0.05)


def _query() -> Any:
    return advising.Query("language", "understanding", 20_000, 60)


def _judged(method: str, value: float, error: float, tasks: int = 3) -> Judged:
    estimate = Estimate(value, value - 0.3, value + 0.3, error, tasks, tasks)
    return Judged(Candidate(method), estimate, None, None, serving(Candidate(method), "generation"), None)


def test_the_profile_of_a_model_needs_its_config_alone(model: str, tmp_path: Path) -> None:
    found = model_profile(model, "text-classification", 3)
    assert found.name == "BertForSequenceClassification" and found.positions == 40 and not found.decoder
    config = tf.BertConfig.from_pretrained(model, num_labels=3)
    count = sum(p.numel() for p in tf.BertForSequenceClassification(config).parameters())
    assert (found.parameters, found.weights) == (count, 2 * count)
    assert "attn.q" in found.roles and sum(found.towers.values()) > 10
    clip = {"text_config": {"vocab_size": 50, **tiny.SHAPE}, "vision_config": {"image_size": 16, "patch_size": 8}}
    clip["vision_config"] |= tiny.SHAPE
    tf.CLIPConfig(**clip).save_pretrained(tmp_path)
    towers = model_profile(str(tmp_path), "image-text-retrieval", 0).towers
    assert {"text", "vision"} <= set(towers)


def test_the_profile_of_data_counts_rows_classes_and_tokens(model: str, tmp_path: Path) -> None:
    rows = [*tiny.reviews(30), ("good film", "rare"), ("bad film", "rare")]
    path = str(tiny.write_csv(tmp_path / "train.csv", rows))
    data = load_data(path)
    found = data_profile(path, data, model)
    assert (found.task, found.classes, found.counted) == ("text-classification", 3, True)
    assert found.rows + found.valid == 32 and found.smallest <= 2
    assert found.tokens is not None and found.tokens[3] == max(len(r.source.split()) for r in data.train)
    (tmp_path / "bare").mkdir()
    guess = data_profile(path, data, str(tmp_path / "bare"))
    assert not guess.counted and any("estimated" in note for note in guess.notes)


def test_images_have_a_side(tmp_path: Path) -> None:
    folder = tiny.write_pairs(tmp_path / "pairs", 12)
    data = load_data(str(folder), task="captioning")
    found = data_profile(str(folder), data, str(tmp_path))
    assert (found.modality, found.side) == ("vision-language", tiny.PIXELS)
    bare = tmp_path / "vit"
    tf.ViTConfig(image_size=32, patch_size=8, **tiny.SHAPE).save_pretrained(bare)
    assert model_profile(str(bare), "image-classification", 2).side == 32
    (bare / "preprocessor_config.json").write_text('{"size": {"height": 16}}')
    assert model_profile(str(bare / "config.json"), "image-classification", 2).side == 16, "as a run would"
    assert model_profile(str(bare), "image-classification", 2, image=24).side == 24
    with pytest.raises(ConfigError, match="not a multiple of the patch size"):
        model_profile(str(bare), "image-classification", 2, image=25)
    made = model_profile("dit-fashion", "image-generation", 2)  # a packaged model, by its name
    assert (made.name, made.side) == ("DiffusionTransformer", 28)


def asked(model: str, data: str, **more: Any) -> Asked:
    return Asked(model=model, data=data, **(LIGHT | more))


def _profiles(model: str, data: str) -> tuple[Any, Any]:
    rows = load_data(data)
    return model_profile(model, rows.task, len(rows.labels)), data_profile(data, rows, model)


def test_length_and_precision_follow_from_data_and_budget(model: str, data: str) -> None:
    m, d = _profiles(model, data)
    how = costs.setting(m, d, asked(model, data))
    assert how.length % 8 == 0 and how.length >= d.tokens[2] and how.dtype == "float32" and how.labels == 2
    assert costs.setting(m, d, asked(model, data, memory=5 * m.parameters)).dtype == "bfloat16"
    assert costs.setting(m, d, asked(model, data, max_length=40)).length == 40
    with pytest.raises(ConfigError, match="max_length=41: the model takes 40"):
        costs.setting(m, d, asked(model, data, max_length=41))
    with pytest.raises(ConfigError, match=r"below the weights of .* themselves"):
        costs.setting(m, d, asked(model, data, memory=m.weights))


def test_the_ladder_gives_up_rows_then_activations(model: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    m, d = _profiles(model, data)
    wanted = costs.request(asked(model, data), d, costs.setting(m, d, asked(model, data)), "lora", {})
    whole = costs.plan(wanted)
    taken: list[tuple[int, bool]] = []

    def made(limit: dict[tuple[int, bool], int]) -> Cost:
        taken.clear()

        def fake(r: Request) -> Any:
            taken.append((r.batch_size, r.gradient_checkpointing))
            return dataclasses.replace(
                whole, request=r, expected=limit.get((r.batch_size, r.gradient_checkpointing), 200)
            )

        monkeypatch.setattr(costs, "plan", fake)
        return costs.cost(wanted, 100)

    assert made({(16, False): 90}).accumulation == 1 and taken == [(16, False)]
    found = made({(1, True): 10, (4, False): 90})
    assert (found.batch, found.accumulation, found.checkpointing, found.fits) == (4, 4, False, True)
    found = made({(1, True): 10, (16, True): 90})
    assert (found.batch, found.checkpointing) == (16, True)
    found = made({(1, True): 10})
    assert (found.batch, found.accumulation, found.checkpointing) == (1, 16, True)
    assert not made({}).fits and taken == [(16, False), (1, True)]


def test_run_settings_say_what_was_planned(model: str, data: str) -> None:
    _, d = _profiles(model, data)
    how = Setting(24, "bfloat16", image=16)
    wanted = costs.request(asked(model, data), d, dataclasses.replace(how, labels=2), "lora", {"r": 4})
    plan = costs.plan(wanted)
    assert (wanted.image_size, wanted.length, wanted.dtype, wanted.batch_size) == (16, 24, "bfloat16", 16)
    run = asked(model, data, epochs=7, method="dora")
    run = run.model_copy(update={"data": DataConfig(train=data, columns={"text": "review"})})
    found = run_settings(run, d, Candidate("lora", {"r": 4}), how, Cost(plan, True, 4, 4, True), Rate(0.5, 3))
    assert found["data"] == {"train": data, "columns": {"text": "review"}} and found["max_length"] == 24
    assert (found["epochs"], found["task"]) == (7, d.task) and "memory" not in found and "goal" not in found
    assert (found["batch_size"], found["accumulation"], found["activations"]) == (4, 4, "checkpoint")
    assert found["image_size"] == 16
    assert found["lr"] == registry.get("lora").tags.lr / 2 and found["dtype"] == "bfloat16"
    assert found["method"] == {"name": "lora", "fields": {"r": 4}}


def test_a_run_file_of_ones_own_is_kept(tmp_path: Path) -> None:
    one = Candidate("lora", {"sites": "attn.q attn.v"})
    path = write_run(tmp_path, {"model": "m"}, one, ())
    assert path.name == "lora-sites-attn.q-attn.v.yaml" and yaml.safe_load(path.read_text()) == {"model": "m"}
    assert write_run(tmp_path, {"model": "m"}, one, ()) == path
    with pytest.raises(ConfigError, match="exists with other content"):
        write_run(tmp_path, {"model": "n"}, one, ())
    with pytest.raises(ConfigError, match="is not a folder"):
        write_run(path, {"model": "n"}, one, ())


def test_candidates_are_the_registry_and_more_each_once() -> None:
    found = candidates([invented()])
    labels = [c.label for c in found]
    assert set(registry.methods()) <= set(labels) and "lora sites=linear" in labels
    assert len(labels) == len(set(labels))
    extra = Measured(task="one", method="vera", fields={"r": 64}, seeds=1, relative=0.5)
    more = invented().model_copy(update={"results": (*invented().results, extra)})
    assert "vera r=64" in [c.label for c in candidates([more])]


def test_where_an_adapter_can_be_served() -> None:
    lora, dora = serving(Candidate("lora", {"r": 64}), "generation"), serving(Candidate("dora"), "generation")
    assert lora.vllm and lora.llama_cpp and lora.peft and lora.merged
    assert any("--max-lora-rank 64" in note for note in lora.notes)
    assert not serving(Candidate("lora"), "generation").notes[0].startswith("vLLM"), "rank 8 needs no option"
    assert any("--max-lora-rank 32" in n for n in serving(Candidate("pissa", {"r": 16}), "generation").notes)
    assert dora.peft and dora.merged and not dora.vllm
    assert not serving(Candidate("lora"), "text-classification").vllm
    assert serving(Candidate("houlsby"), "generation").text == "peftree only"
    assert serving(Candidate("bitfit"), "generation").text.startswith("merged")


def test_every_rule_has_a_source_and_a_case() -> None:
    found = rules.rules()
    assert found and all(r.source.startswith(("arXiv ", "Schulman")) for r in found)
    known = set(registry.methods())
    assert all(set(r.when.methods) <= known for r in found)
    said = [r.rule for r in rules.apply(("ia3",), "vision", "understanding", 100)]
    assert len(said) == 1 and said[0].startswith("Tune the learning rate")
    rank = [r for r in found if r.rule.startswith("Raise the rank")]
    assert rank[0] in rules.apply(("lora",), "language", "generation", 50_000)
    assert rank[0] not in rules.apply(("lora",), "language", "generation", 500)


def test_forgetting_is_shown_beside_full_fine_tuning() -> None:
    from peftree.advise.show import forgotten

    assert forgotten(None).startswith("unknown")
    assert forgotten(Forgetting(0.2, (("t", "rise", 0.05, 0.1),))) == "+0.05, full fine-tuning +0.1 (rise; t)"


CASES = {
    "no config": (["{empty}", "data={data}", "--memory", "1GB"], "has no config.json"),
    "no data": (["{model}", "data={empty}/nowhere.csv", "--memory", "1GB"], "does not exist"),
    "bad data": (["{model}", "data={broken}", "--memory", "1GB"], "broken.jsonl:2"),
    "bad memory": (["{model}", "data={data}", "--memory", "lots"], "'lots' is not an amount of memory"),
    "bad goal": (["{model}", "data={data}", "--memory", "1GB", "--goal", "spede"], "Did you mean 'speed'"),
    "bad task": (["{model}", "data={data}", "--memory", "1GB", "task=x"], "there is no task 'x'"),
    "bad probe": (["{model}", "data={data}", "--memory", "1GB", "--probe", "soon"], "'soon' is not a duration"),
    "bad column": (["{model}", "data={data}", "--memory", "1GB", "data.columns.txt=text"], "do not determine the task"),
    "no budget": (["{model}", "data={data}"], "Add --memory 24GB"),
    "an option of old": (["{model}", "--data", "{data}", "--memory", "1GB"], "Settings are key=value: data="),
    "another of old": (["{model}", "data={data}", "--memory", "1GB", "--length", "40"], "key=value: max_length="),
    "an old name": (["{model}", "data={data}", "--memory", "1GB", "length=40"], "Write max_length"),
    "small budget": (["{model}", "data={data}", "--memory", "1KB"], "below the weights"),
    "bad write": (["{model}", "data={data}", "--memory", "1GB", "--write", "{data}"], "is not a folder"),
    "wrong task": (["{model}", "data={data}", "--memory", "1GB", "task=text-regression"], "no column"),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_input_is_one_clear_error_before_any_work(
    case: str, model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a", "label": "b"}\nnot json\n')
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(costs, "plan", lambda _: pytest.fail("planned before all was checked"))
    words, wanted = CASES[case]
    names = {"model": model, "data": data, "empty": tmp_path / "empty", "broken": broken}
    done = CliRunner().invoke(app, ["advise", *(w.format(**names) for w in words)])
    assert isinstance(done.exception, PeftreeError), done.output
    assert wanted in str(done.exception) and done.exception.fix


def test_durations() -> None:
    assert (seconds("90s"), seconds("5min"), seconds("1.5h")) == (90.0, 300.0, 5400.0)
    for bad in ("", "5", "min", "0s", "-1s", "5 minutes"):
        with pytest.raises(ConfigError, match="not a duration"):
            seconds(bad)


@pytest.mark.usefixtures("known_")
def test_the_command_prints_a_table_or_json_and_writes_run_files(model: str, data: str, tmp_path: Path) -> None:
    words = ["advise", model, f"data={data}", "--memory", "1GiB", "--write", str(tmp_path / "runs")]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found["recommended"]) == 3 and found["recommended"][0]["judged"]["label"] == "houlsby"
    assert found["recommended"][0]["judged"]["cost"]["plan"]["expected"] > 0
    assert sorted(found["written"]) == sorted(map(str, (tmp_path / "runs").glob("*.yaml")))
    text = CliRunner().invoke(app, [*words, "--quiet"])
    assert text.exit_code == 0, text.output
    for part in ("houlsby", "no difference shown", "Quality unknown", "served by", "arXiv 2602.04998", "next: peftree"):
        assert part in text.stdout, part


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['peftree', 'advise', '--help']\n"
        "from peftree.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules), 'loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_evidence_that_is_damaged_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "study.json").write_text("{}")
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    table.known.cache_clear()
    try:
        with pytest.raises(DataError, match=r"study\.json is not a table of evidence"):
            table.known()
    finally:
        table.known.cache_clear()
