"""The int8 form of a float weight: a cache behind the operators, so that the rest of torch sees float parameters only.

An entry belongs to a tensor object and goes with it.  It holds one byte per element and four per row, is made at the
first call, and made anew when the weight has changed: its memory, layout or dtype, its version (every change in place
but those through `.data`), or a hash of 64 elements spread over it (what changes through `.data` usually change).

FSDP2 fills a parameter before each forward, mostly at the address of the last time and without moving its version.  So
a process that has sharded anything keeps no entries, and quantises at every call.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastvit.ops import _backend
from fastvit.reference.int8 import rotation


class _Entry(NamedTuple):
    stamp: tuple[object, ...]
    values: Tensor  # (N, K padded) int8, rotated
    scale: Tensor  # (N,) float32


# Threads share it without a lock: a dictionary's own operations are atomic, entries are never changed, and two threads
# that miss at once make the same entry.
_entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def operand(weight: Tensor, quantize: str | None) -> tuple[Tensor, Tensor | None]:
    """`weight` (N, K) as the C++ kernels take it: itself and None, or int8 rows and their scales."""
    if quantize is None:
        return weight.contiguous(), None
    dense = weight.detach().contiguous()
    if not keeps():
        return _quantized(dense)
    stamp = (
        weight.data_ptr(),
        weight.shape,
        weight.stride(),
        weight.dtype,
        None if weight.is_inference() else weight._version,
        _backend.extension().fingerprint(_backend.view(dense)),  # type: ignore[union-attr]
    )
    entry = _entries.get(weight)
    if entry is None or entry.stamp != stamp:
        # The stamp is older than the values: a change in between is found at the next call.
        entry = _entries[weight] = _Entry(stamp, *_quantized(dense))
    return entry.values, entry.scale


def keeps() -> bool:
    """Are the int8 forms kept from call to call?"""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    # Every class that fully_shard makes is one.
    return fsdp is None or not fsdp.FSDPModule.__subclasses__()


def forget(weight: Tensor) -> None:
    """Free the int8 form of a weight, or have it made anew."""
    _entries.pop(weight, None)


def _quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, k = weight.shape
    # Not inference tensors: the entry outlives the mode.
    with torch.inference_mode(False):
        values = torch.empty(rows, rotation(k)[1], dtype=torch.int8)
        scale = torch.empty(rows)
    view = _backend.view
    _backend.extension().quantize_rows(  # type: ignore[union-attr]
        view(values), view(scale), view(weight), torch.get_num_threads()
    )
    return values, scale
