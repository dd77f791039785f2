"""What `diagnose` says of an adapted model."""

import json
import math
import sys

import pytest
import torch
from models import MLP
from settings import LINEAR, SMALL
from torch import nn

import lora_lite as ll
from lora_lite.diagnose import spectrum
from lora_lite.testing import calibration_for, move, snapshot, unchanged
from lora_lite.variant import configure


def test_the_spectrum_of_known_matrices():
    rank, entropy = spectrum(torch.diag(torch.tensor([3.0, 3.0, 3.0, 0.0])))
    assert (rank, entropy) == (pytest.approx(3, rel=1e-6), pytest.approx(math.log(3), rel=1e-6))
    rank, entropy = spectrum(torch.diag(torch.tensor([3.0, 1.0])).double())
    assert entropy == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), rel=1e-12)
    assert rank == pytest.approx(math.exp(entropy), rel=1e-12)
    assert spectrum(torch.zeros(4, 3)) == (0.0, 0.0)
    assert spectrum(torch.outer(torch.ones(5), torch.ones(3)))[0] == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("variant", LINEAR)
def test_every_method_has_a_table(variant):
    model = MLP()
    configured = configure(variant, **SMALL[variant][0])
    batches = calibration_for(configured, [torch.randn(64, 24)])
    ll.attach(model, configured, seed=0, calibration=batches)
    move(model)
    before = snapshot(model)
    found = ll.diagnose(model)
    unchanged(model, before)
    deltas = ll.delta_weights(model)
    for row, (name, layer) in zip(
        found.rows, (("block.up", model.block["up"]), ("block.down", model.block["down"]))
    ):
        assert (row["layer"], row["adapter"], row["method"]) == (name, "default", variant)
        want = deltas[name]
        assert row["change"] == pytest.approx(float(want.norm() / layer.weight.norm()), rel=1e-5)
        assert row["effective_rank"] == pytest.approx(spectrum(want)[0], rel=1e-9)
        assert row["effective_rank"] == pytest.approx(math.exp(row["spectral_entropy"]), rel=1e-9)
    assert len(str(found).splitlines()) == 3 and "effective_rank" in str(found)
    json.dumps(found.rows)


def test_lora_has_its_own_rank():
    model = MLP()
    ll.attach(model, "lora", r=1)
    assert all(row["effective_rank"] == 0 == row["change"] for row in ll.diagnose(model).rows)
    move(model)
    assert all(row["effective_rank"] == pytest.approx(1) for row in ll.diagnose(model).rows)


def test_what_has_no_matrix_has_no_spectrum():
    model = MLP()
    ll.attach(model, "jora", clip="tanh", magnitude="none", targets=["up"])
    ll.attach(model, "lora", name="second", targets=["down"])
    first, second = ll.diagnose(model).rows
    assert first["effective_rank"] is first["change"] is first["spectral_entropy"] is None
    assert second["effective_rank"] == 0 and "angle_L_rad" not in second
    assert "–" in str(ll.diagnose(model))
    assert "effective_rank" not in ll.diagnose(model, spectra=False).columns


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="the model has no adapters"):
        ll.diagnose(MLP())


def test_jora_tells_of_angles_energies_churn_and_magnitudes():
    model = nn.Sequential(nn.Linear(24, 40, dtype=torch.float64))
    ll.attach(model, "jora", k=4, ema_beta=0.0, dtype=torch.float64, ecd_temp_annealing=True)
    tensors = model[0].adapters.default.tensors()
    nn.init.normal_(tensors["g_mag"])
    x = torch.ones(1, 24, dtype=torch.float64)
    x[0, [3, 8, 5, 1]] = torch.tensor([4.0, 3, 2, 2]).double()
    model(x).square().sum().backward()
    fresh = ll.diagnose(model).rows[0]
    assert (fresh["entered_R"], fresh["left_R"], fresh["moved_R"]) == (0, 0, 0.0)
    with torch.no_grad():
        tensors["theta_R"].fill_(2.0)
    pairs = tensors["pairs_R"][:2]
    moved = sum(2 * float(x[0, pair].square().sum()) for pair in pairs) / (20 + 33)
    ll.step(model, total=4)
    with torch.no_grad():
        tensors["theta_R"][:2] = torch.tensor([2.0, -2.0])
    row = ll.diagnose(model).rows[0]
    assert row["angle_R_rad"] == pytest.approx([math.pi / 2] * 2)
    assert row["angle_L_rad"] == [0, 0]
    assert row["chosen_energy_R"] == pytest.approx(33 / (20 + 33), rel=1e-6)
    assert (row["entered_R"], row["left_R"]) == (2, 2)
    assert row["moved_R"] == pytest.approx(moved, rel=1e-6)
    assert row["energy_error"] < 1e-6
    assert row["temperature"] == 4.0


def test_a_broken_magnitude_would_be_seen():
    class Broken(ll.JORA, name="broken_magnitude_test"):
        def scale(self, **t):
            return super().scale(**t) + 1e-3

    model = MLP()
    ll.attach(model, Broken)
    assert all(row["energy_error"] > 1e-3 for row in ll.diagnose(model).rows)


def test_plots_are_written_and_matplotlib_is_asked_for(tmp_path, monkeypatch):
    model = MLP()
    ll.attach(model, "jora")
    move(model)
    ll.diagnose(model).plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'lora-lite\[bench\]'"):
        ll.diagnose(model).plot(tmp_path / "b.png")
