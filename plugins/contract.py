"""The ONNX node that stands for one reduction: what the exporter writes and a fused TensorRT plugin reads.

domain "tokcompile", op_type the method's name in CamelCase (`tome` -> `Tome`): with the attributes `plugin_namespace`
and `plugin_version` that is the name TensorRT looks the plugin up by, the same for every reduction of a method. Where
the bodies of two reductions of a model differ in more than constants (a method that takes another road for some count),
the second body is written as `Tome_2`, and fused only in a plugin file, where it is a `Tome` like the first. All shapes
are static; B is the batch and L is prefix + n*unit + suffix. Segments of one sequence (images, windows) that are reduced
alike are samples of one batch: B counts them, and L is n*unit. For onnxruntime, which reads no plugin, a B of 1 is left out.

inputs, in the order that the attribute `inputs` names:
    x                   (B, L, D)       the residual stream, in the model's dtype
    size                (B, n)          float32, how many original tokens each holds; only for methods that track sizes
    normed              (B, L, D)       x after the model's final norm; taps are there only for methods that read them
    q, k, v             (B, H, L, d)    of the attention last computed, before any rotary embedding
    rotated_k           (B, H, L, d)    the keys after it
    cls_attention       (B, H, L)       the softmax row of the class token
    last_attention      (B, H, L)       the softmax row of the last token
    received_attention  (B, H, L)       mean over all queries
    earlier_attention   (B, H, L)       the same in an earlier block
    earlier_cls_attention (B, E, L)     float32, the row of the class token in each of E blocks, mean over heads
    text_attention      (B, H, T, L)    the softmax rows of the T text tokens after the reduced ones; without text their mean
    scores              (B, H, L, L)    before the softmax, scaled and masked
    embeds, text_embeds (B, n0, D), (B, T', D)  the reduced tokens and the text as they came into the first block
    text_seen           (B or 1, T')    float32, 0 for text that a mask hides; only where there is such a mask
outputs, in the order that the attribute `outputs` names:
    x                   (B, prefix + k*unit + suffix, D)
    index               (B, k)          int64, the kept tokens, counted without the prefix
    size                (B, k)          float32, only where sizes are tracked
    assign              (B, n)          int64, the new token of each old one; only where the model's output needs it
    positions           (B, k, P)       int64, the tokens that lend each new one P positions; only from methods that give them
attributes: those of `ATTRIBUTES`; `start` and `tap_start` are the first row reduced in x and in the taps: where one
block reduces several spans, x is shorter already while the taps are not. `grid`, the (rows, columns) of the patches while
they are still a whole raster and (0,) after; `text`, starts and stops of the text tokens in the taps in a language model,
(0,) in a vision tower; `option_<name>` for the method's options that are numbers or strings; and c0, c1, ...: the
constants of the function body that differ between the model's reductions of this method, which only the body reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokcompile.passes.reduction import ReductionModule

DOMAIN = "tokcompile"
DOMAIN_VERSION = 1
PLUGIN_NAMESPACE = "tokcompile"
PLUGIN_VERSION = "1"
# the op types that the plugin library holds
PLUGINS = frozenset({"Dart", "Topk", "Fastv", "Fastervlm", "Fopru", "Pyramiddrop", "Evit", "Tome", "Pitome", "Divprune"})
INPUTS = (
    "x", "size", "normed", "q", "k", "v", "rotated_k", "cls_attention", "last_attention", "received_attention",
    "earlier_attention", "earlier_cls_attention", "text_attention", "scores", "embeds", "text_embeds", "text_seen",
)  # fmt: skip
OUTPUTS = ("x", "index", "size", "assign", "positions")
ATTRIBUTES: Mapping[str, type] = {
    "plugin_namespace": str,  # TensorRT before 10.10 looks a plugin up by these two alone
    "plugin_version": str,
    "method": str,
    "inputs": str,
    "outputs": str,
    "n": int,
    "k": int,
    "prefix": int,
    "suffix": int,
    "unit": int,
    "start": int,
    "tap_start": int,
    "step": int,
    "steps": int,
    "block": int,
    "depth": int,
}


@dataclass(frozen=True)
class ReductionNode:
    """One node as it stands in the file, without its values."""

    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


def op_type(method: str) -> str:
    """The op type, and plugin name, of a method: `dart` -> `Dart`, `my-method` -> `MyMethod`."""
    words = "".join(c if c.isalnum() else " " for c in method).split()
    return "".join(w[0].upper() + w[1:] for w in words) or "Reduction"


def reduction_node(module: ReductionModule, outputs: tuple[str, ...]) -> ReductionNode:
    """The node of one reduction that gives these of `OUTPUTS`."""
    recipe, site = module.recipe, module.site
    # a method that merges nothing hands on the sizes that an earlier one tracks
    inputs = ("x", *(("size",) if recipe.track_size or "size" in outputs else ()), *module.names)
    attributes: dict[str, Any] = {
        "plugin_namespace": PLUGIN_NAMESPACE,
        "plugin_version": PLUGIN_VERSION,
        "method": recipe.name,
        "inputs": ",".join(inputs),
        "outputs": ",".join(outputs),
        "unit": module.unit,
        "start": module.start,
        "tap_start": module.tap_start,
    }
    attributes |= {name: getattr(site, name) for name in ATTRIBUTES if name not in attributes}
    attributes["grid"] = tuple(site.grid or (0,))
    attributes["text"] = tuple(edge for span in site.text for edge in span) or (0,)
    for name, value in site.options.items():
        if name == "renumber":  # what becomes of positions is no matter of the reduction itself
            continue
        if isinstance(value, (bool, int)):
            attributes[f"option_{name}"] = int(value)
        elif isinstance(value, (float, str)):
            attributes[f"option_{name}"] = value
    return ReductionNode(op_type(recipe.name), inputs, outputs, attributes)
