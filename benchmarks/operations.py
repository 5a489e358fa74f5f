"""One process: CPU seconds of import, attach, save, load and switch for one library; prints one JSON line."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
start = time.process_time()
import torch

TORCH = time.process_time() - start
start = time.process_time()
if sys.argv[1] == "peftree":
    import peftree
else:
    import peft
IMPORT = time.process_time() - start

from transformers import LlamaConfig, LlamaModel


def timed(function: object) -> float:
    """Return the CPU seconds of one call."""
    begin = time.process_time()
    function()  # type: ignore[operator]
    return time.process_time() - begin


def main() -> None:
    """Measure on the SmolLM2-135M shape, 30 layers, 210 linear maps."""
    torch.set_num_threads(1)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=1000,
    )  # fmt: skip
    model = LlamaModel(config)
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    out = {"import torch": TORCH, "import beyond torch": IMPORT}
    with tempfile.TemporaryDirectory() as folder:
        where = str(Path(folder) / "a")
        if sys.argv[1] == "peftree":
            out["attach"] = timed(lambda: peftree.adapt(model, "lora", sites="linear", name="a"))
            out["save"] = timed(lambda: peftree.save(peftree.adapters(model)["a"], where))
            out["load another"] = timed(lambda: peftree.load(model, where, name="b"))
            out["switch"] = timed(lambda: peftree.switch(model, "a"))
        else:
            lora = peft.LoraConfig(r=8, target_modules=every)
            held: list[object] = []
            out["attach"] = timed(lambda: held.append(peft.get_peft_model(model, lora, adapter_name="a")))
            wrapped = held[0]
            out["save"] = timed(lambda: wrapped.save_pretrained(where))  # type: ignore[attr-defined]
            out["load another"] = timed(lambda: wrapped.load_adapter(where + "/a", "b"))  # type: ignore[attr-defined]
            out["switch"] = timed(lambda: wrapped.set_adapter("a"))  # type: ignore[attr-defined]
    print(json.dumps(out))


if __name__ == "__main__":
    main()
