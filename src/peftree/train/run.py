"""A whole run: read data, load the model, adapt, train, score before and after, save; and open it again."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from peftree import registry, store
from peftree.adapter import Adapter, adapt, disabled
from peftree.assets.models import located
from peftree.errors import ConfigError, MethodError, did_you_mean
from peftree.evaluate.cost import current_rss, peak_rss, reset_peak_rss, saved_bytes, training_bytes
from peftree.evaluate.quality import Scores
from peftree.files import atomic_write
from peftree.methods.contract import Method
from peftree.train.config import RunConfig, load_config, write_resolved
from peftree.train.data import Data, Example, load_data
from peftree.train.measure import Clock, Point, Saved, StepClock, calm, curve, environment
from peftree.train.tasks import Items, Options, Task, build_task
from peftree.train.thin import thinned
from peftree.train.trainer import AdapterTrainer

# Settings that a resumed run may change.
_FREE = (
    "output",
    "task",
    "resume",
    "quiet",
    "threads",
    "save_every",
    "keep",
    "epochs",
    "steps",
    "base_score",
    "log_every",
)


@dataclass(frozen=True)
class RunResult:
    """What a run found; `metrics.json` in the output folder holds the same under the same names.

    Attributes:
        task, model, method, branch, fields, lr, seed: what was trained.
        metric, higher_is_better, aggregate: the primary metric, and how `items` give it.
        split: `test`, or `valid` where no test file was given.
        score, values, items: after training, on that split; see `evaluate.quality.Scores`.
        base_score, base_values, base_items: the same without the adapter; empty if not asked for.
        labels: class names in the order of the model's outputs.
        trainable_parameters, total_parameters: of the adapter, and of the base model.
        adapter_bytes: of the saved files.
        peak_rss_bytes: most resident memory while training, of the process as a whole where the
            kernel cannot start that count anew; rss_after_load_bytes: before training.
        saved_for_backward_bytes: what the graph of one training batch keeps.
        gradient_bytes, optimizer_bytes: of one gradient for each trained tensor, and of the optimizer's state.
        setup_seconds, train_seconds, eval_seconds: wall time, each without the others.
        cpu_seconds: processor time of training alone.
        step_seconds: median of the steps after the first two; processor time on one thread of a CPU, else wall time.
        curve: points `{"step", "loss", "score"}`, the last on validation rows; None where not measured.
        environment: versions and threads.
    """

    task: str
    model: str
    method: str
    branch: str
    fields: dict[str, Any]
    lr: float
    seed: int
    metric: str
    higher_is_better: bool
    aggregate: str
    split: str
    score: float
    values: dict[str, float]
    items: tuple[float, ...]
    base_score: float | None
    base_values: dict[str, float]
    base_items: tuple[float, ...]
    labels: tuple[str, ...]
    n_train: int
    steps: int
    batch_size: int
    sites: int
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    peak_rss_bytes: int
    rss_after_load_bytes: int | None
    saved_for_backward_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    setup_seconds: float
    train_seconds: float
    eval_seconds: float
    cpu_seconds: float
    step_seconds: float | None
    curve: list[Point]
    output: str
    environment: dict[str, str | int] = field(default_factory=dict)


def run(config: RunConfig) -> RunResult:
    """Do the whole job that `config` describes and write everything into `config.output`.

    The folder gets `resolved.yaml`, `checkpoint-N/`, `adapter/` (for `peftree.load`) and `metrics.json`.

    Raises:
        PeftreeError: a setting, file, site or value is wrong, or training would fail silently.
        SystemExit: with code 143 after SIGTERM, once a checkpoint is written.
    """
    return complete(config.model_copy(update={"model": located(config.model, config.quiet)}))[0]


def complete(config: RunConfig, onto: OpenRun | None = None) -> tuple[RunResult, OpenRun]:
    """Do as `run` does, and return the trained model with its adapter on and its data too.

    Args:
        config: the run.
        onto: go on training the adapter of this one, on the data of `config`, with the same model,
            method, task and labels (else ConfigError).
    """
    clock = Clock()
    with clock("setup"):
        method = make_method(config)
        lr = method.tags.lr if config.lr is None else config.lr
        resolved = config.resolved(registry.spec(method)["fields"], lr)
        _check_output(config, resolved)
        if config.threads:
            torch.set_num_threads(config.threads)
        with calm(config.quiet):
            data, task, adapter = _prepare(config, method) if onto is None else _goes_on(config, onto)
        resolved["task"] = data.task
        task.progress = not config.quiet
        items = {s: task.items(getattr(data, s)) for s in ("train", "valid", "test")}
        trainer = _trainer(config, task, adapter, items, clock, lr)
        for line in (*data.warnings, *task.notes):
            trainer.say(f"note: {line}")
        write_resolved(Path(config.output) / "resolved.yaml", resolved)
        saved = Saved(lambda: _saved(config, task, items["train"]), clock)
        trainer.add_callback(saved)
    split, base = data.scored[0], None
    if config.base_score:
        with clock("eval"), disabled(task.model):
            base = task.score(items[split], config.eval_batch_size)
    loaded = current_rss()
    reset_peak_rss()
    with clock("train"):
        trainer.train(resume_from_checkpoint=config.resume)
    peak = peak_rss()
    sizes = training_bytes(adapter.parameters(), trainer.optimizer)
    with clock("eval"):
        scores = task.score(items[split], config.eval_batch_size)
    folder = store.save(adapter, Path(config.output) / "adapter", format="native")
    result = RunResult(
        **_what(config, method, resolved, lr), **_scored(scores, base, split), **_counts(task, adapter),
        labels=task.labels, n_train=len(data.train), steps=trainer.state.global_step,
        adapter_bytes=sum(p.stat().st_size for p in folder.iterdir()), peak_rss_bytes=peak,
        gradient_bytes=sizes["trainable"], optimizer_bytes=sizes["optimizer"],
        rss_after_load_bytes=loaded, saved_for_backward_bytes=saved.bytes, **clock.results(),
        curve=curve(trainer.state.log_history), environment=environment(),
    )  # fmt: skip
    _write_metrics(result, trainer)
    return result, OpenRun(config, task, adapter, data)


def make_method(config: RunConfig) -> Method:
    """Return the method of `config` with its fields.

    Raises:
        MethodError, ConfigError: an unknown method or field, or a value out of range, with file and line.
    """
    name, fields = config.method.name, config.method.fields
    try:
        known = registry.get(name).model_fields
    except MethodError as error:
        where = config.where("method.name") or config.where("method")
        raise MethodError(where + error.what, error.fix) from None
    for key in fields:
        if key not in known:
            where = config.where(f"method.{key}") or config.where(f"method.fields.{key}")
            hint = did_you_mean(key, [*known, *RunConfig.model_fields], f"Fields of {name} and keys of a run")
            raise ConfigError(f"{where}{name} has no field '{key}'.", hint)
    try:
        return registry.make(name, fields)
    except ConfigError as error:
        places = (config.where(f"method.{key}") for key in fields if f": {key}" in error.what)
        raise ConfigError(next(places, "") + error.what, error.fix) from None


@dataclass(frozen=True)
class OpenRun:
    """A finished run, its model loaded and its adapter on.

    Attributes:
        config: as it was run.
        task, adapter, data: the live objects; `task.model` is the model.
    """

    config: RunConfig
    task: Task
    adapter: Adapter
    data: Data

    def score(self, split: str | None = None) -> Scores:
        """Score the model as it stands on a split (`train`, `valid`, `test`; None: test, or valid without one)."""
        rows = self.data.scored[1] if split is None else getattr(self.data, split)
        return self.score_rows(rows)

    def score_rows(self, rows: Sequence[Example]) -> Scores:
        """Score the model as it stands on `rows`."""
        return self.task.score(self.task.items(rows), self.config.eval_batch_size)


def open_run(folder: str | Path, overrides: Sequence[str] = (), *, progress: bool = False) -> OpenRun:
    """Load the model, data and adapter of a finished run.

    Args:
        folder: its output folder.
        overrides: as for `load_config`: `data.test=other.csv`, `model=/moved/here`.
        progress: show a bar where scoring takes long.

    Raises:
        PeftreeError: the folder is not a finished run, or something in it is damaged or was moved.
    """
    path = Path(folder)
    if not (path / "adapter").is_dir():
        raise ConfigError(f"{path} is no finished run: it has no folder 'adapter'.", "Train it to its end.")
    config = load_config(path / "resolved.yaml", overrides)
    with calm(quiet=True):
        data = _data(config)
        task = build_task(config.model, data, _options(config))
        task.progress = progress
        adapter = store.load(task.model, path / "adapter", name=config.adapter)
    return OpenRun(config, task, adapter, data)


def _prepare(config: RunConfig, method: Method) -> tuple[Data, Task, Adapter]:
    data = _data(config)
    task = build_task(config.model, data, _options(config))
    adapter = adapt(task.model, method, name=config.adapter, head=config.head, seed=config.seed)
    if config.gradient_checkpointing:
        model: Any = task.model
        with warnings.catch_warnings():  # the name that every 5.x has; later ones say it will change
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return data, task, adapter


def _goes_on(config: RunConfig, onto: OpenRun) -> tuple[Data, Task, Adapter]:
    data, old = _data(config), onto.config
    pairs = {"model": (config.model, old.model), "method": (config.method, old.method)}
    pairs |= {"task": (data.task, onto.data.task), "labels": (set(data.labels), set(onto.data.labels))}
    for what, (new, before) in pairs.items():
        if new != before:
            raise ConfigError(f"This run's {what} differs from that of the run it goes on from.", "Train anew.")
    return data, onto.task, onto.adapter


def _data(config: RunConfig) -> Data:
    files = config.data.model_dump(exclude={"share", "label_noise"})
    data = load_data(**files, task=config.task, seed=config.seed)
    return thinned(data, config.data.share, config.data.label_noise)


def _options(config: RunConfig) -> Options:
    names = ("config", "dtype", "max_length", "image_size", "chat", "seed", "generate")
    return Options(**{name: getattr(config, name) for name in names})


def _check_output(config: RunConfig, resolved: dict[str, Any]) -> None:
    """Refuse a folder that cannot be made, and to mix two runs in one."""
    output = Path(config.output)
    there = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(
            f"{config.where('output')}output: {output}: {there} is no folder that can be written to.",
            "Name another output folder.",
        )
    used = (output / "metrics.json").exists() or any(output.glob("checkpoint-*"))
    if used and not config.resume:
        raise ConfigError(f"{output} holds a run already.", "Set resume: true to go on, or name another output folder.")
    if used and (output / "resolved.yaml").exists():
        old = yaml.safe_load((output / "resolved.yaml").read_text(encoding="utf-8"))
        changed = [k for k, v in resolved.items() if k not in _FREE and old.get(k) != v]
        if changed:
            raise ConfigError(
                f"{output} is a run with other settings: {', '.join(changed)}.",
                "Resume with the settings in its resolved.yaml, or name another output folder.",
            )


def _trainer(
    config: RunConfig, task: Task, adapter: Adapter, items: dict[str, Items], clock: Clock, lr: float
) -> AdapterTrainer:
    callbacks: list[TrainerCallback] = [StepClock(clock)]
    if config.early_stopping:
        callbacks.append(EarlyStoppingCallback(config.early_stopping))

    def score() -> Scores:
        with clock("eval"):
            return task.score(items["valid"], config.eval_batch_size)

    return AdapterTrainer(
        adapter, _arguments(config, task), lr=lr, stop=task.stop, score=score, quiet=config.quiet,
        train_dataset=items["train"], eval_dataset=items["valid"], data_collator=task.collate,
        callbacks=callbacks,
    )  # fmt: skip


def _arguments(config: RunConfig, task: Task) -> TrainingArguments:
    best = config.early_stopping > 0
    evaluate, save = _every(config.eval_every), _every(config.save_every)
    if best:  # the best checkpoint is found among those that were scored
        save = evaluate
    schedule = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return TrainingArguments(
        output_dir=config.output, num_train_epochs=config.epochs, max_steps=config.steps or -1,
        per_device_train_batch_size=config.batch_size, gradient_accumulation_steps=config.accumulation,
        weight_decay=config.weight_decay, lr_scheduler_type=schedule, warmup_steps=config.warmup,
        max_grad_norm=config.max_grad_norm, seed=config.seed, optim="adamw_torch",
        eval_strategy=evaluate[0], eval_steps=evaluate[1], save_strategy=save[0],
        save_steps=save[1] or 500, save_total_limit=config.keep, logging_steps=config.log_every,
        logging_first_step=True, load_best_model_at_end=best, metric_for_best_model="score" if best else None,
        greater_is_better=task.higher_is_better if best else None, report_to="none",
        disable_tqdm=config.quiet, remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip


def _every(steps: int | None) -> tuple[str, int | None]:
    """Return the Trainer's strategy and number of steps."""
    if steps is None:
        return "epoch", None
    return ("steps", steps) if steps else ("no", None)


def _saved(config: RunConfig, task: Task, items: Items) -> int:
    """Return the bytes that the graph of one training batch keeps; random numbers stay as they were."""
    batch = next(task.batches(items, config.batch_size))
    model, training = task.model, task.model.training
    model.train()
    with torch.random.fork_rng():
        found = saved_bytes(lambda: model(**batch).loss, model)
    model.train(training)
    return found


def _what(config: RunConfig, method: Method, resolved: dict[str, Any], lr: float) -> dict[str, Any]:
    return {
        "task": resolved["task"], "model": config.model, "method": method.name, "branch": method.tags.branch,
        "fields": resolved["method"]["fields"], "lr": lr, "seed": config.seed, "batch_size": config.batch_size,
        "output": config.output,
    }  # fmt: skip


def _scored(scores: Scores, base: Scores | None, split: str) -> dict[str, Any]:
    return {
        "metric": scores.metric, "higher_is_better": scores.higher_is_better, "aggregate": scores.aggregate,
        "split": split, "score": scores.score, "values": dict(scores.values), "items": scores.items,
        "base_score": base.score if base else None, "base_values": dict(base.values) if base else {},
        "base_items": base.items if base else (),
    }  # fmt: skip


def _counts(task: Task, adapter: Adapter) -> dict[str, Any]:
    own = {id(p) for p in adapter.parameters()}
    return {
        "sites": len(adapter.entries),
        "trainable_parameters": sum(p.numel() for p in adapter.parameters() if p.requires_grad),
        "total_parameters": sum(p.numel() for p in task.model.parameters() if id(p) not in own),
    }


def _write_metrics(result: RunResult, trainer: AdapterTrainer) -> None:
    text = json.dumps(asdict(result), indent=1, allow_nan=False)
    atomic_write(Path(result.output) / "metrics.json", text + "\n")
    trainer.say(_last_line(result))


def _last_line(result: RunResult) -> str:
    before = f" (without the adapter {result.base_score:.4g})" if result.base_score is not None else ""
    return (
        f"{result.metric} {result.score:.4g}{before} on {len(result.items)} {result.split} rows; "
        f"{result.steps} steps in {result.train_seconds:.1f} s; adapter in {result.output}/adapter"
    )
