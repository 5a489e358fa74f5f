"""The loss of language models without their logits: the head's product and the cross-entropy, some tokens at a time."""

from peftree.loss.chunked import Head, token_losses
from peftree.loss.deferred import Logits, deferred, has_head, obstacle, pieces, source

__all__ = ["Head", "Logits", "deferred", "has_head", "obstacle", "pieces", "source", "token_losses"]
