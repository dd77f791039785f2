"""The least that a method can cost by what its fused form must move and multiply, for judging what
was measured: counted from the operations in `ops`, in bfloat16, forward and backward."""

import dataclasses
from dataclasses import dataclass

from lora_lite.bench.cost_rows import Row
from lora_lite.bench.workload import Shape

BYTES = 2

CEILINGS = {"NVIDIA H200": (4.3e12, 790e12)}
"""By device, bytes a second of a large copy and operations a second of a large product."""

RANKS = ("r", "init_r", "lowrank_r")
"""What methods call the rank of their narrow products."""


@dataclass(frozen=True)
class Work:
    """What a method adds to a layer's step beside the layer's own products.

    inputs, outputs: how often the d_in numbers of each token, and the d_out, are read or written.
    matrix: how often the layer's weight is read. narrow_in, narrow_out: products of tokens by
    d_in × r, and by d_out × r.
    """

    inputs: int
    outputs: int
    matrix: int = 0
    narrow_in: int = 0
    narrow_out: int = 0


# x for A x, dx twice, x for A's gradient; y twice, dy: the layer's own products accumulate.
LOW_RANK = Work(4, 3, 0, 3, 3)
# The same without a gradient to A, so x once.
FROZEN_FACTORS = Work(3, 3, 0, 2, 2)
ROTATED_INPUT = Work(5, 0)
GATE = 5

WORK: dict[str, Work] = {
    "lora": LOW_RANK,
    "rslora": LOW_RANK,
    "pissa": LOW_RANK,
    "eva": LOW_RANK,
    "adalora": LOW_RANK,
    # The output is read and scaled where it lies; backward reads it and writes its gradient scaled.
    "dora": Work(4, 5, 1, 3, 3),
    "dplr": FROZEN_FACTORS,
    "antipasto": FROZEN_FACTORS,
    "antipasto_rot": FROZEN_FACTORS,
    "vera": Work(3, 3, 0, 2, 3),
    "oft": ROTATED_INPUT,
    # All levels in one pass.
    "boft": Work(5, GATE),
    "hra": Work(7, 0, 0, 6, 0),
    "ia3": Work(0, GATE),
    "ia3_ff": Work(GATE, 0),
    "road": Work(0, GATE),
    # x and the output; x, dy and dx twice, energies among the sums.
    "jora": Work(4, 3),
}
"""By method, at the settings of the cost benchmark."""

COMPILED: dict[str, Work | None] = {"ia3": None, "ia3_ff": None, "boft": ROTATED_INPUT}
"""The same of methods with a gate where they are compiled: it is fused with what is beside it."""


def work_of(row: Row) -> Work | None:
    """What a row's configuration adds; None for what is not counted."""
    table = WORK | COMPILED if row.mode == "compiled" else WORK
    known, hyper = table.get(row.variant), row.hyperparameters
    if row.variant != "jora":
        return known
    if hyper["clip"] != "none" or hyper["core"] in ("selective", "coupled"):
        return None
    known = LOW_RANK if hyper["core"] == "lowrank" else known
    # A scale on the output is DoRA's.
    more = 2 if hyper["magnitude"] != "none" and hyper["magnitude_on"] == "output" else 0
    return dataclasses.replace(known, outputs=known.outputs + more)


def counted(row: Row) -> float | None:
    """The least multiple of the floor's time that a row's work amounts to on its device, on all
    projections; None where work or device is not known."""
    work, ceilings = work_of(row), CEILINGS.get(row.device)
    if work is None or ceilings is None or row.track != "all-linear":
        return None
    shape = Shape(**row.shape)
    width, inner, tokens = shape.width, shape.intermediate, shape.tokens
    # q, k, v, o; gate and up; down.
    layers = [(width, width)] * 4 + [(width, inner)] * 2 + [(inner, width)]
    d_in, d_out = (sum(side) for side in zip(*layers))
    weights = sum(n * m for n, m in layers)
    rank = next((row.hyperparameters[k] for k in RANKS if k in row.hyperparameters), 0)
    rank *= 2 if row.variant == "pissa" else 1
    moved = BYTES * (tokens * (work.inputs * d_in + work.outputs * d_out) + work.matrix * weights)
    done = 2 * tokens * rank * (work.narrow_in * d_in + work.narrow_out * d_out)
    bandwidth, rate = ceilings
    return 1 + 1e3 * shape.layers * (moved / bandwidth + done / rate) / row.floor.ms
