"""RoseLoRA: LoRA's forward; which entries are zero is a matter of training."""

from reference.lora import weight as weight
