"""What tasks in which a model writes share: rows of prompt and completion, with the loss on the completion."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from peftree.data.rows import Example
from peftree.errors import ConfigError, DataError
from peftree.evaluate import quality, text_metrics
from peftree.tasks.base import IGNORED, Batch, Items, Rows, Task, pad
from peftree.tasks.decoding import greedy
from peftree.tasks.loading import pad_id
from peftree.tasks.packing import stacked
from peftree.tasks.turns import Encoded


class Completions(Task):
    """A causal language model with the loss on completions and their stop token.

    Attributes:
        length: most tokens per row.
        fixed: number of tokens at the start of every prompt that are never cut.
        generate: number of scored rows that are completed by greedy decoding; see `score`.
        ending: the tokens that end every completion.
    """

    fixed = 0

    def __init__(self, model: nn.Module, tokenizer: Any, length: int, generate: int = 0) -> None:
        super().__init__(model)
        self.tokenizer = tokenizer
        self.length = length
        self.generate = generate
        self.pad = pad_id(tokenizer)
        self.ending = self.find_ending()
        self.stop = self.ending[-1]

    @abstractmethod
    def encode_row(self, row: Example) -> Encoded:
        """Return the tokens of a row's prompt, and those of its completion with its ending."""

    def find_ending(self) -> list[int]:
        """Return the tokenizer's end-of-sequence token; ConfigError if it has none."""
        if self.tokenizer.eos_token_id is None:
            raise ConfigError("The tokenizer has no end-of-sequence token.", "Set eos_token in it.")
        return [int(self.tokenizer.eos_token_id)]

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a single text."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def features(self, rows: Sequence[Example]) -> list[dict[str, Any]]:
        """Return token ids, labels that are -100 on the prompt, its length, and the text that is wanted.

        Raises:
            DataError: a completion has no token.
        """
        features: list[dict[str, Any]] = []
        cut: tuple[list[Example], ...] = ([], [], [])
        head, tail = self.frame
        for row in rows:
            prompt, completion, learned, short = self.encode_row(row)
            cut[2].extend([row] if short else [])
            if completion == self.ending:
                raise DataError(f"{row.where}: {row.target!r} has no token.", "Remove the row, or write it in words.")
            around = min(len(prompt), head + tail)
            room = self.length - max(1, around)  # a first token is not predicted
            if len(completion) > room:
                if room < 2:
                    raise ConfigError(
                        f"max_length={self.length}: {around} tokens surround every prompt.", "Raise max_length."
                    )
                completion = completion[:room]
                cut[1].append(row)
            if len(prompt) + len(completion) > self.length:
                left = self.length - len(completion)
                prompt, learned = (shortened(part, left, head, tail) for part in (prompt, learned))
                cut[0].append(row)
            ids = {"input_ids": prompt + completion, "labels": learned + completion, "start": len(prompt)}
            features.append({**ids, "target": self.wanted(row, completion)})
        limit = f"so that rows have max_length={self.length} tokens"
        self.note_cut(cut[0], len(rows), "prompts", f"in the middle {limit}")
        self.note_cut(cut[1], len(rows), "completions", f"at the end {limit}, and have no stop token")
        self.note_cut(cut[2], len(rows), "conversations", f"at the start {limit}: their oldest turns are left out")
        return features

    @property
    def frame(self) -> tuple[int, int]:
        """The number of tokens at the start and at the end of a prompt that are never cut."""
        return self.fixed, 0

    def wanted(self, row: Example, completion: list[int]) -> str:
        """Return the text that is to be written."""
        return row.target

    def items(self, rows: Sequence[Example]) -> Items:
        """Tokenize; labels are -100 on the prompt."""
        return Rows(self.features(rows))

    def collate(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad on the right; padding is masked by position, so a pad token that equals eos is not a label.

        Rows that are joined come as `packing.stacked` says.
        """
        if "position_ids" in features[0]:
            return stacked(features)
        batch = pad([f["input_ids"] for f in features], self.pad)
        labels = pad([f["labels"] for f in features], IGNORED)["input_ids"]
        return batch | {"labels": labels.masked_fill(batch["attention_mask"] == 0, IGNORED)}

    def score(self, items: Items, batch_size: int = 32) -> quality.Scores:
        """Perplexity of the completions, token accuracy, exact match of all tokens.

        If `generate` is set, that many of the first rows are completed by greedy decoding, with as many tokens as
        their longest completion has, and `exact`, `rouge_l` and `chrf` compare the texts; see `text_metrics`.
        """
        scores = quality.complete(self.model, self.batches(items, batch_size), self.chunked)
        first = [items[i] for i in range(min(self.generate, len(scores.items)))]
        if not first:
            return scores
        with quality.evaluating(self.model):
            written = self.write(first, batch_size)
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        found = text_metrics.compare(texts, [f["target"] for f in first])
        return replace(scores, values={**scores.values, **found})

    def read(self, batch: Batch) -> object:
        """Read the completions of a batch as `score` does."""
        return quality.completed(self.model, batch, self.chunked)

    def write(self, features: Sequence[Mapping[str, Any]], batch_size: int) -> list[list[int]]:
        """Return the tokens that greedy decoding writes after each row's prompt."""
        return greedy(self.model, features, self.pad, self.ending[-1], batch_size, self.bar)


def shortened(prompt: list[int], room: int, head: int, tail: int) -> list[int]:
    """Return `room` tokens of a prompt, cut in its middle: `head`, `tail`, and as much of the rest at each end.

    Instructions are at the start or the end of a prompt.
    """
    before = head + (room - head - tail) // 2
    return prompt[:before] + prompt[len(prompt) - (room - before) :]
