"""Interpolation: to the same size it gives what it is given; to half the size, between the middles of pixels, it is the mean
of four."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from tokcompile.passes.graph import aten, bind, emitter, packet, shape, stand_in

BILINEAR = "aten.upsample_bilinear2d"
SAME = {
    BILINEAR, "aten.upsample_bicubic2d", "aten.upsample_nearest1d", "aten.upsample_nearest2d", "aten.upsample_nearest3d",
    "aten._upsample_nearest_exact2d", "aten.upsample_linear1d", "aten.upsample_trilinear3d",
}  # fmt: skip


def write_interpolations(gm: GraphModule) -> None:
    """Leaves out those that change nothing and writes those that pool as pooling, in place."""
    for node in list(gm.graph.nodes):
        if packet(node) not in SAME:
            continue
        ratio = shrinks_by(node)
        if ratio == 1:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
        elif ratio == 2 and packet(node) == BILINEAR and not bind(node)["align_corners"]:
            stand_in(node, emitter(gm, node)(aten.avg_pool2d.default, node.args[0], [2, 2]))


def shrinks_by(node: Node) -> float | None:
    """How many times as long each side was; None where sides differ, or where the places in between follow from a factor
    that is not this one."""
    ratios = {a / b for a, b in zip(shape(node.args[0])[2:], shape(node)[2:])}
    given = bind(node)
    factors = [f for name, f in given.items() if name.startswith("scales") and f is not None]
    factors += given.get("scale_factors") or []
    (ratio,) = ratios if len(ratios) == 1 else (None,)
    return ratio if ratio is not None and all(f * ratio == 1 for f in factors) else None
