"""The CUDA kernels where they can run: in fastvit._C on a GPU, elsewhere compiled for the host (see host/)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[3]
CSRC = ROOT / "csrc"


@dataclass
class Kernels:
    """The bound functions, and where their tensors are."""

    module: ModuleType
    device: str

    @property
    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0


def build_on_host(folder: Path) -> ModuleType:
    import pybind11

    compiler = os.environ.get("CXX", "g++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler ({compiler[0]})")
    include = [Path(__file__).parent / "host", CSRC, pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wno-unknown-pragmas", *(f"-I{path}" for path in include)]
    cuda = [*CSRC.glob("cuda/*.cu"), *CSRC.glob("cuda/*.cpp")]
    sources = [*cuda, CSRC / "tensor.cpp", Path(__file__).parent / "host" / "module.cpp"]
    assert len(sources) == 6

    def compile_one(source: Path) -> str:
        out = str(folder / f"{source.name}.o")
        subprocess.run([*compiler, *flags, "-x", "c++", "-c", str(source), "-o", out], check=True)
        return out

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / f"cuda_on_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([*compiler, "-shared", *objects, "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location("cuda_on_host", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    from fastvit import _C

    if torch.cuda.is_available() and _C.cuda_compiled():
        return Kernels(_C, "cuda")
    return Kernels(build_on_host(tmp_path_factory.mktemp("cuda_on_host")), "cpu")
