"""Images and text to text: a model answers about images, which its own processor reads."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from peftree.data.chats import ASKS, IMAGE, Turn, Turns
from peftree.data.exchange import given, shown
from peftree.data.picture import read_picture
from peftree.data.rows import Data, Example
from peftree.errors import ConfigError, DataError, first_line
from peftree.tasks.base import IGNORED, Batch, Options, Rows, Task
from peftree.tasks.base import pad as padded
from peftree.tasks.generation import Generation
from peftree.tasks.loading import is_local, length, load, read_config
from peftree.tasks.turns import Encoded, answers, behind
from peftree.trusted import SAFE

_OURS = ("input_ids", "attention_mask", "labels")
Asked = tuple[Encoded, dict[str, list[int]], str]
# The kind of a token that the model writes, in `token_type_ids`, where it is not that of the text before it.
_WRITTEN = {"paligemma": 1}


class Parts:
    """A tokenizer whose chat template gets texts and images as parts, as those of models that read images take them.

    A template that takes text alone, as that of the language model inside has it, gets `image_token` where an image is.
    """

    def __init__(self, tokenizer: Any, image_token: str) -> None:
        self.inner, self.image_token = tokenizer, image_token
        self.parted = bool(tokenizer.chat_template) and _takes_parts(tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def __call__(self, *args: Any, **more: Any) -> Any:
        """Tokenize."""
        return self.inner(*args, **more)

    def apply_chat_template(self, messages: list[dict[str, Any]], **how: Any) -> Any:
        """Return a conversation as text; `IMAGE` in a turn is an image."""
        form = _parts if self.parted else lambda text: text.replace(IMAGE, self.image_token)
        return self.inner.apply_chat_template([{**m, "content": form(m["content"])} for m in messages], **how)


def _takes_parts(tokenizer: Any) -> bool:
    """Return whether a chat template writes the text of a part, and not the part itself or an error."""
    try:
        said = tokenizer.apply_chat_template([{"role": "user", "content": _parts("a text")}], tokenize=False)
    except (TemplateError, TypeError, AttributeError):
        return False
    return "a text" in said and not any(quoted in said for quoted in ("'a text'", '"a text"'))  # Python's, JSON's


def _parts(content: str) -> list[dict[str, str]]:
    first, *others = content.split(IMAGE)
    parts = [{"type": "text", "text": first}]
    for text in others:
        parts += [{"type": "image"}, {"type": "text", "text": text}]
    return [part for part in parts if part.get("text") != "" or len(parts) == 1]


class ImageText(Generation):
    """A model of transformers' `AutoModelForImageTextToText`; the loss is on the answers and their ends.

    Its processor writes the images into the text and makes their pixels. A row is never cut where an image may be:
    one whose images and questions leave no room for an answer is an error, and an answer that is too long is cut at
    its end. Without a chat template, a row is one question and its answer.
    """

    name = "image-text-to-text"
    modality = "vision-language"
    kind = "generation"
    metric = "perplexity"
    higher_is_better = False
    aggregate = "exp_mean"
    columns = ("image", "question", "answer")  # type: ignore[assignment]  # Generation has two
    auto = "AutoModelForImageTextToText"
    packs = False

    def __init__(self, model: nn.Module, processor: Any, length: int, generate: int = 0) -> None:
        self.processor = processor
        tokenizer = processor.tokenizer
        tokenizer.chat_template = processor.chat_template or tokenizer.chat_template
        super().__init__(
            model, Parts(tokenizer, processor.image_token), length, bool(tokenizer.chat_template), generate
        )
        config: Any = model.config
        self.written = _WRITTEN.get(config.model_type, 0)
        self.notes.append(f"images are read by the model's own {type(processor).__name__}")

    @classmethod
    def load(cls, model: str, data: Data, options: Options) -> tuple[Task, list[str]]:
        """Load a model that reads images and writes text.

        Raises:
            ConfigError: it is none, it has no processor, or an image size is set.
        """
        if options.image_size is not None:
            what = f"image_size={options.image_size}: the model's own processor sizes images."
            raise ConfigError(what, "Leave image_size out.")
        from PIL import Image

        config, local = read_config(model, options.config, ()), is_local(model)
        if type(config) not in AutoModelForImageTextToText._model_mapping:
            raise ConfigError(
                f"model: {model} is of type {config.model_type}, which does not write text about images.",
                "Use a model of AutoModelForImageTextToText, such as llava-smollm2-8-dinov2 or a Qwen2-VL.",
            )
        try:
            processor: Any = AutoProcessor.from_pretrained(
                str(Path(model).expanduser()) if local else model, local_files_only=local, **SAFE
            )
            found = processor.tokenizer, processor.image_processor
        except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
            raise ConfigError(
                f"model: {model} has no processor of images and text: {first_line(error)}.",
                "Use a model whose folder has a processor_config.json or preprocessor_config.json.",
            ) from None
        net, fresh = load(AutoModelForImageTextToText, model, config, options)
        fit = length(net, found[0], options.max_length, config.get_text_config(), 1 << 30)
        task = cls(net, processor, fit, options.generate)
        try:
            task._processed([processor.image_token], [[Image.new("RGB", (64, 64))]])
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise ConfigError(
                f"model: {model}: its {type(processor).__name__} reads no image: {first_line(error)}.",
                "Its processor_config.json lacks what the model needs, such as patch_size.",
            ) from None
        return task, fresh

    def features(self, rows: Sequence[Example]) -> list[dict[str, Any]]:
        """Return token ids, labels that are -100 outside answers, kinds of tokens, and what images are read with.

        Raises:
            DataError: a row's images and questions leave no room for an answer, or an image cannot be read.
        """
        features, cut = list[dict[str, Any]](), list[Example]()
        for row in rows:
            asked = made, *_ = self._asked(_turns(row), row.where)
            room = self.length - len(made.prompt)
            if room < 2:
                raise DataError(
                    f"{row.where}: its images and questions take {len(made.prompt)} tokens, and max_length is "
                    f"{self.length}.",
                    f"Set max_length to {len(made.prompt) + len(made.completion)} or more, or leave the row out.",
                )
            completion = made.completion[:room]
            cut.extend([row] if len(completion) < len(made.completion) else [])
            features.append(self._feature(row, asked, completion))
        limit = f"so that rows have max_length={self.length} tokens"
        self.note_cut(cut, len(rows), "answers", f"at the end {limit}, and have no stop token")
        return features

    def exchanged(self, rows: Sequence[Example], others: Sequence[Example]) -> Rows:
        """Return `items` of `rows` with the images of `others`; answers are the same tokens, whatever room is left."""
        answers = [f["input_ids"][f["start"] :] for f in self.features(rows)]
        moved = [given(row, other) for row, other in zip(rows, others, strict=True)]
        asked = [self._asked(_turns(row), row.where) for row in moved]
        return Rows([self._feature(*each) for each in zip(moved, asked, answers, strict=True)])

    def _feature(self, row: Example, asked: Asked, completion: list[int]) -> dict[str, Any]:
        made, kinds, text = asked
        after = dict.fromkeys(kinds, [0] * len(completion)) | {"token_type_ids": [self.written] * len(completion)}
        return {
            "input_ids": made.prompt + completion, "labels": made.labels + completion, "start": len(made.prompt),
            "target": self.wanted(row._replace(turns=_turns(row)), completion), "text": text, "images": shown(row),
            "kinds": {name: (*before, *after[name]) for name, before in kinds.items()},
        }  # fmt: skip

    def _asked(self, turns: Turns, where: str) -> Asked:
        """Return a conversation as tokens, the kinds of those before its last answer, and its text with images."""
        if sum(turn.text.count(IMAGE) for turn in turns) != sum(len(turn.images) for turn in turns):
            raise DataError(f"{where}: a text has the sign {IMAGE!r}, which stands for an image.", "Remove it.")
        if not self.chat:
            if len(turns) != 2 or turns[0].role != "user":
                raise DataError(
                    f"{where}: the model has no chat template, so a row is one question and its answer.",
                    "Write each question as a row of its own, or use a model with a chat template.",
                )
            text, images = turns[0].text.replace(IMAGE, self.processor.image_token), turns[0].images
            ids, kinds = self._read(text, images, where, begins=True)
            answer = self.continued(self.ids("\n"), "\n", turns[1].text) + self.ending
            return Encoded(ids, answer, [IGNORED] * len(ids)), kinds, text
        whole, spans = answers(self.tokenizer, turns, where)
        learned = [n for n, turn in enumerate(turns) if turn.role == "assistant" and turn.learned]
        ids, labels, done, seen = list[int](), list[int](), 0, 0
        kinds = dict[str, list[int]]()
        for n, (start, _, end) in zip(learned, spans, strict=True):
            images = tuple(name for turn in turns[seen:n] for name in turn.images)
            between, here = self._read(whole[done:start], images, where)
            answer = behind(self, whole[:start], whole[start:end])
            _join(kinds, here, len(ids), len(between))
            first, done, seen = len(ids) + len(between), end, n
            ids, labels = ids + between + answer, labels + [IGNORED] * len(between) + answer
        if spans[-1].said == spans[-1].end:
            ids = [*ids, *self.ending]
        _join(kinds, {}, first, 0)
        return Encoded(ids[:first], ids[first:], labels[:first]), kinds, whole

    def _read(
        self, text: str, images: tuple[str, ...], where: str, begins: bool = False
    ) -> tuple[list[int], dict[str, list[int]]]:
        """Return a text with the places of its images as tokens, and what else the processor says of each."""
        try:
            made = self._processed([text], [[read_picture(name) for name in images]], begins)
        except (OSError, ValueError, SyntaxError, TypeError, IndexError) as error:
            raise DataError(
                f"{where}: the {type(self.processor).__name__} refuses its images: {first_line(error)}.",
                "Replace or leave them out.",
            ) from None
        told = {name: value[0].tolist() for name, value in made.items() if name.endswith(("input_ids", "type_ids"))}
        return told.pop("input_ids"), told

    def _processed(self, texts: list[str], images: list[list[Any]], begins: bool = False) -> Any:
        """Return what the processor makes of texts, each with its images."""
        how = {"return_tensors": "pt", "padding": True, "add_special_tokens": begins}
        with warnings.catch_warnings():  # PaliGemma's makes labels, from tensors, as numpy will not do any more
            warnings.simplefilter("ignore", DeprecationWarning)
            return self.processor(text=texts, images=images if any(images) else None, **how)

    def items(self, rows: Sequence[Example]) -> Rows:
        """Tokenize; pixels are made batch by batch."""
        return Rows(self.features(rows))

    def collate(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad on the right, and add what the processor makes of the images of the batch."""
        batch = super().collate(features)
        for name in features[0]["kinds"]:
            batch[name] = padded([f["kinds"][name] for f in features], 0)["input_ids"]
        if any(f["images"] for f in features):
            images = [[read_picture(name) for name in f["images"]] for f in features]
            made = self._processed([f["text"] for f in features], images)
            batch |= {name: value for name, value in made.items() if name not in _OURS and name not in batch}
        return batch

    def write(self, features: Sequence[Mapping[str, Any]], batch_size: int) -> list[list[int]]:
        """Return the tokens that greedy decoding writes after each row's images and prompt, row by row."""
        net: Any = self.model
        device, stop, written = next(self.model.parameters()).device, self.ending[-1], list[list[int]]()
        for at in self.bar(range(len(features))):
            row, start = features[at], features[at]["start"]
            kinds = {name: kind[:start] for name, kind in row["kinds"].items()}
            asked = {**row, "input_ids": row["input_ids"][:start], "labels": row["labels"][:start], "kinds": kinds}
            fed = {k: v.to(device) for k, v in self.collate([asked]).items() if k != "labels"}
            settings = GenerationConfig(
                max_new_tokens=len(row["input_ids"]) - start, do_sample=False, eos_token_id=stop, pad_token_id=self.pad
            )
            out: list[int] = net.generate(**fed, generation_config=settings)[0, start:].tolist()
            written.append(out[: out.index(stop)] if stop in out else out)
        return written


def _turns(row: Example) -> Turns:
    """Return the turns of a row; of one of an image and a text, they ask for the text."""
    return row.turns or (Turn("user", IMAGE + ASKS, images=(row.source,)), Turn("assistant", row.target))


def _join(kinds: dict[str, list[int]], here: Mapping[str, list[int]], done: int, count: int) -> None:
    """Add what a processor says of the next `count` tokens, after `done` of which it said nothing of some."""
    for name in {*kinds, *here}:
        before = kinds.get(name, [])
        kinds[name] = [*before, *[0] * (done - len(before)), *here.get(name, [0] * count)]
