"""What the backward pass of an adapted model finds: the Python side of the setting `activations`."""

from __future__ import annotations

import warnings
from typing import Any, get_args

from peftree.errors import AdapterError, PeftreeWarning, did_you_mean
from peftree.graft import Graft
from peftree.graft.forms import Gated
from peftree.settings import Activations


class Keeps:
    """An object with a graft, whose activations can be set."""

    @property
    def graft(self) -> Graft:
        """The graft record of its model."""
        raise NotImplementedError

    @property
    def activations(self) -> str:
        """What the backward pass of its model finds: `exact`, `recompute` or `checkpoint`; it can be set.

        `exact` keeps what is needed, nothing twice. `recompute` runs gate and up of gated feed-forward networks again.
        `checkpoint` is gradient checkpointing: it runs each layer again. It holds for all adapters of the model.
        """
        if any(vars(m).get("gradient_checkpointing") for m in self.graft.model.modules()):
            return "checkpoint"
        return self.graft.shared.activations

    @activations.setter
    def activations(self, how: str) -> None:
        if how not in (known := get_args(Activations)):
            raise AdapterError(f"There is no activations={how!r}.", did_you_mean(str(how), known, "There are"))
        model: Any = self.graft.model
        if how == "checkpoint" or self.activations == "checkpoint":
            with warnings.catch_warnings():  # the names that every 5.x has; later ones say they will change
                warnings.simplefilter("ignore", FutureWarning)
                if how == "checkpoint":
                    model.gradient_checkpointing_enable({"use_reentrant": False})
                else:
                    model.gradient_checkpointing_disable()
        if how == "recompute" and not any(isinstance(form, Gated) for form in (self.graft.forms or {}).values()):
            warnings.warn(
                "activations=recompute has no effect: no feed-forward network of this model is act(gate(x)) up(x).",
                PeftreeWarning,
                stacklevel=2,
            )
        self.graft.shared.activations = "recompute" if how == "recompute" else "exact"
