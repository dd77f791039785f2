"""Triton kernels of `reflections`, in float32.

M = Z holds u and d = v − u of each pair, and Y = M S, S of constants. With G = MᵀM and P = T⁻¹Sᵀ,

    T = I + w ∘ SᵀG, A = P Mᵀ, B = −2 M,

w the factors above the diagonal. For the gradients Ā to A and B̄ to B, with F = ĀM,

    M̄ = ĀᵀP − 2 B̄ + M K, K = S E + (S E)ᵀ, E = −w ∘ (T⁻ᵀ F Pᵀ),

and what M̄ gives to u and v loses what is along them, for nothing depends on their lengths. Sums
over d are made in parts, which every program that needs them adds up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_lite.ops.launch import cdiv, launch, power_of_2

BLOCK = 64


def reflections(U: Tensor) -> tuple[Tensor, ...]:
    """(A, B, the columns' lengths, G and T⁻¹)."""
    d, r = U.shape
    q, wide, rows, parts, warps = sizes(d, r)
    norms = U.norm(dim=0)
    sums, small = U.new_empty(parts, q, q), U.new_empty(2, q, q)
    A, B = U.new_empty(q, d), U.new_empty(d, q)
    launch(
        _gram, (parts,),
        (U, norms, sums), d, rows,
        r, q, wide, BLOCK,
        warps=warps,
    )  # fmt: skip
    launch(
        _factors, (cdiv(d, BLOCK),),
        (U, norms, sums, small, A, B), d, parts,
        r, q, wide, BLOCK,
        warps=warps,
    )  # fmt: skip
    return A, B, norms, small


def backward(dA: Tensor, dB: Tensor, U: Tensor, norms: Tensor, small: Tensor) -> Tensor:
    d, r = U.shape
    q, wide, rows, parts, warps = sizes(d, r)
    sums, dU = U.new_empty(parts, 2, q, q), torch.empty_like(U)
    launch(
        _products, (parts,),
        (U, norms, dA, dB, sums), d, rows, *dA.stride(), *dB.stride(),
        r, q, wide, BLOCK,
        warps=warps,
    )  # fmt: skip
    launch(
        _gradient, (cdiv(d, BLOCK),),
        (U, norms, dA, dB, sums, small, dU), d, parts, *dA.stride(), *dB.stride(),
        r, q, wide, BLOCK,
        warps=warps,
    )  # fmt: skip
    return dU


def sizes(d: int, r: int) -> tuple[int, ...]:
    """(columns of M, and of a tile, rows that a part sums, parts, warps)."""
    q = r + r % 2
    wide = max(16, power_of_2(q))
    rows = cdiv(cdiv(d, 1024 // wide), BLOCK) * BLOCK
    return q, wide, rows, cdiv(d, rows), max(4, wide // 4)


@triton.jit
def _column(k, r: tl.constexpr, q: tl.constexpr):
    """U's column at k, and whether there is one: the last of an odd number is the second of its
    pair."""
    if r == q:
        return k, k < q
    return tl.minimum(k, r - 1), (k < r - 1) | (k == r)


@triton.jit
def _M(U, norms, row, d, r: tl.constexpr, q: tl.constexpr, wide: tl.constexpr):
    k = tl.arange(0, wide)
    column, some = _column(k, r, q)
    before, both = _column(k - 1, r, q)
    both = both & some & (k % 2 == 1)
    u = tl.load(U + row[:, None] * r + column, mask=(row[:, None] < d) & some, other=0.0)
    v = tl.load(U + row[:, None] * r + before, mask=(row[:, None] < d) & both, other=0.0)
    u = tl.div_rn(u, tl.load(norms + column, mask=some, other=1.0) + 0 * u)
    return u - tl.div_rn(v, tl.load(norms + before, mask=both, other=1.0) + 0 * v)


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _sum(sums, parts, stride, i, j, inside, q: tl.constexpr, wide: tl.constexpr):
    some: tl.constexpr = 4096 // (wide * wide)
    p = tl.arange(0, some)[:, None, None]
    total = tl.zeros((wide, wide), tl.float32)
    for first in range(0, parts, some):
        at = sums + (first + p) * stride + (i * q + j)[None]
        total += tl.sum(tl.load(at, mask=inside[None] & (first + p < parts), other=0.0), 0)
    return total


@triton.jit
def _constants(i, j):
    """(S, w, the map of M̄ to the gradients of u and v)."""
    pairs = (i // 2 == j // 2) & (i != j)
    one = tl.where(i == j, 1.0, 0.0)
    down = tl.where(pairs & (i > j), 1.0, 0.0)
    up = tl.where(pairs & (i < j), 1.0, 0.0)
    odd = tl.where((i == j) & (i % 2 == 1), 1.0, 0.0)
    w = tl.where(i < j, tl.where(i // 2 < j // 2, 2.0, 1.0), 0.0)
    return up + odd - down, w, one - down, one + up


@triton.jit
def _gram(
    U, norms, sums, d, rows,
    r: tl.constexpr, q: tl.constexpr, wide: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    i, j = tl.arange(0, wide)[:, None], tl.arange(0, wide)[None, :]
    G = tl.zeros((wide, wide), tl.float32)
    for first in range(part * rows, tl.minimum(part * rows + rows, d), block):
        M = _M(U, norms, first + tl.arange(0, block), d, r, q, wide)
        G += _dot(tl.trans(M), M)
    tl.store(sums + part * q * q + i * q + j, G, mask=(i < q) & (j < q))


@triton.jit
def _factors(
    U, norms, sums, small, A, B, d, parts,
    r: tl.constexpr, q: tl.constexpr, wide: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i, j = tl.arange(0, wide)[:, None], tl.arange(0, wide)[None, :]
    inside = (i < q) & (j < q)
    S, w, _, _ = _constants(i, j)
    G = _sum(sums, parts, q * q, i, j, inside, q, wide)
    T = w * _dot(tl.trans(S), G)
    # T⁻¹ by back substitution, T's diagonal being 1.
    X = tl.where(i == j, 1.0, 0.0)
    for step in range(q):
        k = q - 1 - step
        column = tl.sum(tl.where(j == k, T, 0.0), 1, keep_dims=True)
        X -= column * tl.sum(tl.where(i == k, X, 0.0), 0, keep_dims=True)
    if tl.program_id(0) == 0:
        tl.store(small + i * q + j, G, mask=inside)
        tl.store(small + q * q + i * q + j, X, mask=inside)
    row = tl.program_id(0) * block + tl.arange(0, block)
    M = _M(U, norms, row, d, r, q, wide)
    At = _dot(_dot(M, S), tl.trans(X))
    k, row = tl.arange(0, wide)[None, :], row[:, None]
    tl.store(A + k * d + row, At, mask=(row < d) & (k < q))
    tl.store(B + row * q + k, -2 * M, mask=(row < d) & (k < q))


@triton.jit
def _gradients(
    dA, dB, row, d, a_k, a_row, b_row, b_k, q: tl.constexpr, wide: tl.constexpr
):  # fmt: skip
    """(Āᵀ, B̄) of some rows."""
    k, row = tl.arange(0, wide)[None, :], row[:, None]
    inside = (row < d) & (k < q)
    dAt = tl.load(dA + row * a_row + k * a_k, mask=inside, other=0.0)
    return dAt, tl.load(dB + row * b_row + k * b_k, mask=inside, other=0.0)


@triton.jit
def _products(
    U, norms, dA, dB, sums, d, rows, a_k, a_row, b_row, b_k,
    r: tl.constexpr, q: tl.constexpr, wide: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    i, j = tl.arange(0, wide)[:, None], tl.arange(0, wide)[None, :]
    F, Q = tl.zeros((wide, wide), tl.float32), tl.zeros((wide, wide), tl.float32)
    for first in range(part * rows, tl.minimum(part * rows + rows, d), block):
        row = first + tl.arange(0, block)
        M = _M(U, norms, row, d, r, q, wide)
        dAt, dB_rows = _gradients(dA, dB, row, d, a_k, a_row, b_row, b_k, q, wide)
        F += _dot(tl.trans(dAt), M)
        Q += _dot(tl.trans(M), dB_rows)
    at = sums + part * 2 * q * q + i * q + j
    tl.store(at, F, mask=(i < q) & (j < q))
    tl.store(at + q * q, Q, mask=(i < q) & (j < q))


@triton.jit
def _gradient(
    U, norms, dA, dB, sums, small, dU, d, parts, a_k, a_row, b_row, b_k,
    r: tl.constexpr, q: tl.constexpr, wide: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i, j = tl.arange(0, wide)[:, None], tl.arange(0, wide)[None, :]
    inside = (i < q) & (j < q)
    S, w, to_columns, columns = _constants(i, j)
    F = _sum(sums, parts, 2 * q * q, i, j, inside, q, wide)
    Q = _sum(sums + q * q, parts, 2 * q * q, i, j, inside, q, wide)
    G = tl.load(small + i * q + j, mask=inside, other=0.0)
    X = tl.load(small + q * q + i * q + j, mask=inside, other=0.0)
    P = _dot(X, tl.trans(S))
    SE = -_dot(S, w * _dot(tl.trans(X), _dot(F, tl.trans(P))))
    K = SE + tl.trans(SE)
    # What M̄ has along u and v: MᵀM̄ is made of small matrices alone.
    H = _dot(tl.trans(F), P) - 2 * Q + _dot(G, K)
    along = tl.sum(columns * _dot(H, to_columns), 0, keep_dims=True)
    row = tl.program_id(0) * block + tl.arange(0, block)
    M = _M(U, norms, row, d, r, q, wide)
    dAt, dB_rows = _gradients(dA, dB, row, d, a_k, a_row, b_row, b_k, q, wide)
    D = _dot(_dot(dAt, P) - 2 * dB_rows + _dot(M, K), to_columns) - _dot(M, columns) * along
    column, some = _column(tl.arange(0, wide), r, q)
    D /= tl.load(norms + column, mask=some, other=1.0)
    tl.store(dU + row[:, None] * r + column, D, mask=(row[:, None] < d) & some)
