"""Triton kernels of `cores`: one program a block, in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_lite.ops.cayley_kernels import (
    _inverse,
    _put,
    _put_packed,
    _skew,
    _square,
    _through_inverse,
    tile,
)
from lora_lite.ops.launch import launch


def turned_shift(
    S: Tensor, delta: Tensor, P_U: Tensor | None, P_V: Tensor | None, b: int, L: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(core, (I − X_U)⁻¹, (I − X_V)⁻¹)."""
    n = len(delta) // b
    core = delta.new_empty(n, b, b)
    inverses = [None if P is None else torch.empty_like(core) for P in (P_U, P_V)]
    launch(
        _turned_shift, (n,),
        (S.contiguous(), delta.contiguous(), *given(core, P_U, P_V), core, *given(core, *inverses)),
        L, b, P_U is not None, P_V is not None, tile(b),
    )  # fmt: skip
    return core, *inverses


def turned_shift_backward(
    G: Tensor,
    S: Tensor,
    delta: Tensor,
    P_U: Tensor | None,
    P_V: Tensor | None,
    X_U: Tensor | None,
    X_V: Tensor | None,
    L: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dδ, dP_U, dP_V)."""
    n, b, _ = G.shape
    ddelta = torch.empty_like(delta)
    dP = [None if P is None else G.new_empty(n, b * (b - 1) // 2) for P in (P_U, P_V)]
    launch(
        _turned_shift_backward, (n,),
        (
            G.contiguous(), S.contiguous(), delta.contiguous(), *given(G, P_U, P_V, X_U, X_V),
            ddelta, *given(G, *dP),
        ),
        L, b, P_U is not None, P_V is not None, tile(b),
    )  # fmt: skip
    return ddelta, *dP


def given(other: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """The tensors, or another for what is not there and is not touched."""
    return [other if t is None else t.contiguous() for t in tensors]


@triton.jit
def _tanh(z):
    """tanh z, and its slope."""
    e, square = tl.exp(-2 * tl.abs(z)), z * z
    # Of a small z, 1 − e has lost its digits.
    series = -1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))
    far = tl.where(z < 0, e - 1, 1 - e) / (1 + e)
    return tl.where(square < 1 / 16, z + z * square * series, far), 4 * e / ((1 + e) * (1 + e))


@triton.jit
def _bounded(P, limit, i, j, b: tl.constexpr):
    """X = ½ L tanh(A/L) and dX/dP, entry by entry."""
    bent, slope = _tanh(_skew(P, i, j, b) / (2 * limit))
    return limit / 2 * bent, slope / 4


@triton.jit
def _row(s, i, b: tl.constexpr):
    return tl.load(s + tl.program_id(0) * b + i, mask=i < b, other=0.0)


@triton.jit
def _turned_shift(
    S, delta, P_U, P_V, core, X_U, X_V, limit,
    b: tl.constexpr, by_U: tl.constexpr, by_V: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    i, j = tl.arange(0, wide)[:, None], tl.arange(0, wide)[None, :]
    shift = _row(delta, i, b)
    out = tl.where(i == j, shift, 0.0)
    if by_V:
        V_1 = _rotation(P_V, X_V, limit, i, j, b)
        out += (_row(S, i, b) + shift) * V_1
    if by_U:
        M = tl.trans(_rotation(P_U, X_U, limit, i, j, b)) * (_row(S, j, b) + _row(delta, j, b))
        out += M
        if by_V:
            out += tl.dot(M, V_1, input_precision="ieee")
    _put(core, out, i, j, b)


@triton.jit
def _rotation(P, inverse, limit, i, j, b: tl.constexpr):
    """R − I; notes (I − X)⁻¹."""
    X, _ = _bounded(P, limit, i, j, b)
    M = _inverse(X, i, j, b)
    _put(inverse, M, i, j, b)
    return 2 * tl.dot(X, M, input_precision="ieee")


@triton.jit
def _turned_shift_backward(
    G, S, delta, P_U, P_V, X_U, X_V, ddelta, dP_U, dP_V, limit,
    b: tl.constexpr, by_U: tl.constexpr, by_V: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    # core = diag δ + D V_1 + M + M V_1, M = U_1ᵀ D, D = diag(S + δ).
    i, j = tl.arange(0, wide)[:, None], tl.arange(0, wide)[None, :]
    D, dcore = _row(S, i, b) + _row(delta, i, b), _square(G, i, j, b)
    terms = tl.where(i == j, dcore, 0.0)
    dM, dV = dcore, dcore
    if by_V:
        X, slope_V = _bounded(P_V, limit, i, j, b)
        inverse_V = _square(X_V, i, j, b)
        V_1 = 2 * tl.dot(X, inverse_V, input_precision="ieee")
        terms += dcore * V_1
        dM += tl.dot(dcore, tl.trans(V_1), input_precision="ieee")
    if by_U:
        X, slope = _bounded(P_U, limit, i, j, b)
        inverse = _square(X_U, i, j, b)
        U_1 = 2 * tl.dot(X, inverse, input_precision="ieee")
        terms += tl.trans(dM) * U_1
        dV += tl.dot(U_1, dcore, input_precision="ieee")
        _put_packed(dP_U, slope * _through_inverse(D * tl.trans(dM), inverse), i, j, b)
    if by_V:
        _put_packed(dP_V, slope_V * _through_inverse(D * dV, inverse_V), i, j, b)
    tl.store(ddelta + tl.program_id(0) * b + i, tl.sum(terms, 1, keep_dims=True), mask=i < b)
