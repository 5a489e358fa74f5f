"""One process of several: `torchrun several.py JOBS.json` trains each job of the file, a list of `key=value` words."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from peftree.settings import load_config
from peftree.train.run import run
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


def main(jobs: str) -> None:
    """Train the jobs in turn."""
    torch.set_num_threads(1)
    if "PEFTREE_TEST" in os.environ:
        import peftree.train.run

        peftree.train.run.AdapterTrainer = Injured  # type: ignore[attr-defined, misc]
    for words in json.loads(Path(jobs).read_text()):
        run(load_config(None, words))


if __name__ == "__main__":
    main(sys.argv[1])
