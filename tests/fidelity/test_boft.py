"""BOFT (arXiv:2311.06243 §4) against W' = diag(s) W Rᵀ, R the product of its butterflies, entry by
entry, and for m = 1 against PEFT."""

import math

import peft
import pytest
import torch
from peft_reference import both, scatter
from reference import (
    TOLERANCE,
    adapted,
    assert_close,
    assert_follows,
    assert_starts_as_identity,
    first_gradients,
    in_dtypes,
    inputs,
    largest_in_a_step,
    linear,
    on_layers,
    settings,
    tensors,
    updated_weight,
    with_and_without_bias,
)

import lora_lite as ll
from lora_lite import shapes
from lora_lite.base import LinearBase
from lora_lite.ops.blocks import add_butterflies, drop_blocks

LAWS = {"boft": [dict(block_size=4, m=2), dict(n_blocks=2), dict(block_size=2, m=3)]}
KEPT = {"boft": (dict(block_size=8, m=2), 2 * 96 + 160)}


def skew(entries, b):
    """S from its strict upper triangle, row by row."""
    S = torch.zeros(b, b, dtype=entries.dtype)
    upper = torch.zeros_like(S, dtype=torch.bool)
    for i in range(b):
        upper[i, i + 1 :] = True
    S = S.masked_scatter(upper, entries)
    return S - S.T


def rotation(entries, b):
    """(I − S)(I + S)⁻¹."""
    S, eye = skew(entries, b), torch.eye(b, dtype=entries.dtype)
    return (eye - S) @ torch.linalg.inv(eye + S)


def members(level, block, b):
    """Which inputs a block mixes: eq. 1's pair of diagonals. Two halves, 2^level halves apart."""
    half, apart = b // 2, 2**level
    group, within = divmod(block, apart)
    first = 2 * apart * group + within
    return [h * half + o for h in (first, first + apart) for o in range(half)]


def factor(level, entries, b):
    """B_i, written entry by entry."""
    d = len(entries) * b
    B = torch.zeros(d, d, dtype=entries.dtype)
    for block, row in enumerate(entries):
        at = torch.tensor(
            members(level, block, b) if level else list(range(block * b, block * b + b))
        )
        B = B.index_put((at[:, None], at[None, :]), rotation(row, b))
    return B


def butterfly(q, b):
    """The widest level on the left."""
    R = torch.eye(q.shape[1] * b, dtype=q.dtype)
    for level, entries in enumerate(q):
        R = factor(level, entries, b) @ R
    return R


def size(hyper, d_in):
    return d_in // hyper["n_blocks"] if "n_blocks" in hyper else hyper.get("block_size", 4)


def dense(hyper):
    return lambda W, q, s: torch.diag(s) @ W @ butterfly(q, size(hyper, W.shape[1])).T


EVERY = settings(
    default={},
    two_levels=dict(block_size=4, m=2),
    three_levels=dict(block_size=2, m=3),
    two_of_two=dict(block_size=2, m=2),
    by_number=dict(n_blocks=4, m=2),
    wide=dict(n_blocks=2, m=2),
    one_block=dict(n_blocks=1),
    even=dict(block_size=8),
)


@on_layers
@in_dtypes
@EVERY
def test_matches_the_butterflies(d_in, d_out, bias, dtype, hyper):
    model = adapted("boft", d_in, d_out, bias, dtype=dtype, moved=0.3, **hyper)
    assert_follows(model, dense(hyper), {"q", "s"}, TOLERANCE[dtype])


@settings(
    odd_blocks=dict(d_in=21, block_size=3),
    four=dict(d_in=48, block_size=6, m=4),
    five=dict(d_in=32, block_size=2, m=5),
    dense=dict(d_in=32, block_size=4, m=4),
)
def test_matches_at_other_sizes(hyper):
    hyper = dict(hyper)
    model = adapted("boft", hyper.pop("d_in"), 40, moved=0.3, **hyper)
    assert_follows(model, dense(hyper), {"q", "s"}, 1e-10)


@with_and_without_bias
@EVERY
def test_starts_as_identity(bias, hyper):
    assert_starts_as_identity("boft", bias, **hyper)


def test_everything_moves_at_the_first_step():
    grads = first_gradients("boft", block_size=2, m=3)
    assert grads["q"].all() and grads["s"].all()


def test_shapes_and_parameter_count():
    chart = ll.plan(linear(24, 40), "boft", block_size=4, m=2)
    assert chart.sites[0].shapes == {"q": (2, 6, 6), "s": (40,)}
    # §4: ½ (b − 1) d m, and one magnitude a row.
    assert chart.trainable == (4 - 1) * 24 * 2 // 2 + 40
    assert ll.plan(linear(24, 40), "boft").sites[0].shapes["q"] == (1, 6, 6)
    assert ll.plan(linear(24, 40), "boft", n_blocks=3).sites[0].shapes["q"] == (1, 3, 28)


def rotated(d, **hyper):
    """R of a moved adapter without magnitudes."""
    model = adapted("boft", d, d, False, **hyper)
    model.weight.data = torch.eye(d, dtype=torch.float64)
    tensors(model)["s"].data.fill_(1)
    return updated_weight(model).T


@pytest.mark.parametrize("d, b, m", [(24, 4, 2), (32, 2, 5), (24, 6, 1), (48, 6, 4)])
def test_is_a_rotation(d, b, m):
    R = rotated(d, block_size=b, m=m, moved=1.0)
    assert_close(R @ R.T, torch.eye(d).double())
    assert_close(torch.linalg.det(R), torch.tensor(1.0).double())


@on_layers
@EVERY
def test_keeps_norms_and_angles_but_for_the_magnitudes(d_in, d_out, bias, hyper):
    model = adapted("boft", d_in, d_out, bias, **hyper)
    W, s, W_new = model.weight, tensors(model)["s"], updated_weight(model)
    assert_close(W_new @ W_new.T, s[:, None] * (W @ W.T) * s)


@pytest.mark.parametrize("d, b", [(32, 4), (64, 2), (24, 6), (24, 12)])
def test_is_dense_from_as_many_levels_as_the_paper_says(d, b):
    """§4: BOFT(log₂(2d/b), b) yields a dense R; a level less reaches half of the inputs."""
    m = 1 + int(math.log2(d / b))
    reached = [(rotated(d, block_size=b, m=k).abs() > 1e-14).double().mean() for k in (m - 1, m)]
    assert reached == [0.5, 1.0]


def test_levels_as_in_figure_4():
    """Inputs 1 … 8 in pairs that are 1, 2 and 4 apart."""
    for level in range(3):
        R = torch.zeros(3, 4, 2, 2).index_fill(0, torch.tensor(level), 1)
        z = add_butterflies(torch.eye(8), R) - torch.eye(8)
        for i in range(8):
            assert sorted(z[i].nonzero().flatten().tolist()) == sorted({i, i ^ (1 << level)})


def test_with_one_level_and_no_magnitude_is_exact_oft():
    """At the opposite sign of the entries."""
    model, other = adapted("boft", block_size=8), adapted("oft", block_size=8, exact=True)
    tensors(model)["s"].data.fill_(1)
    tensors(other)["q"].data.copy_(-tensors(model)["q"][0])
    assert_close(updated_weight(model), updated_weight(other), 1e-14)


def test_negated_entries_undo_a_level():
    model = adapted("boft", 24, 24, False, block_size=4)
    model.weight.data = torch.eye(24, dtype=torch.float64)
    own = tensors(model)
    own["s"].data.fill_(1)
    R = updated_weight(model)
    own["q"].data.neg_()
    assert_close(updated_weight(model), R.T)


def test_the_bias_is_not_scaled():
    model = adapted("boft", moved=0)
    s = tensors(model)["s"]
    s.data.copy_(torch.linspace(-1, 2, 40))
    x = inputs(24)
    assert_close(model(x), s * (x @ model.weight.T) + model.bias)


@pytest.mark.parametrize("moved", [1e-4, 1e-6])
def test_a_small_rotation_keeps_its_digits_in_bfloat16(moved):
    """R − I is what is cast: an R in bfloat16 would be I."""
    model = linear(24, 40, False, dtype=torch.bfloat16)
    ll.attach(model, "boft", block_size=4, m=2)
    own = tensors(model)
    own["q"].data.normal_().mul_(moved)
    want = torch.stack([rotation(row, 4) for row in own["q"].detach().double().flatten(0, 1)])
    got = prepared(model).bfloat16().double().flatten(0, 1)
    assert_close(got, want - torch.eye(4), 1e-2)


def prepared(model):
    """C − I of every block in a forward."""
    adapter = model.adapters["default"]
    return adapter.variant.prepare(LinearBase(model), **adapter.tensors())["C_1"].detach()


@settings(one=dict(m=1, p=0.5), three=dict(m=3, p=0.34), few=dict(m=2, p=0.1))
def test_dropout_makes_some_blocks_of_one_level_the_identity(hyper):
    m, p = hyper["m"], hyper["p"]
    model = adapted("boft", block_size=2, m=m, dropout=p)
    whole, drawn, levels = prepared(model.eval()), set(), set()
    assert whole.any(-1).any(-1).all()
    model.train()
    for _ in range(50):
        C_1 = prepared(model)
        out = (C_1 == 0).all(-1).all(-1)
        assert torch.equal(C_1[~out], whole[~out])
        assert sorted(out.sum(1).tolist()) == [0] * (m - 1) + [int(p * 12)]
        levels |= set(out.any(1).nonzero().flatten().tolist())
        drawn |= set(out.nonzero()[:, 1].tolist())
    assert levels == set(range(m)) and drawn == set(range(12))


def test_dropout_is_for_training_alone():
    model = adapted("boft", block_size=2, m=2, dropout=0.5)
    x, want = inputs(24), dense(dict(block_size=2))(model.weight, **tensors(model))
    assert not torch.allclose(model(x), model(x))
    assert_close(updated_weight(model.eval()), want.detach())
    assert_close(
        ll.delta_weights(torch.nn.Sequential(model.train()))["0"], (want - model.weight).detach()
    )


def test_dropped_blocks_get_no_gradient():
    R = torch.randn(3, 10, 2, 2, requires_grad=True)
    drop_blocks(R, 0.4).sum().backward()
    out = (R.grad == 0).all(-1).all(-1)
    assert out.sum() == 4 and (out.sum(1) == 4).sum() == 1
    assert (R.grad[~out] == 1).all()


def test_dropout_compiles_whole():
    model = adapted("boft", dtype=torch.float32, block_size=2, m=2, dropout=0.5)
    x = inputs(24, torch.float32)
    torch._dynamo.reset()
    with shapes.unchecked():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        outputs = [compiled(x) for _ in range(5)]
        outputs[0].sum().backward()
        compiled.eval()
        whole = compiled(x)
    assert any(not torch.equal(outputs[0], y) for y in outputs[1:])
    assert tensors(model)["q"].grad.any()
    model.eval()
    assert torch.allclose(whole, model(x))


def test_without_dropout_no_random_number_is_drawn():
    model = adapted("boft", m=2)
    state = torch.get_rng_state()
    model(inputs(24))
    assert torch.equal(torch.get_rng_state(), state)


@EVERY
def test_a_step_makes_nothing_of_the_size_of_the_matrix(hyper):
    if "n_blocks" not in hyper:
        b, m = hyper.get("block_size", 4), hyper.get("m", 1)
        assert largest_in_a_step("boft", 160, **hyper) <= 160 * max(b * m, 4)


@on_layers
@in_dtypes
@settings(
    default={},
    two=dict(block_size=2),
    eight=dict(block_size=8),
    by_number=dict(n_blocks=2),
    one=dict(n_blocks=1),
)
@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor:UserWarning")
def test_against_peft(d_in, d_out, bias, dtype, hyper):
    """One level: PEFT takes more with its CUDA extension alone, and one without it."""
    n_blocks = hyper.get("n_blocks", 0)
    config = peft.BOFTConfig(
        boft_block_size=0 if n_blocks else hyper.get("block_size", 4), boft_block_num=n_blocks
    )
    layer, other = both("boft", config, d_in, d_out, bias, dtype, **hyper)
    P, s = other.boft_R["default"], other.boft_s["default"]
    scatter(dict(P=P, s=s))
    own, b = tensors(layer), P.shape[-1]
    i, j = torch.triu_indices(b, b, 1)
    own["q"].data.copy_(((P - P.mT) / 2)[..., i, j])
    own["s"].data.copy_(s[:, 0])
    x, x_theirs = (inputs(d_in, dtype).requires_grad_() for _ in range(2))
    y, y_theirs = layer(x), other(x_theirs)
    y_grad = inputs(d_out, dtype).flip(0)
    y.backward(y_grad)
    y_theirs.backward(y_grad)
    tolerance = TOLERANCE[dtype]
    assert_close(y, y_theirs, tolerance, "the output")
    assert_close(x.grad, x_theirs.grad, tolerance, "the gradient to x")
    assert_close(own["s"].grad, s.grad[:, 0], tolerance, "the gradient to s")
    # Each entry stands in P twice, by halves.
    want = (P.grad - P.grad.mT)[..., i, j]
    assert_close(own["q"].grad, want, tolerance, "the gradient to q")


@settings(
    none=(dict(m=0), "m=0 must be ≥ 1"),
    both=(dict(block_size=4, n_blocks=2), "say the same thing; give one of them"),
    one=(dict(block_size=1), "block_size=1 must be ≥ 2: smaller rotates nothing"),
    no_block=(dict(n_blocks=0), "n_blocks=0 must be ≥ 1"),
    dropout=(dict(dropout=1.0), r"dropout=1.0 must be in \[0, 1\)"),
    size=(
        dict(block_size=5),
        "the model has in_features=24, and block_size=5 does not fit; use 2, 3, 4, 6, 8, 12, 24",
    ),
    levels=(
        dict(block_size=4, m=3),
        "in_features=24, and block_size=4 with m=3, 4 even blocks or a multiple, "
        "does not fit; use 2, 6$",
    ),
    odd=(dict(block_size=3, m=2), "block_size=3 with m=2, .* use 2, 4, 6, 12$"),
    number=(dict(n_blocks=3, m=2), "n_blocks=3 with m=2, .* use 2, 4, 6, 12$"),
    too_many=(dict(n_blocks=48), "n_blocks=48 does not fit; use 1, 2, 3"),
    deep=(dict(m=5), "block_size=4 with m=5, .* no size fits, exclude the layer"),
)
def test_what_cannot_work_is_refused(hyper):
    hyper, match = hyper
    with pytest.raises(ValueError, match=f"^boft: .*{match}"):
        ll.attach(linear(), "boft", **hyper)


def test_weight_decay_leaves_the_magnitudes_alone():
    groups = ll.param_groups(adapted("boft"), lr=1e-3, weight_decay=0.1)
    decays = {tuple(p.shape): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {(1, 6, 6): 0.1, (40,): 0.0}
