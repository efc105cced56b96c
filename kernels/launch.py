"""Where every kernel is launched, and for which GPU its tiles are chosen."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

ARCHS = ("sm80", "sm90", "sm100", "gfx942")


class Launch(NamedTuple):
    """One launch that `record` held back."""

    kernel: Any
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


class _Recorder(NamedTuple):
    arch: str
    launches: list[Launch]


_recorder: ContextVar[_Recorder | None] = ContextVar("fastvit_launch_recorder", default=None)


@contextlib.contextmanager
def record(arch: str) -> Iterator[list[Launch]]:
    """Inside the `with` block launchers choose tiles for `arch` and list their launches instead of running them.

    The way to compile, ahead of time and without a GPU, exactly what an operator would run: launchers then take tensors
    on the meta device.
    """
    launches: list[Launch] = []
    token = _recorder.set(_Recorder(arch, launches))
    try:
        yield launches
    finally:
        _recorder.reset(token)


def launch(
    kernel: Any, programs: int, *args: Any, num_warps: int, num_stages: int, descriptors: bool = False, **constants: Any
) -> None:
    """Run `programs` instances of `kernel` on the device of its first argument.

    That is a tensor, or a tuple that begins with one.
    descriptors: the kernel makes TMA descriptors, for which Triton asks for memory.
    """
    recorder = _recorder.get()
    if recorder is not None:
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | constants
        recorder.launches.append(Launch(kernel, arguments, num_warps, num_stages))
        return
    first = (*args, *constants.values())[0]
    device = (first if isinstance(first, Tensor) else first[0]).device
    if descriptors:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*args, num_warps=num_warps, num_stages=num_stages, **constants)


def arch(device: torch.device) -> str:
    """The row of the tile tables that serves `device`."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.arch
    if device.type != "cuda":
        return "sm90"  # the interpreter
    return _arch(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _arch(index: int) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    # 12.x (consumer Blackwell) has neither wgmma nor tcgen05, and Ampere's shared memory.
    return {9: "sm90", 10: "sm100"}.get(torch.cuda.get_device_capability(index)[0], "sm80")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many thread blocks fill `device` once."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of products whose operands are `dtype`: float32 follows torch's own matmul setting."""
    return "ieee" if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"


def rows(t: Tensor) -> Tensor:
    """(..., K) as (M, K) with unit stride in the last dimension, a view wherever one exists."""
    t = t.reshape(t.shape[:-1].numel(), t.shape[-1])
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that products run in: the narrower of the two, so float32 only where both are."""
    return weight.dtype if weight.dtype != torch.float32 else x.dtype
