"""Triton kernels of `cayley`: one program a block, in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_lite.ops.launch import launch, power_of_2


def rotation(q: Tensor, b: int, terms: int | None) -> tuple[Tensor, Tensor | None]:
    """(R − I, and (I − Q)⁻¹ where the transform is exact)."""
    n, wide = len(q), tile(b)
    R_1 = q.new_empty(n, b, b)
    if terms is not None:
        launch(_neumann, (n,), (q, R_1), terms, b, wide)
        return R_1, None
    X = torch.empty_like(R_1)
    launch(_cayley, (n,), (q, R_1, X), b, wide)
    return R_1, X


def backward(G: Tensor, saved: Tensor, terms: int | None) -> Tensor:
    """The gradient to q; `saved` is q for the series, (I − Q)⁻¹ for the exact transform."""
    n, b, _ = G.shape
    dq = G.new_empty(n, b * (b - 1) // 2)
    wide = tile(b)
    if terms is None:
        launch(_cayley_backward, (n,), (G, saved, dq), b, wide)
    else:
        launch(_neumann_backward, (n,), (G, saved, dq), terms, b, wide)
    return dq


def tile(b: int) -> int:
    """The least square of b × b that the matrix units take."""
    return max(16, power_of_2(b))


@triton.jit
def _packed(i, j, b: tl.constexpr):
    """The place of entry (i, j), i < j, in the upper triangle in row-major order."""
    return i * (2 * b - i - 1) // 2 + j - i - 1


@triton.jit
def _skew(q, i, j, b: tl.constexpr):
    inside = (i < b) & (j < b)
    at = tl.program_id(0).to(tl.int64) * (b * (b - 1) // 2)
    upper = tl.load(q + at + _packed(i, j, b), mask=inside & (i < j), other=0.0)
    lower = tl.load(q + at + _packed(j, i, b), mask=inside & (j < i), other=0.0)
    return upper - lower


@triton.jit
def _square(M, i, j, b: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * b * b
    return tl.load(M + at + i * b + j, mask=(i < b) & (j < b), other=0.0)


@triton.jit
def _put(M, value, i, j, b: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * b * b
    tl.store(M + at + i * b + j, value, mask=(i < b) & (j < b))


@triton.jit
def _put_packed(dq, dQ, i, j, b: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * (b * (b - 1) // 2)
    odd = dQ - tl.trans(dQ)
    tl.store(dq + at + _packed(i, j, b), odd, mask=(i < j) & (j < b))


@triton.jit
def _cayley(q, R_1, X, b: tl.constexpr, wide: tl.constexpr):
    i, j = tl.arange(0, wide)[:, None], tl.arange(0, wide)[None, :]
    Q = _skew(q, i, j, b)
    M = _inverse(Q, i, j, b)
    _put(X, M, i, j, b)
    _put(R_1, 2 * tl.dot(Q, M, input_precision="ieee"), i, j, b)


@triton.jit
def _inverse(Q, i, j, b: tl.constexpr):
    """(I − Q)⁻¹."""
    M = tl.where(i == j, 1.0, 0.0) - Q
    # Gauss–Jordan in place. Without pivoting: the symmetric part of I − Q is I, and stays
    # positive definite in every Schur complement.
    for k in range(b):
        row = tl.sum(tl.where(i == k, M, 0.0), 0, keep_dims=True)
        column = tl.sum(tl.where(j == k, M, 0.0), 1, keep_dims=True)
        pivot = tl.sum(tl.where(j == k, row, 0.0))
        rest = tl.where(i == k, row / pivot, M - column * row / pivot)
        M = tl.where(j == k, tl.where(i == k, 1.0 / pivot, -column / pivot), rest)
    return M


@triton.jit
def _cayley_backward(G, X, dq, b: tl.constexpr, wide: tl.constexpr):
    i, j = tl.arange(0, wide)[:, None], tl.arange(0, wide)[None, :]
    _put_packed(dq, _through_inverse(_square(G, i, j, b), _square(X, i, j, b)), i, j, b)


@triton.jit
def _through_inverse(dR, X):
    """dQ = 2 Xᵀ dR Xᵀ: δR = 2 X δQ X, X = (I − Q)⁻¹."""
    Xt = tl.trans(X)
    return 2 * tl.dot(tl.dot(Xt, dR, input_precision="ieee"), Xt, input_precision="ieee")


@triton.jit
def _series(Q, steps):
    """U ← Q + Q U, `steps` times from zero."""
    U = tl.zeros_like(Q)
    for _ in range(steps):
        U = Q + tl.dot(Q, U, input_precision="ieee")
    return U


@triton.jit
def _neumann(q, R_1, terms, b: tl.constexpr, wide: tl.constexpr):
    i, j = tl.arange(0, wide)[:, None], tl.arange(0, wide)[None, :]
    Q = _skew(q, i, j, b)
    U = _series(Q, terms - 2)
    _put(R_1, U + Q + tl.dot(Q, U, input_precision="ieee"), i, j, b)


@triton.jit
def _neumann_backward(G, q, dq, terms, b: tl.constexpr, wide: tl.constexpr):
    i, j = tl.arange(0, wide)[:, None], tl.arange(0, wide)[None, :]
    Q = _skew(q, i, j, b)
    Qt, dR = tl.trans(Q), _square(G, i, j, b)
    dQ = dR + tl.dot(dR, tl.trans(_series(Q, terms - 2)), input_precision="ieee")
    dU = dR + tl.dot(Qt, dR, input_precision="ieee")
    for k in range(terms - 2):
        U = _series(Q, terms - 3 - k)
        dQ += dU + tl.dot(dU, tl.trans(U), input_precision="ieee")
        dU = tl.dot(Qt, dU, input_precision="ieee")
    _put_packed(dq, dQ, i, j, b)
