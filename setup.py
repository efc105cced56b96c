"""Builds csrc with ninja: per-file instruction-set flags, header dependencies, parallel and incremental.

No torch header is used, so the extension builds in seconds, in an isolated build, for every torch version at once.

Environment variables:
    FASTVIT_CUDA        auto (default: compile csrc/cuda when nvcc is found), on (fail without nvcc) or off.
    FASTVIT_CUDA_ARCHS  compute capabilities to compile for, such as "80;90" (default "80;90;100").
    FASTVIT_WERROR      1 turns compiler warnings into errors; CI sets it.
    CXX, MAX_JOBS       the C++ compiler and the number of parallel jobs.

Without a C++ compiler the install still succeeds, says what is missing, and fastvit runs on Triton or plain torch.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
PER_ISA_MARK = "// fastvit: per-isa"

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
ISA_FLAGS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
}
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
]
NVCC_FLAGS = ["-std=c++17", "-O3", "--threads=2", "-Xcompiler=-fPIC,-fvisibility=hidden"]


class BuildError(RuntimeError):
    """The user asked for something that this machine can't build."""


def say(line: str) -> None:
    print(f"fastvit: {line}", file=sys.stderr, flush=True)


def compiler() -> list[str] | None:
    """The C++ compiler command, or None."""
    command = os.environ.get("CXX", "").split() or ["c++"]
    for candidate in (command, ["g++"], ["clang++"]):
        if shutil.which(candidate[0]):
            return candidate
    return None


def compiles(cxx: list[str], flags: list[str], code: str = "int main() {}") -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(code)
        command = [*cxx, *flags, "-c", str(source), "-o", str(Path(folder, "probe.o"))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def nvcc() -> str | None:
    """The CUDA compiler to use, or None; raises BuildError where FASTVIT_CUDA can't be honoured."""
    mode = os.environ.get("FASTVIT_CUDA", "auto")
    if mode not in ("auto", "on", "off"):
        raise BuildError(f"FASTVIT_CUDA: {mode!r} is not known; accepted: auto, on, off")
    if mode == "off" or not list(CSRC.glob("cuda/*.cu")):
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = shutil.which("nvcc") or next(
        (path for home in homes if home and (path := shutil.which("nvcc", path=str(Path(home, "bin"))))), None
    )
    if found is None and mode == "on":
        raise BuildError("FASTVIT_CUDA=on, but nvcc was not found; put it on PATH or set CUDA_HOME")
    if found is None:
        say("nvcc was not found: the CUDA C++ kernels are left out (Triton serves NVIDIA GPUs)")
    return found


def cuda_home(nvcc_path: str) -> Path:
    """Where nvcc keeps its headers and libraries: asked of nvcc itself, because PATH may hold a wrapper."""
    listing = subprocess.run(
        [nvcc_path, "--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull], capture_output=True, text=True, check=False
    )
    for line in listing.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line[len("#$ TOP=") :].strip()).resolve()
    return Path(nvcc_path).resolve().parent.parent


def cuda_archs() -> list[str]:
    archs = os.environ.get("FASTVIT_CUDA_ARCHS", "80;90;100").replace(",", ";").split(";")
    for arch in archs:
        if not arch.rstrip("af").isdigit():
            raise BuildError(f"FASTVIT_CUDA_ARCHS: {arch!r} is not a compute capability; accepted: such as 80;90;100")
    return archs


def why_not() -> str | None:
    """What is missing to build the extension, or None."""
    cxx = compiler()
    if cxx is None:
        return "a C++17 compiler (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++)"
    if not compiles(cxx, ["-std=c++17"], "#include <cstdint>\nint main() {}"):
        return f"a working C++17 compiler ({' '.join(cxx)} fails on an empty program)"
    include = sysconfig.get_paths()["include"]
    if not compiles(cxx, ["-std=c++17", f"-I{include}"], "#include <Python.h>\nint main() {}"):
        return "Python's headers (Debian, Ubuntu: apt install python3-dev)"
    return None


class NinjaBuild(build_ext):
    """build_ext that writes build.ninja and lets ninja do the work."""

    def run(self) -> None:
        if missing := why_not():
            say(f"no C++ extension was built: missing {missing}.")
            say("the install goes on; fastvit will run on Triton or plain torch, slower on CPU.")
            return
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11

        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        script = build_dir / "build.ninja"
        script.write_text(ninja_script(target, build_dir, pybind11.get_include()))
        command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(build_dir), "-f", str(script)]
        if jobs := os.environ.get("MAX_JOBS"):
            command.append(f"-j{int(jobs)}")
        subprocess.run(command, check=True)


def ninja_script(target: Path, build_dir: Path, pybind11_include: str) -> str:
    cxx = compiler()
    assert cxx is not None
    flags = [
        *CXX_FLAGS,
        f"-I{CSRC}",
        f"-isystem {pybind11_include}",
        f"-isystem {sysconfig.get_paths()['include']}",
    ]
    link = ["-shared"] if sys.platform != "darwin" else ["-bundle", "-undefined dynamic_lookup"]
    if compiles(cxx, ["-fopenmp"], "#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }"):
        flags.append("-fopenmp")
        link.append("-fopenmp")
    else:
        say("the compiler has no OpenMP: the C++ kernels will run on one thread")
        flags.append("-Wno-unknown-pragmas")
    if os.environ.get("FASTVIT_WERROR") == "1":
        flags.append("-Werror")

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas = [isa for isa, extra in ISA_FLAGS.items() if isa == "scalar" or (x86 and compiles(cxx, extra))]
    if x86 and len(isas) < len(ISA_FLAGS):
        say(f"the compiler lacks {', '.join(i for i in ISA_FLAGS if i not in isas)}: these levels are left out")
    flags += [f"-DFASTVIT_HAVE_{isa.upper()}=1" for isa in isas]

    objects: list[str] = []
    edges: list[str] = []

    def compile_edge(rule: str, source: Path, suffix: str = "", extra: str = "") -> None:
        out = build_dir / f"{source.relative_to(CSRC).as_posix().replace('/', '.')}{suffix}.o"
        edges.append(f"build {escape(out)}: {rule} {escape(source)}\n  extra = {extra}")
        objects.append(escape(out))

    for source in sorted(CSRC.glob("cpu/*.cpp")):
        if source.read_text().startswith(PER_ISA_MARK):
            for isa in isas:
                compile_edge("cxx", source, f".{isa}", " ".join([f"-DFASTVIT_ISA={isa}", *ISA_FLAGS[isa]]))
        else:
            compile_edge("cxx", source)

    nvcc_path = nvcc()
    cuda = ""
    if nvcc_path is not None:
        home, archs = cuda_home(nvcc_path), cuda_archs()
        gencode = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
        # PTX of the last one lets newer GPUs compile it when it is first loaded.
        gencode += f" -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"
        flags += ["-DFASTVIT_WITH_CUDA=1", f"-isystem {home / 'include'}"]
        libraries = next((d for d in (home / "lib64", home / "lib", home / "targets/x86_64-linux/lib") if d.is_dir()), home)
        link += [f"-L{libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        for source in sorted(CSRC.glob("cuda/*.cu")):
            compile_edge("nvcc", source)
        for source in sorted(CSRC.glob("cuda/*.cpp")):
            compile_edge("cxx", source)
        cuda = (
            f"rule nvcc\n  command = {nvcc_path} {' '.join(NVCC_FLAGS)} {gencode} -I{CSRC} $extra "
            "-MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n  description = nvcc $in\n"
        )
    compile_edge("cxx", CSRC / "bindings.cpp")

    return (
        "ninja_required_version = 1.8\n"
        f"rule cxx\n  command = {' '.join(cxx)} {' '.join(flags)} $extra -MD -MF $out.d -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc\n  description = c++ $in $extra\n"
        f"{cuda}"
        f"rule link\n  command = {' '.join(cxx)} $in -o $out {' '.join(link)}\n  description = link $out\n"
        + "\n".join(edges)
        + f"\nbuild {escape(target)}: link {' '.join(objects)}\n"
        + f"default {escape(target)}\n"
    )


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


try:
    nvcc()  # a bad FASTVIT_CUDA stops the install before anything is compiled
    cuda_archs()
except BuildError as error:
    sys.exit(f"fastvit: {error}")

setup(ext_modules=[Extension("fastvit._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
