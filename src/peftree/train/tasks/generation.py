"""Generation by a decoder: a causal language model completes prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from peftree.errors import ConfigError, DataError
from peftree.evaluate import quality, text_metrics
from peftree.train.data import Data, Example
from peftree.train.tasks.base import IGNORED, Batch, Items, Options, Rows, Task, pad
from peftree.train.tasks.decoding import greedy
from peftree.train.tasks.loading import length, load, pad_id, read_config, tokenizer


class Completions(Task):
    """A causal language model with the loss on completions and their stop token.

    Attributes:
        length: tokens of a row at most.
        fixed: tokens of a prompt that are never cut.
        generate: how many of the scored rows are completed by greedy decoding; see `score`.
        ending: the tokens that end every completion.
    """

    fixed = 1

    def __init__(self, model: nn.Module, tokenizer: Any, length: int, generate: int = 0) -> None:
        super().__init__(model)
        self.tokenizer = tokenizer
        self.length = length
        self.generate = generate
        self.pad = pad_id(tokenizer)
        self.ending = self.find_ending()
        self.stop = self.ending[0]

    @abstractmethod
    def encode_row(self, row: Example) -> tuple[list[int], list[int]]:
        """Return the tokens of a row's prompt, and those of its completion with its ending."""

    def find_ending(self) -> list[int]:
        """Return the tokenizer's end-of-sequence token; ConfigError if it has none."""
        if self.tokenizer.eos_token_id is None:
            raise ConfigError("The tokenizer has no end-of-sequence token.", "Set eos_token in it.")
        return [int(self.tokenizer.eos_token_id)]

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text alone."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def features(self, rows: Sequence[Example]) -> list[dict[str, Any]]:
        """Return token ids, labels that are -100 on the prompt, and the text that is wanted.

        Raises:
            DataError: a completion has no token.
        """
        features: list[dict[str, Any]] = []
        cut = 0
        for row in rows:
            prompt, completion = self.encode_row(row)
            if len(completion) == len(self.ending):
                raise DataError(f"{row.where}: {row.target!r} has no token.", "Remove the row, or write it in words.")
            room = self.length - self.fixed
            if len(completion) > room:
                completion, cut = completion[:room], cut + 1
            prompt = prompt[-(self.length - len(completion)) :]
            labels = [IGNORED] * len(prompt) + completion
            features.append({"input_ids": prompt + completion, "labels": labels, "target": row.target})
        if cut:
            note = f"{cut} of {len(rows)} completions are longer than max_length={self.length} and cut"
            self.notes.append(note)
        return features

    def items(self, rows: Sequence[Example]) -> Items:
        """Tokenize; labels are -100 on the prompt."""
        return Rows(self.features(rows))

    def collate(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad at the right; padding is masked by place, so a pad token that equals eos is no label."""
        batch = pad([f["input_ids"] for f in features], self.pad)
        labels = pad([f["labels"] for f in features], IGNORED)["input_ids"]
        return batch | {"labels": labels.masked_fill(batch["attention_mask"] == 0, IGNORED)}

    def score(self, items: Items, batch_size: int = 32) -> quality.Scores:
        """Perplexity of the completions, token accuracy, exact match of all tokens.

        If `generate` is set, that many of the first rows are completed by greedy decoding, with as many tokens as
        their longest completion has, and `exact`, `rouge_l` and `chrf` compare the texts; see `text_metrics`.
        """
        scores = quality.complete(self.model, self.batches(items, batch_size))
        first = [items[i] for i in range(min(self.generate, len(scores.items)))]
        if not first:
            return scores
        with quality.evaluating(self.model):
            written = self.write(first, batch_size)
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        found = text_metrics.compare(texts, [f["target"] for f in first])
        return replace(scores, values={**scores.values, **found})

    def write(self, features: Sequence[Mapping[str, Any]], batch_size: int) -> list[list[int]]:
        """Return the tokens that greedy decoding writes after each row's prompt."""
        return greedy(self.model, features, self.pad, self.ending[0], batch_size, self.bar)


class Generation(Completions):
    """A causal language model that completes prompts; the loss is on the completion and its stop token.

    A prompt is cut at its beginning so that prompt and completion fit into `max_length` tokens; a
    completion that alone is longer is cut at its end and then has no stop token.
    """

    name = "generation"
    metric = "perplexity"
    higher_is_better = False

    def __init__(self, model: nn.Module, tokenizer: Any, length: int, chat: bool, generate: int = 0) -> None:
        self.chat = chat
        super().__init__(model, tokenizer, length, generate)

    def find_ending(self) -> list[int]:
        """Return the tokens with which the chat template, if it is used, ends an answer."""
        if not self.chat:
            return super().find_ending()
        if not self.tokenizer.chat_template:
            raise ConfigError("chat is on, but the tokenizer has no chat template.", "Set chat: false.")
        marked = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
        text = self.tokenizer.apply_chat_template(marked, tokenize=False)
        ending = text.rpartition("ANSWER")[2].rstrip()
        return self.ids(ending) or super().find_ending()

    def encode_row(self, row: Example) -> tuple[list[int], list[int]]:
        """Return the tokens of prompt and completion; see `encode`."""
        return self.encode(row.source, row.target)

    def encode(self, prompt: str, completion: str = "") -> tuple[list[int], list[int]]:
        """Return the token ids of the prompt, and of the completion with its stop token.

        Without a chat template a space stands between the two, unless one has white space there.
        """
        if self.chat:
            turn = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            return self.ids(text), self.ids(completion) + self.ending
        start: list[int] = self.tokenizer(prompt)["input_ids"]
        if start and start[-1] == self.tokenizer.eos_token_id:
            start = start[:-1]
        space = "" if prompt[-1:].isspace() else " "
        return start, self.ids(space + completion) + self.ending


def load_generation(model: str, data: Data, options: Options) -> tuple[Task, list[str]]:
    """Load a causal language model.

    Raises:
        ConfigError: the model does not load, or its tokens see those after them.
    """
    config, tokens = read_config(model, options.config, data.labels), tokenizer(model)
    net, fresh = load(AutoModelForCausalLM, model, config, options)
    _check_causal(net, model)
    fit = length(net, tokens, options.max_length)
    return Generation(net, tokens, fit, options.chat, options.generate), fresh


def _check_causal(net: nn.Module, model: str) -> None:
    """Refuse a model whose first token sees the second: it would learn to copy what it is to predict."""
    mask = torch.ones(1, 2, dtype=torch.long)
    with quality.evaluating(net):
        first, other = (net(input_ids=torch.tensor([[0, i]]), attention_mask=mask).logits[0, 0].float() for i in (1, 2))
    if float((first - other).abs().max()) > 1e-4 * max(1.0, float(first.abs().max())):
        raise ConfigError(
            f"model: {model}: its tokens see those after them, which they are to predict.",
            "Use a decoder such as Llama or GPT-2; some encoders are one with config.is_decoder=true.",
        )
