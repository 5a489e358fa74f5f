"""Kills a run of two processes again and again, and checks that what is left always resumes to the same adapter.

`python benchmarks/kills.py MODEL DATA --kills 30`: each time, at a random moment after the first new checkpoint began,
one process, the launcher, or all of them get SIGKILL. Then no process may be left, a whole checkpoint must be there,
and the next call resumes from the newest. At the end, the adapter must equal that of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

from peftree.train.checkpoint import damage


def start(model: str, data: str, output: Path, log: Path, steps: int, *more: str) -> subprocess.Popen[bytes]:
    """Start `peftree train` in two processes."""
    words = [f"model={model}", f"data={data}", f"output={output}", f"steps={steps}", "batch_size=4", "processes=2",
             "save_every=1", "eval_every=0", "base_score=false", "quiet=true", *more]  # fmt: skip
    with log.open("ab") as file:
        return subprocess.Popen([sys.executable, "-m", "peftree", "train", *words], stdout=file, stderr=file)


def children(pid: int) -> list[int]:
    """Return the processes that `pid` has started."""
    with contextlib.suppress(FileNotFoundError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def newest(output: Path) -> int:
    """Return the step of the newest checkpoint."""
    return max((int(p.name.rpartition("-")[2]) for p in output.glob("checkpoint-*")), default=0)


def ended(pid: int, within: float = 90.0) -> bool:
    """Wait until a process is gone."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


def kill(run: subprocess.Popen[bytes], output: Path, draw: random.Random) -> str:
    """Kill something of a run some time after its next checkpoint, and return what; or that it ended before."""
    before, until = newest(output), time.monotonic() + 240
    while newest(output) <= before and run.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(draw.random() * 0.4)
    ranks = children(run.pid)
    whom = draw.choice(["rank 0", "rank 1", "the launcher", "all"])
    chosen = {"rank 0": ranks[:1], "rank 1": ranks[1:], "the launcher": [run.pid], "all": [*ranks, run.pid]}[whom]
    if run.poll() is not None or len(ranks) != 2:
        return "it had ended"
    for pid in chosen:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert run.wait(300) != 0, f"exit code 0 after {whom} was killed"
    assert all(ended(pid) for pid in ranks), f"processes are left after {whom} was killed"
    return whom


def main() -> None:
    """Do it and print a line for each kill."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("settings", nargs="*", help="settings of every run, such as method=adalora shard=fsdp")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    folder, draw = Path(tempfile.mkdtemp(prefix="kills-")), random.Random(asked.seed)
    steps, done = 8 * asked.kills, 0
    while done < asked.kills:
        run = start(asked.model, asked.data, folder / "killed", folder / "log", steps, "resume=true", *asked.settings)
        whom = kill(run, folder / "killed", draw)
        found = {p.name: damage(p) for p in (folder / "killed").glob("checkpoint-*")}
        print(f"{done + 1}: {whom}, at step {newest(folder / 'killed')}: {json.dumps(found)}", flush=True)
        assert not all(found.values()), found  # one that was being removed may be in part
        assert whom != "it had ended", (folder / "log").read_text()[-2000:]
        done += 1
    for name, more in (("killed", ["resume=true"]), ("whole", [])):
        assert start(asked.model, asked.data, folder / name, folder / "log", steps, *more, *asked.settings).wait() == 0
    one, two = (load_file(folder / name / "adapter" / "adapter.safetensors") for name in ("killed", "whole"))
    same = one.keys() == two.keys() and all(bool((one[k] == two[k]).all()) for k in one)
    print(f"{done} kills; the adapter is {'the same to the bit' if same else 'NOT the same'} as without")
    shutil.rmtree(folder)
    sys.exit(not same)


if __name__ == "__main__":
    main()
