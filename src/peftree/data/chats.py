"""Rows for generation in the layouts of other tools: OpenAI's messages, ShareGPT, Alpaca, plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftree.errors import DataError

Turns = tuple[tuple[str, str], ...]  # role and text of each turn of a conversation, in order
_ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}
_KNOWN = ("system", "user", "assistant")
_LISTS = {"messages": "messages", "conversations": "ShareGPT", "conversation": "ShareGPT"}


def layout(record: Mapping[str, Any]) -> str:
    """Return the layout in which a row holds what is given and what is learned; empty: our columns, or none."""
    names = set(record)
    if found := [kind for name, kind in _LISTS.items() if name in names]:
        return found[0]
    if {"chosen", "rejected"} <= names:
        return ""
    if {"instruction", "output"} <= names:
        return "Alpaca"
    if {"prompt", "completion"} <= names:
        return "prompt and completion turns" if isinstance(record["prompt"], list) else ""
    return "text" if names == {"text"} else ""


def converted(record: Mapping[str, Any], kind: str, where: str) -> tuple[Any, Any, Turns]:
    """Return what is given, what is learned, and the turns of a conversation, of a row in a layout.

    A conversation ends with its last answer. An Alpaca row is one of a question and an answer; its instruction and
    input have an empty line between them.

    Raises:
        DataError: a turn is not one of a system, a user or an assistant, or not a text.
    """
    if kind == "text":
        return "", record["text"], ()
    if kind == "Alpaca":
        if unread := [n for n in ("history", "system") if record.get(n)]:
            raise DataError(f"{where}: {unread[0]} of Alpaca rows is not read.", f"Write messages; {_fix('messages')}")
        asked, extra, answer = (record.get(n) or "" for n in ("instruction", "input", "output"))
        if all(isinstance(text, str) for text in (asked, extra, answer)):
            asked = f"{asked}\n\n{extra}" if extra.strip() else asked
        return asked, answer, (("user", asked), ("assistant", answer))
    name = next((name for name in _LISTS if name in record), "prompt")
    listed = record[name]
    if name == "prompt" and isinstance(record["completion"], list):
        listed = [*listed, *record["completion"]]
    if not isinstance(listed, list):
        raise DataError(f"{where}: {name} is {str(listed)[:80]}, not a list of turns.", _fix(name))
    turns = [_turn(turn, f"{where}: turn {n} of {name}", name) for n, turn in enumerate(listed, 1)]
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    if not turns:
        return "", "", ()
    return "\n".join(f"{role}: {text}" for role, text in turns[:-1]), turns[-1][1], tuple(turns)


def _turn(turn: object, where: str, name: str) -> tuple[str, str]:
    """Return role and text of one turn."""
    said = turn if isinstance(turn, Mapping) else {}
    role, text = said.get("role", said.get("from")), said.get("content", said.get("value"))
    if isinstance(text, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in text):
        text = "".join(str(part.get("text", "")) for part in text)
    role = _ROLES.get(str(role), role)
    if role not in _KNOWN:
        raise DataError(f"{where} has the role {str(role)[:40]!r}.", f"Roles are {', '.join(_KNOWN)}; {_fix(name)}")
    if not isinstance(text, str):
        raise DataError(f"{where} is {str(text)[:80]}, not text.", _fix(name))
    return str(role), text


def _fix(name: str) -> str:
    keys = '"from": "human", "value"' if name.startswith("conversation") else '"role": "user", "content"'
    return f'write each turn as {{{keys}: ".."}}.'
