"""Reduced vision-language models that are made once a run."""

import functools

import pytest

import tokcompile
from tests.vlm.models import vlm
from tokcompile.vlm import Generator, split

COUNT = 32


@functools.cache
def made(name, language=(), vision=(), batch=1, padded=None):
    """(model, inputs, generator). language, vision: items of the arguments of `optimize`, none to leave a part whole."""
    model, inputs = vlm(name, batch)
    parts = split(model, inputs, padded=padded)
    if vision:
        parts = parts.after(tokcompile.optimize(*parts.vision, outputs="reduced", **dict(vision)))
    options = dict(language) or dict(method="random", budget=1.0)
    prefill = tokcompile.optimize(*parts.language, spans=parts.spans, outputs="reduced", **options)
    return model, inputs, Generator(parts, prefill, max_new_tokens=COUNT)


@pytest.fixture(scope="session")
def generator():
    return made
