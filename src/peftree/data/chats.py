"""Rows for generation in the layouts of other tools: OpenAI's messages, ShareGPT, Alpaca, plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from peftree.data.cells import cell
from peftree.errors import DataError


class Turn(NamedTuple):
    """A turn of a conversation; `learned`: whether an answer is."""

    role: str
    text: str
    learned: bool = True


Turns = tuple[Turn, ...]
_ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}
_KNOWN = ("system", "user", "assistant")
_LISTS = {"messages": "messages", "conversations": "ShareGPT", "conversation": "ShareGPT"}
_PROMPTED = "prompt and completion turns"
_REFUSED = ("tools", "functions", "tool_calls", "function_call", "reasoning_content", "history")


def layout(record: Mapping[str, Any]) -> str:
    """Return the layout in which a row holds what is given and what is learned; empty: our columns, or none."""
    for name, kind in _LISTS.items():
        if isinstance(_parsed(record.get(name)), list):
            return kind
    if {"chosen", "rejected"} <= record.keys():
        return ""
    if {"instruction", "output"} <= record.keys():
        return "Alpaca"
    if {"prompt", "completion"} <= record.keys():
        return _PROMPTED if isinstance(_parsed(record["prompt"]), list) else ""
    return "text" if "text" in record and not {"label", "score"} & record.keys() else ""


def has(record: Mapping[str, Any], kind: str) -> bool:
    """Whether a row is in the layout of the rows before it; one that lacks a value is."""
    found = layout(record)
    return found == kind or (not found and any(record.get(n, 0) is None for n, k in _LISTS.items() if k == kind))


def converted(record: Mapping[str, Any], kind: str, where: str) -> tuple[Any, Any, Turns]:
    """Return what is given, what is learned, and the turns of a conversation, of a row in a layout.

    A conversation ends with its last answer that is learned. An Alpaca row is one of a question and an answer; its
    instruction and input have an empty line between them.

    Raises:
        DataError: a turn is not one of a system, a user or an assistant, is not a text, or has what is not read.
    """
    if kind == "text":
        return "", record["text"], ()
    _refuse(record, where)
    if kind == "Alpaca":
        asked, extra, answer = (cell(n, record.get(n), n, where) for n in ("instruction", "input", "output"))
        turns = [Turn("user", f"{asked}\n\n{extra}" if extra.strip() else asked), Turn("assistant", answer)]
    else:
        turns = _turns(record, kind, where)
    if (told := cell("system", record.get("system"), "system", where)).strip():
        turns.insert(0, Turn("system", told))
    while turns and not (turns[-1].role == "assistant" and turns[-1].learned):
        turns.pop()
    if not turns:
        return "", "", ()
    given = "\n".join(f"{turn.role}: {turn.text}" for turn in turns[:-1] if turn.text.strip())
    return given, turns[-1].text, tuple(turns)


def _turns(record: Mapping[str, Any], kind: str, where: str) -> list[Turn]:
    """Return the turns of a row that has a list of them, or two."""
    name = next((n for n, k in _LISTS.items() if k == kind and record.get(n) is not None), "prompt")
    if kind != _PROMPTED and name == "prompt":
        return []
    listed = _parsed(record[name])
    if name == "prompt":
        answer = _parsed(record["completion"])
        answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        answer = [answer] if isinstance(answer, Mapping) else answer
        if not isinstance(answer, list) or not any(_turn(t, where, name).role == "assistant" for t in answer):
            raise DataError(f"{where}: completion has no turn of an assistant.", _fix(name))
        past = [_turn(turn, f"{where}: turn {n} of {name}", name) for n, turn in enumerate(listed, 1)]
        return [t._replace(learned=False) for t in past] + [_turn(t, f"{where}: completion", name) for t in answer]
    return [_turn(turn, f"{where}: turn {n} of {name}", name) for n, turn in enumerate(listed, 1)]


def _turn(turn: object, where: str, name: str) -> Turn:
    """Return one turn."""
    said = turn if isinstance(turn, Mapping) else {}
    role, text = said.get("role", said.get("from")), said.get("content", said.get("value"))
    if isinstance(text, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in text):
        text = "".join(part["text"] for part in text)
    role = _ROLES.get(str(role), role)
    if role not in _KNOWN:
        raise DataError(f"{where} has the role {str(role)[:40]!r}.", f"Roles are {', '.join(_KNOWN)}; {_fix(name)}")
    _refuse(said, where)
    if not isinstance(text, str):
        raise DataError(f"{where} is {str(text)[:80]}, not text.", _fix(name))
    learned = all(said.get(key) not in (0, 0.0, False) for key in ("weight", "loss", "train"))
    return Turn(str(role), text, learned)


def _refuse(said: Mapping[str, Any], where: str) -> None:
    if found := next((name for name in _REFUSED if said.get(name)), ""):
        raise DataError(f"{where}: {found} is not read.", "Leave such rows out, or write what they say as turns.")


def _parsed(value: Any) -> Any:
    """Return a list that a cell holds as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _fix(name: str) -> str:
    keys = '"from": "human", "value"' if name.startswith("conversation") else '"role": "user", "content"'
    return f'write each turn as {{{keys}: ".."}}.'
