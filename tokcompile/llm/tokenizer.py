"""Text to token ids and back, by the tokenizer.json of a folder."""

from __future__ import annotations

import os
from typing import Any

from tokcompile.errors import InputError

TOKENIZER = "tokenizer.json"


def read_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The tokenizer of a folder. Raises: InputError."""
    path = os.path.join(folder, TOKENIZER)
    if not os.path.isfile(path):
        raise InputError(
            f"{os.fspath(folder)} has no {TOKENIZER}: pass token ids (--ids), or copy the model's {TOKENIZER} there"
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise InputError(f"text needs the package tokenizers: pip install tokenizers ({error})") from error
    try:
        return Tokenizer.from_file(path)
    except Exception as error:
        raise InputError(f"{path} is no tokenizer: {error}") from error


def encoded(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, those of special tokens that are written out in it among them; none is added."""
    return list(tokenizer.encode(text, add_special_tokens=False).ids)
