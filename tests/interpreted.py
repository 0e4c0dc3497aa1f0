"""Correct Triton's interpreter for bfloat16.

The interpreter represents a bfloat16 by its 16 bits. Its matrix product treats these bits as an integer, and
its conversion from float32 truncates instead of rounding. This module replaces both operations. Our kernels
do nothing else with bfloat16 than load and store it.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

_multiply, _convert = interpreter.InterpreterBuilder.create_dot, interpreter.InterpreterBuilder.cast_impl


def _widened(value: TensorHandle) -> TensorHandle:
    """Return a bfloat16 value in float32, and any other value unchanged."""
    if value.dtype.scalar != tl.bfloat16:
        return value
    return TensorHandle((value.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _converted(builder, value: TensorHandle, to: tl.dtype, *rounding) -> TensorHandle:
    kinds = value.dtype.scalar, to.scalar
    if kinds == (tl.bfloat16, tl.float32):
        return _widened(value)
    if kinds == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.ascontiguousarray(value.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy(), to.scalar)
    assert tl.bfloat16 not in kinds, "no kernel converts it to or from anything else"
    return _convert(builder, value, to)


def mend_bfloat16() -> None:
    """Replace the interpreter's matrix product and conversions, for every kernel that it runs from now on."""
    builder = interpreter.InterpreterBuilder
    builder.create_dot = lambda self, a, b, *more: _multiply(self, _widened(a), _widened(b), *more)
    builder.cast_impl = builder.create_fp_to_fp = _converted
