"""CLIP-LoRA: LoRA's forward; dropout is a matter of training."""

from reference.lora import weight as weight

MODELS = ("clip", "vit")
