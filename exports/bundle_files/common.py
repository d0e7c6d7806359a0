"""What run.py and verify.py share: the manifest, the engine to take, and arrays.

`python3 common.py` checks every file of the bundle against manifest.json.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
FORMAT = 1


class BundleError(Exception):
    """Something that the person at the keyboard can mend."""


def read_manifest(root: Path = ROOT) -> dict:
    """manifest.json, once every file that it names is found unchanged."""
    try:
        manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"there is no manifest.json in {root}: copy the whole bundle again") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"manifest.json cannot be read ({error}): copy the whole bundle again") from None
    if manifest.get("format") != FORMAT:
        raise BundleError(f"manifest.json has format {manifest.get('format')!r}; these scripts read format {FORMAT}")
    wrong = [problem for name, entry in manifest["files"].items() if (problem := difference(root / name, name, entry))]
    if wrong:
        raise BundleError("files differ from manifest.json:\n  " + "\n  ".join(wrong) + "\nCopy the bundle again.")
    return manifest


def difference(path: Path, name: str, entry: dict) -> str:
    """What is wrong with one file, or ""."""
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{name} was changed: {size} bytes instead of {entry['bytes']}"
    found = sha256(path)
    return "" if found == entry["sha256"] else f"{name} was changed: sha256 {found[:12]} instead of {entry['sha256'][:12]}"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def choose_engine(manifest: dict, given: str | None, plain: bool) -> Path:
    """The engine asked for, else the one with the plugin, else the plain one; built or not."""
    if given:
        return Path(given)
    names = ["plain"] if plain or "plugin" not in manifest["models"] else ["plugin", "plain"]
    paths = [ROOT / "build" / f"model.{name}.engine" for name in names]
    return next((path for path in paths if path.exists()), paths[0])


def plugin_of(engine: Path) -> Path | None:
    """The library that an engine needs: build.sh wrote it beside the engine, with the checksums."""
    return next((path for path in stamped(engine) if path.suffix == ".so"), None)


def check_engine(engine: Path) -> None:
    """Refuses an engine that is not there, or not made of the files that lie here now."""
    if not engine.is_file():
        raise BundleError(f"there is no engine {engine}: run ./build.sh on this device first")
    for path, wanted in stamped(engine).items():
        if not path.is_file() or sha256(path) != wanted:
            raise BundleError(f"{path.name} is not the one that belongs to {engine.name}: run ./build.sh again")


def stamped(engine: Path) -> dict[Path, str]:
    """{file: sha256} that build.sh wrote in the form of sha256sum; paths count from the bundle's folder."""
    stamp = engine.with_name(engine.name + ".sha256")
    if not stamp.is_file():
        raise BundleError(f"{engine.name} was not finished by build.sh (no {stamp.name}): run ./build.sh again")
    lines = [line.split(None, 1) for line in stamp.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {ROOT / name.strip().lstrip("*"): digest for digest, name in lines}


def load(name: str, dtype: str) -> Any:
    """One golden array; bfloat16, which numpy lacks, is kept as its 16 bits."""
    import numpy as np

    array = np.load(ROOT / name, allow_pickle=False)
    if array.dtype != numpy_dtype(dtype):
        raise BundleError(f"{name} holds {array.dtype}, not {dtype}")
    return np.ascontiguousarray(array)


def numpy_dtype(dtype: str) -> Any:
    import numpy as np

    return np.dtype({"bfloat16": "uint16"}.get(dtype, dtype))


def main_of(run: Callable[[], int | None]) -> int:
    """Runs a script: 0 done, 1 a check failed, 2 with a message for what can be mended."""
    try:
        return run() or 0
    except BundleError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def check() -> None:
    print(f"{len(read_manifest()['files'])} files are as manifest.json says")


if __name__ == "__main__":
    sys.exit(main_of(check))
