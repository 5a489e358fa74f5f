"""LoftQ: LoRA's forward on the packed weight; its start, from the plain one, is in tests/quantized."""

from reference.lora import weight as weight
