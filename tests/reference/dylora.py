"""DyLoRA in use: all components count, W' = W + (alpha / r) B A."""

from reference.lora import weight as weight
