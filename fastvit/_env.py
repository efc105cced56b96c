"""`fastvit.env()`: versions, instruction sets, GPUs, and which backends are live, or why not and how to get them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import fastvit
from fastvit.ops._backend import extension, has_triton

_LIBRARIES = ("torch", "triton", "timm", "transformers", "torchvision", "open_clip_torch", "numpy")


def env() -> dict[str, Any]:
    """What fastvit finds on this machine; JSON-serialisable.

    Returns:
        "versions": package to version or None.  "cpu": name, cores, torch's threads, compiled, supported and selected
        instruction sets.  "openmp": the runtime and whether it is torch's.  "gpus": name and compute capability.
        "backends": for each of "cpp", "triton", "cuda_cpp" and "reference": live, why, how (to get it).
    """
    return {
        "versions": {"fastvit": fastvit.__version__, "python": platform.python_version(), **_versions()},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "openmp": _openmp(),
        "gpus": _gpus(),
        "backends": {"cpp": _cpp(), "triton": _triton(), "cuda_cpp": _cuda_cpp(), "reference": _backend(True)},
    }


def _versions() -> dict[str, str | None]:
    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in _LIBRARIES}


def _cpu() -> dict[str, Any]:
    ext = extension()
    return {
        "name": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "isa": ext.isa() if ext else None,
        "supported_isas": ext.supported_isas() if ext else [],
        "FASTVIT_CPU_ISA": os.environ.get("FASTVIT_CPU_ISA"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _openmp() -> dict[str, Any]:
    ext = extension()
    if ext is None:
        return {"path": None, "shared_with_torch": None}
    path = ext.omp_info().get("path")
    torch_folder = str(Path(torch.__file__).parent)
    return {"path": path, "shared_with_torch": bool(path and str(Path(path).resolve()).startswith(torch_folder))}


def _gpus() -> list[dict[str, str]]:
    if not torch.cuda.is_available():
        return []
    return [
        {
            "name": torch.cuda.get_device_name(i),
            "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
        }
        for i in range(torch.cuda.device_count())
    ]


def _backend(live: bool, why: str = "", how: str = "") -> dict[str, Any]:
    return {"live": live, "why": why, "how": how}


def _build_record() -> dict[str, Any]:
    """What setup.py wrote about the build."""
    try:
        return json.loads((Path(__file__).parent / "_build.json").read_text())
    except (OSError, ValueError):
        return {}


def _cpp() -> dict[str, Any]:
    if extension() is not None:
        return _backend(True)
    why = _build_record().get("why_no_extension") or _import_error()
    return _backend(
        False, why, "install a C++17 compiler (apt install g++) and reinstall: pip install --force-reinstall ."
    )


def _import_error() -> str:
    try:
        importlib.import_module("fastvit._C")
    except ImportError as error:
        return f"fastvit._C can't be imported: {error}"
    return "fastvit._C was not importable when fastvit was first used"


def _triton() -> dict[str, Any]:
    if not has_triton():
        how = "pip install triton" if sys.platform == "linux" else "Triton runs on Linux"
        return _backend(False, "triton is not installed", how)
    if not torch.cuda.is_available():
        return _backend(False, *_no_gpu())
    return _backend(True)


def _no_gpu() -> tuple[str, str]:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is a CPU build", "install a CUDA build of torch on a machine with an NVIDIA GPU"
    return "torch sees no GPU", "run on a machine with a GPU and a driver for it"


def _cuda_cpp() -> dict[str, Any]:
    ext = extension()
    if ext is None:
        return _backend(False, "the C++ extension is missing", _cpp()["how"])
    if not ext.cuda_compiled():
        why = _build_record().get("why_no_cuda") or "CUDA sources were not compiled"
        return _backend(False, why, "put nvcc on PATH and reinstall with FASTVIT_CUDA=on")
    if not torch.cuda.is_available():
        return _backend(False, *_no_gpu())
    return _backend(True)
