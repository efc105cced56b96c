"""What every shipped Triton kernel costs a GPU that is not here: registers, shared memory, spills, tensor cores.

    python -m benchmarks.resources [--arch sm90 ...] [--only TEXT] [--json]

compiles, ahead of time, what the launchers of `fastvit.kernels` would run on the shapes of real models, prints a table
and writes it to benchmarks/results/resources.md.  Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    sys.exit("benchmarks.resources compiles kernels: unset TRITON_INTERPRET")

import triton
from fastvit.kernels.launch import ARCHS, Launch, record
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.resource_cases import TYPES, Case, cases

RESULTS = Path(__file__).with_name("results") / "resources.md"

_TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# Bytes of shared memory that one block may ask for.
SHARED_LIMIT = {"sm80": 163 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024, "gfx942": 64 * 1024}

# Tensor-core instructions, by the name under which the table counts them.
_PRODUCTS = {"mma": r"\bHMMA", "wgmma": r"\bHGMMA", "tcgen05": r"\bUTC\w*MMA", "mfma": r"\bv_s?mfma"}
# What shows that TMA loads the tiles, and that warps are specialised: registers moved from loaders to the others.
_SPECIALISED = {"tma": r"\bUTMALDG", "setmaxreg": r"\bUSETMAXREG"}


@dataclass
class Resources:
    """One compiled kernel."""

    operator: str
    label: str
    dtype: str
    arch: str
    kernel: str
    config: str
    warps: int
    stages: int
    registers: int
    shared: int
    spilled: int  # instructions that touch the stack; on AMD, registers spilled and bytes of scratch
    instructions: int
    mma: int = 0
    wgmma: int = 0
    tcgen05: int = 0
    mfma: int = 0
    tma: int = 0
    setmaxreg: int = 0


def specialise(launch: Launch) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Signature, constants and attributes as Triton's own launch finds them, for pointers aligned to 16 bytes."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def find(value: Any, at: tuple[int, ...], constant: bool = False) -> Any:
        """The type of one argument, or the types of a tuple's."""
        if isinstance(value, tuple) and not constant:
            types = [find(inner, (*at, i)) for i, inner in enumerate(value)]
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        if constant or value is None or (isinstance(value, int) and value == 1):
            constants[at] = value
            return "constexpr"
        if isinstance(value, Tensor):
            attributes[at] = [["tt.divisibility", 16]]
            return "*" + TYPES[value.dtype]
        if isinstance(value, int):
            if value % 16 == 0:
                attributes[at] = [["tt.divisibility", 16]]
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        return "fp32"

    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        signature[parameter.name] = find(value, (parameter.num,), parameter.is_constexpr)
    return signature, constants, attributes


def compile_launch(launch: Launch, arch: str) -> Any:
    """What Triton's own launch would compile on `arch`."""
    signature, constants, attributes = specialise(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=_TARGETS[arch], options=options)


def measure(case: Case, launch: Launch, arch: str) -> Resources:
    """Compile one launch and read its machine code.  Raises what the compiler raises."""
    compiled = compile_launch(launch, arch)
    read = _read_amd if arch.startswith("gfx") else _read_nvidia
    registers, spilled, code = read(compiled)
    constants = {p.name: launch.arguments[p.name] for p in launch.kernel.params if p.is_constexpr}
    for name, value in list(constants.items()):
        if is_dataclass(value):
            constants = asdict(value) | constants
            del constants[name]
    config = " ".join(f"{name}={value}" for name, value in constants.items())
    return Resources(
        operator=case.operator,
        label=case.label,
        dtype=TYPES[case.dtype],
        arch=arch,
        kernel=launch.kernel.__name__,
        config=config,
        warps=launch.num_warps,
        stages=launch.num_stages,
        registers=registers,
        shared=compiled.metadata.shared,
        spilled=spilled,
        instructions=len(re.findall(r"/\*[0-9a-f]{4,}\*/", code)) or len(re.findall(r"^\t[vsdgb]\w+_", code, re.M)),
        **{name: len(re.findall(pattern, code)) for name, pattern in (_PRODUCTS | _SPECIALISED).items()},
    )


def _tool(name: str) -> str:
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(bundled) if bundled.exists() else shutil.which(name)
    if found is None:
        sys.exit(f"benchmarks.resources needs {name}: neither in triton's wheel nor on PATH (CUDA toolkit)")
    return found


def _read_nvidia(compiled: Any) -> tuple[int, int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([_tool("cuobjdump"), "--dump-resource-usage", file.name], text=True)
        code = subprocess.run(
            [_tool("nvdisasm"), "-ndf", "-c", file.name],
            capture_output=True,  # it warns of its own format
            text=True,
            check=True,
        ).stdout
    match = re.search(r"REG:(\d+)", usage)
    assert match is not None, usage
    return int(match[1]), len(re.findall(r"\b(?:LDL|STL)\b", code)), code


def _read_amd(compiled: Any) -> tuple[int, int, str]:
    code = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", code)
        assert match is not None, name
        return int(match[1])

    return field("vgpr_count"), field("vgpr_spill_count") + field("private_segment_fixed_size"), code


def _work(archs: tuple[str, ...], only: str) -> list[tuple[str, int, int]]:
    """(arch, case, launch) of every kernel to compile, each distinct one once."""
    seen = set()
    work = []
    for arch in archs:
        for i, case in enumerate(cases()):
            if arch not in case.archs or only not in f"{case.operator} {case.label}":
                continue
            with record(arch) as launches:
                case.call()
            for j, launch in enumerate(launches):
                options = (launch.num_warps, launch.num_stages)
                key = repr((arch, launch.kernel.__module__, launch.kernel.__name__, options, specialise(launch)))
                if key not in seen:
                    seen.add(key)
                    work.append((arch, i, j))
    return work


def _measure_one(item: tuple[str, int, int]) -> Resources | str:
    arch, i, j = item
    case = list(cases())[i]
    with record(arch) as launches:
        case.call()
    try:
        return measure(case, launches[j], arch)
    except Exception as error:  # the table shows every kernel, whatever happened to one
        return f"{arch} {case.operator} ({case.label}) {launches[j].kernel.__name__}: {type(error).__name__}: {error}"


def collect(
    archs: tuple[str, ...] = ARCHS, only: str = "", jobs: int | None = None
) -> tuple[list[Resources], list[str]]:
    """Compile everything: the kernels' resources, and what failed to compile."""
    with ProcessPoolExecutor(jobs or os.cpu_count()) as pool:
        done = list(pool.map(_measure_one, _work(archs, only)))
    return [d for d in done if isinstance(d, Resources)], [d for d in done if isinstance(d, str)]


def table(resources: list[Resources]) -> str:
    """Markdown."""
    columns = ("arch", "operator", "case", "dtype", "kernel", "configuration", "warps", "stages", "registers")
    columns += ("shared KB", "spilled", "instructions", "products")
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for r in resources:
        counted = (*_PRODUCTS, *_SPECIALISED)
        products = ", ".join(f"{getattr(r, name)} {name}" for name in counted if getattr(r, name)) or "none"
        cells = (r.arch, r.operator, r.label, r.dtype, r.kernel, r.config, r.warps, r.stages, r.registers)
        cells += (f"{r.shared / 1024:.1f}", r.spilled, r.instructions, products)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=ARCHS, help="may be repeated; default: all")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only cases whose name contains TEXT; writes no file"
    )
    parser.add_argument("--json", action="store_true", help="print JSON; writes no file")
    arguments = parser.parse_args()
    resources, failures = collect(tuple(arguments.arch or ARCHS), arguments.only)
    if arguments.json:
        print(json.dumps({"resources": [asdict(r) for r in resources], "failures": failures}))
        return 0
    print(table(resources))
    for failure in failures:
        print(failure, file=sys.stderr)
    if not arguments.only and not arguments.arch:
        RESULTS.parent.mkdir(exist_ok=True)
        heading = (
            f"# Resources of the Triton kernels\n\nTriton {triton.__version__}; `python -m benchmarks.resources`.\n\n"
        )
        RESULTS.write_text(heading + table(resources))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
