"""The method that settings name, made with its fields; an error says where the wrong name or value is."""

from __future__ import annotations

from peftree import registry
from peftree.errors import ConfigError, MethodError, did_you_mean
from peftree.methods.contract import Method
from peftree.settings import RunConfig, renamed

_PLANNED = "`peftree plan` can plan them, `peftree train` cannot run them yet: it "
# Settings that other trainers have -> what to do here.
ABSENT = {
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), "Write quantize=nf4 or quantize=int8."),
    **dict.fromkeys(
        ("bf16", "fp16"), "Write precision=bf16 or precision=fp16; for a base in half precision, dtype=bfloat16."
    ),
    "sample_packing": "Write packing=true.",
    **dict.fromkeys(
        ("val_size", "val_set_size"), "A tenth of the rows is held out unless data.valid names a file; leave it out."
    ),
}


def make_method(config: RunConfig) -> Method:
    """Return the method of `config` with its fields.

    Raises:
        MethodError, ConfigError: an unknown method or field, or a value out of range, with file and line.
    """
    name, fields = config.method.name, config.method.fields
    try:
        known = registry.get(name).model_fields
    except MethodError as error:
        where = config.where("method.name") or config.where("method")
        raise MethodError(where + error.what, error.fix) from None
    for key in fields:
        if key not in known:
            where = config.where(f"method.{key}") or config.where(f"method.fields.{key}")
            hint = did_you_mean(key, [*known, *type(config).model_fields], f"Fields of {name} and settings")
            new = renamed(key, type(config))
            fix = f"Write {new}." if new else ABSENT.get(key, hint)
            raise ConfigError(f"{where}{name} has no field '{key}'.", fix)
    try:
        return registry.make(name, fields)
    except ConfigError as error:
        places = (config.where(f"method.{key}") for key in fields if f": {key}" in error.what)
        raise ConfigError(next(places, "") + error.what, error.fix) from None
