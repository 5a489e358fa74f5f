"""AdaptFormer: x + MLP(LN x) + s (U ReLU(D x + b1) + b2), x the residual stream before the norm."""

from reference.parallel_adapter import output as output

READS = "residual"
MODELS = ("vit", "llama")
