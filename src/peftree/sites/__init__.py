"""Sites: named places in a base model, found by role (`attn.q`, `ffn.down`, `norm`) in models."""

from peftree.sites.listing import summary
from peftree.sites.places import Kind, Site
from peftree.sites.query import resolve
from peftree.sites.records import Record, read_record, register_record
from peftree.sites.survey import task_head, tree, unchanged, why_unclear

__all__ = [
    "Kind", "Record", "Site", "read_record", "register_record", "resolve",
    "summary", "task_head", "tree", "unchanged", "why_unclear",
]  # fmt: skip
