"""Singular triplets by the exact and by the randomised algorithm."""

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.base import LinearBase
from lora_lite.ops import svd
from lora_lite.ops.svd import truncated_svd


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
