"""Reduced vision-language models that are made once a run."""

import functools

import pytest

import tokcompile
from tests.vlm.models import parts_of, reduced_parts, vlm
from tokcompile.vlm import Generator

COUNT = 32


@functools.cache
def made(name, language=(), vision=(), batch=1, padded=None):
    """(model, inputs, generator). language, vision: items of the arguments of `optimize`, none to leave a part whole."""
    model, inputs = vlm(name, batch)
    parts = reduced_parts(name, batch, padded, **dict(vision)) if vision else parts_of(name, batch, padded)
    options = dict(language) or dict(method="random", budget=1.0)
    prefill = tokcompile.optimize(*parts.language, spans=parts.spans, outputs="reduced", **options)
    return model, inputs, Generator(parts, prefill, max_new_tokens=COUNT)


@pytest.fixture(scope="session")
def generator():
    return made
