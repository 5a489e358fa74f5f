"""EVA: LoRA's forward; the start comes from data."""

from reference.lora import weight as weight
