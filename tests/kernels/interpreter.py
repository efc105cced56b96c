"""Triton's interpreter, mended where it is wrong: `use()` before anything imports a kernel."""

from __future__ import annotations

import os
import sys

import numpy as np


def use() -> None:
    """Kernels that are decorated from now on run on the CPU."""
    # Read when a kernel is decorated.
    os.environ["TRITON_INTERPRET"] = "1"
    if "fastvit.kernels.product" in sys.modules:
        raise RuntimeError("fastvit's kernels were imported before the interpreter was asked for")

    import triton.language as tl
    from triton.runtime import interpreter

    def widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        """A bfloat16 operand as float32: the interpreter keeps bfloat16 as its bits in uint16."""
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def double(handle: interpreter.TensorHandle) -> np.ndarray:
        return widened(handle).data.astype(np.float64)

    def create_dot(self, a, b, d, *options):
        # The interpreter would multiply the bits as integers, and NumPy round a b^T unlike b a^T, as no GPU does: the
        # backward of attention makes the logits of the forward anew, transposed.
        if d.dtype.scalar != tl.float32:
            return dot(self, a, b, d, *options)
        return interpreter.TensorHandle((double(a) @ double(b) + d.data).astype(np.float32), tl.float32)

    def create_fma(self, x, y, z):
        # The interpreter would round twice.  In float64 the product is exact.
        exact = double(x) * double(y) + double(z)
        with np.errstate(over="ignore"):
            return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    def cast_impl(self, source, target):
        # The interpreter would truncate; every GPU rounds to nearest, ties to even.
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            bits = np.ascontiguousarray(source.data).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            bits = np.where(np.isnan(source.data), (bits >> 16) | 0x40, rounded)
            return interpreter.TensorHandle(bits.astype(np.uint16), tl.bfloat16)
        return cast(self, source, target)

    builder.create_dot, builder.create_fma, builder.cast_impl = create_dot, create_fma, cast_impl
    builder.create_fp_trunc = lambda self, source, target: self.cast_impl(source, target)

    # Scalars are arrays of one element, which NumPy >= 2.4 no longer turns into loop bounds by itself.
    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
