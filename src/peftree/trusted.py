"""Safe loading of a folder or hub name: nothing that a model's files name is fetched or run."""

from __future__ import annotations

from functools import cache
from typing import Any

from peftree.errors import ConfigError

_WAIT = 10.0  # seconds for the hub to answer
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


@cache
def on_hub(name: str, kind: str = "model") -> bool:
    """Return whether the hub has a model or data set (`dataset`); False: it does not answer, but files are kept here.

    One request tells it; the libraries that load would repeat theirs for half a minute.

    Raises:
        ConfigError: it has no such name, or it cannot be reached and no file was fetched before.
    """
    from huggingface_hub import HfApi, errors, try_to_load_from_cache

    what = "data set" if kind == "dataset" else "model"
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=_WAIT)
    except errors.OfflineModeIsEnabled:
        return False
    except (errors.HFValidationError, errors.RepositoryNotFoundError):  # which a name that is not public is to others
        fix = "Check its spelling; log in with `hf auth login` if it is private; a folder or file is named by its path."
        raise ConfigError(f"The hub has no {what} '{name}'.", fix) from None
    except Exception as error:  # noqa: BLE001  each HTTP library has its own
        if kind == "model" and isinstance(try_to_load_from_cache(name, "config.json"), str):
            return False
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise ConfigError(
            f"The hub cannot be asked for the {what} '{name}': {why}.", "Name a folder or file."
        ) from None
    return True
