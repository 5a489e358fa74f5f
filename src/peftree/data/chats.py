"""Rows for generation in the layouts of other tools: OpenAI's messages, ShareGPT, Alpaca, questions about images."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from peftree.data.cells import cell
from peftree.data.picture import FILES, images_in
from peftree.errors import DataError


class Turn(NamedTuple):
    """A turn of a conversation.

    Attributes:
        role, text: who says it, and what; `IMAGE` is at the place of each image.
        learned: whether an answer is.
        images: the paths of its images, or those that the row holds.
        more: calls of tools and what else a message with tools has, as JSON; empty: nothing.
        tools: the tools of its conversation as JSON; empty: there are none.
    """

    role: str
    text: str
    learned: bool = True
    images: tuple[str, ...] = ()
    more: str = ""
    tools: str = ""


Turns = tuple[Turn, ...]
IMAGE = "\ufffc"  # where an image is in a text
ASKS = "Caption:"  # what is asked of an image whose row has a text alone
_ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}
_KNOWN = ("system", "user", "assistant", "tool")
_LISTS = {"messages": "messages", "conversations": "ShareGPT", "conversation": "ShareGPT"}
_PROMPTED = "prompt and completion turns"
_ASKED, _CAPTIONED = "image, question and answer", "image and text"
_OF_TOOLS = ("tool_calls", "tool_call_id", "name")
_REFUSED = ("functions", "function_call", "reasoning_content", "history")


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
    return "text" if "text" in record else ""


def pictured(record: Mapping[str, Any]) -> str:
    """Return the layout in which a row asks about images; empty: none."""
    if (found := layout(record)) in {*_LISTS.values(), _PROMPTED}:
        return found
    if any(name in record for name in FILES):
        return _ASKED if {"question", "answer"} <= record.keys() else _CAPTIONED if "text" in record else ""
    return ""


def shows(record: Mapping[str, Any]) -> bool:
    """Whether a row of turns has an image in one, or is a question about one."""
    turns = (_parsed(record.get(name)) for name in (*_LISTS, "prompt"))
    said = [turn.get("content") for listed in turns if isinstance(listed, list) for turn in listed if "content" in turn]
    parts = [part for content in said if isinstance(content, list) for part in content if isinstance(part, Mapping)]
    return any(part.get("type") == "image" for part in parts) or pictured(record) == _ASKED


def has(record: Mapping[str, Any], kind: str, tell: Callable[[Mapping[str, Any]], str] = layout) -> bool:
    """Whether a row is in the layout of the rows before it; one that lacks a value is."""
    found = tell(record)
    return found == kind or (not found and any(record.get(n, 0) is None for n, k in _LISTS.items() if k == kind))


def converted(record: Mapping[str, Any], kind: str, where: str) -> tuple[Any, Any, Turns]:
    """Return what is given, what is learned, and the turns of a conversation, of a row in a layout.

    A conversation ends with its last answer that is learned. An Alpaca row is one of a question and an answer; its
    instruction and input have an empty line between them.

    Raises:
        DataError: a turn has another role, is not a text, or has what is not read.
    """
    if kind == "text":
        return "", record["text"], ()
    _refuse(record, where)
    if kind == "Alpaca":
        asked, extra, answer = (cell(n, record.get(n), n, where) for n in ("instruction", "input", "output"))
        turns = [Turn("user", f"{asked}\n\n{extra}" if extra.strip() else asked), Turn("assistant", answer)]
    elif kind in (_ASKED, _CAPTIONED):
        turns = _question(record, kind, where)
    else:
        turns = _illustrated(_turns(record, kind, where), record, where)
    if (told := cell("system", record.get("system"), "system", where)).strip():
        turns.insert(0, Turn("system", told))
    while turns and not (turns[-1].role == "assistant" and turns[-1].learned):
        turns.pop()
    if not turns:
        return "", "", ()
    tools = _tools(record, where)
    turns = [turn._replace(tools=tools) for turn in turns]
    given = "\n".join(
        f"{turn.role}: {turn.text or turn.more}" for turn in turns[:-1] if (turn.text or turn.more).strip()
    )
    return given, turns[-1].text or turns[-1].more, tuple(turns)


def _question(record: Mapping[str, Any], kind: str, where: str) -> list[Turn]:
    """Return a question about images, and its answer; no turns if one of the three is missing."""
    name = next((n for n in FILES if record.get(n) is not None), "image")
    files = images_in(record.get(name), name, where)
    if kind == _CAPTIONED:
        asked, answer = ASKS, cell("text", record.get("text"), "text", where)
    else:
        asked, answer = (cell(n, record.get(n), n, where) for n in ("question", "answer"))
    found = [Turn("user", IMAGE * len(files) + asked, images=tuple(files)), Turn("assistant", answer)]
    return found if files and all(files) and asked.strip() and answer.strip() else []


def _tools(record: Mapping[str, Any], where: str) -> str:
    """Return the tools of a conversation as JSON; empty: none."""
    tools = _parsed(record.get("tools"))
    if not tools:
        return ""
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(
            f"{where}: tools is {str(tools)[:80]}, not a list of tools.",
            'Write {"type": "function", "function": {"name": .., "parameters": ..}} for each.',
        )
    return json.dumps(tools)


def _illustrated(turns: list[Turn], record: Mapping[str, Any], where: str) -> list[Turn]:
    """Return turns with the images of the column `images` at those that name none."""
    name = next((n for n in ("images", "image") if record.get(n)), "")
    files = images_in(record[name], name, where) if name else []
    found = []
    for turn in turns:
        named = tuple(name or (files.pop(0) if files else "") for name in turn.images)
        if not all(named):
            raise DataError(
                f"{where}: an image names no file and holds no bytes.",
                'Write {"type": "image", "image": "a.png"}, or a column images.',
            )
        found.append(turn._replace(images=named))
    if files:
        raise DataError(f"{where}: {len(files)} of its images are in no turn.", 'Put {"type": "image"} where each is.')
    return found


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
    shown = [part.get("image") or part.get("path") for part in text if _pictures(part)] if _parts(text) else []
    images = tuple(images_in(shown, "an image", where))
    if _parts(text):
        text = "".join(IMAGE if _pictures(part) else part["text"] for part in text)
    role = _ROLES.get(str(role), role)
    if role not in _KNOWN:
        raise DataError(f"{where} has the role {str(role)[:40]!r}.", f"Roles are {', '.join(_KNOWN)}; {_fix(name)}")
    _refuse(said, where)
    more = {key: said[key] for key in _OF_TOOLS if said.get(key) and role in ("assistant", "tool")}
    if calls := more.get("tool_calls"):
        more["tool_calls"] = [_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]
        text = text or ""
    if not isinstance(text, str):
        raise DataError(f"{where} is {str(text)[:80]}, not text.", _fix(name))
    if images and role != "user":
        raise DataError(f"{where} has an image, and its role is {role}.", "Images are in turns of a user.")
    learned = all(said.get(key) not in (0, 0.0, False) for key in ("weight", "loss", "train"))
    return Turn(str(role), text, learned, images, json.dumps(more) if more else "")


def _parts(text: object) -> bool:
    """Whether a text comes as a list of texts and images."""
    return isinstance(text, list) and all(
        isinstance(part, Mapping) and (isinstance(part.get("text"), str) or _pictures(part)) for part in text
    )


def _pictures(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "image"


def _call(call: Any, where: str) -> dict[str, Any]:
    """Return a call of a tool with its arguments as data, as templates take them; OpenAI writes them as JSON."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(
            f"{where}: a call of a tool is {str(call)[:80]}.",
            'Write {"type": "function", "function": {"name": .., "arguments": {..}}}.',
        )
    given = function.get("arguments", {})
    try:
        given = json.loads(given) if isinstance(given, str) and given.strip() else given or {}
    except ValueError:
        raise DataError(
            f"{where}: the arguments {given[:80]!r} are not JSON.", "Write them as a JSON object."
        ) from None
    return {**call, "function": {**function, "arguments": given}}


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
