"""Saved: the program in a `.pt2` file, and what is wrong with a file that holds none."""

from __future__ import annotations

import logging
import os
import zipfile
from typing import Any

import torch
from torch.export import ExportedProgram

from tokcompile.errors import ExportError, first_line


def load_program(path: str, extra_files: dict[str, Any] | None = None) -> ExportedProgram:
    """Reads a `.pt2` file. Raises: ExportError that says what is wrong with it."""
    if not os.path.exists(path):
        raise ExportError(f"no such file: {path}")
    if not zipfile.is_zipfile(path):
        raise ExportError(f"{path} is not a torch.export archive (.pt2)")
    names: list[str] = []
    reasons: list[Exception] = []

    def hold(record: logging.LogRecord) -> bool:
        """Takes what torch logs with a traceback: the error that it raises after says no more than to look above."""
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        reasons.extend([error] if isinstance(error, Exception) else [])
        return error is None

    log = logging.getLogger("torch.export")
    log.addFilter(hold)
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not look at the checksums, and would give other weights
            names, damaged = archive.namelist(), archive.testzip()
        if damaged is None:
            return torch.export.load(path, extra_files=extra_files)
    except Exception as error:
        written = any(name == "version" or name.endswith("archive_format") for name in names)
        reason = first_line(next(iter(reasons), error)) if written or not names else "torch.export.save did not write it"
        raise ExportError(f"{path} cannot be read as a torch.export archive: {reason}") from error
    finally:
        log.removeFilter(hold)
    raise ExportError(f"{path} is damaged: {damaged} in it does not have its checksum\n  what to do: copy or save it again")
