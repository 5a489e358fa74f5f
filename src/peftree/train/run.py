"""A whole run: read data, load the model, adapt, train, score before and after, save; and open it again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from peftree import registry, store
from peftree.adapter import Adapter, adapt, disabled
from peftree.data.rows import Data, Example
from peftree.data.thinning import rows_of
from peftree.deltas.shared import repeated
from peftree.errors import ConfigError
from peftree.evaluate.cost import current_rss, device_peak, peak_rss, reset_peaks, training_bytes
from peftree.evaluate.quality import Scores
from peftree.files import atomic_write
from peftree.methods.contract import Method
from peftree.named_method import make_method
from peftree.resolver import located
from peftree.runs.read import METRICS
from peftree.runs.record import Run
from peftree.settings import SETTINGS, RunConfig, load_config, run_of, write_resolved
from peftree.tasks import Items, Options, Task, build_task
from peftree.tasks.packing import check_deltas, training_items
from peftree.train.ability import check_machine, training_device
from peftree.train.base import base_scores
from peftree.train.measure import Clock, Saved, StepClock, calm, curve, environment, throughput
from peftree.train.outcome import last_lines, scored
from peftree.train.output import (
    check_inputs,
    check_place,
    check_scoring,
    check_settings,
    check_trackers,
    check_unfinished,
    held,
    rows_of_step,
    written,
)
from peftree.train.peak import peak
from peftree.train.processes import Team, join, noticing
from peftree.train.sharded import check_shard, shard
from peftree.train.trainer import AdapterTrainer

POINTS = 20  # of the loss curve, at the least, if there are as many steps


def run(config: RunConfig) -> Run:
    """Do the whole run that `config` describes and write everything to `config.output`.

    The folder gets `resolved.yaml`, `checkpoint-N/`, `adapter/` (for `peftree.load`) and `metrics.json`.

    Raises:
        PeftreeError: a setting, file, site or value is wrong, or training would fail silently.
        SystemExit: with code 143 after SIGTERM or 130 after SIGINT, once a checkpoint is written.
    """
    team = join(config)
    if not team.first:
        team.sum(0)  # until the first has fetched a packaged model
    model = located(config.model, config.quiet or not team.first)
    if team.first:
        team.sum(0)
    return complete(config.model_copy(update={"model": model}))[0]


def complete(config: RunConfig, onto: OpenRun | None = None) -> tuple[Run, OpenRun]:
    """Do as `run` does, and also return the trained model, with its adapter switched on, and its data.

    Args:
        config: the run.
        onto: continue training the adapter of this run, on the data of `config`, with the same model,
            method, task and labels (else ConfigError).

    Every process of a run returns its results.

    Raises:
        BusyError: another process trains in the output folder.
    """
    team = join(config)
    if team.size > 1:
        config = config.model_copy(update={"processes": team.size, "quiet": config.quiet or not team.first})
    check_place(config)
    check_trackers(config)
    method = make_method(config)
    check_machine(config, method)
    check_shard(config, method)
    if config.threads:
        torch.set_num_threads(config.threads)
    with held(config.output) if team.first else nullcontext(), noticing():
        return _complete(config, onto, team)


def _complete(config: RunConfig, onto: OpenRun | None, team: Team) -> tuple[Run, OpenRun]:
    clock = Clock()
    with clock("setup"):
        method = make_method(config)
        lr = method.tags.lr if config.lr is None else config.lr
        resolved = config.resolved(registry.spec(method)["fields"], lr)
        used, done = _begun(config, resolved, team)
        data, task, adapter = _opened(config, method, onto, team)
        sharded = config.shard != "none"
        resolved["task"] = data.task
        task.progress = not config.quiet
        items = {s: task.items(getattr(data, s)) for s in ("valid", "test")}
        items["train"] = training_items(task, data.train, config)
        trainer = _trainer(config, task, adapter, items, clock, lr)
        trainer.say(*(f"note: {line}" for line in (*data.warnings, *task.notes)))
        saved = Saved(task.model)
        if team.first:
            check_inputs(config, data, task.model, used)
            write_resolved(Path(config.output) / SETTINGS, resolved)
        if sharded:
            team.sum(0)  # the first may still be reading; for a layer, the others wait minutes at most
        elif team.first and not config.compile:
            trainer.add_callback(saved)
        trainer.ends, trainer.scored_at = True, done
    split = data.scored[0]
    base, known = _base_score(config, task, items[split], clock, config.base_score and (team.first or sharded))
    loaded = current_rss()
    reset_peaks(trainer.args.device)
    with clock("train"):
        trainer.train(resume_from_checkpoint=config.resume)
    opened = OpenRun(config, task, adapter, data)
    peaks = {"peak_rss_bytes": peak_rss(), "device_peak_bytes": device_peak(trainer.args.device)}
    sizes = training_bytes(adapter.parameters(), trainer.optimizer)
    scores = _score(config, task, items[split], clock) if team.first or sharded else None
    if scores is None or not team.first:
        return Run(**team.told(None)), opened
    folder = store.save(adapter, Path(config.output) / "adapter", format="native")
    memory, told = peak(config, task, adapter, items, trainer.optimizer, trainer.state.global_step)
    result = Run(
        **_what(config, method, resolved, lr), **scored(scores, base, split, known), **_counts(task, adapter),
        labels=task.labels, n_train=len(data.train), steps=trainer.state.global_step,
        adapter_bytes=sum(p.stat().st_size for p in folder.iterdir()), **peaks,
        **memory, gradient_bytes=sizes["trainable"], optimizer_bytes=sizes["optimizer"],
        rss_after_load_bytes=loaded, saved_for_backward_bytes=saved.bytes, **clock.results(),
        **throughput(items["train"], rows_of_step(config.model_dump()), clock.step_seconds()),
        curve=curve(trainer.state.log_history), environment=environment(),
    )  # fmt: skip
    _write_metrics(result, trainer, told)
    team.told(result.model_dump(mode="json"))
    return result, opened


def _opened(config: RunConfig, method: Method, onto: OpenRun | None, team: Team) -> tuple[Data, Task, Adapter]:
    with calm(config.quiet):
        found = _prepare(config, method) if onto is None else _goes_on(config, onto)
    if config.shard != "none" and onto is None:
        shard(found[2], team)
    return found


def _begun(config: RunConfig, resolved: dict[str, Any], team: Team) -> tuple[bool, int | None]:
    """Return whether the output folder holds a run to continue, and the step of its results, as the first sees it."""
    found = (check_settings(config, resolved), *written(config.output)) if team.first else None
    used, done, rows = team.told(found)
    check_unfinished(config, done, rows)
    return used, done


@dataclass(frozen=True)
class OpenRun:
    """A finished run, with its model loaded and its adapter switched on.

    Attributes:
        config: the configuration of the run.
        task, adapter, data: the live objects; `task.model` is the model.
    """

    config: RunConfig
    task: Task
    adapter: Adapter
    data: Data

    def score(self, split: str | None = None) -> Scores:
        """Score the model in its current state on a split (`train`, `valid`, `test`; None: test, or else valid)."""
        rows = self.data.scored[1] if split is None else getattr(self.data, split)
        return self.score_rows(rows)

    def score_rows(self, rows: Sequence[Example]) -> Scores:
        """Score the model in its current state on `rows`."""
        return self.task.score(self.task.items(rows), self.config.eval_batch_size)


def open_run(folder: str | Path, overrides: Sequence[str] = (), *, progress: bool = False) -> OpenRun:
    """Load the model, data and adapter of a finished run.

    Args:
        folder: its output folder, the adapter in it, or the run file whose `output` that is.
        overrides: as for `load_config`: `data.test=other.csv`, `model=/moved/here`.
        progress: show a progress bar if scoring takes long.

    Raises:
        PeftreeError: the folder is not a finished run, something in it is damaged or was moved, or an override only
            affects training and would change nothing.
    """
    path = Path(folder)
    if path.is_file():
        path = Path(load_config(path, overrides).output)
    path = run_of(path) or path
    if not (path / "adapter").is_dir():
        raise ConfigError(f"{path} is not a finished run: it has no folder 'adapter'.", _unfinished(path))
    config = load_config(path / SETTINGS, overrides)
    make_method(config)
    check_scoring(config, load_config(path / SETTINGS), path, overrides)
    with calm(quiet=True):
        data = rows_of(config)
        task = build_task(config.model, data, _options(config))
        task.progress = progress
        adapter = store.load(task.model, path / "adapter", name=config.adapter)
        _leave_room(config, task, adapter)
    return OpenRun(config, task, adapter, data)


def _leave_room(config: RunConfig, task: Task, adapter: Adapter) -> None:
    """Subtract the positions that virtual tokens and prefixes need from the length of a row, and say so."""
    for room in adapter.graft.rooms((adapter.name,)):
        left = room.most - room.front
        if left >= task.length:
            continue
        if config.max_length is not None:
            raise ConfigError(
                f"{config.where('max_length')}max_length={config.max_length}: {room.front} of the model's {room.most} "
                f"positions are the adapter's.",
                f"Set max_length: {left}, or a shorter prompt or prefix.",
            )
        task.length = left
        task.notes.append(
            f"{room.front} of the model's {room.most} positions are the adapter's, so rows have at most {left} tokens"
        )


def _unfinished(path: Path) -> str:
    if any(path.glob("checkpoint-*")):
        return f"Finish it: peftree train {path / SETTINGS} resume=true."
    return "Name the output folder of a finished run."


def _prepare(config: RunConfig, method: Method) -> tuple[Data, Task, Adapter]:
    data = rows_of(config)
    task = build_task(config.model, data, _options(config))
    for name, several in (("accumulation", config.accumulation), ("processes", config.processes or 1)):
        if task.contrastive and several > 1:
            raise ConfigError(
                f"{config.where(name)}{name}={several}: the loss of {data.task} compares the "
                "rows of one forward pass, so several passes are not a larger batch.",
                f"Set {name}: 1 and raise batch_size; activations: checkpoint saves memory.",
            )
    adapter = adapt(task.model, method, name=config.adapter, head=config.head, seed=config.seed)
    if config.packing:
        check_deltas(adapter)
    _leave_room(config, task, adapter)
    if config.activations == "recompute":
        adapter.activations = "recompute"
    if config.gradient_checkpointing:
        model: Any = task.model
        with warnings.catch_warnings():  # the name that every 5.x has; later ones say it will change
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(
                {"use_reentrant": False} | ({"context_fn": repeated} if _several(config) else {})
            )
    return data, task, adapter


def _goes_on(config: RunConfig, onto: OpenRun) -> tuple[Data, Task, Adapter]:
    data, old = rows_of(config), onto.config
    pairs = {name: (getattr(config, name), getattr(old, name)) for name in ("model", "method", "shard")}
    pairs |= {"task": (data.task, onto.data.task), "labels": (set(data.labels), set(onto.data.labels))}
    for what, (new, before) in pairs.items():
        if new != before:
            raise ConfigError(f"This run's {what} differs from that of the run that it continues.", "Train again.")
    return data, onto.task, onto.adapter


def _options(config: RunConfig) -> Options:
    return Options(**{f.name: getattr(config, f.name) for f in fields(Options)})


def _trainer(
    config: RunConfig, task: Task, adapter: Adapter, items: dict[str, Items], clock: Clock, lr: float
) -> AdapterTrainer:
    callbacks: list[TrainerCallback] = [StepClock(clock)]
    if config.early_stopping:
        callbacks.append(EarlyStoppingCallback(config.early_stopping))

    def score() -> Scores:
        return _score(config, task, items["valid"], clock)

    rows = len(items["train"])  # type: ignore[arg-type]
    return AdapterTrainer(
        adapter, _arguments(config, task, rows), lr=lr, stop=task.stop, score=score, quiet=config.quiet,
        compiles=config.compile, chunked_loss=config.chunked_loss, sharded=config.shard != "none",
        train_dataset=items["train"], eval_dataset=items["valid"], data_collator=task.collate,
        callbacks=callbacks,
    )  # fmt: skip


def _arguments(config: RunConfig, task: Task, rows: int) -> TrainingArguments:
    best = config.early_stopping > 0
    log = config.log_every or max(1, min(10, config.total_steps(rows) // POINTS))
    evaluate, save = _every(config.eval_every), _every(config.save_every)
    if best:  # the best checkpoint is found among those that were scored
        save = evaluate
    schedule = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return TrainingArguments(
        output_dir=config.output, num_train_epochs=config.epochs, max_steps=config.steps or -1,
        per_device_train_batch_size=config.batch_size, gradient_accumulation_steps=config.accumulation,
        weight_decay=config.weight_decay, lr_scheduler_type=schedule, warmup_steps=config.warmup,
        max_grad_norm=config.max_grad_norm, seed=config.seed, optim=config.optimizer,
        eval_strategy=evaluate[0], eval_steps=evaluate[1], save_strategy=save[0],
        save_steps=save[1] or 500, save_total_limit=config.keep, logging_steps=log,
        logging_first_step=True, load_best_model_at_end=best, metric_for_best_model="score" if best else None,
        greater_is_better=task.higher_is_better if best else None, report_to=list(config.report_to) or "none",
        disable_tqdm=config.quiet, remove_unused_columns=False, dataloader_num_workers=config.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        bf16=config.precision == "bf16", fp16=config.precision == "fp16",
        # Without it, processes on a CPU do not join.
        use_cpu=training_device().type == "cpu" or (_several(config) and not torch.cuda.is_available()),
    )  # fmt: skip


def _several(config: RunConfig) -> bool:
    return (config.processes or 1) > 1


def _every(steps: int | None) -> tuple[str, int | None]:
    """Return the Trainer's strategy and number of steps."""
    if steps is None:
        return "epoch", None
    return ("steps", steps) if steps else ("no", None)


def _what(config: RunConfig, method: Method, resolved: dict[str, Any], lr: float) -> dict[str, Any]:
    return {
        "task": resolved["task"], "model": config.model, "method": method.name, "branch": method.tags.branch,
        "fields": resolved["method"]["fields"], "learning_rate": lr, "seed": config.seed,
        "batch_size": config.batch_size, "output": config.output,
    }  # fmt: skip


def _counts(task: Task, adapter: Adapter) -> dict[str, Any]:
    own = {id(p) for p in adapter.parameters()}
    return {
        "sites": len(adapter.entries),
        "trainable_parameters": sum(p.numel() for p in adapter.parameters() if p.requires_grad),
        "total_parameters": sum(p.numel() for p in task.model.parameters() if id(p) not in own),
    }


def _score(config: RunConfig, task: Task, items: Items, clock: Clock) -> Scores:
    with clock("eval"):
        return task.score(items, config.eval_batch_size)


def _base_score(
    config: RunConfig, task: Task, items: Items, clock: Clock, asked: bool
) -> tuple[Scores | None, bool]:  # fmt: skip
    def measure() -> Scores:
        with disabled(task.model):
            return _score(config, task, items, clock)

    with clock("setup"):
        return base_scores(config, task, items, measure) if asked else (None, False)


def _write_metrics(result: Run, trainer: AdapterTrainer, memory: str) -> None:
    text = json.dumps(result.metrics(), indent=1, allow_nan=False)
    atomic_write(Path(result.output) / METRICS, text + "\n")
    for line in (*last_lines(result), memory):
        trainer.say(line)
