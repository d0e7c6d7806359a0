"""The one exception family: what went wrong, where, why, and what to do about it."""

from __future__ import annotations

from typing import Any


class TokcompileError(Exception):
    """Base of every error that tokcompile raises on purpose."""


class BudgetError(TokcompileError, ValueError):
    """The token budget is out of range, or the model or the method cannot meet it."""


class MethodError(TokcompileError, ValueError):
    """The method is unknown, or its options do not fit it."""


class PlanError(TokcompileError, ValueError):
    """A plan file or a plan object does not fit the model, or is not a plan."""


class TraceError(TokcompileError):
    """The model could not be turned into one static graph."""


class InputError(TokcompileError, ValueError):
    """Example or later inputs do not have the form the model was compiled for."""


class ExportError(TokcompileError):
    """A file could not be written, read or verified."""


class EngineError(TokcompileError):
    """A TensorRT engine could not be built, or what was built is not what was planned."""


class UnsupportedGraph(TokcompileError):
    """The graph holds something the pass refuses to guess about; the message names the node and the way out."""

    def __init__(self, reason: str, node: Any = None, hint: str | None = None):
        self.reason, self.node, self.hint = reason, node, hint
        super().__init__("\n".join(filter(None, (reason, describe(node), hint and f"  what to do: {hint}"))))


def first_line(error: Exception) -> str:
    """The kind of an error of another library, and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def module_path(node: Any) -> str:
    """The dotted path of the innermost module that a graph node came from, or '' where none is recorded."""
    stack = (getattr(node, "meta", None) or {}).get("nn_module_stack") or {}
    entries = [value[0] for value in stack.values() if isinstance(value, tuple)]
    return clean_path(entries[-1]) if entries else ""


def clean_path(path: str) -> str:
    """`L['self'].blocks[3].attn` and the like as `blocks.3.attn`."""
    for old, new in (("L['self']", ""), ("L__self___", ""), ("['", "."), ("']", ""), ("[", "."), ("]", "")):
        path = path.replace(old, new)
    return path.strip(".")


def source_line(node: Any) -> str:
    """`file:line, in function` of the innermost user frame recorded for a node, or ''."""
    trace = (getattr(node, "meta", None) or {}).get("stack_trace") or ""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    return frames[-1].replace("File ", "", 1).replace('"', "").replace(", line ", ":") if frames else ""


def describe(node: Any) -> str:
    """The lines of an error message that say where in the model a graph node stands."""
    if node is None:
        return ""
    lines = [f"  node: {node.name} = {node.target}"]
    shapes = [shape_text(arg) for arg in getattr(node, "all_input_nodes", [])]
    if shapes:
        lines[0] += f"({', '.join(shapes)})"
    for title, text in (("module", module_path(node)), ("source", source_line(node))):
        if text:
            lines.append(f"  {title}: {text}")
    return "\n".join(lines)


def shape_text(node: Any) -> str:
    value = node.meta.get("val")
    return "x".join(map(str, value.shape)) if hasattr(value, "shape") else node.name
