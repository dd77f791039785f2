"""OFT and COFT (arXiv:2306.07280 §3), OFTv2 (arXiv:2506.19847 §3) against W' = W Rᵀ."""

import pytest
import torch
from reference import (
    TOLERANCE,
    adapted,
    assert_close,
    assert_follows,
    assert_starts_as_identity,
    in_dtypes,
    inputs,
    linear,
    on_layers,
    settings,
    tensors,
    updated_weight,
    with_and_without_bias,
)

import lora_lite as ll

LAWS = {
    "oft": [
        dict(block_size=8),
        dict(n_blocks=2, exact=True),
        dict(block_size=4, block_share=True),
    ]
}
KEPT = {"oft": (dict(block_size=32), 96)}


def skew(entries, b):
    """Q from its strict upper triangle, row by row."""
    Q = torch.zeros(b, b, dtype=entries.dtype)
    upper = torch.zeros_like(Q, dtype=torch.bool)
    for i in range(b):
        for j in range(i + 1, b):
            upper[i, j] = True
    Q = Q.masked_scatter(upper, entries)
    return Q - Q.T


def cayley(Q):
    """arXiv:2306.07280 §3.3."""
    eye = torch.eye(len(Q), dtype=Q.dtype)
    return (eye + Q) @ torch.linalg.inv(eye - Q)


def neumann(Q, terms):
    """arXiv:2506.19847 §3.3: (I + Q)(I + Σ Qⁱ), i = 1 … k, k = terms − 2."""
    eye = torch.eye(len(Q), dtype=Q.dtype)
    return (eye + Q) @ (eye + sum(torch.matrix_power(Q, i) for i in range(1, terms - 1)))


def dense(b, rotation):
    """W' = W Rᵀ; a single block serves all."""

    def W_new(W, q):
        blocks = [rotation(skew(row, b)) for row in q]
        n = W.shape[1] // b
        return W @ torch.block_diag(*(blocks * n if len(blocks) == 1 else blocks)).T

    return W_new


@on_layers
@in_dtypes
@settings(
    default_terms=dict(terms=5, block_size=8),
    blocks_of_two=dict(terms=5, block_size=2),
    by_number=dict(terms=4, n_blocks=2),
    one_block=dict(terms=4, n_blocks=1),
    shared=dict(terms=5, block_size=4, block_share=True),
    exact=dict(exact=True, block_size=8),
    exact_by_number=dict(exact=True, n_blocks=4),
    exact_shared=dict(exact=True, block_size=4, block_share=True),
    coft=dict(terms=6, block_size=4, coft=True),
    **{f"terms_{t}": dict(terms=t, block_size=4) for t in (2, 3, 4, 6)},
)
def test_matches_the_rotated_input(d_in, d_out, bias, dtype, hyper):
    model = adapted("oft", d_in, d_out, bias, dtype=dtype, moved=0.2, **hyper)
    b = hyper.get("block_size") or d_in // hyper["n_blocks"]
    rotation = cayley if hyper.get("exact") else lambda Q: neumann(Q, hyper["terms"])
    assert_follows(model, dense(b, rotation), {"q"}, TOLERANCE[dtype])


@pytest.mark.parametrize("exact", [False, True])
@with_and_without_bias
def test_starts_as_identity(bias, exact):
    assert_starts_as_identity("oft", bias, block_size=8, exact=exact)


def test_shapes_and_parameter_count():
    chart = ll.plan(linear(24, 40), "oft", block_size=8)
    assert chart.sites[0].shapes == {"q": (3, 28)}
    # §3.3: d(d/r − 1)/2 for r blocks.
    assert chart.trainable == 24 * (8 - 1) // 2
    assert ll.plan(linear(24, 40), "oft", n_blocks=3, block_share=True).trainable == 28


def rotation_of(moved, **hyper):
    """R as the layer applies it: x ↦ Rᵀ x under W = I. Returns (R, Q) of one 8 × 8 block."""
    model = linear(8, 8, False)
    model.weight.data = torch.eye(8, dtype=torch.float64)
    ll.attach(model, "oft", block_size=8, dtype=torch.float64, **hyper)
    q = tensors(model)["q"]
    q.data = moved * torch.randn(q.shape, generator=torch.Generator().manual_seed(4)).double()
    return updated_weight(model).T, skew(q.detach()[0], 8)


@on_layers
@settings(
    separate=dict(block_size=8), by_number=dict(n_blocks=4), shared=dict(n_blocks=2, block_share=1)
)
def test_exact_keeps_norms_and_angles(d_in, d_out, bias, hyper):
    hyper = {key: bool(v) if key == "block_share" else v for key, v in hyper.items()}
    model = adapted("oft", d_in, d_out, bias, exact=True, **hyper)
    W, W_new = model.weight, updated_weight(model)
    assert_close(W_new @ W_new.T, W @ W.T)
    assert not torch.allclose(W_new, W)


@pytest.mark.parametrize("moved", [0.01, 0.3, 3.0])
def test_exact_is_a_rotation(moved):
    R, Q = rotation_of(moved, exact=True)
    assert_close(R @ R.T, torch.eye(8).double())
    assert_close(torch.linalg.det(R), torch.tensor(1.0).double())
    assert_close(R, cayley(Q))


@pytest.mark.parametrize("terms", [2, 3, 4, 5, 6, 7, 9])
def test_error_of_the_series(terms):
    """Against the exact rotation and against orthogonality, from Q's largest frequency ω."""
    R, Q = rotation_of(0.06, terms=terms)
    omega = torch.linalg.eigvals(Q).abs().max()
    assert 0.1 < omega < 0.9
    norm = lambda M: torch.linalg.matrix_norm(M, 2)
    assert_close(norm(R - cayley(Q)), omega ** (terms - 1), 1e-9)
    sign = {0: 0, 1: -1, 3: 1}[terms % 4 if terms % 2 else 0]
    want = 2 * omega ** (terms - 1) * abs(sign) + (sign or 1) * omega ** (2 * (terms - 1))
    assert_close(norm(R.T @ R - torch.eye(8)), want, 1e-8)


@settings(exact=dict(exact=True), even=dict(terms=4), odd=dict(terms=5))
def test_negated_entries_transpose_the_rotation(hyper):
    R, _ = rotation_of(0.3, **hyper)
    back, _ = rotation_of(-0.3, **hyper)
    assert_close(back, R.T)


def test_shared_block_rotates_every_block_alike():
    model = adapted("oft", 24, 24, False, block_size=8, block_share=True)
    model.weight.data = torch.eye(24, dtype=torch.float64)
    R = updated_weight(model).T
    block = R[:8, :8]
    assert not torch.allclose(block, torch.eye(8).double())
    assert_close(R, torch.block_diag(block, block, block))


@on_layers
@pytest.mark.parametrize("eps", [1e-3, 0.1])
@pytest.mark.parametrize("share", [False, True])
def test_coft_projects_after_the_step(d_in, d_out, bias, eps, share):
    """§3.4: ‖Q‖ ≤ ε as the projection of projected gradient descent, ε spread over the blocks."""
    model = adapted("oft", d_in, d_out, bias, block_size=8, coft=True, eps=eps, block_share=share)
    q = tensors(model)["q"]
    n = len(q)
    q.data[0] *= 1e-6
    before = q.detach().clone()
    model(inputs(d_in))
    assert torch.equal(q, before)
    ll.step(model)
    assert torch.equal(q[0], before[0])
    for i in range(1, n):
        Q = skew(q.detach()[i], 8)
        assert_close(Q.norm(), torch.tensor(eps / n**0.5, dtype=torch.float64))
        assert_close(Q / Q.norm(), skew(before[i], 8) / skew(before[i], 8).norm())
    once = q.detach().clone()
    ll.step(model)
    assert_close(q, once, 1e-15)


def test_coft_bounds_the_whole_rotation():
    """‖Q‖ ≤ ε over all blocks, so ‖R − I‖ ≤ 2 ε to first order: R ≈ I + 2Q, §3.4."""
    model = adapted("oft", 40, 24, block_size=8, coft=True, eps=1e-3)
    ll.step(model)
    blocks = [neumann(skew(row, 8), 5) for row in tensors(model)["q"].detach()]
    assert_close(
        (torch.block_diag(*blocks) - torch.eye(40)).norm(),
        torch.tensor(2e-3, dtype=torch.float64),
        1e-3,
    )


def test_without_coft_a_step_changes_nothing():
    model = adapted("oft", block_size=8)
    before = tensors(model)["q"].detach().clone()
    ll.step(model)
    assert torch.equal(tensors(model)["q"], before)


def test_coft_leaves_zero_alone():
    model = adapted("oft", block_size=8, coft=True, moved=0)
    ll.step(model)
    assert not tensors(model)["q"].any()
