"""The methods we ship, one file each; importing this registers them."""

from tokcompile.methods import dart, divprune, evit, fastv, grid, pitome, random, tome, topk  # noqa: F401
