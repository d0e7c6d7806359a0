"""Generators that are made once a run."""

import functools

import pytest
import torch

import tokcompile
from tests.conftest import build
from tests.test_language import SPAN
from tokcompile.llm import Generator, Prefill

COUNT = 32


@functools.cache
def made(name, method="dart", budget=None, batch=1, padded=False, spans=(SPAN,), schedule=()):
    """(model, prefill inputs, generator) of a decoder whose span of 25 tokens becomes 11 at layer 2, unless said otherwise."""
    model, _, kwargs = build(name, batch)
    inputs = {"inputs_embeds": kwargs["inputs_embeds"]}
    if padded:
        inputs["attention_mask"] = torch.ones(batch, 40, dtype=torch.long)
        inputs["attention_mask"][:, :4] = 0
    budget = tokcompile.Schedule(dict(schedule)) if schedule else budget or tokcompile.Tokens(11)
    prefill = tokcompile.optimize(
        Prefill(model), kwargs=inputs, method=method, budget=budget, spans=list(spans), outputs="reduced"
    )
    return model, inputs, Generator(prefill, model, max_new_tokens=COUNT)


@pytest.fixture(scope="session")
def generator():
    return made
