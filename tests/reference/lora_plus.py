"""LoRA+: LoRA's forward; only the rates differ."""

from reference.lora import weight as weight
