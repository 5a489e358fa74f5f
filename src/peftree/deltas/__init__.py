"""The primitives that methods are made of: verbs, places, and shared building blocks.

Torch alone; what packed a weight is known in `packed`, where a model came from in `origin`.
"""

from peftree.deltas.affine import Affine, Offset, ScaledInput, takes_shift
from peftree.deltas.bank import MaskedBank
from peftree.deltas.branch import ACTIVATIONS, Bottleneck
from peftree.deltas.combine import FusedOutput, FusedWeight, gated
from peftree.deltas.concrete import GatedEntries, relaxed
from peftree.deltas.core import Core
from peftree.deltas.coupling import Coupling
from peftree.deltas.experts import ExpertTerms, RandomExperts
from peftree.deltas.fastfood import Fastfood
from peftree.deltas.follow import Kept, follow
from peftree.deltas.fused import fusable, lowrank_linear
from peftree.deltas.grid import over_grid
from peftree.deltas.grow import Growing
from peftree.deltas.importance import InLayer
from peftree.deltas.kron import KroneckerBottleneck, glorot, kronecker_rows
from peftree.deltas.lowrank import LowRank, Residual, lora_factors, orthogonal_factors, packing_error, principal_factors
from peftree.deltas.mask import MaskedBottleneck, pack_bits, top_mask, unpack_bits
from peftree.deltas.matrix import (
    LINEAR,
    TINY,
    Bases,
    added_norm,
    cayley,
    matrix,
    nearest_divisor,
    only,
    seeded_indices,
    within,
)
from peftree.deltas.memory import KeyValues
from peftree.deltas.noise import Drawn, Ivon, ivon
from peftree.deltas.origin import filled
from peftree.deltas.place import Place, read
from peftree.deltas.probe import probed_gradients
from peftree.deltas.prompt import VirtualTokens, start_tokens
from peftree.deltas.replace import Replace
from peftree.deltas.route import TokenRouter, balance
from peftree.deltas.scene import Scene, scene
from peftree.deltas.selection import BiasOffset, Sensitivity, keep_largest, pick, turn
from peftree.deltas.side import LayerNormBlock, SideBlock, attended, quick_gelu, rms
from peftree.deltas.sparse import Entries, Sparse, Watched, quantiles, squared_gradients
from peftree.deltas.steps import Steps
from peftree.deltas.structured import Added, Term, circulant, convolved, factor_pair
from peftree.deltas.subspace import InputSubspace
from peftree.deltas.text import by_rows, largest, places, pooled, summary, task_numbers, token_ids
from peftree.deltas.triplet import Triplets
from peftree.deltas.verbs import Attend, Delta, Frozen, Part, Prepend, Reweight, Rewrite, Side, SideAttention
from peftree.deltas.video import OverFrames, OverWords, from_top

__all__ = [
    "ACTIVATIONS",
    "LINEAR",
    "TINY",
    "Added",
    "Affine",
    "Attend",
    "Bases",
    "BiasOffset",
    "Bottleneck",
    "Core",
    "Coupling",
    "Delta",
    "Drawn",
    "Entries",
    "ExpertTerms",
    "Fastfood",
    "Frozen",
    "FusedOutput",
    "FusedWeight",
    "GatedEntries",
    "Growing",
    "InLayer",
    "InputSubspace",
    "Ivon",
    "Kept",
    "KeyValues",
    "KroneckerBottleneck",
    "LayerNormBlock",
    "LowRank",
    "MaskedBank",
    "MaskedBottleneck",
    "Offset",
    "OverFrames",
    "OverWords",
    "Part",
    "Place",
    "Prepend",
    "RandomExperts",
    "Replace",
    "Residual",
    "Reweight",
    "Rewrite",
    "ScaledInput",
    "Scene",
    "Sensitivity",
    "Side",
    "SideAttention",
    "SideBlock",
    "Sparse",
    "Steps",
    "Term",
    "TokenRouter",
    "Triplets",
    "VirtualTokens",
    "Watched",
    "added_norm",
    "attended",
    "balance",
    "by_rows",
    "cayley",
    "circulant",
    "convolved",
    "factor_pair",
    "filled",
    "follow",
    "from_top",
    "fusable",
    "gated",
    "glorot",
    "ivon",
    "keep_largest",
    "kronecker_rows",
    "largest",
    "lora_factors",
    "lowrank_linear",
    "matrix",
    "nearest_divisor",
    "only",
    "orthogonal_factors",
    "over_grid",
    "pack_bits",
    "packing_error",
    "pick",
    "places",
    "pooled",
    "principal_factors",
    "probed_gradients",
    "quantiles",
    "quick_gelu",
    "read",
    "relaxed",
    "rms",
    "scene",
    "seeded_indices",
    "squared_gradients",
    "start_tokens",
    "summary",
    "takes_shift",
    "task_numbers",
    "token_ids",
    "top_mask",
    "turn",
    "unpack_bits",
    "within",
]
