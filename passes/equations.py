"""Equations: an einsum names each of its axes, those of an ellipsis too, and its result, so that passes need not guess."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_letters

from torch.fx import GraphModule

from tokcompile.passes.graph import aten, bind, shape


def write_out_equations(gm: GraphModule) -> None:
    """Writes every einsum's equation out in full, in place."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.einsum.default):
        a = bind(node)
        node.args = (written_out(a["equation"], [len(shape(t)) for t in a["tensors"]]), a["tensors"])


def written_out(equation: str, ranks: Sequence[int]) -> str:
    """The same with a letter for each axis. ranks: of the operands.

    >>> written_out("...d, de", [3, 2])
    'abd,de->abe'
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    hidden = [rank - len(term) + 3 if "..." in term else 0 for term, rank in zip(terms, ranks)]
    letters = "".join(c for c in ascii_letters if c not in equation)[: max(hidden)]
    if not arrow:
        once = sorted(c for c in set(inputs) - {",", "."} if inputs.count(c) == 1)
        output = "..." * ("..." in inputs) + "".join(once)
    full = [term.replace("...", letters[len(letters) - count :]) for term, count in zip(terms, hidden)]
    return f"{','.join(full)}->{output.replace('...', letters)}"
