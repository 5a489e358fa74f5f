"""Tasks: text classification, generation, image classification, behind one small interface."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from peftree.errors import ConfigError, DataError
from peftree.evaluate import quality
from peftree.train.data import Data, Example, TaskName
from peftree.train.images import Images, Look, read_look

Batch = dict[str, Tensor]
Items = Dataset[dict[str, Any]]
DEFAULT_LENGTH = 256
IGNORED = -100


@dataclass(frozen=True)
class Options:
    """How models are loaded and rows turned into tensors; see `RunConfig` for the meaning."""

    config: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    max_length: int | None = None
    image_size: int | None = None
    chat: bool = False
    seed: int = 0


class Task(ABC):
    """A model with what turns rows into batches and scores its answers.

    Attributes:
        model: the base model with a head for the task.
        labels: class names by index; empty for generation.
        notes: sentences the user should see (a new head, rows that were cut).
        stop: id of the token that must end a completion; None for other tasks.
    """

    name: ClassVar[TaskName]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool] = True

    def __init__(self, model: nn.Module, labels: Sequence[str] = (), notes: Sequence[str] = ()) -> None:
        self.model = model
        self.labels = tuple(labels)
        self.notes = list(notes)
        self.stop: int | None = None

    @abstractmethod
    def items(self, rows: Sequence[Example]) -> Items:
        """Return a data set of features, one for each row."""

    @abstractmethod
    def collate(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """Return features as one batch of tensors with `labels`, first dimension the rows."""

    @abstractmethod
    def score(self, items: Items, batch_size: int = 32) -> quality.Scores:
        """Score the model as it stands now on `items`."""

    def batches(self, items: Items, batch_size: int) -> Iterator[Batch]:
        """Yield `items` in their order, batch by batch, on the model's device."""
        device = next(self.model.parameters()).device
        count = len(items)  # type: ignore[arg-type]
        for start in range(0, count, batch_size):
            batch = self.collate([items[i] for i in range(start, min(start + batch_size, count))])
            yield {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


class Rows(Dataset[dict[str, Any]]):
    """Features kept in memory."""

    def __init__(self, features: Sequence[dict[str, Any]]) -> None:
        self.features = list(features)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.features[index]


class TextClassification(Task):
    """A sequence classifier; texts are cut at `max_length` tokens."""

    name = "text-classification"
    metric = "accuracy"

    def __init__(self, model: nn.Module, tokenizer: Any, labels: Sequence[str], length: int) -> None:
        super().__init__(model, labels)
        self.tokenizer = tokenizer
        self.length = length
        self.pad = _pad_id(tokenizer)

    def items(self, rows: Sequence[Example]) -> Rows:
        """Tokenize; the label is the class's index."""
        if not rows:
            return Rows([])
        encoded = self.tokenizer([r.source for r in rows], truncation=True, max_length=self.length)
        index = {name: i for i, name in enumerate(self.labels)}
        return Rows(
            [
                {"input_ids": ids, "labels": index[row.target]}
                for ids, row in zip(encoded["input_ids"], rows, strict=True)
            ]
        )

    def collate(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad at the right to the longest text of the batch."""
        labels = torch.tensor([f["labels"] for f in features])
        return pad([f["input_ids"] for f in features], self.pad) | {"labels": labels}

    def score(self, items: Items, batch_size: int = 32) -> quality.Scores:
        """Accuracy and macro-F1."""
        return quality.classify(self.model, self.batches(items, batch_size))


class Generation(Task):
    """A causal language model that completes prompts; the loss is on the completion and its stop token.

    A prompt is cut at its beginning so that prompt and completion fit into `max_length` tokens; a
    completion that alone is longer is cut at its end and then has no stop token.
    """

    name = "generation"
    metric = "perplexity"
    higher_is_better = False

    def __init__(self, model: nn.Module, tokenizer: Any, length: int, chat: bool) -> None:
        super().__init__(model)
        self.tokenizer = tokenizer
        self.length = length
        self.chat = chat
        self.pad = _pad_id(tokenizer)
        self.ending = self._chat_ending() if chat else [self._eos()]
        self.stop = self.ending[0]

    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise ConfigError("The tokenizer has no end-of-sequence token.", "Set eos_token in it.")
        return int(self.tokenizer.eos_token_id)

    def _chat_ending(self) -> list[int]:
        """Return the tokens with which the chat template ends an answer."""
        if not self.tokenizer.chat_template:
            raise ConfigError("chat is on, but the tokenizer has no chat template.", "Set chat: false.")
        marked = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
        text = self.tokenizer.apply_chat_template(marked, tokenize=False)
        ending = text.rpartition("ANSWER")[2].rstrip()
        return self._ids(ending) or [self._eos()]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def encode(self, prompt: str, completion: str = "") -> tuple[list[int], list[int]]:
        """Return the token ids of the prompt, and of the completion with its stop token.

        Without a chat template a space stands between the two, unless one has white space there.
        """
        if self.chat:
            turn = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            return self._ids(text), self._ids(completion) + self.ending
        start: list[int] = self.tokenizer(prompt)["input_ids"]
        if start and start[-1] == self.tokenizer.eos_token_id:
            start = start[:-1]
        space = "" if prompt[-1:].isspace() else " "
        return start, self._ids(space + completion) + self.ending

    def items(self, rows: Sequence[Example]) -> Rows:
        """Tokenize; labels are -100 on the prompt."""
        features: list[dict[str, Any]] = []
        cut = 0
        for row in rows:
            prompt, completion = self.encode(row.source, row.target)
            if len(completion) >= self.length:
                completion, cut = completion[: self.length - 1], cut + 1
            prompt = prompt[-(self.length - len(completion)) :]
            labels = [IGNORED] * len(prompt) + completion
            features.append({"input_ids": prompt + completion, "labels": labels})
        if cut:
            note = f"{cut} of {len(rows)} completions are longer than max_length={self.length} and cut"
            self.notes.append(note)
        return Rows(features)

    def collate(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad at the right; padding is masked by place, so a pad token that equals eos is no label."""
        batch = pad([f["input_ids"] for f in features], self.pad)
        labels = pad([f["labels"] for f in features], IGNORED)["input_ids"]
        return batch | {"labels": labels.masked_fill(batch["attention_mask"] == 0, IGNORED)}

    def score(self, items: Items, batch_size: int = 32) -> quality.Scores:
        """Perplexity of the completions, token accuracy, exact match under greedy decoding."""
        return quality.complete(self.model, self.batches(items, batch_size))


class ImageClassification(Task):
    """An image classifier; images are resized at their short side and cropped to a square."""

    name = "image-classification"
    metric = "accuracy"

    def __init__(self, model: nn.Module, look: Look, labels: Sequence[str]) -> None:
        super().__init__(model, labels)
        self.look = look
        own = getattr(model.config, "image_size", None)
        self.interpolate = own not in (None, look.size) and _takes(model, "interpolate_pos_encoding")

    def items(self, rows: Sequence[Example]) -> Images:
        """Return the images as a data set; small sets are decoded once."""
        index = {name: i for i, name in enumerate(self.labels)}
        return Images([(row.source, index[row.target]) for row in rows], self.look)

    def collate(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """Stack the images `[batch, 3, size, size]`."""
        batch: Batch = {
            "pixel_values": torch.stack([f["pixel_values"] for f in features]),
            "labels": torch.tensor([f["labels"] for f in features]),
        }
        if self.interpolate:  # a flag of ViT-like models for another size than they were trained on
            batch["interpolate_pos_encoding"] = True  # type: ignore[assignment]
        return batch

    def score(self, items: Items, batch_size: int = 32) -> quality.Scores:
        """Accuracy and macro-F1."""
        return quality.classify(self.model, self.batches(items, batch_size))


def build_task(model: str, data: Data, options: Options | None = None) -> Task:
    """Load the model for the task of `data`, and its tokenizer or image settings.

    Args:
        model: a local folder; or a hub name, which is fetched only because the user gave one.
        data: the checked rows, for task and labels.
        options: precision, lengths and sizes.

    Raises:
        ConfigError: the model does not load, has no such task, or a length or size does not fit.
    """
    options = options or Options()
    config = _config(model, options.config, data.labels)
    if data.task == "image-classification":
        look = read_look(model, _is_local(model), config, options.image_size)
        net, fresh = _load(AutoModelForImageClassification, model, config, options)
        task: Task = ImageClassification(net, look, _label_order(config))
    elif data.task == "generation":
        tokenizer = _tokenizer(model)
        net, fresh = _load(AutoModelForCausalLM, model, config, options)
        length = _length(net, tokenizer, options.max_length)
        task = Generation(net, tokenizer, length, options.chat)
    else:
        tokenizer = _tokenizer(model)
        config.pad_token_id = _pad_id(tokenizer)
        net, fresh = _load(AutoModelForSequenceClassification, model, config, options)
        length = _length(net, tokenizer, options.max_length)
        task = TextClassification(net, tokenizer, _label_order(config), length)
    if fresh:
        task.notes.append(f"new tensors, not in the model's files: {', '.join(fresh)}")
    return task


def pad(sequences: Sequence[Sequence[int]], value: int) -> Batch:
    """Return `input_ids` padded at the right with `value` and their `attention_mask`, `[batch, longest]`."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), value)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, : len(sequence)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _is_local(model: str) -> bool:
    """Return True for a folder; a name that looks like a path must exist."""
    if Path(model).expanduser().is_dir():
        return True
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).exists():
        raise ConfigError(f"model: {model} is no folder.", "Name the folder with config.json.")
    return False


def _config(model: str, changes: Mapping[str, Any], labels: Sequence[str]) -> Any:
    """Return the model's config with `changes` and the labels in the order the model knows, if it does."""
    path = str(Path(model).expanduser()) if _is_local(model) else model
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=_is_local(model))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model: {model}: {_first(error)}", "Check the folder or hub name.") from None
    unknown = sorted(set(changes) - set(config.to_dict()))
    if unknown:
        raise ConfigError(f"config: {type(config).__name__} has no {', '.join(unknown)}.", "See config.json.")
    for key, value in changes.items():
        setattr(config, key, value)
    if labels:
        known = [config.id2label[i] for i in sorted(config.id2label)] if config.id2label else []
        order = known if set(known) == set(labels) else list(labels)
        config.id2label = dict(enumerate(order))
        config.label2id = {name: i for i, name in enumerate(order)}
    return config


def _label_order(config: Any) -> list[str]:
    return [config.id2label[i] for i in sorted(config.id2label)]


def _load(auto: Any, model: str, config: Any, options: Options) -> tuple[nn.Module, list[str]]:
    """Load the weights; return the model and the names of its new tensors, drawn with the run's seed."""
    path = str(Path(model).expanduser()) if _is_local(model) else model
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            net, info = auto.from_pretrained(
                path, config=config, dtype=getattr(torch, options.dtype), use_safetensors=True,
                local_files_only=_is_local(model), ignore_mismatched_sizes=True,
                output_loading_info=True,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"model: {model}: {_first(error)}", "It must hold safetensors weights.") from None
    mismatched = {m[0] if isinstance(m, tuple) else m for m in info.get("mismatched_keys", ())}
    return net, sorted({*info["missing_keys"], *mismatched})


def _tokenizer(model: str) -> Any:
    local = _is_local(model)
    path = str(Path(model).expanduser()) if local else model
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=local)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model: {model} has no tokenizer: {_first(error)}", "Add tokenizer.json.") from None


def _first(error: Exception) -> str:
    return f"{str(error).strip().splitlines()[0].rstrip('.') if str(error).strip() else type(error).__name__}."


def _pad_id(tokenizer: Any) -> int:
    """Return an id to pad with; what it is does not matter, because padding is masked by place."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return int(value)
    return 0


def _length(model: nn.Module, tokenizer: Any, wanted: int | None) -> int:
    """Return how many tokens a row may have.

    Raises:
        ConfigError: `wanted` is more than the model takes.
        DataError: the tokenizer knows tokens that the model has no embedding for.
    """
    config: Any = model.config
    rows = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if len(tokenizer) > rows:
        raise DataError(
            f"The tokenizer has {len(tokenizer):,} tokens, the model embeds {rows:,}.",
            "Resize the model's embeddings and train them first, or use the model's own tokenizer.",
        )
    limits = [int(v) for v in (getattr(config, "max_position_embeddings", None),) if v]
    limits += [tokenizer.model_max_length] if tokenizer.model_max_length < 1 << 30 else []
    most = min(limits, default=1 << 30)
    if wanted is not None and wanted > most:
        raise ConfigError(f"max_length={wanted}: the model takes {most} tokens.", "Lower max_length.")
    return wanted or min(DEFAULT_LENGTH, most)


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters
