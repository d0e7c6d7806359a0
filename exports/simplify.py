"""Equal forms that a runtime does faster: small rewrites of exported graphs, chosen in the rows of `targets.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir
import onnx_ir.passes.common as passes

from tokcompile.exports.batch_one import drop_batch
from tokcompile.exports.head_mean import head_mean
from tokcompile.exports.hidden_rows import hidden_rows
from tokcompile.exports.indices import look_up
from tokcompile.exports.rewriting import constant, is_full, maker, replace
from tokcompile.exports.row_bias import row_bias_channel
from tokcompile.exports.slices import slice_last
from tokcompile.exports.split_qkv import split_qkv


def reshape_once(graph: ir.Graph) -> int:
    """Of two reshapes in a row only the last one counts, and one to the shape that is there already does nothing."""
    count = 0
    for node in list(graph):
        if node.op_type != "Reshape" or not is_full(constant(node.inputs[1])):
            continue
        if before := maker(node.inputs[0], "Reshape"):
            node.replace_input_with(0, before.inputs[0])
            count += 1
        source, out = node.inputs[0], node.outputs[0]
        if source is not None and source.shape is not None and source.shape == out.shape:
            given = source.producer() is None or source.is_graph_output()
            if given and out.is_graph_output():
                continue
            out.replace_all_uses_with(source, replace_graph_outputs=True)
            count += 1
    return count


def transpose_whole(graph: ir.Graph) -> int:
    """The last two axes swapped with those before folded into one becomes a Transpose of the whole, which fuses into a
    product. So torch.onnx writes the keys of attention."""
    count = 0
    for node in list(graph):
        swap = maker(node.inputs[0], "Transpose") if node.op_type == "Reshape" else None
        fold = maker(swap.inputs[0], "Reshape") if swap is not None else None
        source = fold.inputs[0] if fold is not None else None
        if swap is None or source is None or source.shape is None or list(swap.attributes["perm"].as_ints()) != [0, 2, 1]:
            continue
        shape, folded, out = source.shape, swap.outputs[0].shape, node.outputs[0].shape
        if folded is None or out is None or len(shape) != len(out) or len(shape) < 3:
            continue
        if [*shape[:-2], shape[-1], shape[-2]] != list(out) or list(folded)[1:] != list(out)[-2:]:
            continue
        perm = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
        replace(graph, node.outputs[0], [ir.Node("", "Transpose", [source], [ir.AttrInt64s("perm", perm)])])
        count += 1
    return count


def lp_norm(graph: ir.Graph) -> int:
    """x / max(|x|, tiny) over the last axis becomes LpNormalization, which gives 0 for 0 too."""
    count = 0
    if graph.opset_imports.get("", 0) >= 22:  # onnxruntime before 1.24 has no kernel of that version
        return count
    for node in list(graph):
        clip = maker(node.inputs[1], "Clip") if node.op_type == "Div" else None
        norm = maker(clip.inputs[0], "ReduceL2") if clip is not None else None
        if clip is None or norm is None or norm.inputs[0] is not node.inputs[0]:
            continue
        if node.outputs[0].dtype != ir.DataType.FLOAT:  # onnxruntime has no half precision kernel
            continue
        axes, least = constant(norm.inputs[1]), constant(clip.inputs[1])
        if axes is None or axes.tolist() != [-1] or least is None or least > 1e-10 or not norm.attributes["keepdims"].value:
            continue
        made = ir.Node("", "LpNormalization", [node.inputs[0]], [ir.AttrInt64("axis", -1), ir.AttrInt64("p", 2)])
        replace(graph, node.outputs[0], [made])
        count += 1
    return count


RULES: Mapping[str, Callable[[ir.Graph], int]] = {
    "hidden_rows": hidden_rows,
    "split_qkv": split_qkv,
    "transpose_whole": transpose_whole,
    "lp_norm": lp_norm,
    "slice_last": slice_last,
    "drop_batch": drop_batch,
    "row_bias_channel": row_bias_channel,
    "look_up": look_up,
    "reshape_once": reshape_once,
    "head_mean": head_mean,
}


def simplify(model: ir.Model, rules: tuple[str, ...]) -> None:
    """Applies the named rules, and drops what each leaves unread, so that the next one counts only what is read."""
    for rule in rules:
        if RULES[rule](model.graph):
            passes.RemoveUnusedNodesPass()(model)
