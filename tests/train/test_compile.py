"""Training passes that are compiled: equal to plain ones, saved as the plain model, refused where nothing compiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils import _triton

import peftree
from peftree.data.rows import load_data
from peftree.errors import ConfigError
from peftree.settings import load_config
from peftree.tasks import build_task
from peftree.train.compiled import check_compiler
from peftree.train.run import open_run, run
from sampled import quick
from train.tiny import trainer


def adapter_after(encoder: str, data: Path, output: Path, on: bool, monkeypatch: Any, **more: Any) -> tuple[Any, int]:
    """Return the adapter after a few steps, and how many graphs were compiled."""
    torch._dynamo.reset()
    count = [0]

    def backend(module: Any, inputs: Any) -> Any:
        count[0] += 1
        return module.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend=backend))
    task = build_task(encoder, load_data(data))
    made = trainer(peftree.adapt(task.model, "lora"), task, data, output, quiet=True, compiles=on, **more)
    made.train()
    monkeypatch.setattr(torch, "compile", real)
    assert not [n for n, _ in task.model.named_modules() if "_orig_mod" in n] and "forward" not in vars(task.model)
    return made.adapter, count[0]


@pytest.mark.parametrize("more", quick([{}, {"bf16": True, "use_cpu": True}]))
def test_a_compiled_step_is_a_plain_one(
    more: dict[str, Any], encoder: str, review_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {
        on: adapter_after(encoder, review_data, tmp_path / str(on), on, monkeypatch, **more) for on in (True, False)
    }
    assert found[True][1] > 0 and found[False][1] == 0
    one, two = found[True][0].state(), found[False][0].state()
    assert list(one) == list(two) and all((one[k] - two[k]).abs().max() < (1e-3 if more else 1e-5) for k in one)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch's own compiler
def test_a_run_compiled_by_the_machines_compiler(encoder: str, review_data: Path, tmp_path: Path) -> None:
    """It is scored, saved and opened as the plain model."""
    torch._dynamo.reset()
    still = ["config.hidden_dropout_prob=0.0", "config.attention_probs_dropout_prob=0.0"]  # a compiler draws others
    usual = [
        *still,
        "batch_size=8",
        "steps=8",
        "lr=0.01",
        "threads=1",
        "quiet=true",
        "save_every=4",
        f"data={review_data}",
    ]
    made = run(load_config(None, [f"model={encoder}", f"output={tmp_path / 'fast'}", "compile=true", *usual]))
    plain = run(load_config(None, [f"model={encoder}", f"output={tmp_path / 'plain'}", *usual]))
    assert [p.loss for p in made.curve if p.loss] == pytest.approx([p.loss for p in plain.curve if p.loss], abs=1e-3)
    assert open_run(tmp_path / "fast").score().items == made.items
    assert (tmp_path / "fast" / "checkpoint-8").is_dir() and made.steps == 8


def test_a_machine_without_a_compiler_says_so_first(
    review_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["model=none", f"data={review_data}", f"output={tmp_path / 'o'}", "compile=true"]

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ConfigError, match=r"'compile=true': compile: this machine has no C\+\+ compiler\. Install"):
        run(load_config(None, words))
    monkeypatch.setattr(_triton, "has_triton", lambda: False)
    with pytest.raises(ConfigError, match="pip install triton"):
        check_compiler(torch.device("cuda"))
