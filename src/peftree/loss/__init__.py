"""The loss of language models without their logits: the head's product and the cross-entropy, some tokens at a time."""

from peftree.loss.chunked import Head, token_losses
from peftree.loss.deferred import Logits, deferred, obstacle

__all__ = ["Head", "Logits", "deferred", "obstacle", "token_losses"]
