"""Tensors without memory that behave as on a device: what a computation costs, without computing.

In: a function of tensors of any size, under `Abstract(device)`. Out: its floating point operations
and the bytes that are alive at its worst moment, exactly those of eager execution on that device,
but for what a kernel uses inside. Unlike torch's meta device, autocast acts on such tensors as on
the device that they claim, which torch must have been built for. torch's FakeTensorMode does the
same and more; its first use imports for a second, longer than a dry run should take.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
_FLASH = 1  # of torch.nn.attention.SDPBackend: what eager attention chooses on every device


class AbstractTensor(torch.Tensor):
    """A meta tensor (`shadow`) that claims to be on a device."""

    shadow: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> AbstractTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        tensor.shadow = inner
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} of an abstract tensor outside its Abstract")


class Abstract(TorchDispatchMode):
    """A context in which every tensor that is made is abstract; those from outside lend shape and
    type.

    `flops` counts products of matrices and convolutions since the start, `live_bytes` are those of
    the storages that somebody holds, `peak_bytes` their largest sum so far.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it would be to import it

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        if device.type != "cpu":  # autograd has a queue for each numbered device alone
            device = torch.device(device.type, device.index or 0)
        self.device = device
        self.flops = 0
        self.live_bytes = 0
        self.peak_bytes = 0
        self._holders: Counter[int] = Counter()  # tensors of each live storage

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten._fused_sdp_choice.default:
            return _FLASH
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        inner_args, inner_kwargs = tree_map(_inner, args), tree_map(_inner, kwargs)
        rule = _SHAPE_RULES.get(func, func)
        result = rule(*inner_args, **inner_kwargs)
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*inner_args, **inner_kwargs, out_val=result)
        # what an operation in place gives back is the tensor that it was given
        given = {id(part.shadow): part for part in args if isinstance(part, AbstractTensor)}
        return tree_map(lambda part: self._wrapped(part, given), result)

    def _wrapped(self, part: Any, given: Mapping[int, AbstractTensor]) -> Any:
        if not isinstance(part, torch.Tensor):
            return part
        if id(part) in given:
            return given[id(part)]
        tensor = AbstractTensor(part, self.device)
        storage = part.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if not self._holders[key]:
            self.live_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self._holders[key] += 1
        weakref.finalize(tensor, self._let_go, key, num_bytes).atexit = False
        return tensor

    def _let_go(self, key: int, num_bytes: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            self.live_bytes -= num_bytes


def _inner(part: Any) -> Any:
    if isinstance(part, AbstractTensor):
        return part.shadow
    return part.to("meta") if isinstance(part, torch.Tensor) else part


# Shapes of results. torch's own rules for these on meta tensors are decompositions in Python, whose
# first use imports torch._dynamo and sympy.


def _meta(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.empty(shape, dtype=like.dtype, device="meta")


def _like(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    extent = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    if extent != x.numel():  # a part of a tensor, or an expanded one
        return _meta(x.shape, x)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _filled(x: torch.Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
    return _like(x) if dtype is None else torch.empty(x.shape, dtype=dtype, device="meta")


def _product(x: torch.Tensor, y: torch.Tensor, **_: Any) -> torch.Tensor:
    return _meta((*x.shape[:-1], y.shape[-1]), x)


def _shifted_product(_: Any, x: torch.Tensor, y: torch.Tensor, **__: Any) -> torch.Tensor:
    return _product(x, y)


def _pointwise(x: torch.Tensor, y: torch.Tensor | float, *_: Any, **__: Any) -> torch.Tensor:
    if not isinstance(y, torch.Tensor):
        return _like(x)
    shape, dtype = torch._C._infer_size(x.shape, y.shape), torch.result_type(x, y)
    full = next((part for part in (x, y) if part.shape == shape and part.dtype == dtype), None)
    return torch.empty(shape, dtype=dtype, device="meta") if full is None else _like(full)


def _convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Any,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> torch.Tensor:
    if transposed:
        return aten.convolution.default(
            x, weight, bias, stride, padding, dilation, True, output_padding, groups
        )
    sizes = [
        (size + 2 * pad - dilate * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, dilate in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    by_channel = any(
        part.is_contiguous(memory_format=torch.channels_last) and not part.is_contiguous()
        for part in (x, weight)
    )
    memory_format = torch.channels_last if by_channel else torch.contiguous_format
    shape = (len(x), len(weight), *sizes)
    return torch.empty(shape, dtype=x.dtype, device="meta", memory_format=memory_format)


def _convolution_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor | None, ...]:
    bias = _meta(gradient.shape[1:2], gradient)
    parts = (_like(x), _like(weight), bias)
    return tuple(part if wanted else None for part, wanted in zip(parts, rest[-1], strict=True))


def _group_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: Any, batch: int, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    mean = torch.empty((batch, rest[2]), dtype=dtype, device="meta")  # of each group
    return _like(x), mean, _like(mean)


def _group_norm_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    batch: int,
    channels: int,
    *rest: Any,
) -> tuple[torch.Tensor | None, ...]:
    parameter = _meta((channels,), x if weight is None else weight)
    parts = (_like(x), parameter, _like(parameter))
    return tuple(part if wanted else None for part, wanted in zip(parts, rest[-1], strict=True))


def _fold(x: torch.Tensor, factor: int) -> torch.Tensor:
    batch, channels, height, width = x.shape
    return _meta((batch, channels * factor**2, height // factor, width // factor), x)


def _unfold(x: torch.Tensor, factor: int) -> torch.Tensor:
    batch, channels, height, width = x.shape
    return _meta((batch, channels // factor**2, height * factor, width * factor), x)


def _pad(x: torch.Tensor, pad: list[int], *_: Any) -> torch.Tensor:
    sizes = list(x.shape)
    for place in range(len(pad) // 2):
        sizes[-1 - place] += pad[2 * place] + pad[2 * place + 1]
    return _meta(sizes, x)


def _cat(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    sizes = list(parts[0].shape)
    sizes[dim] = sum(part.shape[dim] for part in parts)
    wider = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)
    return torch.empty(sizes, dtype=wider, device="meta")


def _stack(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    sizes = list(parts[0].shape)
    sizes.insert(dim % (len(sizes) + 1), len(parts))
    return _meta(sizes, parts[0])


def _upsample(x: torch.Tensor, size: list[int], *_: Any) -> torch.Tensor:
    return _meta((*x.shape[:2], *size), x)


def _upsample_backward(
    gradient: torch.Tensor, size: list[int], input_size: list[int], *_: Any
) -> torch.Tensor:
    return _meta(input_size, gradient)


def _pooled(x: torch.Tensor, kernel: list[int], stride: list[int]) -> tuple[int, ...]:
    sizes = zip(x.shape[-2:], kernel, stride or kernel, strict=True)
    return (*x.shape[:-2], *((size - part) // step + 1 for size, part, step in sizes))


def _max_pool(
    x: torch.Tensor, kernel: list[int], stride: Sequence[int] = (), *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    if rest:
        return aten.max_pool2d_with_indices.default(x, kernel, stride, *rest)
    shape = _pooled(x, kernel, list(stride))
    return _meta(shape, x), torch.empty(shape, dtype=torch.int64, device="meta")


def _avg_pool(
    x: torch.Tensor, kernel: list[int], stride: Sequence[int] = (), *rest: Any
) -> torch.Tensor:
    if rest:
        return aten.avg_pool2d.default(x, kernel, stride, *rest)
    return _meta(_pooled(x, kernel, list(stride)), x)


def _where(condition: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    shape = torch._C._infer_size(condition.shape, torch._C._infer_size(x.shape, y.shape))
    return torch.empty(shape, dtype=torch.result_type(x, y), device="meta")


def _slice_backward(gradient: torch.Tensor, sizes: list[int], *_: Any) -> torch.Tensor:
    return _meta(sizes, gradient)


def _compared(x: torch.Tensor, _: float) -> torch.Tensor:
    return _like(x).to(torch.bool)


def _first(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x


def _log_sigmoid(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _like(x), _like(x)


def _attention(q: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _like(q), torch.empty(q.shape[:-1], device="meta")


def _attention_backward(_: Any, *qkv_and_rest: Any, **__: Any) -> tuple[torch.Tensor, ...]:
    q, k, v, *_rest = qkv_and_rest
    return _like(q), _like(k), _like(v)


def _sum(
    x: torch.Tensor, dims: list[int] | None = None, keep: bool = False, **_: Any
) -> torch.Tensor:
    gone = {dim % x.ndim for dim in (dims or range(x.ndim))} if x.ndim else set()
    sizes = [1 if place in gone else size for place, size in enumerate(x.shape)]
    if not keep:
        sizes = [size for place, size in enumerate(x.shape) if place not in gone]
    dtype = x.dtype if x.dtype.is_floating_point else torch.int64
    return torch.empty(sizes, dtype=dtype, device="meta")


def _second(_: Any, x: torch.Tensor, *__: Any) -> torch.Tensor:
    return _like(x)


_UNARY = (
    aten.abs.default,
    aten.clamp.default,
    aten.exp.default,
    aten.expm1.default,
    aten.leaky_relu.default,
    aten.leaky_relu_backward.default,
    aten.neg.default,
    aten.pow.Tensor_Scalar,
    aten.relu.default,
    aten.sgn.default,
    aten.silu.default,
    aten.silu_backward.default,
    aten.softplus.default,
    aten.softplus_backward.default,
    aten.sqrt.default,
    aten.tanh.default,
    aten.tanh_backward.default,
    aten.threshold_backward.default,
)
_BINARY = (
    aten.add.Scalar,
    aten.add.Tensor,
    aten.div.Scalar,
    aten.div.Tensor,
    aten.mul.Scalar,
    aten.mul.Tensor,
    aten.rsub.Scalar,
    aten.sub.Tensor,
)
_SHAPE_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_UNARY, _like),
    **dict.fromkeys(_BINARY, _pointwise),
    aten.empty_like.default: _filled,
    aten.ones_like.default: _filled,
    aten.zeros_like.default: _filled,
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.addmm.default: _shifted_product,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten.native_group_norm.default: _group_norm,
    aten.native_group_norm_backward.default: _group_norm_backward,
    aten.pixel_unshuffle.default: _fold,
    aten.pixel_shuffle.default: _unfold,
    aten.constant_pad_nd.default: _pad,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.mean.dim: _sum,
    aten.upsample_nearest2d.default: _upsample,
    aten.upsample_nearest2d_backward.default: _upsample_backward,
    aten.avg_pool2d.default: _avg_pool,
    aten.avg_pool2d_backward.default: _second,
    aten.slice_backward.default: _slice_backward,
    aten.where.self: _where,
    aten.ge.Scalar: _compared,
    aten.le.Scalar: _compared,
    aten.logical_and_.default: _first,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.max_pool2d_with_indices_backward.default: _second,
    aten.log_sigmoid_forward.default: _log_sigmoid,
    aten.log_sigmoid_backward.default: _second,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
}
