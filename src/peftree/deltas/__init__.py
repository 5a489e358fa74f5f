"""The primitives that methods are made of: verbs, places, and shared building blocks. Torch only."""

from peftree.deltas.affine import Affine, Offset, ScaledInput, takes_shift
from peftree.deltas.branch import ACTIVATIONS, Bottleneck
from peftree.deltas.combine import FusedOutput, FusedWeight, gated
from peftree.deltas.experts import RandomExperts
from peftree.deltas.fused import lowrank_linear
from peftree.deltas.lowrank import LowRank, lora_factors, principal_factors
from peftree.deltas.mask import MaskedBottleneck, pack_bits, top_mask, unpack_bits
from peftree.deltas.matrix import LINEAR, TINY, Bases, added_norm, cayley, matrix, only, seeded_indices
from peftree.deltas.memory import KeyValues
from peftree.deltas.place import Place, read
from peftree.deltas.route import TokenRouter
from peftree.deltas.select import BiasOffset, Sensitivity, keep_largest, pick
from peftree.deltas.side import SideBlock, rms
from peftree.deltas.sparse import Entries, Sparse, squared_gradients
from peftree.deltas.triplet import Triplets
from peftree.deltas.verbs import Attend, Delta, Frozen, Prepend, Reweight, Rewrite, Side, SideAttention

__all__ = [
    "ACTIVATIONS",
    "LINEAR",
    "TINY",
    "Affine",
    "Attend",
    "Bases",
    "BiasOffset",
    "Bottleneck",
    "Delta",
    "Entries",
    "Frozen",
    "FusedOutput",
    "FusedWeight",
    "KeyValues",
    "LowRank",
    "MaskedBottleneck",
    "Offset",
    "Place",
    "Prepend",
    "RandomExperts",
    "Reweight",
    "Rewrite",
    "ScaledInput",
    "Sensitivity",
    "Side",
    "SideAttention",
    "SideBlock",
    "Sparse",
    "TokenRouter",
    "Triplets",
    "added_norm",
    "cayley",
    "gated",
    "keep_largest",
    "lora_factors",
    "lowrank_linear",
    "matrix",
    "only",
    "pack_bits",
    "pick",
    "principal_factors",
    "read",
    "rms",
    "seeded_indices",
    "squared_gradients",
    "takes_shift",
    "top_mask",
    "unpack_bits",
]
