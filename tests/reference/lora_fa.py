"""LoRA-FA: LoRA's forward; A gets no gradient."""

from reference.lora import weight as weight
