"""Builds csrc with ninja: per-file instruction-set flags, header dependencies, parallel and incremental.

No torch header is used, so the extension builds in seconds, in an isolated build, for every torch version at once.

Environment variables:
    FASTVIT_CUDA        auto (default: compile csrc/cuda when nvcc is found), on (fail without nvcc) or off.
    FASTVIT_CUDA_ARCHS  compute capabilities to compile for, such as "80;90" (default: those of 80;90;100 nvcc knows).
    FASTVIT_WERROR      1 turns compiler warnings into errors; CI sets it.
    CXX, CXXFLAGS, LDFLAGS, MAX_JOBS   the C++ compiler, further flags, and the number of parallel jobs.

Without a C++ compiler the install still succeeds and says what is missing; `fastvit/_build.json` keeps the outcome,
because pip shows a build's output only with -v.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# The first line of a source that is compiled once per instruction set.
PER_ISA_MARK = "// fastvit: per-isa"

# Every CPU with AVX2 has PREFETCHW, or takes it for a no-op.
AVX2 = ["-mavx2", "-mfma", "-mprfchw"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprfchw"]
AVX512_BF16 = [*AVX512, "-mavx512vnni", "-mavx512bf16"]
# The levels of each architecture, from the plainest to the best, and what compiles them (csrc/cpu/machine.cpp knows
# which a machine has). Every CPU with AVX512-BF16 has VNNI, and every arm64 server with BF16 has I8MM.
ISA_FLAGS: dict[str, dict[str, list[str]]] = {
    "x86_64": {
        "scalar": [],
        "avx2": AVX2,
        "avx_vnni": [*AVX2, "-mavxvnni"],
        "avx512": AVX512,
        "avx512_vnni": [*AVX512, "-mavx512vnni"],
        "avx512_bf16": AVX512_BF16,
        "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
    },
    "arm64": {
        "neon": [],
        "neon_dotprod": ["-march=armv8.2-a+dotprod"],
        "neon_bf16": ["-march=armv8.2-a+dotprod+bf16+i8mm"],
    },
    "other": {"scalar": []},
}
# Taken where the compiler knows them. GCC's scheduler, before registers are allocated, would hoist the loads of eight
# steps of the micro-kernel into registers that it doesn't have.
TUNING_FLAGS = {"arm64": ["-fno-schedule-insns"]}
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
NVCC_FLAGS = ["-std=c++17", "-O3", "--threads=2", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
CUDA_ARCHS = ["80", "90", "100"]
CUDA_MODES = ("auto", "on", "off")


class BuildError(RuntimeError):
    """The user asked for something that can't be built here."""


def say(line: str) -> None:
    print(f"fastvit: {line}", file=sys.stderr, flush=True)


def compiles(command: list[str], code: str = "int main() {}", suffix: str = ".cpp") -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, f"probe{suffix}")
        source.write_text(code)
        full = [*command, "-c", str(source), "-o", str(Path(folder, "probe.o"))]
        return subprocess.run(full, capture_output=True, check=False).returncode == 0


def compiler() -> list[str] | None:
    """The C++ compiler command, or None. g++ comes first: its OpenMP runtime is the one that torch ships on Linux."""
    if command := shlex.split(os.environ.get("CXX", "")):
        return command if shutil.which(command[0]) else None
    return next(([name] for name in ("g++", "c++", "clang++") if shutil.which(name)), None)


def architecture(cxx: list[str]) -> str:
    """A key of ISA_FLAGS: what the compiler compiles for, which need not be the machine it runs on."""
    asked = subprocess.run([*cxx, "-dumpmachine"], capture_output=True, text=True, check=False)
    machine = (asked.stdout.split("-")[0].strip() or platform.machine()).lower()
    return {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "arm64", "arm64": "arm64"}.get(machine, "other")


def why_no_extension() -> str | None:
    """What is missing to build the extension, or None."""
    cxx = compiler()
    if cxx is None:
        wanted = (
            f"CXX={os.environ['CXX']} was not found" if os.environ.get("CXX") else "Debian, Ubuntu: apt install g++"
        )
        return f"a C++17 compiler ({wanted})"
    if not compiles([*cxx, "-std=c++17"], "#include <cstdint>\nint main() {}"):
        return f"a working C++17 compiler ({shlex.join(cxx)} can't compile an empty program)"
    include = sysconfig.get_paths()["include"]
    if not compiles([*cxx, "-std=c++17", f"-I{include}"], "#include <Python.h>\nint main() {}"):
        return "Python's headers (Debian, Ubuntu: apt install python3-dev)"
    return None


def cuda_mode() -> str:
    mode = os.environ.get("FASTVIT_CUDA") or "auto"
    if mode not in CUDA_MODES:
        raise BuildError(f"FASTVIT_CUDA: {mode!r} is not known; accepted: {', '.join(CUDA_MODES)}")
    return mode


def cuda_archs(known: list[str] | None = None) -> list[str]:
    """Compute capabilities to compile for, checked against what nvcc knows where that is given."""
    value = os.environ.get("FASTVIT_CUDA_ARCHS")
    if not value:
        return [arch for arch in CUDA_ARCHS if known is None or arch in known]
    archs = [arch for arch in value.replace(",", ";").split(";") if arch]
    for arch in archs:
        if not arch.rstrip("af").isdigit() or (known is not None and arch.rstrip("af") not in known):
            accepted = f"a list such as 80;90;100, of {' '.join(known)}" if known else "a list such as 80;90;100"
            raise BuildError(
                f"FASTVIT_CUDA_ARCHS: {arch!r} is not a compute capability known here; accepted: {accepted}"
            )
    if not archs:
        raise BuildError(
            f"FASTVIT_CUDA_ARCHS: {value!r} names no compute capability; accepted: a list such as 80;90;100"
        )
    return archs


def find_nvcc() -> tuple[str | None, str]:
    """nvcc, or None and why it is not used. Raises BuildError where FASTVIT_CUDA=on can't be honoured."""
    mode = cuda_mode()
    if mode == "off":
        return None, "FASTVIT_CUDA=off"
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [shutil.which("nvcc"), *(shutil.which("nvcc", path=str(Path(home, "bin"))) for home in homes if home)]
    nvcc = next((path for path in candidates if path), None)
    if nvcc is None:
        reason = "nvcc was not found; put it on PATH or set CUDA_HOME"
    elif not compiles([nvcc, "-std=c++17"], "__global__ void kernel() {}", ".cu"):
        nvcc, reason = None, f"{nvcc} can't compile an empty kernel, perhaps because the C++ compiler is too new for it"
    else:
        return nvcc, ""
    if mode == "on":
        raise BuildError(f"FASTVIT_CUDA=on, but {reason}")
    return None, reason


def cuda_home(nvcc: str) -> Path:
    """Where nvcc keeps its headers and libraries: asked of nvcc itself, because PATH may hold a wrapper."""
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull]
    for line in subprocess.run(command, capture_output=True, text=True, check=False).stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=").strip()).resolve()
    return Path(nvcc).resolve().parent.parent


class NinjaBuild(build_ext):
    """build_ext that writes build.ninja and lets ninja do the work."""

    def run(self) -> None:
        outcome: dict[str, object] = {"extension": False}
        if missing := why_no_extension():
            say(f"no C++ extension was built: missing {missing}.")
            say("the install goes on; fastvit will run on Triton or plain torch, slower on CPU.")
            outcome["missing"] = missing
        else:
            self.plan = Plan()
            super().run()
            outcome = {"extension": True, **self.plan.outcome}
        in_tree = self.editable_mode or self.inplace
        folder = ROOT / "fastvit" if in_tree else Path(self.get_ext_fullpath("fastvit._C")).parent
        folder.mkdir(parents=True, exist_ok=True)
        Path(folder, "_build.json").write_text(json.dumps(outcome, indent=2) + "\n")

    def build_extension(self, ext: Extension) -> None:
        try:
            import ninja
            import pybind11
        except ImportError as error:
            sys.exit(
                f"fastvit: {error.name} is missing; without build isolation: pip install setuptools pybind11 ninja"
            )

        # Not build_temp, which is new for each editable build: objects are kept from one build to the next.
        folder = ROOT / "build" / f"ninja-{sysconfig.get_config_var('EXT_SUFFIX').strip('.')}"
        folder.mkdir(parents=True, exist_ok=True)
        # A path that holds the version instead of the isolated environment's random name, for the same reason.
        headers = folder / f"pybind11-{pybind11.__version__}"
        headers.unlink(missing_ok=True)
        headers.symlink_to(pybind11.get_include(), target_is_directory=True)

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        script = folder / "build.ninja"
        script.write_text(self.plan.script(target, folder, headers))
        command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder)]
        if jobs := os.environ.get("MAX_JOBS"):
            command.append(f"-j{jobs}")
        if subprocess.run(command, check=False).returncode != 0:
            sys.exit("fastvit: csrc did not compile; the compiler's message is above (pip shows it with -v)")


class Plan:
    """What is compiled with which flags on this machine; `levels` replaces those of ISA_FLAGS."""

    def __init__(self, levels: dict[str, list[str]] | None = None) -> None:
        cxx = compiler()
        assert cxx is not None
        self.cxx = cxx
        werror = os.environ.get("FASTVIT_WERROR") == "1"
        self.flags = [*CXX_FLAGS, *(["-Werror"] if werror else [])]
        self.link = ["-shared"] if sys.platform != "darwin" else ["-bundle", "-undefined", "dynamic_lookup"]
        if compiles([*cxx, "-fopenmp"], "#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }"):
            self.flags.append("-fopenmp")
            self.link.append("-fopenmp")
        else:
            say("the compiler has no OpenMP: the C++ kernels will run on one thread")
            self.flags.append("-Wno-unknown-pragmas")

        machine = architecture(cxx)
        self.flags += [flag for flag in TUNING_FLAGS.get(machine, []) if compiles([*cxx, "-Werror", flag])]
        levels = levels or ISA_FLAGS[machine]
        self.isa_flags = {isa: extra for isa, extra in levels.items() if not extra or compiles([*cxx, *extra])}
        if left_out := [isa for isa in levels if isa not in self.isa_flags]:
            say(f"the compiler lacks {', '.join(left_out)}: these levels are left out")
        self.flags.append(f"-DFASTVIT_LEVELS(X)={' '.join(f'X({isa})' for isa in self.isa_flags)}")

        self.nvcc, why_no_cuda = find_nvcc()
        self.archs: list[str] = []
        self.cuda_flags: list[str] = []  # of the few C++ sources that know of CUDA
        if self.nvcc is None:
            say(f"csrc/cuda is left out: {why_no_cuda} (Triton serves NVIDIA GPUs)")
        else:
            listing = subprocess.run([self.nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
            self.archs = cuda_archs([line.removeprefix("compute_") for line in listing.split()])
            home = cuda_home(self.nvcc)
            folders = [home / "lib64", home / "lib", home / f"targets/{platform.machine()}-linux/lib"]
            library = next((path for folder in folders if (path := folder / "libcudart_static.a").is_file()), None)
            if library is None:
                raise BuildError(f"libcudart_static.a was not found under {home}; FASTVIT_CUDA=off builds without CUDA")
            self.cuda_flags = ["-DFASTVIT_WITH_CUDA=1", "-isystem", str(home / "include")]
            self.link += [str(library), "-lrt", "-lpthread"]
            # PTX of the last one lets newer GPUs compile it when it is first loaded.
            gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
            gencode.append(f"-gencode=arch=compute_{self.archs[-1]},code=compute_{self.archs[-1]}")
            self.nvcc_flags = [*NVCC_FLAGS, *gencode]
            if werror:
                self.nvcc_flags += ["-Werror=all-warnings", "-Xcompiler=-Werror"]
        if sys.platform.startswith("linux"):
            self.link.append("-ldl")
        self.flags += shlex.split(os.environ.get("CXXFLAGS", ""))
        self.link += shlex.split(os.environ.get("LDFLAGS", ""))
        self.outcome = {
            "compiler": shlex.join(cxx),
            "isas": list(self.isa_flags),
            "openmp": "-fopenmp" in self.flags,
            "cuda_archs": self.archs,
            "why_no_cuda": why_no_cuda or None,
        }

    def cpu_objects(self) -> Iterator[tuple[Path, str, list[str]]]:
        """What csrc/cpu is compiled to: source, suffix of the object's name, further flags."""
        for source in sorted(CSRC.glob("cpu/*.cpp")):
            if source.read_text(encoding="utf-8").startswith(PER_ISA_MARK):
                for isa, extra in self.isa_flags.items():
                    yield source, f"{isa}.", [f"-DFASTVIT_ISA={isa}", *extra]
            else:
                yield source, "", []

    def script(self, target: Path, folder: Path, headers: Path) -> str:
        """build.ninja. -MMD leaves system headers out: only csrc's own headers trigger a rebuild."""
        include = [f"-I{CSRC}", "-isystem", str(headers), "-isystem", sysconfig.get_paths()["include"]]
        rules = [
            "ninja_required_version = 1.8",
            f"rule cxx\n  command = {quote([*self.cxx, *self.flags, *include])} $extra -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = c++ $in $extra",
            f"rule link\n  command = {quote(self.cxx)} $in -o $out {quote(self.link)}\n  description = link $out",
        ]
        if self.nvcc is not None:
            command = quote([self.nvcc, *self.nvcc_flags, f"-I{CSRC}"])
            rules.append(f"rule nvcc\n  command = {command} $extra -MMD -MF $out.d -c $in -o $out")
            rules.append("  depfile = $out.d\n  deps = gcc\n  description = nvcc $in")

        objects: list[str] = []

        def compile_edge(rule: str, source: Path, suffix: str = "", extra: list[str] | None = None) -> None:
            objects.append(escape(folder / ".".join([*source.relative_to(CSRC).parts, f"{suffix}o"])))
            rules.append(f"build {objects[-1]}: {rule} {escape(source)}\n  extra = {quote(extra or [])}")

        for source, suffix, extra in self.cpu_objects():
            compile_edge("cxx", source, suffix, extra)
        if self.nvcc is not None:
            for source in sorted(CSRC.glob("cuda/*.cu")):
                compile_edge("nvcc", source)
            for source in sorted(CSRC.glob("cuda/*.cpp")):
                compile_edge("cxx", source, extra=self.cuda_flags)
        for source in sorted(CSRC.glob("*.cpp")):
            compile_edge("cxx", source, extra=self.cuda_flags)
        rules.append(f"build {escape(target)}: link {' '.join(objects)}\ndefault {escape(target)}\n")
        return "\n".join(rules)


def quote(words: list[str]) -> str:
    """A shell command inside a ninja rule."""
    return shlex.join(words).replace("$", "$$")


def escape(path: Path) -> str:
    """A path inside a ninja build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


if __name__ == "__main__":
    try:
        # A bad setting stops the install before anything is compiled.
        cuda_mode(), cuda_archs()
        setup(
            ext_modules=[Extension("fastvit._C", sources=[])],
            cmdclass={"build_ext": NinjaBuild},
            packages=[*find_packages(include=["fastvit", "fastvit.*"]), "fastvit.kernels"],
            package_dir={"fastvit.kernels": "kernels"},
            package_data={"fastvit.kernels": ["choices.json"]},
        )
    except BuildError as error:
        sys.exit(f"fastvit: {error}")
