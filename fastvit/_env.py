"""`fastvit.env()`: versions, instruction sets, GPUs, and which backends are live, or why not and how to get them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
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
        "versions": package to version or None.  "cpu": name, cores, torch's threads, the instruction sets that were
        compiled and are supported, the selected one and why.  "openmp": the extension's runtime and whether it is
        torch's.  "gpus": name and compute capability.  "backends": for each of "cpp", "triton", "cuda_cpp" and
        "reference": live, and if not why not and how to get it.
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
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "compiled_isas": _build_record().get("isas", []) if ext else [],
        "supported_isas": ext.supported_isas() if ext else [],
        **_isa(ext),
    }


def _isa(ext: Any) -> dict[str, str | None]:
    """The instruction set in use and why it is; None where there is none."""
    if ext is None:
        return {"isa": None, "isa_why": "no C++ extension"}
    try:
        isa = ext.isa()
    except RuntimeError as error:  # FASTVIT_CPU_ISA names one that can't be had
        return {"isa": None, "isa_why": str(error)}
    if isa == os.environ.get("FASTVIT_CPU_ISA"):
        why = "FASTVIT_CPU_ISA asks for it"
    elif isa == ext.supported_isas()[-1]:
        why = "the best that this CPU and the build support"
    else:
        why = "set_isa chose it"
    return {"isa": isa, "isa_why": why}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    name = facts.get("model name", platform.machine())
    if not re.search(r"\d", name) and {"cpu family", "model"} <= facts.keys():  # a virtual machine may hide the rest
        name += f" family {facts['cpu family']} model {facts['model']}"
    return name


def _openmp() -> dict[str, Any]:
    ext = extension()
    if ext is None:
        return {"path": None, "shared_with_torch": None}
    # Whoever shares torch's runtime sees torch's thread count change.
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        shared = ext.omp_info()["max_threads"] == threads + 1
    finally:
        torch.set_num_threads(threads)
    return {"path": ext.omp_info()["path"], "shared_with_torch": shared}


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


_REINSTALL = "reinstall from the source folder: pip install --force-reinstall --no-deps ."


def _cpp() -> dict[str, Any]:
    if extension() is not None:
        return _backend(True)
    if missing := _build_record().get("missing"):
        return _backend(False, f"it was not built: the build lacked {missing}", f"install that, then {_REINSTALL}")
    return _backend(False, _import_error(), f"install a C++17 compiler (apt install g++), then {_REINSTALL}")


def _import_error() -> str:
    try:
        importlib.import_module("fastvit._C")
    except ImportError as error:
        return f"fastvit._C can't be imported: {error}"
    return "fastvit._C was not importable when fastvit was first used"


def _triton() -> dict[str, Any]:
    if not has_triton():
        how = 'pip install "triton>=3.6"' if sys.platform == "linux" else "use Linux: Triton has no wheels for others"
        return _backend(False, "triton is not installed", how)
    return _backend(True) if torch.cuda.is_available() else _backend(False, *_no_gpu())


def _no_gpu() -> tuple[str, str]:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is a CPU build", "on a machine with an NVIDIA GPU, install a CUDA build of torch"
    return "torch sees no GPU", "run on a machine with a GPU and a driver for it"


def _cuda_cpp() -> dict[str, Any]:
    ext = extension()
    if ext is None:
        return _backend(False, "the C++ extension is missing", _cpp()["how"])
    if not ext.cuda_compiled():
        why = _build_record().get("why_no_cuda") or "the CUDA sources were not compiled"
        return _backend(False, why, f"put nvcc on PATH, set FASTVIT_CUDA=on and {_REINSTALL}")
    return _backend(True) if torch.cuda.is_available() else _backend(False, *_no_gpu())
