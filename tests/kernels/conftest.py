"""Run the Triton kernels on CUDA where there is a GPU, elsewhere in Triton's interpreter, mended where it is wrong."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    # Read when a kernel is decorated, so before any kernel is imported.
    os.environ["TRITON_INTERPRET"] = "1"

if not GPU:
    import triton.language as tl
    from triton.runtime import interpreter

    def _widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        """A bfloat16 operand as float32: the interpreter keeps bfloat16 as its bits in uint16."""
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def _mend(builder: type) -> None:
        dot, cast = builder.create_dot, builder.cast_impl

        def create_dot(self, a, b, d, *options):
            # The interpreter would multiply the bits as integers.
            return dot(self, _widened(a), _widened(b), d, *options)

        def cast_impl(self, source, target):
            # The interpreter would truncate; every GPU rounds to nearest, ties to even.
            if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
                bits = np.ascontiguousarray(source.data).view(np.uint32)
                rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
                bits = np.where(np.isnan(source.data), (bits >> 16) | 0x40, rounded)
                return interpreter.TensorHandle(bits.astype(np.uint16), tl.bfloat16)
            return cast(self, source, target)

        builder.create_dot, builder.cast_impl = create_dot, cast_impl
        builder.create_fp_trunc = lambda self, source, target: self.cast_impl(source, target)

    _mend(interpreter.InterpreterBuilder)

    # Scalars are arrays of one element, which NumPy >= 2.4 no longer turns into loop bounds by itself.
    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor, scope):
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_lang_tensor


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")
