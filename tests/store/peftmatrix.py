"""Runs the matrix of PEFT's files: PEFT is the oracle of every case, and each ends in one of four ways."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import peft
from torch import Tensor, nn

import zoo
from peftree import adapter as adapters
from peftree import store
from peftree.errors import PeftreeError
from peftree.store.folder import MANIFEST
from store import tools
from store.peftcases import FAMILIES, Case, batch_of, build

TOLERANCE, SEEN = 1e-5, 1e-5

# name: (what the page says, pattern of our message)
REASONS: dict[str, tuple[str, str]] = {
    "method": ("one library has no method that equals the other's", r"peft_type '|no method that equals"),
    "fused": (
        "the parts of a fused projection (GPT-2's `c_attn`, Phi-3's `qkv_proj`) differ or are not all there: "
        "there it is one layer, here one site a part",
        r"fused projection",
    ),
    "window": ("a prefix slides out of a sliding window there and stays in sight here", r"sliding window"),
    "pool": (
        "virtual tokens stay in the output there, so a classifier of sequences reads them (RoBERTa's reads the cache "
        "of a prefix); here they are taken out",
        r"PEFT pools a virtual token|other inputs than its own forward",
    ),
    "decoder": (
        "a prefix in a decoder behind an encoder has positions of its own there, and none here",
        r"positions in the decoder in PEFT",
    ),
    "class": ("PEFT gives virtual tokens a meaning for other classes of models", r"no virtual tokens for this class"),
    "stacks": (
        "PEFT has virtual tokens in the encoder alone, or the only stack, and prefixes in all of its layers",
        r"only in .*:stack|one prefix for each layer",
    ),
    "base": (
        "the tensors belong to a base that the start has changed; PEFT's own conversion to a plain LoRA is read",
        r"changed base",
    ),
    "llama": ("the adaption prompt exists for Llama and Mistral alone", r"adaption prompt only for Llama"),
    "site": ("this model has no such place", r"No site matches|no sites of this model|is a site of kind|is of kind"),
    "option": (
        "an option of PEFT that changes what an adapter computes and that nothing here equals",
        r"changes what an adapter computes",
    ),
    "pattern": (
        "a scale is set by a regular expression beyond names, wildcards and alternatives; none is run",
        r"of a kind that is not supported here",
    ),
    "network": ("the network behind a prefix is still being trained; call `adapter.finish()`", r"not yet folded in"),
}


class Outcome(NamedTuple):
    """How a case ended.

    Attributes:
        verdict: `right`, `refused`, `wrong`, or `PEFT cannot`.
        why: the reason's name, our words, or PEFT's.
    """

    verdict: str
    why: str = ""


def output(name: str, model: nn.Module) -> Tensor:
    """Return the main output of a family's model on its batch: real tokens alone, no padding and no virtual tokens."""
    kind = batch_of(name)
    out, mask = tools.output(kind, model), zoo.batch(kind).get("attention_mask")
    if out.dim() < 3 or mask is None or FAMILIES[name].task == "SEQ_2_SEQ_LM":
        return out
    n = mask.shape[1]
    return out[:, -n:].masked_fill(mask[..., None] == 0, 0.0)


def gap(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, over the largest value where that is above 1; infinite between other shapes."""
    if one.shape != other.shape:
        return float("inf")
    return float((one - other).abs().max() / one.abs().max().clamp(min=1.0))


def short(error: BaseException) -> str:
    """Return an error in one short line."""
    text = " ".join(str(error).split())
    return re.sub(r"/\S*/", "", f"{type(error).__name__}: {text}")[:160]


def from_file(name: str, folder: Path) -> Tensor:
    """Return what PEFT computes with a folder."""
    return output(name, peft.PeftModel.from_pretrained(build(name), folder).eval())


@contextmanager
def _folder() -> Iterator[Path]:
    """A new folder's path; inside, neither library says anything."""
    with (
        tempfile.TemporaryDirectory() as place,
        tools.Quiet(),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        yield Path(place) / "a"


def _made(case: Case, folder: Path) -> Tensor:
    """Let PEFT make an adapter of random values, save it, and read it back; return its output."""
    model = peft.get_peft_model(build(case.family), case.make())
    tools.shake([p for p in model.parameters() if p.requires_grad])
    model.eval().save_pretrained(folder)
    live, wanted = output(case.family, model), from_file(case.family, folder)
    if gap(live, wanted) > TOLERANCE:
        raise ValueError(f"it does not read its own file back: {gap(live, wanted):.1e} apart")
    if gap(wanted, output(case.family, build(case.family))) < SEEN:
        raise ValueError("the adapter does nothing")
    return wanted


def read(case: Case) -> Outcome:
    """PEFT saves, we load."""
    with _folder() as folder:
        try:
            wanted = _made(case, folder)
        except Exception as error:
            return Outcome("PEFT cannot", short(error))
        model = build(case.family)
        try:
            store.load(model, folder)
            found = gap(wanted, output(case.family, model))
        except PeftreeError as error:
            return refused(error)
        except Exception as error:
            return Outcome("wrong", short(error))
        return Outcome("right") if found < TOLERANCE else Outcome("wrong", f"{found:.1e} apart")


def write(case: Case) -> Outcome:
    """We save, PEFT loads, and so do we, with our manifest and without it."""
    with _folder() as folder:
        model = build(case.family)
        try:
            adapter = adapters.adapt(model, case.method, **case.make())
            tools.shake(adapter.parameters())
            if "finished" in case.option:
                adapter.finish()
            wanted = output(case.family, model)
            assert gap(wanted, output(case.family, build(case.family))) > SEEN, "the adapter does nothing"
            store.save(adapter, folder, format="peft")
        except PeftreeError as error:
            return refused(error)
        apart = {}
        for reader in ("PEFT", "peftree", "peftree without the manifest"):
            try:
                if reader.endswith("manifest"):
                    (folder / MANIFEST).unlink()
                if reader == "PEFT":
                    found = from_file(case.family, folder)
                else:
                    other = build(case.family)
                    store.load(other, folder)
                    found = output(case.family, other)
                apart[reader] = gap(wanted, found)
            except Exception as error:
                if reader == "PEFT" and not _peft_can(case, folder):
                    return Outcome("PEFT cannot", short(error))
                return Outcome("wrong", f"{reader}: {short(error)}")
        for reader, found in apart.items():
            if not found < TOLERANCE:
                return Outcome("wrong", f"{reader}: {found:.1e} apart")
        return Outcome("right")


def _peft_can(case: Case, folder: Path) -> bool:
    """Return whether PEFT can make, save, read and run an adapter of its own from the config of a folder."""
    config = peft.PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    try:
        peft.get_peft_model(build(case.family), config).save_pretrained(folder / "own")
        from_file(case.family, folder / "own")
    except Exception:
        return False
    return True


def refused(error: PeftreeError) -> Outcome:
    """Return the reason of a refusal; a refusal that has none in the list is a fault."""
    text = str(error)
    for name, (_, pattern) in REASONS.items():
        if re.search(pattern, text):
            return Outcome("refused", name)
    return Outcome("wrong", "undocumented refusal: " + re.sub(r"/\S*/", "", " ".join(text.split()))[:200])
