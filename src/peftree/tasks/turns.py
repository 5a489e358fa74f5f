"""Conversations as tokens: a tokenizer's chat template, with the loss on every answer of the assistant."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from jinja2 import TemplateError

from peftree.data.chats import Turns
from peftree.errors import DataError
from peftree.tasks.base import IGNORED


class Encoded(NamedTuple):
    """One row as tokens: what is given, what is learned last, and the labels of the former (-100: not learned)."""

    prompt: list[int]
    completion: list[int]
    labels: list[int]


def given(prompt: list[int], completion: list[int]) -> Encoded:
    """Return a row of which nothing but the completion is learned."""
    return Encoded(prompt, completion, [IGNORED] * len(prompt))


def without_oldest(turns: Turns) -> Turns:
    """Return a conversation without its oldest question and answer; what a system says first stays."""
    head = 1 if turns[0][0] == "system" else 0
    first = next(n for n, (role, _) in enumerate(turns) if role == "assistant")
    return turns[:head] + turns[first + 1 :]


def encoded(task: Any, turns: Turns, ending: str, where: str) -> Encoded:
    """Return a conversation as tokens, its answers told by the template's own marks, or found in what it writes.

    Args:
        task: has the `tokenizer`, and `continued`, which tokenizes a text behind another.
        turns: end with an answer.
        ending: what the template writes behind each answer.
        where: the row, for errors.

    Raises:
        DataError: the template refuses the turns, or writes one otherwise once others follow.
    """
    if re.search(r"{%-?\s*generation", str(task.tokenizer.chat_template)):
        return _marked(task.tokenizer, turns, where)
    return _found(task, turns, ending, where)


def _marked(tokenizer: Any, turns: Turns, where: str) -> Encoded:
    """Return a conversation whose answers the template marks itself (`{% generation %}`)."""
    out = _applied(tokenizer, turns, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = out["input_ids"], out["assistant_masks"]
    end = len(mask) - mask[::-1].index(1)
    start = next((n for n in range(end, 0, -1) if not mask[n - 1]), 0)
    labels = [token if said else IGNORED for token, said in zip(ids, mask, strict=True)]
    return Encoded(ids[:start], ids[start:end], labels[:start])


def _found(task: Any, turns: Turns, ending: str, where: str) -> Encoded:
    """Return a conversation whose answers are found in the text that the template writes.

    An answer begins where the template, given the turns before it, would have the model begin, and reaches to the
    `ending` of a turn. Each is tokenized by itself behind what stands before it, as it is when a model writes it.
    """
    tokenizer, whole = task.tokenizer, _applied(task.tokenizer, turns, where, tokenize=False)
    ids, labels, done, start = list[int](), list[int](), "", 0
    for n, (role, text) in enumerate(turns):
        if role != "assistant":
            continue
        before = _applied(tokenizer, turns[:n], where, tokenize=False, add_generation_prompt=True)
        said = text if text in whole[len(before) :] else text.strip()
        at = whole.find(said, len(before))
        if not whole.startswith(before) or at < 0 or not whole.startswith(ending, at + len(said)):
            raise DataError(
                f"{where}: the chat template does not write turn {n + 1} as it is, so the answer cannot be found.",
                "Use a template that marks answers with {% generation %}, or rows of one question and one answer.",
            )
        end = at + len(said) + len(ending)
        between = task.continued(ids, done, before[len(done) :])
        start = len(ids) + len(between)
        answer = task.continued(ids + between, before, whole[len(before) : end])
        ids, labels, done = ids + between + answer, labels + [IGNORED] * len(between) + answer, whole[:end]
    return Encoded(ids[:start], ids[start:], labels[:start])


def _applied(tokenizer: Any, turns: Turns, where: str, **how: Any) -> Any:
    try:
        return tokenizer.apply_chat_template([{"role": role, "content": text} for role, text in turns], **how)
    except TemplateError as error:
        raise DataError(
            f"{where}: the chat template refuses the turns: {error}.", "Reorder or leave out turns."
        ) from None
