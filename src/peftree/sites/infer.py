"""Structural inference: the layout of a model without a record, where its names leave no doubt."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from peftree.errors import SiteError
from peftree.sites.parts import Modules, inside, kind_of
from peftree.sites.records import Layout

# Last path components by role; a role is taken where exactly one linear of the layer has one.
NAMES: dict[str, frozenset[str]] = {
    "attn.q": frozenset("q_proj query q q_lin to_q wq q_linear query_proj".split()),
    "attn.k": frozenset("k_proj key k k_lin to_k wk k_linear key_proj".split()),
    "attn.v": frozenset("v_proj value v v_lin to_v wv v_linear value_proj".split()),
    "attn.o": frozenset("o_proj out_proj o out_lin to_out wo out_linear proj".split()),
    "ffn.up": frozenset("up_proj fc1 lin1 linear1 c_fc wi".split()),
    "ffn.gate": frozenset({"gate_proj"}),
    "ffn.down": frozenset("down_proj fc2 lin2 linear2 c_proj".split()),
}
THIRDS = "qkv"  # the vision transformers that call it so stack q, k, v in this order
HEADS = frozenset("lm_head head fc classifier score head_dist output".split())
COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
ADVICE = (
    "Write a role record (a YAML file like those in peftree/roles, with model_types or classes, "
    "and stacks that give tower, layers and roles) and pass its path to "
    "peftree.sites.register_record, or name module paths instead of roles."
)


def infer(modules: Modules, known: list[str]) -> tuple[str, Layout, tuple[str, ...]]:
    """Return the stack's path, its layout, and the paths of the linears that are heads.

    Raises:
        SiteError: there is not exactly one list of like layers, or a linear in them has no
            well-known name; names the model type and what was seen.
    """
    model = modules[""]
    kind = str(getattr(getattr(model, "config", None), "model_type", "")) or type(model).__name__
    lists = _lists(modules)
    if len(lists) != 1:
        close = difflib.get_close_matches(kind, known, n=1)
        hint = f"There is a record for '{close[0]}'. " if close else ""
        seen = f"{len(lists)} lists of layers with attention ({', '.join(lists) or 'none'})"
        raise SiteError(
            f"'{kind}' has no role record and its structure is not clear: {seen} where one is needed.",
            f"{hint}{ADVICE}",
        )
    path = lists[0]
    root, _, name = path.rpartition(".")
    linears = _linears(modules, f"{path}.0")
    roles, left = _roles(linears)
    if left:
        raise SiteError(
            f"'{kind}' has no role record, and in its layers '{path}' these linears are not known "
            f"by name: {', '.join(left)} (understood: {', '.join(roles) or 'none'}).",
            ADVICE,
        )
    outside = [p for p in modules if inside(p, root) and not inside(p, path)]
    return root, _layout(modules, f"{path}.0", root, name, roles, outside), _outer(modules, outside)


def _lists(modules: Modules) -> list[str]:
    """Return the outermost lists of layers of one class whose layers hold an attention."""
    found: list[str] = []
    for path, module in modules.items():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
            continue
        if len({type(child) for child in module}) == 1:
            leaves = {name.rpartition(".")[2] for name in _linears(modules, f"{path}.0")}
            split = all(leaves & NAMES[role] for role in ("attn.q", "attn.k", "attn.v"))
            if (split or THIRDS in leaves) and not any(inside(path, old) for old in found):
                found.append(path)
    return found


def _linears(modules: Modules, base: str) -> list[str]:
    below = [path for path in modules if inside(path, base)]
    kinds = ("linear", "conv1d")
    return [p.removeprefix(base + ".") for p in below if kind_of(modules[p]) in kinds]


def _roles(linears: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return role -> place, and the linears that no role or more than one claims."""
    roles: dict[str, Any] = {}
    leaves = {path: path.rpartition(".")[2] for path in linears}
    if {"w1", "w2", "w3"} <= set(leaves.values()):
        alias = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
        leaves = {path: alias.get(leaf, leaf) for path, leaf in leaves.items()}
    for role, names in NAMES.items():
        mine = [path for path, leaf in leaves.items() if leaf in names]
        if len(mine) == 1:
            roles[role] = mine[0]
    fused = [path for path, leaf in leaves.items() if leaf == THIRDS]
    if len(fused) == 1:
        for index, part in enumerate("qkv"):
            roles.setdefault(f"attn.{part}", {"path": fused[0], "slice": f"{index}/3"})
    used = [role if isinstance(role, str) else role["path"] for role in roles.values()]
    left = [path for path in linears if path not in used]
    complete = {"attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.down"} <= set(roles)
    return roles, left or ([] if complete else linears)


def _layout(modules: Modules, first: str, root: str, name: str, roles: dict[str, Any], outside: list[str]) -> Layout:
    """Build the layout; what the names do not tell (the residual stream) is left out."""
    own = [p for p in modules if inside(p, first) and kind_of(modules[p]) == "norm"]
    attn = roles["attn.o"].rpartition(".")[0]
    up, down = (roles[role].rpartition(".")[0] for role in ("ffn.up", "ffn.down"))
    config = getattr(modules[""], "config", None)
    count = next((c for c in COUNTS if _number(config, modules, f"{first}.{attn}", c)), None)
    here = {p: p.removeprefix(root + ".") if root else p for p in outside}
    kinds = {p: kind_of(modules[p]) for p in outside}
    embed = [p for p in outside if kinds[p] == "embedding"]
    convs = [p for p in outside if kinds[p] == "conv2d"]
    label = type(modules[""]).__name__
    causal = bool(getattr(config, "is_decoder", False)) or label.endswith(("CausalLM", "LMHead"))
    return Layout.model_validate({
        "tower": "vision" if convs and not embed else "text",
        "layers": name,
        "causal": causal,
        "embed": here[embed[0]] if len(embed) == 1 else None,
        "roles": roles,
        "attn": {"module": attn, "heads": count} if attn and count else None,
        "ffn": {"in": up, "out": up} if up and up == down and up != attn else None,
        "norms": [p.removeprefix(first + ".") for p in own],
        "outside": {
            "embed": [here[p] for p in embed],
            "conv": [here[p] for p in convs],
            "norm": [here[p] for p in outside if kinds[p] == "norm"],
        },
    })  # fmt: skip


def _number(config: Any, modules: Modules, path: str, field: str) -> bool:
    value = getattr(config, field, None) or getattr(modules.get(path), field, None)
    return isinstance(value, int) and value > 0


def _outer(modules: Modules, outside: list[str]) -> tuple[str, ...]:
    return tuple(p for p in outside if kind_of(modules[p]) == "linear" and HEADS & {*p.split(".")})
