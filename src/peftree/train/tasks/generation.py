"""Generation: a causal language model completes prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM

from peftree.errors import ConfigError
from peftree.evaluate import quality
from peftree.train.data import Data, Example
from peftree.train.tasks.base import IGNORED, Batch, Items, Options, Rows, Task, pad
from peftree.train.tasks.loading import length, load, pad_id, read_config, tokenizer


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
        self.pad = pad_id(tokenizer)
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


def load_generation(model: str, data: Data, options: Options) -> tuple[Task, list[str]]:
    """Load a causal language model."""
    config, tokens = read_config(model, options.config, data.labels), tokenizer(model)
    net, fresh = load(AutoModelForCausalLM, model, config, options)
    return Generation(net, tokens, length(net, tokens, options.max_length), options.chat), fresh
