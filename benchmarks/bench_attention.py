"""attention against scaled_dot_product_attention, from packed qkv to (B, N, C), layout changes included."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import re
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import VIT_B, Case, Width, nbytes, run_in_pytest, tensor
from fastvit.ops import attention

# (tokens, head dim): ViT-B/16 at 224 and 384 pixels and DINOv2 at 518; heads of ViT-B, SigLIP so400m and ViT-H.
NAMES = tuple((tokens, head_dim) for tokens in (197, 577, 1370) for head_dim in (64, 72, 80))
_HEADS = {64: 12, 72: 16, 80: 16}
_PATIENCE = 300.0


def eager(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def fused(qkv: Tensor) -> Tensor:
    return attention(*qkv.unbind(2))


def case(
    name: int | tuple[int, int], dtype: torch.dtype, batch: int, device: str = "cpu", width: Width = VIT_B
) -> Case:
    """name: tokens, or (tokens, head dim); tokens alone take the heads of `width`."""
    if isinstance(name, tuple):
        tokens, head_dim = name
        heads = _HEADS[head_dim]
    else:
        tokens, heads, head_dim = name, width.num_heads, width.dim // width.num_heads
    qkv = tensor(batch, tokens, 3, heads, head_dim, dtype=dtype, device=device, seed=0)
    # The layout that torch likes best, made for nothing and left for nothing.
    split = [t.contiguous() for t in qkv.permute(2, 0, 3, 1, 4)]
    return Case(
        "attention",
        f"{heads} heads of {head_dim}, {tokens} tokens, batch {batch}",
        eager,
        fused,
        (qkv,),
        flops=4 * batch * tokens * tokens * heads * head_dim,
        bytes=nbytes(qkv) * 4 // 3,
        peers={"SDPA, contiguous": lambda _: F.scaled_dot_product_attention(*split)},
    )


def scores_bytes(name: int | tuple[int, int]) -> int:
    """One head's matrix of scores in float32."""
    tokens = name[0] if isinstance(name, tuple) else name
    return 4 * tokens * tokens


def extra_bytes(name: int | tuple[int, int], dtype: torch.dtype, batch: int) -> int | None:
    """Memory that becomes resident during a call, its output left out: in a fresh process, whose scratch is empty.

    None where the system does not tell (it takes Linux), or the process dies.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    # The server imports once; each of its children starts as it was then.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_grow, args=(theirs, name, dtype, batch, torch.get_num_threads()))
    process.start()
    theirs.close()
    try:
        if not ours.poll(_PATIENCE):
            raise TimeoutError(f"attention {name}: the process that measures memory does not answer")
        return ours.recv()
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


def _grow(connection: Connection, name: int | tuple[int, int], dtype: torch.dtype, batch: int, threads: int) -> None:
    torch.set_num_threads(threads)
    case_ = case(name, dtype, batch)
    (qkv,) = case_.tensors
    with torch.inference_mode():
        case_.fused(qkv[:1, :1])  # loads code and starts threads; one token needs next to no scratch
        # What making the tensors has freed must not serve the call unseen.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        except OSError:
            connection.send(None)
            return
        before = _status("VmRSS")
        output = case_.fused(qkv)
        connection.send(max(_status("VmHWM") - before - nbytes(output), 0))


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) << 10


@pytest.mark.parametrize("name", NAMES, ids="{0[0]}x{0[1]}".format)
def test_attention(benchmark, name, dtype, batch, device):
    run_in_pytest(benchmark, case(name, dtype, batch, device))
