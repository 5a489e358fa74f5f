"""Where an adapter of a candidate can be served, from the methods' tags and what the store writes.

vLLM loads adapters in Hugging Face PEFT's format of LoRA and rsLoRA, refuses DoRA and trained heads
(`vllm/lora/peft_helper.py`, vLLM 0.10), and holds ranks up to `--max-lora-rank`, 16 unless set.
llama.cpp's `convert_lora_to_gguf.py` takes only `lora_A` and `lora_B` tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftree import registry
from peftree.advise.candidates import Candidate
from peftree.store.hfpeft import dialects

VLLM_RANK = 16


@dataclass(frozen=True)
class Serving:
    """Where it can be served.

    Attributes:
        peft: whether it has a form in Hugging Face PEFT's format.
        vllm, llama_cpp: whether these load it as an adapter next to the base.
        merged: whether it folds into the weights, so that whatever serves the base model serves it.
        notes: remarks for the reader.
    """

    peft: bool
    vllm: bool
    llama_cpp: bool
    merged: bool
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The number of ways; adapters next to the base count double, since many can share it."""
        return 2 * (self.vllm + self.llama_cpp) + self.merged + self.peft

    @property
    def text(self) -> str:
        """One readable line."""
        ways = [
            *(["vLLM"] if self.vllm else []), *(["llama.cpp"] if self.llama_cpp else []),
            *(["Hugging Face PEFT"] if self.peft else []),
            *(["merged, by whatever serves the base"] if self.merged else []),
        ]  # fmt: skip
        return ", ".join(ways) or "peftree only"


def serving(candidate: Candidate, task: str) -> Serving:
    """Return where an adapter of `candidate` for `task` can be served.

    Raises:
        MethodError, ConfigError: an unknown method, or a field out of range.
    """
    method = registry.make(candidate.method, candidate.fields)
    types = [d.peft_type for d in dialects() if d.writes(method)]
    plain = types == ["LORA"] and method.name != "dora" and task == "generation"
    notes = []
    rank = int(candidate.fields.get("r", type(method).model_fields["r"].default)) if plain else 0
    rank *= 2 if method.name == "pissa" else 1  # written with the subtracted start, as twice the rank
    if rank > VLLM_RANK:
        notes.append(f"vLLM: start it with --max-lora-rank {rank} or the next rank that it offers")
    if plain:
        notes.append("llama.cpp: convert with its convert_lora_to_gguf.py; all sites must be linear maps")
    if method.tags.branch == "reference" and method.name == "full":
        notes.append("a whole model: no adapter, no sharing of one base")
    if types and task != "generation":
        notes.append("its trained task head goes into PEFT's modules_to_save, which vLLM refuses")
    return Serving(bool(types), plain, plain, method.tags.mergeable, tuple(notes))
