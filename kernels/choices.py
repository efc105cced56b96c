"""Which schedule runs a product: what `python -m benchmarks.tune` measured on a GPU, kept as data in choices.json.

    {"sm90": {"norm_linear bfloat16 layer gelu n=3072 k=768": {"16": "persistent", "13": "folded"}}}

The inner keys are buckets of rows: the number of bits of M.  What nobody has measured is left to the kernel's own rule.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path

import torch

PATH = Path(__file__).with_name("choices.json")

# A measurement speaks for the buckets beside its own, too.
_REACH = 1

_forced: ContextVar[str | None] = ContextVar("fastvit_schedule", default=None)


@contextlib.contextmanager
def force(schedule: str) -> Iterator[None]:
    """Inside the `with` block every product that can runs by `schedule`: to measure it, or to test it."""
    token = _forced.set(schedule)
    try:
        yield
    finally:
        _forced.reset(token)


def key(operator: str, dtype: torch.dtype, epilogue: str, n: int, k: int) -> str:
    return f"{operator} {str(dtype).removeprefix('torch.')} {epilogue} n={n} k={k}"


def bucket(m: int) -> int:
    return m.bit_length()


@functools.cache
def table() -> dict[str, dict[str, dict[str, str]]]:
    return json.loads(PATH.read_text())


def choose(arch: str, name: str, m: int, able: Mapping[str, bool]) -> str | None:
    """The schedule that was the fastest for product `name` (see `key`) of about `m` rows.

    None where none is known, or the one that is can't run it: `able` says of each schedule whether it can.
    """
    forced = _forced.get()
    if forced is not None and able.get(forced, False):
        return forced
    measured = table().get(arch, {}).get(name)
    if not measured:
        return None
    nearest = min(measured, key=lambda bits: (abs(int(bits) - bucket(m)), int(bits)))
    if abs(int(nearest) - bucket(m)) > _REACH or not able.get(measured[nearest], False):
        return None
    return measured[nearest]
