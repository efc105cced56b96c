"""The int8 form of a float weight: a cache behind the operators, so that the rest of torch sees float parameters only.

An entry belongs to a tensor object and goes with it.  It holds one byte per element (of a patch embedding two: as they
are, and as products read them) and four per row, is made at the first call, and made anew when the weight has changed:
its memory, layout or dtype, its version (every change in place but those through `.data`), or a hash of 64 elements
spread over it (what changes through `.data` usually change).

FSDP2 fills a parameter before each forward, mostly at the address of the last time and without moving its version.  So
a process that has sharded anything keeps no entries, and quantises at every call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastvit.ops import _backend
from fastvit.reference.int8 import patch_weight, rotation


class _Entry(NamedTuple):
    stamp: tuple[object, ...]
    form: tuple[Tensor, ...]


# Threads share it without a lock: a dictionary's own operations are atomic, entries are never changed, and two threads
# that miss at once make the same entry.
_entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def operand(weight: Tensor, quantize: str | None) -> tuple[Tensor, Tensor | None]:
    """`weight` (N, K) as the C++ kernels take it: itself and None; or (N, K padded) int8, rotated, and scales (N,)."""
    if quantize is None:
        return weight.contiguous(), None
    values, scale = _form(weight, _quantized)
    return values, scale


def patch_operand(
    weight: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`weight` (D, C, P1, P2) for patches of bytes less 128: as `fastvit.reference.int8.patch_weight` says, and packed.

    Packed, because the product of one image is short.
    """
    # Lists, where the dispatcher made the call.
    mean, std = [n if n is None else tuple(n) for n in (mean, std)]
    isa = _backend.extension().isa()
    values, scale, shift, packed = _form(weight, lambda dense: _for_patches(dense, mean, std), mean, std, isa)
    return values, scale, shift, packed


def _form(weight: Tensor, make: Callable[[Tensor], tuple[Tensor, ...]], *settings: object) -> tuple[Tensor, ...]:
    """What `make` makes of a contiguous `weight`, kept as long as nothing of it and no setting changes."""
    if not keeps():
        return make(weight.detach().contiguous())
    stamp = (
        settings,
        None if weight.is_inference() else weight._version,
        _backend.extension().fingerprint(weight),
    )
    entry = _entries.get(weight)
    if entry is None or entry.stamp != stamp:
        # The stamp is older than the values: a change in between is found at the next call.
        entry = _entries[weight] = _Entry(stamp, make(weight.detach().contiguous()))
    return entry.form


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
    _backend.extension().quantize_rows(values, scale, weight, torch.get_num_threads())
    return values, scale


def _for_patches(weight: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> tuple[Tensor, ...]:
    extension = _backend.extension()
    with torch.inference_mode(False), torch.no_grad():
        values, scale, shift = patch_weight(weight, mean, std)
        rows = values.flatten(1)
        packed = torch.empty(extension.packed_bytes(*rows.shape), dtype=torch.int8)
    extension.pack_weight(packed, rows)
    return values, scale, shift, packed
