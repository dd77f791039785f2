"""Triton kernels of `rotated`: passes over all tokens as if nothing turned, and a second launch
for what turning affects.

Forward reads x once, and the output where it scales it; backward reads x, the output and its
gradient once, for all sums over tokens, energies among them, and the input's gradient. A coordinate
outside the pairs is its own partner, p_i = i, and no pass over all gathers anything. Left pairs
affect outputs at their coordinates, and right pairs in all rows of the core's blocks that hold
theirs; of the input's gradient it is the other way round.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_lite.ops import givens_kernels
from lora_lite.ops.blocks import MOST_COLUMNS
from lora_lite.ops.givens_kernels import Side
from lora_lite.ops.launch import cdiv, known_again, launch, power_of_2
from lora_lite.ops.selection import Squares
from lora_lite.ops.skinny_kernels import fold

PROGRAMS = 1056
BLOCK, ROWS = 128, 16
BLOCK_BACKWARD, ROWS_BACKWARD, STAGES_BACKWARD = 64, 8, 4
BLOCKS_FORWARD, BLOCKS_BACKWARD = 32, 16
"""Rows of a tile where products take a block core: more would not fit in registers."""
STAGES = 3
COLUMNS, TOKENS, ENTRIES = 16, 8, 32
"""Of what turning affects: coordinates and tokens of a tile, and the most columns that it gathers
for them."""


class Turns(NamedTuple):
    """Both sides' rotations, as kernels see them.

    c, s, p: tables as in `givens`, the left's n entries and then the right's m. pairs_L, pairs_R:
    the slots' pairs, of which the first have E_L and E_R coordinates in all, −1 for none.
    """

    c: Tensor
    s: Tensor
    p: Tensor
    pairs_L: Tensor
    pairs_R: Tensor
    E_L: int
    E_R: int

    def affected(self, width: int) -> int:
        """How many coordinates turning affects on the side where it takes blocks along."""
        return self.E_L + width * self.E_R


def turns(
    left: Side, right: Side, C: Tensor, n: int, m: int, cayley: bool, max_angle: float
) -> Turns:
    """Of rotations of n and of m coordinates; a side without slots has None for them."""
    some = left if left[3] else right
    if not some[3]:
        return turns_of(left, right, C, C, C, C)
    sides = [side if side[3] else (*some[:3], 0) for side in (left, right)]
    return turns_of(left, right, C, *givens_kernels.tables(sides, (n, m), cayley, max_angle))


def turns_of(left: Side, right: Side, unused: Tensor, c: Tensor, s: Tensor, p: Tensor) -> Turns:
    some = left[1] if left[3] else right[1] if right[3] else unused
    pairs = (side[1] if side[3] else some for side in (left, right))
    return Turns(c, s, p, *pairs, 2 * left[3], 2 * right[3])


def forward(
    z: Tensor | None,
    x: Tensor,
    C: Tensor,
    turns: Turns,
    s_1: Tensor | None,
    b: Tensor | None,
    on_output: bool,
    n: int,
) -> tuple[Tensor, Tensor]:
    """(y, what backward needs of it), in z's memory: (1 + s_1) ⊙ (z + Δ) + b, or with
    `on_output` off z + (1 + s_1) ⊙ Δ + b; without z as if it were zeros, n wide."""
    (T, m), q, width = x.shape, C.shape[0], width_of(C)
    biased, scaled, onto = b is not None, s_1 is not None, z is not None
    z = x.new_empty(T, n) if z is None else z
    y = torch.empty_like(z) if biased and scaled and on_output else z
    *tables, E_L, E_R = turns
    tensors = (z, x, C, *tables, s_1 if scaled else C, b if biased else C, y)
    sizes = (T, n, m, q, E_L, E_R)
    flags = (E_L > 0, E_R > 0, onto, scaled, on_output, biased, y is not z, width)
    if width == 1:
        whole, wide, rows = BLOCK, BLOCK, ROWS
        columns, splits, tokens = cdiv(n, whole), cdiv(T, rows), rows
    else:
        whole, wide, rows = MOST_COLUMNS // width * width, MOST_COLUMNS, BLOCKS_FORWARD
        columns = cdiv(n, whole)
        splits, tokens = shares(T, columns, rows, 64)
    tile = (STAGES, whole, wide, rows)
    launch(_forward, (columns * splits,), tensors, *sizes, tokens, *flags, *tile)
    if E_L + E_R:
        tile = tile_of(width)
        columns = cdiv(turns.affected(width), tile[1])
        grid = (columns * cdiv(T, TOKENS),)
        launch(_forward_at, grid, tensors, *sizes, *flags, *tile, warps=2)
    return y, z


def backward(
    dy: Tensor,
    out: Tensor,
    x: Tensor,
    C: Tensor,
    turns: Turns,
    s_1: Tensor | None,
    on_output: bool,
    divide: bool,
    to_input: bool,
    energies: bool,
) -> tuple[
    Tensor,
    Tensor | None,
    Tensor,
    Tensor | None,
    tuple[Tensor, Tensor] | None,
    tuple[Squares, Squares] | None,
]:
    """(du, R_Rᵀ Cᵀ R_L (s ⊙ dy) if `to_input`, dC, ds, (dc, ds) of the tables at the pairs'
    coordinates, with `energies` x² and dy² summed over tokens)."""
    (T, n), m, q, width = dy.shape, x.shape[1], C.shape[0], width_of(C)
    scaled = s_1 is not None
    du = torch.empty_like(dy) if scaled and on_output else dy
    dx = dy.new_empty(T, m) if to_input else None
    *tables, E_L, E_R = turns
    narrow = width in (1, 2, 4, 8)
    whole = BLOCK_BACKWARD if narrow else MOST_COLUMNS // width * width
    # Sums of a block core's entries take half the registers with half the rows.
    rows = ROWS_BACKWARD // min(width, 2) if narrow else BLOCKS_BACKWARD
    columns = cdiv(max(n, m) if to_input or energies else n, whole)
    splits, tokens = shares(T, columns, rows, 64)
    dC_parts = dy.new_empty(splits, q, width, dtype=torch.float32)
    ds_parts = dy.new_empty(splits, n, dtype=torch.float32) if scaled else dC_parts
    squares = dy.new_empty(splits, n + m, dtype=torch.float32) if energies else dC_parts
    core = (C, *tables, s_1 if scaled else C)
    sizes, flags = (T, n, m, q, E_L, E_R), (E_L > 0, E_R > 0, scaled, on_output)
    launch(
        _backward if narrow else _backward_blocks, (columns, splits),
        (dy, out, x, *core, du, dx if to_input else du, dC_parts, ds_parts, squares),
        *sizes, tokens, *flags, divide, to_input, energies, width,
        *((STAGES_BACKWARD, rows, whole) if narrow else (STAGES, whole, MOST_COLUMNS, rows)),
        warps=1 if narrow else 4,
    )  # fmt: skip
    wide, of_tables, energy = torch.float32, None, None
    dC = dy.new_empty(q, width, dtype=wide)
    ds = dy.new_empty(n, dtype=wide) if scaled else None
    sums = [(dC_parts, dC)] + [(ds_parts, ds)] * scaled
    if energies:
        total = dy.new_empty(1, n + m, dtype=wide)
        sums.append((squares, total))
        g_squares, x_squares = total.split_with_sizes((n, m), 1)
        energy = Squares(x_squares, T), Squares(g_squares, T)
    fold(*sums)
    if E_L + E_R:
        tile, affected = tile_of(width), turns.affected(width)
        columns = cdiv(affected, tile[1])
        splits, tokens = shares(T, columns, TOKENS, TOKENS)
        sums = dy.new_empty(splits, 5 + width, affected, dtype=wide)
        columns_dx = cdiv(width * E_L + E_R, tile[1])
        tiles = columns_dx * cdiv(T, TOKENS) if to_input else 0
        launch(
            _backward_at, (columns * splits + tiles,),
            (dy, x, *core, sums, dx if to_input else du), *sizes, tokens, splits, columns_dx,
            *flags, width, *tile,
            warps=2,
        )  # fmt: skip
        # The sum for s on the output needs no turning, and is there.
        first_row = 0 if scaled and not on_output else 1
        of_tables = dy.new_empty(n + m, dtype=wide), dy.new_empty(n + m, dtype=wide)
        launch(
            _place, (columns, 5 + width - first_row),
            (sums, ds if scaled else dC, dC, *of_tables, *core), *sizes, splits,
            *flags, width, first_row, *tile[1:],
        )  # fmt: skip
    return du, dx, dC.view(C.shape), ds, of_tables, energy


def angles_backward(
    of_tables: tuple[Tensor, Tensor] | None,
    left: Side,
    right: Side,
    n: int,
    q: int,
    cayley: bool,
    max_angle: float,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients to both sides' θ; beyond the core's q columns nothing comes of the right's."""
    if of_tables is None:
        return None, None
    how = n, cayley, max_angle
    if not left[3]:
        of_right = (t[n:] for t in of_tables)
        return None, *givens_kernels.tables_backward(*of_right, [right], [q], *how)
    if not right[3]:
        return *givens_kernels.tables_backward(*of_tables, [left], [n], *how), None
    return tuple(givens_kernels.tables_backward(*of_tables, [left, right], [n, q], *how))


def width_of(C: Tensor) -> int:
    """How wide the core's blocks are; 1 where it is diagonal."""
    return C.shape[1] if C.ndim == 2 else 1


@known_again
def shares(T: int, columns: int, rows: int, least: int) -> tuple[int, int]:
    """Into how many splits T tokens go, for about PROGRAMS programs, and the tokens of each, whole
    tiles: about `least` or more."""
    splits = max(1, min(cdiv(T, least), cdiv(PROGRAMS, columns)))
    return splits, cdiv(cdiv(T, splits), rows) * rows


def tile_of(width: int) -> tuple[int, int, int]:
    """Tokens, coordinates, and the columns gathered for each, of what turning affects."""
    wide = power_of_2(width)
    return TOKENS, min(COLUMNS, ENTRIES // wide), wide


@triton.jit
def _turns(p, i, inside, side: tl.constexpr):
    """Whether a side pairs coordinate i with another."""
    if side:
        return inside & (tl.load(p + i, mask=inside, other=0) != i)
    return inside & (i < 0)


@triton.jit
def _entries(
    column, pairs_1, E_1, p_1, pairs_2, E_2, p_2, d, q,
    turns_1: tl.constexpr, turns_2: tl.constexpr,
    b: tl.constexpr, block: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Some of the coordinates below d that side 1 turns, and of those in the blocks where side 2
    turns any: the coordinate, and whether the entry stands for it, as one alone does."""
    e = column * block + tl.arange(0, block)
    of_block, r = e >= E_1, tl.maximum(e - E_1, 0)
    j = tl.load(pairs_1 + e, mask=e < E_1, other=-1)
    j = tl.load(pairs_2 + r // b, mask=of_block & (r < b * E_2), other=j).to(tl.int32)
    first = tl.maximum(j, 0) // b * b
    i = tl.where(of_block, first + r % b, j)
    in_1 = _turns(p_1, i, (i >= 0) & (i < d), turns_1)
    in_2 = _turns(p_2, j, of_block & (j >= 0) & (j < q), turns_2)
    before = first[:, None] + tl.arange(0, wide)[None, :]
    taken = _turns(p_2, before, in_2[:, None] & (before < j[:, None]), turns_2)
    in_2 = in_2 & (tl.max(taken.to(tl.int32), 1) == 0) & (i < q)
    return i, tl.where(of_block, in_2 & (in_1 == 0), in_1)


@triton.jit
def _number(t, i, inside):
    return tl.load(t + i, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _turn(c, s, p, i, inside, turns: tl.constexpr):
    """c_i, s_i, the partner, and whether it is another."""
    partner = i
    moves = inside & (i < 0)
    if turns:
        partner = tl.load(p + i, mask=inside, other=0).to(tl.int32)
        moves = inside & (partner != i)
    return tl.where(moves, _number(c, i, moves), 1.0), _number(s, i, moves), partner, moves


@triton.jit
def _columns(i, inside, q, b: tl.constexpr, wide: tl.constexpr):
    """The coordinates of the block that holds i."""
    k = tl.arange(0, wide)[None, :]
    j = (tl.maximum(i, 0) // b * b)[:, None] + k
    return j, inside[:, None] & (k < b) & (j < q)


@triton.jit
def _mixed(x, row, there, i, inside, c, s, partner, moves):
    """(R x)_i of some rows, for coordinates i in one dimension or in two."""
    u = c[None] * _number(x, row + i[None], there & inside[None])
    return u + s[None] * _number(x, row + partner[None], there & moves[None])


@triton.jit
def _core(
    x, row, there, i, inside, q, C, c, s, p, turns: tl.constexpr, b: tl.constexpr,
    wide: tl.constexpr,
):  # fmt: skip
    """z_i = (C R_R x)_i, and R_R x in its block."""
    inside = inside & (i < q)
    j, here = _columns(i, inside, q, b, wide)
    core = _number(C, i[:, None] * b + tl.arange(0, wide)[None, :], here)
    c, s, partner, moves = _turn(c, s, p, j, here, turns)
    u = _mixed(x, row[:, :, None], there[:, :, None], j, here, c, s, partner, moves)
    return tl.sum(core[None] * u, 2), u


@triton.jit
def _scaled_turn(c, s, p, s_1, i, inside, turns: tl.constexpr, scaled: tl.constexpr):
    """`_turn` of R_L diag(s)."""
    c, s, partner, moves = _turn(c, s, p, i, inside, turns)
    if scaled:
        c, s = c * (1 + _number(s_1, i, inside)), s * (1 + _number(s_1, partner, moves))
    return c, s, partner, moves


@triton.jit
def _back(
    dy, row, there, j, inside, q, C, c, s, p, s_1, turns: tl.constexpr, scaled: tl.constexpr,
    b: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """(Cᵀ R_L (s ⊙ dy))_j."""
    inside = inside & (j < q)
    i, here = _columns(j, inside, q, b, wide)
    core = _number(C, i * b + (j % b)[:, None], here)
    c, s, partner, moves = _scaled_turn(c, s, p, s_1, i, here, turns, scaled)
    h = _mixed(dy, row[:, :, None], there[:, :, None], i, here, c, s, partner, moves)
    return tl.sum(core[None] * h, 2)


@triton.jit
def _finish(
    z, y, at, u, delta, scale, shift, inside, scaled: tl.constexpr, on_output: tl.constexpr,
    biased: tl.constexpr, apart: tl.constexpr,
):  # fmt: skip
    """Add Δ to u, scale and shift, and store at `at`; with `apart` z keeps what is not scaled."""
    if scaled and not on_output:
        delta = scale * delta
    u = u + delta
    if apart:
        tl.store(z + at, u.to(z.dtype.element_ty), mask=inside)
    if scaled and on_output:
        u = scale * u
    if biased:
        u = u + shift
    tl.store(y + at, u.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _core_tile(C, first, q, b: tl.constexpr, whole: tl.constexpr, wide: tl.constexpr):
    """The square piece of Cᵀ whose columns begin at `first`."""
    k, i = tl.arange(0, wide)[:, None], tl.arange(0, wide)[None, :]
    core = tl.zeros((wide, wide), tl.float32)
    for j in range(b):
        at = i // b * b + j
        here = (i < whole) & (first + i < q) & (first + at < q)
        core = tl.where(k == at, _number(C, (first + i) * b + j, here), core)
    return core


@triton.jit
def _forward(
    z, x, C, c_L, s_L, p_L, pairs_L, pairs_R, s_1, b, y, T, n, m, q, E_L, E_R, tokens,
    left: tl.constexpr, right: tl.constexpr, onto: tl.constexpr, scaled: tl.constexpr,
    on_output: tl.constexpr, biased: tl.constexpr, apart: tl.constexpr, width: tl.constexpr,
    stages: tl.constexpr, whole: tl.constexpr, wide: tl.constexpr, block_t: tl.constexpr,
):  # fmt: skip
    p_R = p_L + n
    columns = tl.cdiv(n, whole)
    first = tl.program_id(0) % columns * whole
    k = tl.arange(0, wide)
    i, row = (first + k)[None, :], tl.arange(0, block_t)[:, None]
    in_n, in_q = (k < whole)[None, :] & (i < n), (k < whole)[None, :] & (i < q)
    begin = (tl.program_id(0) // columns).to(tl.int64) * tokens
    end = tl.minimum(begin + tokens, T)
    # What turning affects keeps its z for now: a store of all columns is a wide one.
    moves = _turns(p_R, first + k, (k < whole) & (first + k < q), right)
    if width > 1:
        moves = moves[:, None] & ((k // width)[:, None] == (k // width)[None, :])
        moves = tl.max(moves.to(tl.int32), 0) > 0
    rests = (_turns(p_L, i, in_n, left) | (in_q & moves[None, :])) == 0
    if width == 1:
        core = _number(C, i, rests & in_q)
    else:
        core = _core_tile(C, first, q, width, whole, wide).to(x.dtype.element_ty)
    scale = 1 + _number(s_1, i, rests & in_n) if scaled else 1.0
    shift = _number(b, i, rests & in_n) if biased else 0.0
    for t in tl.range(begin, end, block_t, num_stages=stages):
        there = row < end - t
        own = tl.load(x + t * m + (row * m + i), mask=there & in_q, other=0.0)
        u = _number(z + t * n, row * n + i, there & in_n) if onto else 0.0
        delta = core * own if width == 1 else tl.where(rests, tl.dot(own, core), 0.0)
        _finish(
            z + t * n, y + t * n, row * n + i, u, delta, scale, shift, there & in_n,
            scaled, on_output, biased, apart,
        )  # fmt: skip


@triton.jit
def _forward_at(
    z, x, C, c_L, s_L, p_L, pairs_L, pairs_R, s_1, b, y, T, n, m, q, E_L, E_R,
    left: tl.constexpr, right: tl.constexpr, onto: tl.constexpr, scaled: tl.constexpr,
    on_output: tl.constexpr, biased: tl.constexpr, apart: tl.constexpr, width: tl.constexpr,
    block_t: tl.constexpr, block: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    c_R, s_R, p_R = c_L + n, s_L + n, p_L + n
    columns = tl.cdiv(E_L + width * E_R, block)
    i, counts = _entries(
        tl.program_id(0) % columns, pairs_L, E_L, p_L, pairs_R, E_R, p_R, n, q,
        left, right, width, block, wide,
    )  # fmt: skip
    t = ((tl.program_id(0) // columns).to(tl.int64) * block_t + tl.arange(0, block_t))[:, None]
    inside = (t < T) & counts[None, :]
    u = _number(z, t * n + i[None, :], inside) if onto else 0.0
    delta, _ = _core(x, t * m, t < T, i, counts, q, C, c_R, s_R, p_R, right, width, wide)
    if left:
        c, s, partner, in_L = _turn(c_L, s_L, p_L, i, counts, left)
        other, _ = _core(x, t * m, t < T, partner, in_L, q, C, c_R, s_R, p_R, right, width, wide)
        delta = c[None, :] * delta - s[None, :] * other
    scale = 1 + _number(s_1, i, counts)[None, :] if scaled else 1.0
    shift = _number(b, i, counts)[None, :] if biased else 0.0
    at_i = t * n + i[None, :]
    _finish(z, y, at_i, u, delta, scale, shift, inside, scaled, on_output, biased, apart)


@triton.jit
def _split(t, count: tl.constexpr):
    """The even columns of each tensor, and then the odd ones."""
    even, odd = (), ()
    for k in tl.static_range(count):
        pairs = tl.reshape(t[k], (t[k].shape[0], t[k].shape[1] // 2, 2))
        one, other = tl.split(pairs)
        even, odd = even + (one,), odd + (other,)
    return even + odd


@triton.jit
def _joined(t, count: tl.constexpr):
    """What `_split` splits into so many tensors."""
    out = ()
    half: tl.constexpr = count // 2
    for k in tl.static_range(half):
        pairs = tl.join(t[k], t[half + k])
        out = out + (tl.reshape(pairs, (pairs.shape[0], pairs.shape[1] * 2)),)
    return out


@triton.jit
def _apart(t, width: tl.constexpr):
    """The first, second, … columns of each `width` neighbours: 1, 2, 4 or 8."""
    out = (t,)
    for k in tl.static_range(3):
        if width > 2**k:
            out = _split(out, 2**k)
    return out


@triton.jit
def _together(t, count: tl.constexpr):
    """The tensor whose columns `_apart` took apart, into so many: up to 64."""
    for k in tl.static_range(6):
        if count > 32 // 2**k:
            t = _joined(t, 64 // 2**k)
    return t[0]


@triton.jit
def _core_apart(C, i, q, width: tl.constexpr):
    """Entry (r, j) of the blocks of coordinates i, at j width + r."""
    out = ()
    for j in tl.static_range(width):
        here = (i < q) & (i // width * width + j < q)
        out = out + _apart(_number(C, i * width + j, here), width)
    return out


@triton.jit
def _zeros(rows: tl.constexpr, columns: tl.constexpr, count: tl.constexpr):
    out = ()
    for _ in tl.static_range(count):
        out = out + (tl.zeros((rows, columns), tl.float32),)
    return out


@triton.jit
def _add_products(sums, rows, columns, width: tl.constexpr):
    """sums[r, j] + rows[r] columns[j]."""
    out = ()
    for k in tl.static_range(width * width):
        out = out + (sums[k] + rows[k // width] * columns[k % width],)
    return out


@triton.jit
def _times(core, t, width: tl.constexpr, rows: tl.constexpr):
    """C t of each block with `rows`, else Cᵀ t."""
    out = ()
    for r in tl.static_range(width):
        total = core[r if rows else r * width] * t[0]
        for j in tl.static_range(1, width):
            total += core[j * width + r if rows else r * width + j] * t[j]
        out = out + (total,)
    return out


@triton.jit
def _backward(
    dy, out, x, C, c_L, s_L, p_L, pairs_L, pairs_R, s_1, du, dx, dC, ds, squares,
    T, n, m, q, E_L, E_R, tokens,
    left: tl.constexpr, right: tl.constexpr, scaled: tl.constexpr, on_output: tl.constexpr,
    divide: tl.constexpr, to_input: tl.constexpr, energies: tl.constexpr,
    width: tl.constexpr, stages: tl.constexpr, block_t: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * block
    i = (first + tl.arange(0, block))[None, :]
    split = tl.program_id(1).to(tl.int64)
    begin = split * tokens
    end = tl.minimum(begin + tokens, T)
    # A block's coordinates are apart, and so are its core's entries (r, j), each a tensor over the
    # blocks: a thread then holds blocks whole.
    blocks: tl.constexpr = block // width
    core = _core_apart(C, i, q, width)
    sum_C = _zeros(block_t, blocks, width * width)
    scale = 1 + _number(s_1, i, i < n) if scaled else 1.0
    sum_s = tl.zeros((block_t, block), tl.float32)
    squares_g = tl.zeros((block_t, block), tl.float32)
    squares_x = tl.zeros((block_t, block), tl.float32)
    # With stages of its own a loop fetches ahead.
    for begin_t in tl.range(begin, end, block_t, num_stages=stages):
        t = (begin_t + tl.arange(0, block_t)).to(tl.int64)[:, None]
        g = _number(dy, t * n + i, (t < end) & (i < n))
        own = _number(x, t * m + i, (t < end) & (i < (m if energies else q)))
        h = scale * g
        rows, columns = _apart(h, width), _apart(own, width)
        sum_C = _add_products(sum_C, rows, columns, width)
        if energies:
            squares_g += g * g
            squares_x += own * own
        if scaled:
            if on_output:
                sum_s += g * _number(out, t * n + i, (t < end) & (i < n))
                # h itself would be laid out among the threads a second time.
                again = _together(rows, width).to(du.dtype.element_ty)
                tl.store(du + t * n + i, again, mask=(t < end) & (i < n))
            else:
                sum_s += g * _together(_times(core, columns, width, 1), width)
        if to_input:
            e = _together(_times(core, rows, width, 0), width).to(dx.dtype.element_ty)
            tl.store(dx + t * m + i, e, mask=(t < end) & (i < m))
    # Put together, the entries of a block's core are neighbours, as they are in C.
    entry = (first * width + tl.arange(0, block * width))[None, :]
    r, j = entry // width, entry % width
    total = tl.sum(_together(sum_C, width * width), 0)[None, :]
    total = tl.where(r // width * width + j < q, total, 0.0)
    tl.store(dC + split * q * width + entry, total, mask=r < q)
    if scaled:
        total = tl.sum(sum_s, 0)[None, :]
        if divide:
            total = tl.where(scale == 0, 0.0, total / scale)
        tl.store(ds + split * n + i, total, mask=i < n)
    if energies:
        to = squares + split * (n + m) + i
        tl.store(to, tl.sum(squares_g, 0)[None, :], mask=i < n)
        tl.store(to + n, tl.sum(squares_x, 0)[None, :], mask=i < m)


@triton.jit
def _backward_blocks(
    dy, out, x, C, c_L, s_L, p_L, pairs_L, pairs_R, s_1, du, dx, dC, ds, squares,
    T, n, m, q, E_L, E_R, tokens,
    left: tl.constexpr, right: tl.constexpr, scaled: tl.constexpr, on_output: tl.constexpr,
    divide: tl.constexpr, to_input: tl.constexpr, energies: tl.constexpr, width: tl.constexpr,
    stages: tl.constexpr, whole: tl.constexpr, wide: tl.constexpr, block_t: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * whole
    k, row = tl.arange(0, wide)[None, :], tl.arange(0, block_t)[:, None]
    i = first + k
    in_n, in_m, in_q = (k < whole) & (i < n), (k < whole) & (i < m), (k < whole) & (i < q)
    split = tl.program_id(1).to(tl.int64)
    begin = split * tokens
    end = tl.minimum(begin + tokens, T)
    kind: tl.constexpr = x.dtype.element_ty
    core = _core_tile(C, first, q, width, whole, wide).to(kind)
    scale = 1 + _number(s_1, i, in_n) if scaled else 1.0
    sum_s = tl.zeros((block_t, wide), tl.float32)
    squares_g = tl.zeros((block_t, wide), tl.float32)
    squares_x = tl.zeros((block_t, wide), tl.float32)
    sum_C = tl.zeros((wide, wide), tl.float32)
    for t in tl.range(begin, end, block_t, num_stages=stages):
        there = row < end - t
        at_n, at_m = row * n + i, row * m + i
        g = _number(dy + t * n, at_n, there & in_n)
        own = tl.load(x + t * m + at_m, mask=there & (in_m if energies else in_q), other=0.0)
        h = scale * g
        if energies:
            squares_g += g * g
            squares_x += own.to(tl.float32) * own.to(tl.float32)
        if scaled:
            if on_output:
                sum_s += g * _number(out + t * n, at_n, there & in_n)
                tl.store(du + t * n + at_n, h.to(du.dtype.element_ty), mask=there & in_n)
            else:
                sum_s += g * tl.dot(own, core)
        h = h.to(kind)
        sum_C = tl.dot(tl.trans(own), h, sum_C)
        if to_input:
            e = tl.dot(h, tl.trans(core)).to(dx.dtype.element_ty)
            tl.store(dx + t * m + at_m, e, mask=there & in_m)
    if scaled:
        total = tl.sum(sum_s, 0)[None, :]
        if divide:
            total = tl.where(scale == 0, 0.0, total / scale)
        tl.store(ds + split * n + i, total, mask=in_n)
    if energies:
        to = squares + split * (n + m) + i
        tl.store(to, tl.sum(squares_g, 0)[None, :], mask=in_n)
        tl.store(to + n, tl.sum(squares_x, 0)[None, :], mask=in_m)
    # x goes on beyond the core where there are more inputs than outputs.
    j = tl.arange(0, wide)[:, None]
    to = dC + split * q * width + i * width + j % width
    sum_C = tl.where(first + j < q, sum_C, 0.0)
    tl.store(to, sum_C, mask=(j // width == k // width) & in_q)


@triton.jit
def _input_gradient_at(
    column, tile, dy, dx, C, c_L, s_L, p_L, pairs_L, pairs_R, s_1, T, n, m, q, E_L, E_R,
    left: tl.constexpr, right: tl.constexpr, scaled: tl.constexpr, on_output: tl.constexpr,
    width: tl.constexpr, block_t: tl.constexpr, block: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    c_R, s_R, p_R = c_L + n, s_L + n, p_L + n
    j, counts = _entries(
        column, pairs_R, E_R, p_R, pairs_L, E_L, p_L, m, q, right, left, width, block, wide
    )  # fmt: skip
    t = (tile.to(tl.int64) * block_t + tl.arange(0, block_t))[:, None]
    here = t < T
    e = _back(dy, t * n, here, j, counts, q, C, c_L, s_L, p_L, s_1, left, scaled, width, wide)
    if right:
        c, s, partner, in_R = _turn(c_R, s_R, p_R, j, counts, right)
        other = _back(
            dy, t * n, here, partner, in_R, q, C, c_L, s_L, p_L, s_1, left, scaled, width, wide
        )  # fmt: skip
        e = c[None, :] * e - s[None, :] * other
    tl.store(dx + t * m + j[None, :], e.to(dx.dtype.element_ty), mask=here & counts[None, :])


@triton.jit
def _sums_at(
    column, split, dy, x, C, c_L, s_L, p_L, pairs_L, pairs_R, s_1, found,
    T, n, m, q, E_L, E_R, tokens,
    left: tl.constexpr, right: tl.constexpr, scaled: tl.constexpr, on_output: tl.constexpr,
    width: tl.constexpr, block_t: tl.constexpr, block: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    c_R, s_R, p_R = c_L + n, s_L + n, p_L + n
    i, counts = _entries(
        column, pairs_L, E_L, p_L, pairs_R, E_R, p_R, n, q, left, right, width, block, wide
    )  # fmt: skip
    split = split.to(tl.int64)
    begin = split * tokens
    end = tl.minimum(begin + tokens, T)
    c, s, left_of, in_L = _turn(c_L, s_L, p_L, i, counts, left)
    scaled_c, scaled_s, _, _ = _scaled_turn(c_L, s_L, p_L, s_1, i, counts, left, scaled)
    _, _, right_of, in_R = _turn(c_R, s_R, p_R, i, counts & (i < q), right)
    scale = 1 + _number(s_1, i, counts) if scaled else 1.0
    zeros = tl.zeros((block_t, block), tl.float32)
    own, other, sum_cr, sum_sr = zeros, zeros, zeros, zeros
    sum_C = tl.zeros((block_t, block, wide), tl.float32)
    for first in range(begin, end, block_t):
        t = (first + tl.arange(0, block_t)).to(tl.int64)[:, None]
        here = t < end
        g = _number(dy, t * n + i[None, :], here & counts[None, :])
        z, u = _core(x, t * m, here, i, counts, q, C, c_R, s_R, p_R, right, width, wide)
        own += g * z
        h = scaled_c[None, :] * g
        if left:
            z, _u = _core(x, t * m, here, left_of, in_L, q, C, c_R, s_R, p_R, right, width, wide)
            other += g * z
            h += scaled_s[None, :] * _number(dy, t * n + left_of[None, :], here & in_L[None, :])
        sum_C += h[:, :, None] * u
        if right:
            e = _back(
                dy, t * n, here, i, in_R, q, C, c_L, s_L, p_L, s_1, left, scaled, width, wide
            )  # fmt: skip
            there = here & in_R[None, :]
            sum_cr += e * _number(x, t * m + i[None, :], there)
            sum_sr += e * _number(x, t * m + right_of[None, :], there)
    own, other = tl.sum(own, 0), tl.sum(other, 0)
    k = tl.arange(0, wide)[None, :]
    e = column * block + tl.arange(0, block)
    entries = E_L + width * E_R
    to = found + split * (5 + width) * entries + e
    tl.store(to, c * own - s * other, mask=e < entries)
    to_core = to[:, None] + (1 + k) * entries
    tl.store(to_core, tl.sum(sum_C, 0), mask=(e < entries)[:, None] & (k < width))
    to += (1 + width) * entries
    tl.store(to, scale * own, mask=e < entries)
    tl.store(to + entries, -scale * other, mask=e < entries)
    tl.store(to + 2 * entries, tl.sum(sum_cr, 0), mask=e < entries)
    tl.store(to + 3 * entries, tl.sum(sum_sr, 0), mask=e < entries)


@triton.jit
def _backward_at(
    dy, x, C, c_L, s_L, p_L, pairs_L, pairs_R, s_1, found, dx, T, n, m, q, E_L, E_R,
    tokens, splits, columns_dx,
    left: tl.constexpr, right: tl.constexpr, scaled: tl.constexpr, on_output: tl.constexpr,
    width: tl.constexpr, block_t: tl.constexpr, block: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first = tl.cdiv(E_L + width * E_R, block) * splits
    if program < first:
        _sums_at(
            program // splits, program % splits, dy, x, C, c_L, s_L, p_L, pairs_L, pairs_R, s_1,
            found, T, n, m, q, E_L, E_R, tokens,
            left, right, scaled, on_output, width, block_t, block, wide,
        )  # fmt: skip
    else:
        program -= first
        _input_gradient_at(
            program % columns_dx, program // columns_dx, dy, dx, C, c_L, s_L, p_L, pairs_L,
            pairs_R, s_1, T, n, m, q, E_L, E_R,
            left, right, scaled, on_output, width, block_t, block, wide,
        )  # fmt: skip


@triton.jit
def _place(
    found, ds, dC, dcos, dsin, C, c_L, s_L, p_L, pairs_L, pairs_R, s_1,
    T, n, m, q, E_L, E_R, splits,
    left: tl.constexpr, right: tl.constexpr, scaled: tl.constexpr, on_output: tl.constexpr,
    width: tl.constexpr, first_row: tl.constexpr, block: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) + first_row
    i, counts = _entries(
        tl.program_id(0), pairs_L, E_L, p_L, pairs_R, E_R, p_L + n, n, q,
        left, right, width, block, wide,
    )  # fmt: skip
    e = (tl.program_id(0) * block + tl.arange(0, block))[None, :]
    total = tl.zeros((16, block), tl.float32)
    for first in range(0, splits, 16):
        split = first + tl.arange(0, 16)[:, None]
        at_e = (split * (5 + width) + row) * (E_L + width * E_R) + e
        total += _number(found, at_e, counts[None, :] & (split < splits))
    total = tl.sum(total, 0)
    if row == 0:
        tl.store(ds + i, total, mask=counts)
    elif row <= width:
        tl.store(dC + i * width + row - 1, total, mask=counts & (i < q))
    else:
        # cos and sin of the left, which the right's are behind.
        side, inside = (row - width - 1) // 2, counts & ((row - width - 1) // 2 * i < m)
        if (row - width - 1) % 2 == 0:
            tl.store(dcos + side * n + i, total, mask=inside)
        else:
            tl.store(dsin + side * n + i, total, mask=inside)
