"""Health checks of a training run: by its third step, what would fail silently fails with a message."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftree.adapter import Adapter, active, adapters, switch
from peftree.errors import TrainError

STEPS = 3  # a low-rank term's first factor gets a gradient only once the second moved; warm-up costs a step
LENIENT = ("moe", "unified")  # a router may not have reached an expert yet


class Health:
    """Watches the first steps of a run and raises TrainError when something is dead.

    Args:
        adapter: the adapter in training.
        stop: id of the stop token, which must be in the loss for generation.
    """

    def __init__(self, adapter: Adapter, stop: int | None = None) -> None:
        self.adapter = adapter
        self.stop = stop
        self.names = names(adapter)
        self.alive: set[str] = set()
        self.turns: Counter[str] = Counter()  # steps in which a tensor was trained: some methods let them take turns
        self.steps = 0
        self.labels = [0, 0]
        self._seen: tuple[int, ...] = (0, 0, 0, 0)  # `counts` of all processes
        self.stops = [0, 0]
        self.optimized = 0
        self.done = False

    def check_adapter(self, model: nn.Module) -> None:
        """Check before the first step that the adapter is switched on and that only it trains."""
        name = self.adapter.name
        on = active(model)
        if name not in on:
            raise TrainError(
                f"Adapter '{name}' is trained but not switched on, so it would get no gradients.",
                f"Call peftree.switch(model, '{name}') before training.",
            )
        trained = self._trained()
        if not trained:
            raise TrainError(f"Adapter '{name}' has no trainable tensor.", "Call adapter.requires_grad(True).")
        idle = {id(p) for a in adapters(model).values() if a.name not in on for p in a.parameters()}
        others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in {*trained, *idle}]
        if others:
            raise TrainError(
                f"{len(others)} trainable tensors, such as {others[0]}, are not part of adapter '{name}'.",
                "Freeze them with requires_grad_(False); only the adapter would be saved.",
            )

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Check that the optimizer holds exactly the trainable tensors."""
        trained = self._trained()
        held = {id(p) for g in optimizer.param_groups for p in g["params"]}
        missing = [n for key, n in trained.items() if key not in held]
        if missing or len(held) > len(trained):
            what = f"lacks {len(missing)}, such as {missing[0]}, of" if missing else "holds more than"
            raise TrainError(
                f"The optimizer {what} the {len(trained)} trainable tensors of adapter '{self.adapter.name}'.",
                "Build it after peftree.adapt, from adapter.param_groups().",
            )
        self.optimized = len(held)

    def _trained(self) -> dict[int, str]:
        return {id(p): n for n, p in self.names.items() if p.requires_grad}

    def see_batch(self, batch: Mapping[str, Any]) -> None:
        """Check a batch's masks and labels."""
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and not bool(mask.flatten(1).any(1).all()):
            raise TrainError("A row's attention mask is all zero.", "Check tokenizer and collator.")
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            return
        # Numbers to predict are not marks: -100 is one of them.
        kept = torch.ones_like(labels, dtype=torch.bool) if labels.is_floating_point() else labels.ne(-100)
        self.labels[0] += int(kept.sum())
        self.labels[1] += labels.numel()
        if self.stop is not None and labels.dim() == 2:
            rows = ((labels == self.stop) & kept).any(1)
            self.stops[0] += int(rows.sum())
            self.stops[1] += len(rows)

    @property
    def counts(self) -> list[float]:
        """Labels in the loss, all labels, rows with a stop token in the loss, and all rows, so far in this process."""
        return [*map(float, (*self.labels, *self.stops))]

    def _check_labels(self, counts: Sequence[float]) -> None:
        """Check what the passes of a step had in the loss together; a single pass may have no label."""
        before, self._seen = self._seen, tuple(map(int, counts))
        kept, labels = (new - old for new, old in zip(self._seen[:2], before[:2], strict=True))
        stops, rows = self._seen[2:]
        if labels and not kept:
            raise TrainError(
                f"All {labels} labels of a batch are masked (-100); nothing would be learned.",
                "Raise max_length or shorten the rows, and check that the completion column is not empty.",
            )
        if rows and not stops:
            raise TrainError(
                f"The stop token {self.stop} is not in the loss of any of {rows} rows; "
                "the model would not learn to stop.",
                "Raise max_length or shorten the rows; do not mask labels by pad id, which may be the stop token.",
            )

    def see_loss(self, loss: Tensor) -> None:
        """Check that the loss reaches the adapter at all."""
        if not loss.requires_grad:
            raise TrainError(
                "The loss depends on no trainable tensor: no adapter weight would get a gradient.",
                "With gradient checkpointing, set use_reentrant=False; check that the sites are in the "
                "part of the model that the task runs.",
            )

    def see_gradients(self, counts: Sequence[float]) -> None:
        """Note which tensors have a gradient in a step, before the optimizer uses it; `counts`: of all processes."""
        self.steps += 1
        self._check_labels(counts)
        self.turns.update(name for name, parameter in self.names.items() if parameter.requires_grad)
        for name, parameter in self.names.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            if name not in self.alive and bool(gradient.any()):
                self.alive.add(name)
        if self.steps == STEPS:
            self._judge()

    def _judge(self) -> None:
        """Raise if a site is dead, or if one tensor is dead at every site; the data can cause single dead tensors.

        A request for `all` parameters names no module: some models have parts for other tasks (DINOv2's mask token).
        """
        trained = list(self._trained().values())
        dead = [n for n in trained if n not in self.alive and self.turns[n] >= STEPS]
        lenient = self.adapter.method.tags.branch in LENIENT and len(dead) < len(trained)
        if not dead or lenient:
            return
        every = {key for key, site, _ in self.adapter.entries if site.role == "all"} if self.alive else set()
        named = [n for n in dead if n.rpartition("/")[0] not in every]
        fatal = [n for part in (0, 2) for n in named if not self._alive_like(n, part)]
        if fatal:
            raise TrainError(
                f"{len(dead)} of {len(trained)} trainable tensors had no gradient in {STEPS} steps, "
                f"such as {', '.join(fatal[:3])}.",
                "Check that their sites are in the part of the model that the task runs (peftree inspect), or name "
                "other sites. A narrow bottleneck of ReLUs can also start dead: widen it or change the seed.",
            )

    def _alive_like(self, name: str, part: int) -> bool:
        """Return True if another tensor of the same site (`part` 0) or of the same name (2) has had a gradient."""
        key = name.rpartition("/")[part]
        return any(other.rpartition("/")[part] == key for other in self.alive)

    def effect(self, model: nn.Module, batch: Mapping[str, Any]) -> float:
        """Return the largest change that the adapter makes to the output on the first rows of a batch, or on all.

        The model gets everything that it got in training: some models read their labels. Where not every tensor's first
        dimension is the rows, and where the first rows do not change, it gets all rows.

        Raises:
            TrainError: the output does not change.
        """
        return self._effect(model, first_rows(batch)) or self._effect(model, batch) or self._none()

    def _none(self) -> float:
        raise TrainError(
            f"Adapter '{self.adapter.name}' is switched on and trained, but the output equals the base's.",
            "Raise lr if it is tiny; check that its sites are in the part that the task runs.",
        )

    def _effect(self, model: nn.Module, batch: Mapping[str, Any]) -> float:
        on = active(model)
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng():
                new = main_output(model(**batch))
                switch(model, [n for n in on if n != self.adapter.name])
                old = main_output(model(**batch))
        finally:
            switch(model, on)
            model.train(training)
        same = new.shape == old.shape and new.dim()
        rows = range(len(new) if same else 0)  # one by one: the logits of a batch are its largest tensor
        return max((float((new[i].float() - old[i].float()).abs().max()) for i in rows), default=float("inf"))

    def report(self, change: float | None) -> str:
        """Return the line that says what was checked."""
        count = len(self._trained())
        parts = [f"gradients {len(self.alive)}/{count} finite and non-zero"]
        parts.append(f"optimizer {self.optimized}/{count} tensors")
        kept, labels, stops, rows = self._seen
        if labels:
            parts.append(f"labels {kept:,}/{labels:,} in the loss")
        if self.stop is not None:
            parts.append(f"stop token in {stops}/{rows} rows")
        if change is not None:
            parts.append(f"output changed by up to {change:.1e}")
        return f"step {self.steps}: {', '.join(parts)}"


def names(adapter: Adapter) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters, each once, by `path/part_role/tensor`."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for key, delta in adapter.deltas.items():
        for name, parameter in delta.named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{key}/{name}"] = parameter
    return found


def first_rows(batch: Mapping[str, Any], count: int = 2) -> Mapping[str, Any]:
    """Return the first rows of a batch whose tensors all have its rows as their first dimension; any other as it is."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    lengths = {len(t) if t.dim() else 0 for t in tensors}
    plain = len(lengths) == 1 and all(isinstance(v, Tensor | bool | None) for v in batch.values())
    return {k: v[:count] if isinstance(v, Tensor) else v for k, v in batch.items()} if plain else batch


def main_output(output: Any) -> Tensor:
    """Return the tensor that matters in a model's output: the logits, or its first tensor that is not a scalar loss."""
    named = output if isinstance(output, Mapping) else {}
    logits = named.get("logits")
    if isinstance(logits, Tensor):
        return logits
    values: Iterable[Any] = named.values() or output
    tensors = [value for value in values if isinstance(value, Tensor)]
    return next((tensor for tensor in tensors if tensor.dim()), tensors[0])


def first_line(model: nn.Module, adapter: Adapter) -> str:
    """Return what is trained: `adapter 'x' (lora): 224 sites, 1,234,567 trainable parameters, 0.59 % of the model`."""
    count = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    own = {id(p) for p in adapter.parameters()}
    base = {id(p): p.numel() for p in model.parameters() if id(p) not in own}
    share = 100 * count / max(1, sum(base.values()))
    return (
        f"adapter '{adapter.name}' ({adapter.method.name}): {len(adapter.entries):,} sites, "
        f"{count:,} trainable parameters, {share:.3g} % of the model"
    )
