"""What compiling the passes of training needs of a machine."""

from __future__ import annotations

import torch

from peftree.errors import ConfigError


def check_compiler(device: torch.device, where: str = "") -> None:
    """Raise ConfigError, which starts with `where`, if torch.compile has no compiler for a device here."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # a second to import, and rarely needed
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device.type != "cpu" and not has_triton():
        raise ConfigError(f"{where}compile: torch.compile needs triton here.", "Run: pip install triton")
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ConfigError(
            f"{where}compile: this machine has no C++ compiler.",
            "Install one (Debian: apt-get install g++), or set CXX; or leave compile out.",
        ) from None
