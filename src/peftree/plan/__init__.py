"""Memory before anything runs: what a setting takes, from a config alone."""

from peftree.plan.estimate import plan
from peftree.plan.request import Request, parse_bytes, request
from peftree.plan.result import Plan

__all__ = ["Plan", "Request", "parse_bytes", "plan", "request"]
