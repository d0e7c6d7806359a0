"""tokcompile: static token reduction, compiled into any vision transformer."""

import tokcompile.methods  # noqa: F401  (before the function of that name, which then stands for it)
from tokcompile import llm, primitives, steps, vlm
from tokcompile.api import OptimizedModel, ReducedOutput, load, optimize
from tokcompile.budget import Flops, KeepRate, Remove, Schedule, Share, Tokens
from tokcompile.errors import (
    BudgetError,
    EngineError,
    ExportError,
    InputError,
    MethodError,
    PlanError,
    TokcompileError,
    TraceError,
    UnsupportedGraph,
)
from tokcompile.exports.session import session_options
from tokcompile.oracles import Check, check
from tokcompile.passes.plan import Plan, Reduction
from tokcompile.passes.rules import Call, NeedsFull, register_rule
from tokcompile.recipe import Keep, Merge, Mix, Recipe, Site, methods, register_method

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "Call",
    "Check",
    "EngineError",
    "ExportError",
    "Flops",
    "InputError",
    "Keep",
    "KeepRate",
    "Merge",
    "MethodError",
    "Mix",
    "NeedsFull",
    "OptimizedModel",
    "Plan",
    "PlanError",
    "Recipe",
    "ReducedOutput",
    "Reduction",
    "Remove",
    "Schedule",
    "Share",
    "Site",
    "TokcompileError",
    "Tokens",
    "TraceError",
    "UnsupportedGraph",
    "check",
    "llm",
    "load",
    "methods",
    "optimize",
    "primitives",
    "register_method",
    "register_rule",
    "session_options",
    "steps",
    "vlm",
]
