"""The methods we ship, one file each; importing this registers them."""

from tokcompile.methods import (  # noqa: F401
    dart,
    divprune,
    evit,
    fastervlm,
    fastv,
    fopru,
    grid,
    holov,
    m3,
    pitome,
    prumerge,
    random,
    todre,
    tome,
    topk,
    visionzip,
)
