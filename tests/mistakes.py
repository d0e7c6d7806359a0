"""Mistakes made in the pass on purpose, which an oracle has to see."""

import torch

from tokcompile.passes.gather import Gatherer
from tokcompile.passes.tokens import new_shape, old_shape


def no_coercion(patch):
    """Operands that meet reduced tokens are taken as they are, where their shape allows it (all tokens are kept)."""
    right = Gatherer.coerce
    patch.setattr(Gatherer, "coerce", lambda self, x, have, want, origin: x if old_shape(want) == new_shape(want)
                  else right(self, x, have, want, origin))  # fmt: skip


def next_token(patch):
    """Operands are gathered one position off."""
    right = Gatherer.within
    patch.setattr(Gatherer, "within", lambda self, old, space: self.b.emit(
        torch.ops.aten.roll.default, right(self, old, space), [1], [1]))  # fmt: skip


def other_sample(patch):
    """Operands are gathered by the tokens of another sample of the batch."""
    right = Gatherer.within
    patch.setattr(Gatherer, "within", lambda self, old, space: self.b.emit(
        torch.ops.aten.roll.default, right(self, old, space), [1], [0]))  # fmt: skip


def wrong_recovery(patch):
    """Tokens are given back to their neighbours."""
    right = Gatherer.slots
    patch.setattr(Gatherer, "slots", lambda self, space: self.b.emit(
        torch.ops.aten.roll.default, right(self, space), [1], [1]))  # fmt: skip


def no_mask(patch):
    """Attention forgets its mask."""
    patch.setattr("tokcompile.passes.rules.attention.mask", lambda call, scores: None)


def one_key(patch):
    """A merged token is one key to attention."""
    patch.setattr("tokcompile.passes.rules.attention.log_sizes", lambda *given: None)


def one_of_a_mean(patch):
    """A merged token is one among those of a mean."""
    patch.setattr("tokcompile.passes.rules.reduce.by_share", lambda call, value, *given: value)


def one_of_a_product(patch):
    """A merged token is one among those that a product over tokens adds up."""
    patch.setattr("tokcompile.passes.rules.contract.weigh", lambda call, value, *given: value)
