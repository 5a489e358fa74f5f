"""CPU seconds of whole training runs, imports included: `peftree train` beside a plain script of PEFT and the Trainer.

Every run is a process of its own, the programs take turns, and a figure is the median of the rounds. All train LoRA of
rank 8 on queries and values, with the same rows, batches and steps; each epoch ends with a score of the validation rows
and a checkpoint, the run with a score of the test rows and the saved adapter. `--script` is the other libraries' run.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Program -> whether it is the script, and whether it scores the base.
PROGRAMS = {
    "script": (True, False), "script, base scored": (True, True), "peftree": (False, True),
    "peftree, again": (False, True), "peftree, base_score=false": (False, False),
}  # fmt: skip
# Case -> model, data set, its rows (train, valid, test), batch size, epochs.
CASES: dict[str, tuple[str, str, tuple[int, int, int], int, int]] = {
    "tiny": ("tiny", "movies", (256, 64, 128), 16, 1),
    "minilm-l6": ("minilm-l6", "movies", (256, 64, 128), 16, 2),
    "minilm-l6, longer": ("minilm-l6", "movies", (1000, 200, 300), 16, 3),
    "smollm2-135m": ("smollm2-135m", "definitions", (64, 16, 32), 8, 2),
    "smollm2-135m, longer": ("smollm2-135m", "definitions", (256, 32, 64), 8, 3),
}
FEW = ("tiny", "minilm-l6")  # what the benchmark's section runs
Row = dict[str, Any]


def script(model: str, data: Path, batch: int, epochs: int, out: str, base: bool) -> None:
    """Train as a plain script of Hugging Face PEFT and transformers' Trainer does; `base` scores the start too."""
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    generates = (data / "train.jsonl").exists()
    collate: Any
    if generates:
        net = AutoModelForCausalLM.from_pretrained(model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        sites, collate = ["q_proj", "v_proj"], DataCollatorForSeq2Seq(tokenizer)
    else:
        net = AutoModelForSequenceClassification.from_pretrained(model)
        sites, collate = ["query", "value"], DataCollatorWithPadding(tokenizer)

    def rows(split: str) -> list[dict[str, Any]]:
        if not generates:
            with (data / f"{split}.csv").open(encoding="utf-8") as file:
                found = list(csv.DictReader(file))
            texts = tokenizer([row["text"] for row in found], truncation=True, max_length=256)["input_ids"]
            return [
                {"input_ids": i, "labels": int(r["label"] == "positive")} for i, r in zip(texts, found, strict=True)
            ]
        out = []
        for line in (data / f"{split}.jsonl").read_text("utf-8").splitlines():
            row = json.loads(line)
            prompt = tokenizer(row["prompt"])["input_ids"]
            whole = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
            out.append({"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]})
        return out

    def accuracy(found: Any) -> dict[str, float]:
        return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    kind = "CAUSAL_LM" if generates else "SEQ_CLS"
    adapted = get_peft_model(net, LoraConfig(task_type=kind, r=8, lora_alpha=16, target_modules=sites))
    arguments = TrainingArguments(
        output_dir=out, num_train_epochs=epochs, per_device_train_batch_size=batch, per_device_eval_batch_size=32,
        learning_rate=5e-4, warmup_steps=0.06, eval_strategy="epoch", save_strategy="epoch", save_total_limit=2,
        logging_steps=10, report_to="none", use_cpu=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(
        adapted, arguments, train_dataset=rows("train"), eval_dataset=rows("valid"), data_collator=collate,
        compute_metrics=None if generates else accuracy,
    )  # fmt: skip
    test = rows("test")
    if base:
        with adapted.disable_adapter():
            print(trainer.evaluate(test))
    trainer.train()
    print(trainer.evaluate(test))
    adapted.save_pretrained(f"{out}/adapter")


def tiny(folder: Path) -> Path:
    """Write a BERT of two layers, 32 units wide, with MiniLM's tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from peftree.resolver import located

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=2,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(located("minilm-l6", True)).save_pretrained(folder)
    return folder


def spent(arguments: list[str], cache: Path) -> float:
    """Return the CPU seconds of a process and its children, on one thread."""
    told = {"PEFTREE_CACHE": str(cache), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=said,
            stderr=said,
            env=os.environ | told | {"TOKENIZERS_PARALLELISM": "false"},
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(said.read().decode(errors="replace"))
    return used.ru_utime + used.ru_stime


def one(case: str, program: str, model: str, data: Path, cache: Path) -> float:
    """Run a program on a case in a process of its own, and return its CPU seconds."""
    _, _, _, batch, epochs = CASES[case]
    theirs, base = PROGRAMS[program]
    with tempfile.TemporaryDirectory() as out:
        if theirs:
            return spent([__file__, "--script", json.dumps([model, str(data), batch, epochs, out, base])], cache)
        words = [f"model={model}", f"data={data}", f"batch_size={batch}", f"epochs={epochs}", f"output={out}/run"]
        return spent(["-m", "peftree", "train", *words, f"base_score={str(base).lower()}"], cache)


def measured(asked: argparse.Namespace) -> Iterator[Row]:
    """Return a row for each case: seconds of the script, and ratios to the script with the same scores."""
    from step import ratios

    from peftree.assets.data import write_data
    from peftree.resolver import located

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in asked.only or FEW:
            model, data, counts, *_ = CASES[case]
            place = str(tiny(folder / "model")) if model == "tiny" else located(model, True)
            parts = dict(zip(("train", "valid", "test"), counts, strict=True))
            rows = write_data(folder / case, data, {}, parts, 0, True)
            found: dict[str, list[float]] = {program: [] for program in PROGRAMS}
            for number in range(asked.rounds):
                for program in PROGRAMS:
                    found[program].append(one(case, program, place, rows, folder / f"{case}{number}"))
            scored = ratios({n: found[n] for n in ("script, base scored", "peftree")}, "script, base scored")
            again = ratios({n: found[n] for n in ("peftree", "peftree, again")}, "peftree")["peftree, again"]
            plain = ratios({n: found[n] for n in ("script", "peftree, base_score=false")}, "script")
            yield {
                "row": case, "rounds": asked.rounds, "seconds": scored["seconds"], "peftree": scored["peftree"],
                "again": again, "unscored": plain["peftree, base_score=false"],
            }  # fmt: skip


def main() -> None:
    """Run the other libraries' program, or measure."""
    if sys.argv[1:2] == ["--script"]:
        model, data, *rest = json.loads(sys.argv[2])
        script(model, Path(data), *rest)
        return
    from step import section

    section(measured, __doc__)


if __name__ == "__main__":
    main()
