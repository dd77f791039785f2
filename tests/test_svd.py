"""Singular triplets by the exact and by the randomised algorithm."""

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.base import LinearBase
from lora_lite.ops import svd
from lora_lite.ops.svd import nystrom, sketching, truncated_svd


def orthonormal(n, m, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, m, generator=generator, dtype=torch.float64)).Q


def spectrum(decay):
    """500 singular values that fall as k^−decay; those of white noise for 0."""
    if decay:
        return torch.arange(1, 501).double() ** -decay
    generator = torch.Generator().manual_seed(5)
    return torch.linalg.svdvals(torch.randn(600, 500, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("r", [1, 8, 64])
def test_the_randomised_error(dtype, decay, r):
    """Singular values of trained weights fall about as k^−0.3 to k^−1; noise is the worst case."""
    S = spectrum(decay)
    W = (orthonormal(600, 500, 0) * S @ orthonormal(500, 500, 1).T).to(dtype)
    got = truncated_svd(W, r, "randomised", 0)
    assert all(t.dtype == dtype for t in got)
    U, S_r, Vh = (t.double() for t in got)
    left = (W.double() - U * S_r @ Vh).norm() / S[r:].norm()
    most, off = (1.001, 0.01) if decay else (1.002, 0.04)
    assert left <= most, f"{left - 1:.1e} more is left of W than must be"
    assert ((S_r - S[:r]).abs() / S[:r]).max() <= off
    eye, eps = torch.eye(r).double(), torch.finfo(dtype).eps
    for Q in (U.T @ U, Vh @ Vh.T):
        assert (Q - eye).abs().max() < 50 * eps
    assert (S_r.diff() <= 0).all()


def covariance(decay, d=500):
    """Eigenvalues and a d × d matrix that has them: squares of singular values that fall as
    k^−decay."""
    values = torch.arange(1, d + 1).double() ** (-2 * decay)
    Q = orthonormal(d, d, 3)
    return values, (Q * values) @ Q.T


@pytest.mark.parametrize("decay, lost, off", [(1.0, 3e-5, 0.04), (0.5, 0.01, 0.3)])
@pytest.mark.parametrize("k", [4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_error_of_the_sketch(dtype, k, decay, lost, off):
    """How much of the trace that k directions can have the found ones miss, and by how much
    eigenvalues are too small: for what is nearly so in any data, 8 k + 10 products and no more."""
    values, C = covariance(decay)
    Omega = sketching(500, k)
    assert Omega.shape == (500, 8 * k + 10)
    eps = torch.finfo(dtype).eps
    V, found = nystrom((C.to(dtype) @ Omega.to(dtype)).double(), Omega.double(), k, eps)
    assert (V.T @ V - torch.eye(k)).abs().max() < 1e-12
    best = values[:k].sum()
    assert 0 < 1 - ((C @ V) * V).sum() / best <= lost
    short = 1 - found / values[:k]
    assert short.min() > -10 * eps and short.max() <= off
    assert (found.diff() <= 0).all()
    # The leading half lies in what was found.
    exact = torch.linalg.eigh(C).eigenvectors.flip(1)[:, : k // 2]
    assert torch.linalg.svdvals(V.T @ exact).min() > 1 - 3 * lost


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_a_sketch_as_wide_as_the_matrix_is_exact(decay):
    values, C = covariance(decay, 60)
    generator = torch.Generator().manual_seed(4)
    rotation = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64)).Q
    assert torch.equal(sketching(60, 7), torch.eye(60)) and sketching(60, 6).shape == (60, 58)
    for Omega in (torch.eye(60, dtype=torch.float64), rotation):
        V, found = nystrom(C @ Omega, Omega, 7, 1e-16)
        torch.testing.assert_close(found, values[:7], rtol=1e-10, atol=0)
        torch.testing.assert_close((V * found).T, V.T @ C, rtol=0, atol=1e-12)


def test_a_sketch_finds_all_of_few_directions_and_is_orthonormal_beyond():
    """Of rank 3: what of the products is rounding divides nothing."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(200, 3, generator=generator).double() @ orthonormal(500, 3, 7).T
    C, Omega = x.T @ x, sketching(500, 8).double()
    for eps, noise in ((1e-16, 0), (1e-7, 1e-8)):
        Y = C @ Omega
        Y = Y + noise * Y.norm() * torch.randn(Y.shape, generator=generator) / Y.numel() ** 0.5
        V, found = nystrom(Y, Omega, 8, eps)
        assert (V.T @ V - torch.eye(8)).abs().max() < 1e-12
        exact = torch.linalg.eigvalsh(C).flip(0)[:3]
        torch.testing.assert_close(found[:3], exact, rtol=1e-6, atol=0)
        assert found[3:].max() < 1e-5 * found[0]
        torch.testing.assert_close((V[:, :3] * found[:3]) @ V[:, :3].T, C, rtol=0, atol=1e-4)


def test_the_default_is_exact_up_to_2048_and_randomised_above():
    assert svd.WIDE == 2048
    kinds = {
        (2048, 4096, 8): False,
        (2049, 4096, 8): True,
        (4096, 2049, 8): True,
        (4096, 4096, 1024): True,
        # More than a quarter of the triplets: the exact algorithm costs no more.
        (4096, 4096, 1025): False,
    }
    for (n, m, r), want in kinds.items():
        assert svd.is_randomised("auto", r, n, m) is want, (n, m, r)
        assert svd.is_randomised("randomised", r, n, m)
        assert not svd.is_randomised("exact", r, n, m)


@pytest.mark.parametrize("variant", ["pissa", "antipasto", "antipasto_rot", "dplr"])
def test_every_start_from_triplets_follows_the_setting(variant, monkeypatch):
    """`auto`, with layers of 64 taken for wide, is `randomised` bit for bit; `exact` is not."""
    monkeypatch.setattr(svd, "WIDE", 40)
    layer, kept = nn.Linear(64, 48, bias=False), {}
    for kind in ("auto", "exact", "randomised"):
        ll.attach(layer, variant, r=8, svd=kind, seed=0)
        own = layer.adapters["default"].tensors()
        kept[kind] = (
            own["B0"] @ own["A0"] if variant == "pissa" else own["U"] * own["S"] @ own["Vh"]
        )
        ll.detach(layer)
    assert torch.equal(kept["auto"], kept["randomised"])
    assert not torch.equal(kept["auto"], kept["exact"])
    assert (kept["auto"] - kept["exact"]).norm() < 0.1 * kept["exact"].norm()


def test_a_weight_is_decomposed_once_per_attach(monkeypatch):
    layer, calls = nn.Linear(48, 64), []
    truncated = svd.truncated_svd

    def counted(*args):
        calls.append(args[1:3])
        return truncated(*args)

    monkeypatch.setattr("lora_lite.base.truncated_svd", counted)
    batches = [torch.randn(40, 48) for _ in range(3)]
    ll.attach(layer, "antipasto", r=8, calibration=batches)
    assert calls == [(48, "exact")]
    ll.detach(layer)
    ll.attach(layer, "antipasto", r=8, svd="randomised", calibration=batches)
    assert calls[1:] == [(32, "randomised")]


def test_calibration_of_wide_layers_chooses_among_the_leading_triplets():
    layer = nn.Linear(64, 64, bias=False)
    U, S, Vh = LinearBase(layer).svd(64, "exact")
    # Loud along v_20, louder along v_60.
    x = torch.cat([10 * Vh[20:21], 1000 * Vh[60:61], torch.randn(30, 64)])
    found = {}
    for kind in ("exact", "randomised"):
        ll.attach(layer, "antipasto", r=8, svd=kind, calibration=[x])
        found[kind] = layer.adapters["default"].Vh
        ll.detach(layer)
    seen = lambda v, among: float((among @ v).norm())
    assert seen(Vh[60], found["exact"]) > 0.999
    assert seen(Vh[60], found["randomised"]) < 0.7
