"""Runs the kernels in a program of their own (driver.cpp): under an emulator, for instruction sets of other machines.

`build` compiles csrc/cpu with the flags of setup.py.  A `Driver` stands in for fastvit._C in tests/csrc/call.py.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, torch.int8: 4}  # csrc/cpu/types.h
NONE, INTEGER, REAL, TEXT, VIEW = range(5)


class Missing(RuntimeError):
    """A tool that the build or the run needs is not installed; the message says how to get it."""


def require(tool: str, package: str) -> None:
    if shutil.which(tool) is None:
        raise Missing(f"{tool} is not installed (Debian, Ubuntu: apt-get install {package})")


@functools.cache
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastvit_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(
    name: str,
    compiler: str,
    *,
    levels: dict[str, list[str]] | None = None,
    flags: Sequence[str] = (),
) -> Path:
    """The driver for what `compiler` compiles for, in build/NAME; only what changed is compiled again.

    levels: instruction sets and their flags, in place of those of setup.py.  flags: further ones for every source.
    """
    import ninja

    setup = setup_py()
    environment = {"CXX": compiler, "FASTVIT_CUDA": "off", "FASTVIT_WERROR": "1", "CXXFLAGS": "", "LDFLAGS": ""}
    before = {key: os.environ.get(key) for key in environment}
    os.environ.update(environment)
    try:
        plan = setup.Plan(levels)
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})

    folder = ROOT / "build" / name
    folder.mkdir(parents=True, exist_ok=True)
    compile_command = setup.quote([*plan.cxx, *plan.flags, *flags, f"-I{setup.CSRC}"])
    # Static: the emulator needs no libraries of the other architecture.
    link_command = setup.quote([*plan.cxx, *(["-fopenmp"] if "-fopenmp" in plan.flags else []), "-static"])
    rules = [
        f"rule cxx\n  command = {compile_command} $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {link_command} $in -o $out -lpthread",
    ]
    objects = []
    for source, suffix, extra in [*plan.cpu_objects(), (HERE / "driver.cpp", "", [])]:
        objects.append(setup.escape(folder / f"{source.name}.{suffix}o"))
        rules.append(f"build {objects[-1]}: cxx {setup.escape(source)}\n  extra = {setup.quote(extra)}")
    target = folder / "driver"
    rules.append(f"build {setup.escape(target)}: link {' '.join(objects)}\ndefault {setup.escape(target)}\n")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of tests may want it, too
        (folder / "build.ninja").write_text("\n".join(rules))
        done = subprocess.run([str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


class Driver:
    """One process that answers requests. It has the functions of fastvit._C that tests/csrc/call.py calls."""

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        env = {**os.environ, **(environment or {})}
        self.process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
        )

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=10)

    def isa(self) -> str:
        return self.request("isa").decode()

    def supported_isas(self) -> list[str]:
        return self.request("supported_isas").decode().split()

    def packed_bytes(self, n: int, k: int) -> int:
        return int(self.request("packed_bytes", n, k))

    def set_isa(self, name: str) -> None:
        self.request("set_isa", name)

    def __getattr__(self, operator: str) -> Callable[..., None]:
        return lambda *arguments: self.call(operator, *arguments)

    def call(self, operator: str, *arguments: Tensor | int | float | None) -> None:
        """Sends the arguments' whole storages, and takes them back as the kernel left them."""
        storages = {}
        for argument in arguments:
            if isinstance(argument, Tensor):
                storage = argument.untyped_storage()
                storages[storage.data_ptr() or id(argument)] = torch.empty(0, dtype=torch.uint8).set_(storage)
        answer = bytearray(self.request(operator, *arguments, storages=storages))
        at = 0
        for data in storages.values():
            if len(data):
                data.copy_(torch.frombuffer(answer, dtype=torch.uint8, count=len(data), offset=at))
            at += len(data)

    def request(self, name: str, *arguments: Any, storages: Mapping[int, Tensor] | None = None) -> bytes:
        arrays = [bytes(data.numpy()) for data in (storages or {}).values()]
        places = list(storages or {})
        message = [_text(name.encode()), _integers(len(arrays)), *map(_text, arrays), _integers(len(arguments))]
        for argument in arguments:
            if argument is None:
                message.append(_integers(NONE))
            elif isinstance(argument, Tensor):
                place = places.index(argument.untyped_storage().data_ptr() or id(argument))
                offset = argument.storage_offset() * argument.element_size()
                head = (VIEW, place, offset, DTYPES[argument.dtype], argument.ndim)
                message.append(_integers(*head, *argument.shape, *argument.stride()))
            elif isinstance(argument, str):
                message += [_integers(TEXT), _text(argument.encode())]
            elif isinstance(argument, float):
                message += [_integers(REAL), struct.pack("<d", argument)]
            else:
                message.append(_integers(INTEGER, argument))
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(b"".join(message))
            stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"{name}: the driver is gone (exit status {self.process.wait()})") from None
        head = stdout.read(16)
        if len(head) < 16:
            raise RuntimeError(f"{name}: the driver died (exit status {self.process.wait()})")
        status, size = struct.unpack("<qq", head)
        answer = stdout.read(size)
        if status != 0:
            raise ValueError(answer.decode())
        return answer


def _integers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def _text(data: bytes) -> bytes:
    return _integers(len(data)) + data
