"""patch_embed: normalise, cut into patches, project, add positions, write after the prefix tokens: one operator."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fastvit import reference
from fastvit.ops import _backend, _checks, _int8
from fastvit.ops._library import as_gradients, autocast_dtype, define, gradients_like, in_dtype, register, spread

LAYOUTS = ("NCHW", "NHWC")


def patch_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    layout: str = "NCHW",
    quantize: str | None = None,
) -> Tensor:
    """Image to tokens (Dosovitskiy et al. 2020, section 3.1).

    A uint8 image is read as it lies in memory, in either layout: no float image is written.

    Args:
        image: (B, C, H, W), or (B, H, W, C) if `layout` says so; float or uint8 (then divided by 255).  Any strides.
        weight: (D, C, P1, P2), a Conv2d weight whose stride is its kernel; P1 divides H and P2 divides W.  Dtype of a
            float `image` (any float dtype under autocast).
        bias: (D,).
        pos_embed: (N, D) or (1, N, D) with N = H / P1 * W / P2, added to the patch tokens.
        prefix: (R, D) or (1, R, D), class and register tokens with their own positions added: the first R tokens.
        mean, std: C numbers; the product sees (image - mean) / std.
        layout: "NCHW" or "NHWC", the order of the image's dimensions; it is never guessed from the shape.
        quantize: None, or "int8" for a product of integers, of a uint8 image only: bytes as they are times weights in
            int8 per output channel, whose rounding errors cancel where an image is smooth (`fastvit.reference.int8`).
            Gradients are those of the float product.

    Returns:
        (B, R + N, D), contiguous; dtype of a float `image`, else of `weight`; or autocast's.

    Raises:
        ValueError, TypeError: an argument's shape or dtype is not accepted.
    """
    if has_torch_function((image, weight)):
        return handle_torch_function(
            patch_embed,
            (image, weight),
            image,
            weight,
            bias,
            pos_embed=pos_embed,
            prefix=prefix,
            mean=mean,
            std=std,
            layout=layout,
            quantize=quantize,
        )
    _checks.tensor("image", image)
    _checks.tensor("weight", weight)
    return _op(
        image,
        weight,
        bias,
        pos_embed,
        prefix,
        _numbers("mean", mean),
        _numbers("std", std),
        autocast_dtype(weight),
        layout,
        quantize,
    )


def _numbers(name: str, values: Sequence[float] | Tensor | None) -> tuple[float, ...] | None:
    if values is None:
        return None
    if isinstance(values, (str, float, int)) or (isinstance(values, Tensor) and values.ndim == 0):
        raise TypeError(f"{name}: {values!r} is not accepted; give a number for each channel")
    return tuple(map(float, values))


def _channels_first(image: Tensor, layout: str) -> Tensor:
    return image if layout == "NCHW" else image.permute(0, 3, 1, 2)


@_checks.remembered
def _output(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype | None,
    layout: str,
    quantize: str | None = None,
) -> Tensor:
    """Check everything and return the empty result: also the operator's fake version."""
    if image.dtype != torch.uint8 and image.dtype not in _checks.FLOATS:
        accepted = ", ".join(map(str, (*_checks.FLOATS, torch.uint8)))
        raise TypeError(f"image: dtype {image.dtype} is not accepted; give {accepted}")
    _checks.floating("weight", weight)
    _checks.one_of("layout", layout, LAYOUTS)
    _checks.quantize(quantize)
    if quantize is not None and image.dtype != torch.uint8:
        raise ValueError(f"quantize: {quantize!r} takes no image of {image.dtype}; accepted: None, or uint8 pixels")
    _checks.ndim("image", image, 4, "(B, C, H, W)" if layout == "NCHW" else "(B, H, W, C)")
    _checks.ndim("weight", weight, 4, "(D, C, P1, P2)")
    batch, *sizes = image.shape
    channels, height, width = sizes if layout == "NCHW" else (sizes[2], *sizes[:2])
    dim, weight_channels, patch_h, patch_w = weight.shape
    if channels != weight_channels:
        other = "NHWC" if layout == "NCHW" else "NCHW"
        hint = f", or layout={other!r}" if image.shape[other.index("C")] == weight_channels else ""
        raise ValueError(
            f"image: {channels} channels in {tuple(image.shape)} with layout {layout!r}, but weight has "
            f"{weight_channels}; accepted: {weight_channels}{hint}"
        )
    if patch_h < 1 or patch_w < 1:
        raise ValueError(f"weight: shape {tuple(weight.shape)} has patches without pixels; accepted: P1, P2 >= 1")
    if height % patch_h or width % patch_w:
        raise ValueError(f"image: {height} x {width} is no multiple of the patch; accepted: {patch_h}i x {patch_w}j")
    patches = (height // patch_h) * (width // patch_w)
    _checks.vector("bias", bias, dim)
    for name, t, count in (("pos_embed", pos_embed, patches), ("prefix", prefix, None)):
        if t is None:
            continue
        _checks.floating(name, t)
        rows, columns = t.shape[-2:] if t.ndim == 2 or (t.ndim == 3 and len(t) == 1) else (-1, -1)
        if columns != dim or (count is not None and rows != count):
            raise ValueError(f"{name}: shape {tuple(t.shape)} does not fit; accepted: ({count or 'R'}, {dim})")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != channels:
            raise ValueError(f"{name}: {len(values)} numbers; accepted: {channels}, one per channel")
    if std is not None and 0.0 in std:
        raise ValueError(f"std: {std} has a zero; accepted: non-zero numbers")
    if dtype is None:
        if image.is_floating_point():
            _checks.same_dtype("weight", weight, image.dtype, "image")
        _checks.same_dtype("bias", bias, weight.dtype, "weight")
    _checks.same_device(image=image, weight=weight, bias=bias, pos_embed=pos_embed, prefix=prefix)
    tokens = patches + (0 if prefix is None else prefix.shape[-2])
    return weight.new_empty((batch, tokens, dim), dtype=dtype or weight.dtype)


def _kernel(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype | None,
    layout: str,
    quantize: str | None = None,
) -> Tensor:
    out = _output(image, weight, bias, pos_embed, prefix, mean, std, dtype, layout, quantize)
    if out.numel() == 0:
        return out
    backend = _backend.choose(image, out.dtype, weight, bias, pos_embed, prefix)
    if backend == "cpp":
        affine = _channel_affine(image, mean, std, weight.shape[1]) if quantize is None else (None, None)
        of_weight: list[Tensor | None] = [None, None, None]
        if quantize is not None:
            weight, *of_weight = _int8.patch_operand(weight, mean, std)
        _backend.extension().patch_embed(
            out,
            image,
            weight.contiguous(),
            *of_weight,
            *map(_backend.contiguous, (bias, pos_embed, prefix)),
            *affine,
            layout == "NHWC",
            _backend.code(out.dtype),
            torch.get_num_threads(),
        )
        return out
    if quantize is not None:
        with torch.autocast(image.device.type, enabled=False):
            return reference.patch_embed(
                image,
                weight,
                bias,
                pos_embed=pos_embed,
                prefix=prefix,
                mean=mean,
                std=std,
                layout=layout,
                quantize=quantize,
            ).to(out.dtype)
    if backend == "triton":
        if dtype is not None:
            image = image.to(dtype) if image.is_floating_point() else image
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        image = _channels_first(image, layout)
        return _backend.triton_kernel("patch_embed")(
            image, weight, bias, pos_embed=pos_embed, prefix=prefix, mean=mean, std=std
        )
    return _reference(image, weight, bias, pos_embed, prefix, mean, std, dtype, layout, quantize)


def _channel_affine(
    image: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[Tensor | None, Tensor | None]:
    """(image - mean) / std as image * scale + shift, with a uint8 image's 1 / 255 in the scale."""
    unit = 1.0 if image.is_floating_point() else 255.0
    if mean is None and std is None and unit == 1.0:
        return None, None
    return _affine(tuple(mean or [0.0] * channels), tuple(std or [1.0] * channels), unit)


@functools.lru_cache(maxsize=64)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], unit: float) -> tuple[Tensor, Tensor]:
    # Kept, because small tensors cost more to make than a batch of one image costs to normalise.
    scale = [1.0 / (unit * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    return torch.tensor(scale, dtype=torch.float32), torch.tensor(shift, dtype=torch.float32)


def _reference(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype | None,
    layout: str,
    quantize: str | None = None,
) -> Tensor:
    # Without `quantize`: a gradient takes rounding for the identity.
    with in_dtype(dtype, image.device):
        tokens = reference.patch_embed(
            image, weight, bias, pos_embed=pos_embed, prefix=prefix, mean=mean, std=std, layout=layout
        )
        return tokens.to(dtype or weight.dtype)


def _backward_kernel(
    grad: Tensor,
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """needs: of image, weight, bias, pos_embed and prefix, whose gradients come in this order."""
    with torch.autocast(weight.device.type, enabled=False):
        grads = _backend.triton_kernel("patch_embed", "patch_embed_backward")(
            grad,
            image.to(dtype) if dtype is not None and image.is_floating_point() else image,
            weight.to(dtype or weight.dtype),
            prefix_rows=0 if prefix is None else prefix.shape[-2],
            mean=mean,
            std=std,
            needs=needs,
        )
        return as_gradients(grads, (image, weight, bias, pos_embed, prefix), needs)


def _backward_fake(grad: Tensor, *arguments: Any) -> list[Tensor]:
    return gradients_like(arguments[:5], arguments[-1])


_backward_op = define(
    "patch_embed_backward(Tensor grad, Tensor image, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix, "
    "float[]? mean, float[]? std, ScalarType? dtype, bool[] needs) -> Tensor[]",
    kernel=_backward_kernel,
    fake=_backward_fake,
)


def _backward(saved: tuple[Any, ...], grad: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None] | None:
    image, weight, *rest, dtype, layout, _ = saved
    if image.numel() == 0 or grad.numel() == 0 or not _backend.differentiates(weight, dtype or weight.dtype):
        return None
    grads = _backward_op(grad, _channels_first(image, layout), weight, *rest, dtype, needs[:5])
    image_grad, *others = spread(grads, needs[:5])
    if image_grad is not None and layout == "NHWC":
        image_grad = image_grad.permute(0, 2, 3, 1)
    return [image_grad, *others, *[None] * 5]


_op = register(
    "patch_embed(Tensor image, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix, float[]? mean, "
    "float[]? std, ScalarType? dtype, str layout, str? quantize=None) -> Tensor",
    kernel=_kernel,
    fake=_output,
    reference=_reference,
    backward=_backward,
)
