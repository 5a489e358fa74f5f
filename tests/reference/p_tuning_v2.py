"""P-tuning v2: prefix tuning's forward; length, rate and the trained head differ."""

from reference.prefix_tuning import MODELS as MODELS
from reference.prefix_tuning import run as run
