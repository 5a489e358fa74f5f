"""Safe loading of a folder or hub name: nothing that a model's files name is fetched or run."""

from __future__ import annotations

from typing import Any

SAFE: dict[str, Any] = {"trust_remote_code": False}  # code beside the weights is neither run nor asked about
_BUILT_IN = (None, "eager", "sdpa", "flex_attention")


def cleared(config: Any) -> Any:
    """Return a config that asks for no kernel from a hub; in place of one it names, transformers picks torch's own.

    A kernel changes how attention or experts are computed, not what. Transformers fetches one that `config.json`
    names, and one for `flash_attention_2` if that package is missing.
    """
    from transformers import PretrainedConfig

    if config._attn_implementation not in _BUILT_IN:
        config._attn_implementation = None
    if "/" in (config._experts_implementation or ""):
        config._experts_implementation = None
    for part in [v for v in vars(config).values() if isinstance(v, PretrainedConfig)]:
        cleared(part)
    return config
