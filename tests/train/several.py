"""One process of several: `torchrun several.py JOBS.json` trains each job of the file, a list of `key=value` words."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

# Nothing here needs them, and transformers imports what is installed: a third of the seconds of a start.
if __name__ == "__main__":
    sys.modules.update(dict.fromkeys(("peft", "bitsandbytes", "torchao", "datasets", "scipy", "sklearn")))

import torch
from torch.distributed.tensor import DTensor

from peftree.adapter import disabled
from peftree.settings import load_config
from peftree.tasks import build_task
from peftree.train.run import OpenRun, _options, complete
from peftree.train.trainer import AdapterTrainer


class Injured(AdapterTrainer):
    """A trainer that does what the variable PEFTREE_TEST says, as `STEP:RANK:WHAT`."""

    injured = False

    def compute_loss(self, *args: Any, **more: Any) -> Any:
        """Do it before the first pass of that step."""
        step, rank, what = os.environ["PEFTREE_TEST"].split(":")
        if (int(step), int(rank), False) == (self.state.global_step, self.team.rank, self.injured):
            self.injured = True
            if what == "drift":
                self.adapter.parameters()[0].data.add_(1e-3)
            elif what == "nan":
                found = super().compute_loss(*args, **more)
                self.finite.see_loss(torch.tensor(float("nan")))
                return found
            else:
                os.kill(os.getpid(), signal.Signals[what])
        return super().compute_loss(*args, **more)


def check_base(opened: OpenRun) -> None:
    """After a sharded run, each process has its part of the layers, and the base is as in the file, to the bit."""
    model: Any = opened.task.model
    base = {n: p for n, p in model.named_parameters() if ".deltas." not in n}
    parts = {n: p for n, p in base.items() if isinstance(p, DTensor)}
    assert parts.keys() == {n for n in base if ".layers." in n or ".layer." in n}
    held, whole = (sum(count(p) for p in parts.values()) for count in (lambda p: p.to_local().numel(), torch.numel))
    assert held <= 0.6 * whole
    plain: Any = build_task(opened.config.model, opened.data, _options(opened.config)).model
    read = dict(plain.named_parameters())
    assert all(torch.equal(p.full_tensor(), read[n]) for n, p in parts.items())
    plain.load_state_dict({n: p for n, p in base.items() if n not in parts}, strict=False)  # its head may be new
    ids = torch.arange(2, 10).view(2, 4)
    with torch.no_grad(), disabled(model):
        assert torch.equal(model.eval()(input_ids=ids).logits, plain.eval()(input_ids=ids).logits)


def main(jobs: str) -> None:
    """Train the jobs in turn."""
    torch.set_num_threads(1)
    if "PEFTREE_TEST" in os.environ:
        import peftree.train.run

        peftree.train.run.AdapterTrainer = Injured  # type: ignore[attr-defined, misc]
    for words in json.loads(Path(jobs).read_text()):
        _, opened = complete(load_config(None, words))
        if opened.config.shard == "fsdp":
            check_base(opened)


if __name__ == "__main__":
    main(sys.argv[1])
