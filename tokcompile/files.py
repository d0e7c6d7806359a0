"""Writing files so that nothing half-written is ever found under their name."""

from __future__ import annotations

import os
import shutil
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


@contextmanager
def atomic_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[str]:
    """The same for a folder: what is in the temporary one gets the name `path` once the block has ended well. Folders that
    it is in are created where they are missing.

    Raises: ExportError for a name that is taken, unless it is a folder that may be overwritten.
    """
    path = os.path.abspath(path)
    if os.path.lexists(path) and not (overwrite and os.path.isdir(path) and not os.path.islink(path)):
        raise ExportError(f"{path} is there already\n  what to do: choose another name, or pass overwrite=True for a folder")
    with parents(path), temporary_beside(path) as new:
        yield new


@contextmanager
def parents(path: str | os.PathLike[str]) -> Iterator[None]:
    """For the duration of the block, and after it if it ends well, the folders that `path` is in are there.

    Raises: ExportError where they cannot be created.
    """
    made: list[str] = []
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(folder):
        made.append(folder)
        folder = os.path.dirname(folder)
    try:
        for missing in reversed(made):
            os.makedirs(missing, exist_ok=True)
    except OSError as error:
        raise ExportError(f"cannot write {os.fspath(path)}: {made[0]} cannot be created: {error.strerror}") from error
    try:
        yield
    except BaseException:
        for folder in made:  # the innermost first; one that holds something by now stays
            with suppress(OSError):
                os.rmdir(folder)
        raise


@contextmanager
def temporary_beside(path: str) -> Iterator[str]:
    parent, name = os.path.split(path)
    try:
        temporary = tempfile.mkdtemp(prefix=f".{name}.", dir=parent)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror}; choose another place") from error
    old = os.path.join(temporary, "old")
    new = os.path.join(temporary, name)
    try:
        os.mkdir(new)
        yield new
        if os.path.lexists(path):
            os.rename(path, old)
        try:
            os.rename(new, path)
        except BaseException:
            if os.path.lexists(old):
                os.rename(old, path)
            raise
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
