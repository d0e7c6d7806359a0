"""Which of several equal forms of an operation is used: data, one row per target.

The forms give the same tokens; they differ in what a runtime takes and in speed (measured in docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Forms:
    """top_k: "key" (unique integer keys: stable under any top-k) or "native" (the runtime breaks ties by lower index).
    gather: "flat" (one index_select over B*n rows) or "elements" (gather with an expanded index).
    merge: "rows" (touch only the r merged rows, by index_add) or "onehot" (a matmul with a one-hot matrix).
    """

    top_k: str = "key"
    gather: str = "flat"
    merge: str = "rows"


FORMS = {
    "torch": Forms(),
    "onnxruntime": Forms(top_k="native"),
    "tensorrt": Forms(top_k="native", merge="onehot"),
}

_current = FORMS["torch"]


def current_forms() -> Forms:
    if _current is FORMS["torch"] and torch.onnx.is_in_onnx_export():  # not ours: one of the user's, to whom keys are no ONNX
        return FORMS["onnxruntime"]
    return _current


@contextmanager
def use_forms(forms: Forms) -> Iterator[None]:
    """Traces what is traced inside with these forms."""
    global _current
    before, _current = _current, forms
    try:
        yield
    finally:
        _current = before
