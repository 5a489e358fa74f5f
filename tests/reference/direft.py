"""DiReFT: hidden states of some tokens are moved in the span of R, by what a map makes of them."""

from reference.loreft import output

__all__ = ["output"]
