"""Settings of the probes and the tasks each applies to; no torch is imported, so that a plan can be checked early."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peftree.errors import ConfigError, did_you_mean

CLASSES = ("text-classification", "image-classification")
TEXTS = ("text-classification", "text-regression", "generation")
IMAGES = ("image-classification", "image-text-retrieval", "captioning")


class Settings(BaseModel):
    """Settings of one probe; `tasks` are those it applies to, none meaning all."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    tasks: ClassVar[tuple[str, ...]] = ()


class Calibration(Settings):
    """Is the probability of the predicted class the chance of being right?"""

    tasks: ClassVar[tuple[str, ...]] = CLASSES
    bins: int = Field(15, ge=1, le=1000, description="bins of equal width of the expected calibration error")
    limit: int = Field(0, ge=0, description="rows, evenly spread; 0: all")


class Noise(Settings):
    """How far does the score fall when letters or words of the texts are damaged?"""

    tasks: ClassVar[tuple[str, ...]] = TEXTS
    limit: int = Field(48, ge=0, description="rows, evenly spread; 0: all")


class Corruptions(Settings):
    """How far does the score fall when the images are damaged?"""

    tasks: ClassVar[tuple[str, ...]] = IMAGES
    limit: int = Field(40, ge=0, description="rows, evenly spread; 0: all")


class Retention(Settings):
    """What does the model still know of general data?"""

    tasks: ClassVar[tuple[str, ...]] = tuple(dict.fromkeys((*TEXTS, *IMAGES)))
    neighbours: int = Field(5, ge=1, le=1000, description="k of the nearest-neighbour accuracy")
    limit: int = Field(200, ge=0, description="general rows, evenly spread; 0: all")


class Interpretability(Settings):
    """What did the adapter change, and where?"""

    matrices: int = Field(12, ge=1, description="weight matrices whose update is taken apart")
    top: int = Field(10, ge=1, description="leading singular vectors among which intruders are counted")
    rows: int = Field(64, ge=2, description="rows of the comparison of hidden states and of the routing load")
    layers: int = Field(6, ge=1, description="layers that are knocked out, evenly spread")
    limit: int = Field(32, ge=1, description="rows scored for each layer knocked out")


class Latency(Settings):
    """How long does a forward pass take, with the adapter, without it, and with it merged?"""

    batch: int = Field(8, ge=1, description="rows of the larger batch")
    rounds: int = Field(9, ge=3, description="rounds at most")
    seconds: float = Field(15.0, ge=0, description="time after which no further round begins; three are always run")


SETTINGS: dict[str, type[Settings]] = {
    "calibration": Calibration,
    "noise": Noise,
    "corruptions": Corruptions,
    "retention": Retention,
    "interpretability": Interpretability,
    "latency": Latency,
}


def check(wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, Settings]:
    """Return the checked settings of the probes `wanted`, by name.

    Raises:
        ConfigError: a probe or setting is unknown, or a value is out of range.
    """
    out: dict[str, Settings] = {}
    for name, values in wanted.items():
        if name not in SETTINGS:
            raise ConfigError(f"There is no probe {name!r}.", did_you_mean(str(name), SETTINGS, "Probes"))
        known = SETTINGS[name].model_fields
        for key in values:
            if key not in known:
                hint = did_you_mean(str(key), known, "Settings")
                raise ConfigError(f"The probe {name} has no setting {key!r}.", hint)
        try:
            out[name] = SETTINGS[name](**values)
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0])
            raise ConfigError(
                f"Probe {name}: {key}={values[key]!r}: {first['msg']}.", f"It is: {known[key].description}."
            ) from None
    return out
