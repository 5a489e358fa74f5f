"""Conversations as tokens: a tokenizer's chat template, with the loss on every answer of the assistant."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from peftree.data.chats import Turn, Turns
from peftree.errors import ConfigError, DataError
from peftree.tasks.base import IGNORED

BEHIND = 64  # characters before a text that decide its first token


class Encoded(NamedTuple):
    """One row as tokens: what is given, what is learned last, and the labels of the former (-100: not learned).

    `short`: whether the oldest turns of a conversation are left out.
    """

    prompt: list[int]
    completion: list[int]
    labels: list[int]
    short: bool = False


class Span(NamedTuple):
    """An answer in the text of a conversation: where it is learned from, where its content ends, and where its end."""

    start: int
    said: int
    end: int


def check_template(tokenizer: Any) -> None:
    """Raise ConfigError if a tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise ConfigError(
            "The tokenizer has no chat template, which chat=true and conversations need.",
            "Put a chat_template.jinja into the model's folder, use a chat model, or give prompts and completions.",
        )


def given(prompt: list[int], completion: list[int]) -> Encoded:
    """Return a row of which nothing but the completion is learned."""
    return Encoded(prompt, completion, [IGNORED] * len(prompt))


def fitting(task: Any, turns: Turns, where: str) -> Encoded:
    """Return a conversation as tokens, without as many of its oldest exchanges as do not fit.

    What a system says first stays, and so does the last question with its answer, whatever their length.
    """
    made = encoded(task, turns, where)
    head = 1 if turns[0].role == "system" else 0
    starts = [n for n in range(head + 1, len(turns)) if turns[n].role == "user" and turns[n - 1].role == "assistant"]
    if len(made.prompt) + len(made.completion) <= task.length or not starts:
        return made

    def short(n: int) -> Encoded:
        return encoded(task, turns[:head] + turns[starts[n] :], where)

    fits = bisect_left(range(len(starts) - 1), 1, key=lambda n: int(sum(map(len, short(n)[:2])) <= task.length))
    return short(fits)._replace(short=True)


def encoded(task: Any, turns: Turns, where: str) -> Encoded:
    """Return a conversation as tokens, its answers told by the template's own marks, or found in what it writes.

    Args:
        task: has the `tokenizer`, `ids` and `continued`, which tokenize a text, alone or behind another.
        turns: end with an answer that is learned.
        where: the row, for errors.

    Raises:
        DataError: the template refuses the turns, or writes an answer otherwise than it is.
    """
    tokenizer = task.tokenizer
    marked = re.search(r"{%-?\s*generation", str(tokenizer.chat_template)) and all(turn.learned for turn in turns)
    if marked and (found := _marked(tokenizer, turns, where)):
        return found
    whole, spans = answers(tokenizer, turns, where)
    ids, labels, done = list[int](), list[int](), 0
    for start, _, end in spans:
        between = behind(task, whole[:done], whole[done:start])
        answer = behind(task, whole[:start], whole[start:end])
        ids, labels = ids + between + answer, labels + [IGNORED] * len(between) + answer
        done, first = end, len(ids) - len(answer)
    if spans[-1].said == spans[-1].end and tokenizer.eos_token_id is not None:
        ids = [*ids, int(tokenizer.eos_token_id)]  # the template writes no end
    return Encoded(ids[:first], ids[first:], labels[:first])


def answers(tokenizer: Any, turns: Turns, where: str) -> tuple[str, list[Span]]:
    """Return the text of a conversation, and where in it the answers are that are learned.

    The template writes the turns once as they are and once with marks in place of their texts; between the marks
    stands what it writes itself. An answer begins where the template, given the turns before it, has the model begin,
    or with its own text if that is elsewhere, and its end is the special token behind it.
    """
    whole = _applied(tokenizer, turns, where)
    thoughts = [turn.text[: turn.text.rfind("</think>") + 8] if "</think>" in turn.text else "" for turn in turns]
    marks = [f"{thought}@peftree{n}@" for n, thought in enumerate(thoughts)]
    framed = [t if _calls(t) or t.images else t._replace(text=mark) for t, mark in zip(turns, marks, strict=True)]
    frame = _applied(tokenizer, framed, where)
    places = sorted((found.start(), found.end(), int(found[1])) for found in re.finditer(r"@peftree(\d+)@", frame))
    answered = {n for n, turn in enumerate(turns) if turn.role == "assistant" and turn.learned}
    calling = {n for n, turn in enumerate(turns) if _calls(turn)}
    missing = {*range(len(turns))} - {n for *_, n in places} - calling
    if lost := missing & answered:
        raise _unfound(where, min(lost))
    if gone := [n for n in sorted(missing) if turns[n].role in ("system", "tool") and turns[n].text.strip()]:
        raise DataError(
            f"{where}: the chat template leaves out turn {gone[0] + 1}, of the role {turns[gone[0]].role}.",
            "Leave that turn out, or use a model whose template writes it.",
        )
    _check_tools(turns, whole, where)
    end_of = re.compile(rf"\s*(?:{'|'.join(map(re.escape, _specials(tokenizer)))})")
    spans, at, done = [_called(tokenizer, turns, n, whole, where) for n in sorted(calling & answered)], 0, 0
    for number, (left, right, n) in enumerate(places):
        ours = frame[done:left]
        after = frame[right : places[number + 1][0] if number + 1 < len(places) else len(frame)]
        text = turns[n].text[len(thoughts[n]) :]
        forms = (text, text.strip(), text.lstrip(), text.rstrip())
        said = next((f for f in forms if whole.startswith(ours + f + after, at)), None)
        if said is None and turns[n].role != "assistant" and (found := whole.find(after, at + len(ours))) >= 0:
            said = whole[at + len(ours) : found]
        if said is None or not whole.startswith(ours, at):
            raise _unfound(where, n)
        begin, at, done = at + len(ours), at + len(ours) + len(said), right
        if n in answered:
            begin -= len(thoughts[n]) if ours.endswith(thoughts[n]) else 0
            closing = end_of.match(after)
            spans.append(Span(_start(tokenizer, turns[:n], whole, begin), at, at + (closing.end() if closing else 0)))
    return whole, sorted(spans)


def _calls(turn: Turn) -> bool:
    """Whether a turn calls tools, which a template writes in a form of its own."""
    return "tool_calls" in turn.more


def _called(tokenizer: Any, turns: Turns, n: int, whole: str, where: str) -> Span:
    """Return where turn `n` is, which calls tools: between what the template writes before it, and with it."""
    try:
        through = _text(tokenizer, turns[: n + 1]).rstrip()
    except TemplateError:
        through = ""
    if not through or not whole.startswith(through):
        raise _unfound(where, n)
    start = _start(tokenizer, turns[:n], whole, len(through))
    return Span(start, start, len(through))


def _check_tools(turns: Turns, whole: str, where: str) -> None:
    """Raise DataError if the template leaves out a tool, or a call of one."""
    tools = [tool.get("function", tool).get("name") for tool in json.loads(turns[0].tools or "[]")]
    calls = [call["function"]["name"] for turn in turns if _calls(turn) for call in json.loads(turn.more)["tool_calls"]]
    if left := next((name for name in [*tools, *calls] if str(name) not in whole), None):
        raise DataError(
            f"{where}: the chat template leaves out the tool {left!r}.", "Use a model whose chat template writes tools."
        )


def _unfound(where: str, number: int) -> DataError:
    return DataError(
        f"{where}: the chat template does not write turn {number + 1} as it is, so the answers cannot be found.",
        "Use a template that marks answers with {% generation %}, or rows of one question and one answer.",
    )


def _start(tokenizer: Any, before: Turns, whole: str, begin: int) -> int:
    """Return where an answer is learned from, whose own text begins at `begin`."""
    if not before:
        return begin
    try:
        bare, asked = (_text(tokenizer, before, add_generation_prompt=prompt) for prompt in (False, True))
    except TemplateError:
        return begin
    if asked != bare and whole.startswith(asked) and len(asked) <= begin:
        return len(asked)
    return len(bare) if whole.startswith(bare) and not whole[len(bare) : begin].strip() else begin


def _marked(tokenizer: Any, turns: Turns, where: str) -> Encoded | None:
    """Return a conversation whose answers the template marks itself (`{% generation %}`); None if it does not."""
    how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    out = _applied(tokenizer, turns, where, **how)
    ids, mask = out["input_ids"], list(out["assistant_masks"])
    _check_tools(turns, tokenizer.decode(ids), where)
    specials = {tokenizer.convert_tokens_to_ids(token) for token in _specials(tokenizer)}
    for n in range(1, len(mask)):  # the end of a turn, where the marks leave it out
        if mask[n - 1] and not mask[n] and ids[n] in specials:
            begin = next((k for k in range(n, 0, -1) if not mask[k - 1]), 0)
            last = max((k for k in range(begin, n) if ids[k] in specials), default=begin - 1)
            mask[n] = int(bool(tokenizer.decode(ids[last + 1 : n]).strip()))
    begun = sum(mask[n] > mask[n - 1] for n in range(1, len(mask)))
    if not begun or begun != sum(turn.role == "assistant" for turn in turns):
        return None
    end = len(mask) - mask[::-1].index(1)
    start = next((n for n in range(end, 0, -1) if not mask[n - 1]), 0)
    labels = [token if said else IGNORED for token, said in zip(ids, mask, strict=True)]
    return Encoded(ids[:start], ids[start:end], labels[:start])


def _specials(tokenizer: Any) -> list[str]:
    """Return the tokens that stand for no text, longest first."""
    added = [str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()]
    return sorted({*map(str, tokenizer.all_special_tokens), *added}, key=len, reverse=True)


def behind(task: Any, before: str, text: str) -> list[int]:
    """Return the tokens of a text behind another."""
    tail = before[-BEHIND:]
    found: list[int] = task.continued(task.ids(tail), tail, text) if tail else task.ids(text)
    return found


def _text(tokenizer: Any, turns: Sequence[Turn], **how: Any) -> Any:
    messages = [{"role": turn.role, "content": turn.text, **json.loads(turn.more or "{}")} for turn in turns]
    tools = json.loads(turns[0].tools) if turns[0].tools else None
    return tokenizer.apply_chat_template(messages, **{"tokenize": False, "tools": tools, **how})


def _applied(tokenizer: Any, turns: Sequence[Turn], where: str, **how: Any) -> Any:
    try:
        return _text(tokenizer, turns, **how)
    except TemplateError as error:
        raise DataError(
            f"{where}: the chat template refuses the turns: {error}.", "Reorder or leave out turns."
        ) from None
