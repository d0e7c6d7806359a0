"""ONNX Runtime: session options and providers, with the names that each provider gives its options."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tokcompile.errors import ExportError

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "rtx": "NvTensorRTRTXExecutionProvider",
}
PACKAGES = {"cpu": "onnxruntime", "cuda": "onnxruntime-gpu", "tensorrt": "onnxruntime-gpu"}


def session_options(
    provider: str = "cpu",
    *,
    plugin_library: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    device: int = 0,
    cache: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Any, list[tuple[str, dict[str, str]]]]:
    """Session options and providers for onnxruntime.InferenceSession(path, session, providers=providers).

    provider: "cpu", "cuda", "tensorrt" or "rtx"; those on a GPU fall back to CUDA, where there is one, and the CPU.
    plugin_library: libtokcompile_plugins.so, for "tensorrt" alone: other providers run the functions in the file.
    threads: within an op, on the CPU. device: number of the GPU. cache: folder for built engines. options: further
    options of the provider.

    Raises: ExportError where onnxruntime, or the provider in it, is missing, and for options the provider has not.

    Example:
        >>> import tokcompile
        >>> options, providers = tokcompile.session_options("cpu", threads=1)
        >>> providers
        [('CPUExecutionProvider', {})]
    """
    if provider not in PROVIDERS:
        raise ExportError(f"provider={provider!r} is none of {', '.join(PROVIDERS)}")
    ort = import_onnxruntime()
    if plugin_library is not None:
        check_plugin(provider, plugin_library)
    available = ort.get_available_providers()
    if provider == "rtx" and PROVIDERS["rtx"] not in available:
        return rtx_options(ort, provider_options(provider, None, device, cache) | text(options))
    if PROVIDERS[provider] not in available:
        raise ExportError(
            f"this onnxruntime {ort.__version__} has no {PROVIDERS[provider]}, only {', '.join(available)}\n"
            f"  what to do: pip install {PACKAGES[provider]} instead of onnxruntime, on a machine with the GPU"
        )
    session = ort.SessionOptions()
    session.log_severity_level = 3
    if threads is not None:
        session.intra_op_num_threads, session.inter_op_num_threads = threads, 1
    own = {**provider_options(provider, plugin_library, device, cache), **text(options)}
    providers = [(PROVIDERS[provider], own)]
    if provider in ("tensorrt", "rtx") and PROVIDERS["cuda"] in available:
        providers.append((PROVIDERS["cuda"], provider_options("cuda", None, device, None)))
    if provider != "cpu":
        providers.append((PROVIDERS["cpu"], {}))
    return session, providers


def import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(f'onnxruntime is missing: pip install "tokcompile[onnx]" ({error})') from error
    return onnxruntime


def check_plugin(provider: str, library: str | os.PathLike[str]) -> None:
    """Raises: ExportError."""
    if provider != "tensorrt":
        raise ExportError(
            f"plugin_library is for provider='tensorrt': {provider} loads no TensorRT plugins\n"
            "  what to do: leave it out; the functions in the file, or its plain form, do the same work"
        )
    if not os.path.isfile(library):
        raise ExportError(f"plugin_library={os.fspath(library)!r} is not a file: build it with `make plugins`")


def text(options: Mapping[str, Any] | None) -> dict[str, str]:
    return {name: str(value) for name, value in (options or {}).items()}


def rtx_options(ort: Any, own: dict[str, str]) -> tuple[Any, list[tuple[str, dict[str, str]]]]:
    """The RTX provider from its own wheel: it is chosen by device in the session options, not by a list of providers."""
    install = "pip install onnxruntime onnxruntime-ep-nv-tensorrt-rtx-cu13, and not onnxruntime-gpu"
    try:
        import onnxruntime_ep_nv_tensorrt_rtx as wheel  # type: ignore[import-not-found]
    except ImportError as error:
        raise ExportError(f"the RTX provider is missing ({error})\n  what to do: {install}") from error
    name = wheel.get_ep_name()
    if name not in {d.ep_name for d in ort.get_ep_devices()}:
        ort.register_execution_provider_library(name, wheel.get_library_path())
    devices = [d for d in ort.get_ep_devices() if d.ep_name == name]
    number = int(own.pop("device_id", "0"))
    if number >= len(devices):
        raise ExportError(
            f"device={number}, and the RTX provider finds {len(devices)} devices here: it needs an RTX card and its driver"
        )
    session = ort.SessionOptions()
    session.log_severity_level = 3
    session.add_provider_for_devices([devices[number]], own)
    return session, []


def provider_options(
    provider: str, library: str | os.PathLike[str] | None, device: int, cache: str | os.PathLike[str] | None
) -> dict[str, str]:
    """The options that follow from our arguments, under the provider's own names."""
    if provider == "cpu":
        return {}
    made = {"device_id": str(device)}
    if provider == "tensorrt":
        if library is not None:
            made["trt_extra_plugin_lib_paths"] = os.path.abspath(library)
        if cache is not None:
            made |= {"trt_engine_cache_enable": "True", "trt_engine_cache_path": os.fspath(cache)}
    if provider == "rtx" and cache is not None:
        made["nv_runtime_cache_path"] = os.fspath(cache)
    return made
