"""Rules: what each ATen op does to token axes. One family of ops a file; importing this registers them all."""

from tokcompile.passes.rules import attention, contract, experts, index, join, pointwise, reduce, view  # noqa: F401
from tokcompile.passes.rules.core import RULES, Call, NeedsFull, register_rule, rule

__all__ = ["RULES", "Call", "NeedsFull", "register_rule", "rule"]
