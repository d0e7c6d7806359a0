"""Writing files so that nothing half-written is ever found under their name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tokcompile.errors import ExportError


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[str]:
    """Gives a temporary name in the same folder and renames it to `path` once the block has ended well.

    Raises: ExportError where the folder does not exist or cannot be written.
    """
    path = os.fspath(path)
    folder, name = os.path.split(os.path.abspath(path))
    if os.path.isdir(path):
        raise ExportError(f"{path} is a folder; give a file name")
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=os.path.splitext(name)[1], dir=folder)
        os.close(handle)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror}; create the folder or choose another place") from error
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~current_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error}") from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
