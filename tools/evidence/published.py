"""Hugging Face PEFT's published comparison as a table of evidence: figures with source and commit, no code.

Their experiments are matched to ours by method, targets and the fields that decide the method; an experiment that
no method of the tree equals is left out. Of several learning rates for one configuration the best counts, as in a
protocol that tunes the rate. One seed each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peftree import registry
from peftree.advise.table import Context, Measured, Table
from peftree.errors import DataError

Run = Mapping[str, Any]
TOP = 3
ITEMS = 1319  # problems in the test set of GSM8K
SUITES = ("MetaMathQA", "image-gen")
# Their name of a method, ours.
METHODS = {
    "LORA": "lora", "ADALORA": "adalora", "OFT": "oft", "VERA": "vera", "FOURIERFT": "fourierft", "IA3": "ia3",
    "LN_TUNING": "layernorm", "PREFIX_TUNING": "prefix_tuning", "PROMPT_TUNING": "prompt_tuning",
    "ADAPTION_PROMPT": "llama_adapter",
}  # fmt: skip
# Their name of a field, ours, by our name of the method.
FIELDS: dict[str, dict[str, str]] = {
    "lora": {"r": "r", "lora_alpha": "alpha"},
    "rslora": {"r": "r", "lora_alpha": "alpha"},
    "dora": {"r": "r", "lora_alpha": "alpha"},
    "vera": {"r": "r"},
    "oft": {"oft_block_size": "block"},
    "fourierft": {"n_frequency": "n", "scaling": "alpha"},
    "prefix_tuning": {"num_virtual_tokens": "length"},
    "prompt_tuning": {"num_virtual_tokens": "length"},
    "llama_adapter": {"adapter_len": "length"},
}
ROLES = {
    "q_proj": "attn.q", "k_proj": "attn.k", "v_proj": "attn.v", "o_proj": "attn.o",
    "up_proj": "ffn.up", "gate_proj": "ffn.gate", "down_proj": "ffn.down",
}  # fmt: skip
# Variants of LoRA that are none of ours: any of these set in their configuration.
OTHER = ("use_bdlora", "velora_config", "monteclora_config", "arrow_config", "corda_config", "eva_config")
OTHER_STARTS = ("mica", "lorafa", "olora", "corda", "eva")
WIDTHS = {"meta-llama/Llama-3.2-3B": 3072}  # what the adapted maps read; their OFT counts blocks, ours their size
CONTEXTS: dict[str, dict[str, Any]] = {
    "MetaMathQA": {
        "modality": "language", "kind": "generation", "metric": "accuracy", "baseline": "zero",
        "forgetting": "rise of the loss on Wikipedia text, in nats a token",
    },
    "image-gen": {
        "modality": "vision", "kind": "generation", "metric": "dino_similarity", "baseline": "none",
        "forgetting": "drift of images whose prompts were not trained on",
    },
}  # fmt: skip


def published(commit: str, results: Mapping[str, Sequence[Run]]) -> Table:
    """Return the table of their results.

    Args:
        commit: of their repository.
        results: suite -> the content of its result files.

    Raises:
        DataError: a result has no test score, or there is no full fine-tuning to compare with.
    """
    contexts: dict[str, Context] = {}
    rows: list[Measured] = []
    try:
        for suite, runs in results.items():
            contexts[f"peft {suite}"], found = _suite(suite, [run for run in runs if _counts(run)])
            rows += found
    except (KeyError, StopIteration) as error:
        raise DataError(f"The results at {commit} lack {error}.", "Their format may have changed.") from None
    origin = f"huggingface/peft, method_comparison/*/results, commit {commit}"
    return Table(origin=origin, contexts=contexts, results=tuple(rows))


def _counts(run: Run) -> bool:
    """Leave out what failed, and LoRA-FA, which is an optimizer there."""
    usual: str = run["run_info"]["train_config"]["optimizer_type"]
    return bool(run["train_info"]["status"] == "success") and usual == "AdamW"


def _suite(suite: str, runs: Sequence[Run]) -> tuple[Context, list[Measured]]:
    steps = max(_last(run)["step"] for run in runs)
    full = next(run for run in runs if not run["run_info"]["peft_config"])
    train = full["run_info"]["train_config"]
    comparable = _last(full)["step"] == steps  # else no relative scores can be had
    context = Context(
        source="Hugging Face PEFT", group=f"peft {suite}", tier="published", model=train["model_id"],
        parameters=full["train_info"]["num_total_params"], rows=max(_last(run)["train samples"] for run in runs),
        steps=steps, **CONTEXTS[suite],
    )  # fmt: skip
    best: dict[str, Measured] = {}
    for run in runs:
        for row in _row(suite, run):
            if row.key not in best or (row.score or 0) > (best[row.key].score or 0):
                best[row.key] = row
    rows = [best[name] for name in sorted(best)]
    if comparable:
        seconds = full["train_info"]["train_time"]
        top = sorted((row.score or 0.0 for row in rows), reverse=True)[:TOP]
        rows = [_compared(row, sum(top) / len(top), seconds) for row in rows]
    return context, rows


def _compared(row: Measured, unit: float, seconds: float) -> Measured:
    """Return a row with its relative score, the items of the test set being the only source of error."""
    score = row.score or 0.0
    value, error = score / unit, math.sqrt(score * (1 - score) / ITEMS) / unit
    found = {"gain": score, "relative": round(value, 4), "low": round(value - 1.96 * error, 4)}
    found |= {"high": round(value + 1.96 * error, 4), "time": round((row.time or 0.0) / seconds, 4)}
    return row.model_copy(update=found)


def _last(run: Run) -> dict[str, Any]:
    last: dict[str, Any] = run["train_info"]["metrics"][-1]
    return last


def _row(suite: str, run: Run) -> Iterable[Measured]:
    """Yield the result as it is, the time in seconds, if a method of ours equals the run's."""
    named = ours(run["run_info"]["peft_config"], WIDTHS.get(run["run_info"]["train_config"]["model_id"], 0))
    if named is None:
        return
    method, fields = named
    last, lost = _last(run), _last(run).get("forgetting", _last(run).get("drift"))
    yield Measured(
        task=f"peft {suite}", method=method, fields=fields, seeds=1,
        score=round(last["test accuracy" if suite == "MetaMathQA" else "test dino_similarity"], 4),
        times=float(f"{run['run_info']['train_config']['optimizer_kwargs']['lr'] / _rate(method):.4g}"),
        time=run["train_info"]["train_time"] if suite == "MetaMathQA" else None,
        forgets=round(lost, 4) if lost is not None and math.isfinite(lost) else None,
        trainable=run["train_info"]["num_trainable_params"],
    )  # fmt: skip


def _rate(method: str) -> float:
    return registry.get(method).tags.lr


def ours(config: Mapping[str, Any] | None, width: int = 0) -> tuple[str, dict[str, Any]] | None:
    """Return our method and the fields that differ from its defaults for one of their configurations, if there is one.

    Args:
        config: their `peft_config`; none: full fine-tuning.
        width: what the adapted maps read, if that is one number.

    >>> ours({"peft_type": "LORA", "r": 32, "lora_alpha": 64, "target_modules": ["v_proj", "q_proj"]})
    ('lora', {'alpha': 64.0, 'r': 32})
    """
    if not config:
        return "full", {}
    method = METHODS.get(config["peft_type"] or "")
    if method is None or _is_other(config):
        return None
    if method == "lora":
        method = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    fields: dict[str, Any] = {new: config[old] for old, new in FIELDS.get(method, {}).items() if config.get(old)}
    if method == "oft" and "block" not in fields:
        if not width or not config.get("r"):
            return None
        fields["block"] = width // config["r"]
    targets = config.get("target_modules")
    if method not in ("layernorm", "llama_adapter") and targets:
        sites = _sites(targets)
        if sites is None:
            return None
        fields |= {"sites": sites}
    made = registry.make(method, fields)
    default = type(made)()
    changed = {n: getattr(made, n) for n in sorted(fields) if getattr(made, n) != getattr(default, n)}
    if set(str(changed.get("sites", "")).split()) == set(default.sites.replace("xattn.k? xattn.v?", "").split()):
        changed.pop("sites", None)
    return method, changed


def _is_other(config: Mapping[str, Any]) -> bool:
    start = config.get("init_lora_weights")
    return any(config.get(name) for name in OTHER) or (isinstance(start, str) and start in OTHER_STARTS)


def _sites(targets: list[str] | str) -> str | None:
    names = [targets] if isinstance(targets, str) else targets
    if all(name in ROLES for name in names):
        return "linear" if set(names) == set(ROLES) else " ".join(r for n, r in ROLES.items() if n in names)
    return "linear" if "linear_in" in names and "to_q" in names else None  # every linear map of their transformer
