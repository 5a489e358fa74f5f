"""One demo run, in a process of its own: trains as `peftree train` does and writes the record."""

from __future__ import annotations

import shutil
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peftree.bench.record import CurvePoint, RunRecord
from peftree.errors import TrainError
from peftree.machine import machine
from peftree.train.config import RunConfig
from peftree.train.run import run

KEPT = 64 << 20  # bytes: a larger adapter (a whole model) is not kept
COPIED = (
    *("score", "base_score", "items", "n_train", "steps", "batch_size", "trainable_parameters"),
    *("total_parameters", "sites", "adapter_bytes", "peak_rss_bytes", "rss_after_load_bytes"),
    *("saved_for_backward_bytes", "setup_seconds", "train_seconds", "eval_seconds"),
    *("cpu_seconds", "step_seconds"),
)


def work(job: dict[str, Any]) -> Path:
    """Train what `job` describes (`facts`, `config`, `records`) and return the record's path.

    Raises:
        PeftreeError: as `peftree.train.run.run`; or the run is not the one that `facts` describe.
    """
    warnings.filterwarnings("ignore")  # the output is read by people when a run fails
    started = datetime.now(UTC)
    config = RunConfig.model_validate(job["config"])
    shutil.rmtree(config.output, ignore_errors=True)  # left by a run that was cut off
    result = run(config)
    facts = job["facts"]
    told: dict[str, Any] = {"task": result.task, "method": result.method, "branch": result.branch}
    told |= {"fields": result.fields, "learning_rate": result.lr, "seed": result.seed}
    told |= {"metric": result.metric, "aggregate": result.aggregate}
    wrong = [key for key, value in told.items() if facts[key] != value]
    if wrong:
        raise TrainError(f"The run differs from its plan in {', '.join(wrong)}.", "Mend the plan.")
    record = RunRecord(
        **facts,
        **{key: getattr(result, key) for key in COPIED},
        curve=tuple(CurvePoint.model_validate(point) for point in result.curve),
        environment={**result.environment, **machine()},
        status="ok",
        started=started,
    )
    if result.adapter_bytes > KEPT:
        shutil.rmtree(config.output)
    return record.write(job["records"])
