"""Generation: a causal language model, or an encoder-decoder, completes prompts."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from peftree.data.chats import Turn
from peftree.data.rows import Data, Example
from peftree.errors import ConfigError, DataError
from peftree.evaluate import quality
from peftree.tasks.base import IGNORED, Batch, Options, Task, pad
from peftree.tasks.completions import Completions
from peftree.tasks.decoding import greedy
from peftree.tasks.loading import length, load, read_config, tokenizer
from peftree.tasks.turns import Encoded, answers, check_template, fitting, given


class Generation(Completions):
    """A causal language model that completes prompts; the loss is on the completion and its stop token.

    A prompt is cut in its middle so that prompt and completion fit into `max_length` tokens: the token that begins
    every text, what a chat template puts around a prompt, and both ends of the rest stay. A completion that alone
    is longer is cut at its end and then has no stop token.
    """

    name = "generation"
    modality = "language"
    kind = "generation"
    metric = "perplexity"
    higher_is_better = False
    aggregate = "exp_mean"
    columns = ("prompt", "completion")
    auto = "AutoModelForCausalLM"
    auto_pair = "AutoModelForSeq2SeqLM"
    packs = True

    def __init__(self, model: nn.Module, tokenizer: Any, length: int, chat: bool, generate: int = 0) -> None:
        self.chat = chat
        super().__init__(model, tokenizer, length, generate)

    @classmethod
    def load(cls, model: str, data: Data, options: Options) -> tuple[Task, list[str]]:
        """Load a causal language model, or an encoder-decoder.

        Raises:
            ConfigError: the model does not load, or its tokens see later ones.
        """
        config = read_config(model, options.config, data.labels)
        if config.is_encoder_decoder:
            return SequenceToSequence.load(model, data, options)
        tokens, chat = tokenizer(model), options.chat or data.talks
        if chat:
            check_template(tokens)
        net, fresh = load(AutoModelForCausalLM, model, config, options)
        if not next(net.parameters()).is_meta:
            _check_causal(net, model)
        return cls(net, tokens, length(net, tokens, options.max_length), chat, options.generate), fresh

    def find_ending(self) -> list[int]:
        """Return the tokens with which the chat template, if it is used, ends an answer."""
        if not self.chat:
            return super().find_ending()
        check_template(self.tokenizer)
        try:
            text, spans = answers(self.tokenizer, (Turn("user", "Q"), Turn("assistant", "ANSWER")), "one question")
        except DataError as error:
            raise ConfigError(f"The chat template cannot be used: {error}", "Use a model with another one.") from None
        return self.ids(text[spans[-1].said : spans[-1].end]) or super().find_ending()

    @functools.cached_property
    def frame(self) -> tuple[int, int]:
        """The number of tokens before and after what the user wrote: a mark, or what the template adds."""
        if not self.chat:
            return len(self.begun("")), 0
        turn = [{"role": "user", "content": "\0PROMPT\0"}]
        try:
            text: str = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ConfigError(
                f"The chat template refuses a single question: {error}.", "Use a model with another one."
            ) from None
        before, _, after = text.partition("\0PROMPT\0")
        return len(self.ids(before)), len(self.ids(after))

    def begun(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt with those that begin every text, but not those that end it."""
        start: list[int] = self.tokenizer(prompt)["input_ids"]
        return start[:-1] if start and start[-1] == self.tokenizer.eos_token_id else start

    def encode_row(self, row: Example) -> Encoded:
        """Return the tokens of prompt and completion; see `encode`.

        A conversation goes through the chat template, and every answer is learned; its oldest questions and answers
        are left out if it is longer than `max_length`.
        """
        if row.turns or (self.chat and row.source):
            turns = row.turns or (Turn("user", row.source), Turn("assistant", row.target))
            return fitting(self, turns, row.where)
        return given(*self.encode(row.source, row.target))

    def wanted(self, row: Example, completion: list[int]) -> str:
        """Return the text that is to be written: of an answer, what a template makes of it."""
        if not row.turns and not self.chat:
            return row.target
        kept = completion[: -len(self.ending)] if completion[-len(self.ending) :] == self.ending else completion
        text: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        return text

    def features(self, rows: Sequence[Example]) -> list[dict[str, Any]]:
        """Return token ids, labels, and the text that is wanted; see `Completions.features`, and `parts` for texts."""
        if any(not row.source and not row.turns for row in rows):
            return self.parts(rows)
        return super().features(rows)

    def parts(self, rows: Sequence[Example]) -> list[dict[str, Any]]:
        """Return texts without a prompt as features, a text that is longer than `max_length` as several.

        Every token but a text's first is learned once: a part starts with the last token of the part before.
        """
        features: list[dict[str, Any]] = []
        for row in rows:
            ids = [*self.begun(""), *self.ids(row.target), *super().find_ending()]
            for at in range(0, len(ids) - 1, self.length - 1):
                part = ids[at : at + self.length]
                said = self.tokenizer.decode(part[1:], skip_special_tokens=True)
                features.append({"input_ids": part, "labels": [IGNORED, *part[1:]], "start": 1, "target": said})
        if len(features) > len(rows):
            self.notes.append(
                f"{len(rows)} texts are learned in {len(features)} parts of at most max_length={self.length} tokens"
            )
        return features

    def encode(self, prompt: str, completion: str = "") -> tuple[list[int], list[int]]:
        """Return the token ids of the prompt, and of the completion with its stop token, without a chat template.

        Both strings are used exactly as they are, and nothing is put between them.
        """
        return self.begun(prompt), self.continued(self.ids(prompt), prompt, completion) + self.ending

    def continued(self, start: list[int], before: str, text: str) -> list[int]:
        """Return the tokens of `text` as it continues `before`, whose tokens are `start`, not as a text starts.

        Tokenizers that mark the start of words put a mark before a text on its own: a space that is not there.
        If tokens would join across the seam, a character that joins nothing stands for what is before.
        """
        for other in (before, "\n", ".", "0"):
            head = start if other == before else self.ids(other)
            both = self.ids(other + text)
            if both[: len(head)] == head:
                return both[len(head) :]
        return self.ids(text)


class SequenceToSequence(Completions):
    """An encoder-decoder; the loss is on the completion and its stop token.

    Prompt and completion have `max_length` tokens each. Longer ones are cut at the end, a prompt before the token
    that ends it; a cut completion has no stop token.
    """

    name, metric, higher_is_better = Generation.name, Generation.metric, Generation.higher_is_better

    def __init__(self, model: nn.Module, tokenizer: Any, length: int, generate: int = 0) -> None:
        super().__init__(model, tokenizer, length, generate)
        net: Any = model
        start = net.config.decoder_start_token_id
        if start is None:
            what = "The model does not say which token its decoder starts with."
            raise ConfigError(what, "Set config.decoder_start_token_id.")
        self.start = int(start)

    @classmethod
    def load(cls, model: str, data: Data, options: Options) -> tuple[Task, list[str]]:
        """Load an encoder-decoder.

        Raises:
            ConfigError: the model does not load or has no tokenizer, or a length does not fit.
        """
        if options.chat or data.talks or not data.train[0].source:
            raise ConfigError(
                "An encoder-decoder has no chat template, and learns no text without a prompt.",
                "Give it rows of prompt and completion, and set chat: false.",
            )
        config, tokens = read_config(model, options.config, data.labels), tokenizer(model)
        net, fresh = load(AutoModelForSeq2SeqLM, model, config, options)
        return cls(net, tokens, length(net, tokens, options.max_length), options.generate), fresh

    def encode_row(self, row: Example) -> Encoded:
        """Return the tokens of prompt and completion, each with the special tokens that its tokenizer adds.

        An empty prompt becomes the stop token, since an encoder needs at least one token.
        """
        source: list[int] = self.tokenizer(row.source)["input_ids"]
        target: list[int] = self.tokenizer(text_target=row.target)["input_ids"]
        return given(source or self.ending, target if target[-1:] == self.ending else target + self.ending)

    def features(self, rows: Sequence[Example]) -> list[dict[str, Any]]:
        """Return token ids of the prompt, those of the completion as labels, and the wanted text.

        Raises:
            DataError: a completion has no token.
        """
        features: list[dict[str, Any]] = []
        cut: tuple[list[Example], list[Example]] = ([], [])
        for row in rows:
            source, target, *_ = self.encode_row(row)
            if not self.ids(row.target):
                raise DataError(f"{row.where}: {row.target!r} has no token.", "Remove the row, or give it some text.")
            for side, part in zip(cut, (source, target), strict=True):
                side.extend([row] if len(part) > self.length else [])
            source = source if len(source) <= self.length else [*source[: self.length - 1], source[-1]]
            features.append({"input_ids": source, "labels": target[: self.length], "target": row.target})
        for what, side in zip(("prompts", "completions"), cut, strict=True):
            self.note_cut(side, len(rows), what, f"at the end, to max_length={self.length} tokens")
        return features

    def collate(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad both sides on the right; the decoder reads the labels one place later."""
        batch = pad([f["input_ids"] for f in features], self.pad)
        labels = pad([f["labels"] for f in features], IGNORED)["input_ids"]
        net: Any = self.model
        return batch | {
            "decoder_input_ids": net.prepare_decoder_input_ids_from_labels(labels=labels),
            "labels": labels,
        }

    def write(self, features: Sequence[Mapping[str, Any]], batch_size: int) -> list[list[int]]:
        """Return the tokens that greedy decoding writes for each row."""
        return greedy(self.model, features, self.pad, self.ending[-1], batch_size, self.bar, self.start)


def _check_causal(net: nn.Module, model: str) -> None:
    """Refuse a model whose first token sees the second: it would learn to copy what it should predict."""
    mask = torch.ones(1, 2, dtype=torch.long)
    with quality.evaluating(net):
        first, other = (net(input_ids=torch.tensor([[0, i]]), attention_mask=mask).logits[0, 0].float() for i in (1, 2))
    if float((first - other).abs().max()) > 1e-4 * max(1.0, float(first.abs().max())):
        raise ConfigError(
            f"model: {model}: its tokens see the later ones, which they should predict.",
            "Use a decoder such as Llama or GPT-2; some encoders become one with config.is_decoder=true.",
        )
