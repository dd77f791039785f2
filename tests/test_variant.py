"""Declaring a method: what is taken, what is refused, what is said."""

import dataclasses

import pytest
import torch
from jaxtyping import Float, Int64
from models import MLP
from settings import BUILT_IN
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.testing import check_variant
from lora_lite.variant import configure, divisors, zeros


class Gain(ll.Variant, name="gain_test", aliases=("gain_alias",)):
    """Scale the output: y = (1 + g) ⊙ W x."""

    floor: float = -1.0

    g: Float[Tensor, "d_out"] = ll.ParamSpec(zeros, lr=10.0, decay=False)

    def forward(self, x, W, g):
        return W(x) + g * W.less_bias(W(x))


def test_a_users_variant_registers_and_keeps_every_law():
    assert "gain_test" in ll.variants() and "gain_alias" not in ll.variants()
    assert configure("gain_alias") == Gain() == configure(Gain) == configure(Gain())
    check_variant(Gain)


def test_the_kit_sees_a_broken_variant():
    class Broken(Gain, name="broken_test"):
        def forward(self, x, W, g):
            return W(x) + (g + 0.1) * W(x)

    with pytest.raises(AssertionError, match="start is as declared"):
        check_variant(Broken)

    class Leaky(Gain, name="leaky_test"):
        def forward(self, x, W, g):
            wide = torch.promote_types(x.dtype, torch.float32)
            return (W(x).to(wide) * (1 + g.to(wide))).to(x.dtype)

    with pytest.raises(AssertionError, match="are not widened"):
        check_variant(Leaky)

    class Curved(Gain, name="curved_test"):
        def forward(self, x, W, g):
            return W(x) + torch.tanh(g * x[..., :1])

    with pytest.raises(AssertionError, match="merge equals forward"):
        check_variant(Curved)

    class Stuck(Gain, name="stuck_test"):
        def forward(self, x, W, g):
            return W(x) + g.detach()

    with pytest.raises((AssertionError, RuntimeError)):
        check_variant(Stuck)


def test_a_configured_variant_is_a_frozen_value():
    assert ll.LoRA(r=4) == ll.LoRA(r=4) != ll.LoRA(r=8)
    assert str(ll.LoRA(r=4)) == "LoRA(r=4, alpha=16.0, rslora=False, dropout=0.0)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        ll.LoRA().r = 4
    assert configure(ll.LoRA(r=4), alpha=1.0) == ll.LoRA(r=4, alpha=1.0)


def test_shapes_are_the_words_of_the_annotation():
    assert ll.LoRA(r=4).shapes(24, 40) == {"A": (4, 24), "B": (40, 4)}
    assert ll.OFT(block_size=8).shapes(24, 40) == {"q": (3, 28)}
    assert ll.AntiPaSTORot(r=8).shapes(24, 40)["rot_T"] == (2, 6)
    assert "rot_T" not in ll.AntiPaSTORot(r=8, rotate_basis="none").shapes(24, 40)


def test_names_of_the_core_are_refused_as_hyperparameters_and_tensors():
    with pytest.raises(TypeError, match="Taken: seed is a name of the core's own"):

        class Taken(ll.Variant, name="taken_test"):
            seed: int = 0

    with pytest.raises(TypeError, match="Named: W is a name"):

        class Named(ll.Variant, name="named_test"):
            W: Float[Tensor, "d_out"] = ll.ParamSpec(zeros)

    with pytest.raises(TypeError, match="the name 'lora' belongs to lora_lite.variants.lora.LoRA"):

        class Lora(ll.Variant):
            pass


def test_the_shape_checker_sees_a_tensor_of_another_shape_or_kind():
    model = MLP()
    ll.attach(model, "lora", targets=["up"])
    adapter = model.block["up"].adapters.default
    adapter.B = nn.Parameter(torch.zeros(8, 40))
    with pytest.raises(Exception, match="B|dimension"):
        model(torch.randn(2, 24))
    ll.detach(model)
    ll.attach(model, "jora", targets=["up"])
    pairs = model.block["up"].adapters.default
    pairs.pairs_L = pairs.pairs_L.float()
    with pytest.raises(Exception, match="pairs|Int64"):
        model(torch.randn(2, 24))


class Wide(ll.Variant, name="wide_test"):
    """Returns too many outputs."""

    c: Float[Tensor, "d_out"] = ll.ParamSpec(zeros)
    i: Int64[Tensor, "d_out"] = ll.ParamSpec(
        lambda shape, generator: torch.zeros(shape, dtype=torch.int64), trainable=False
    )

    def forward(self, x, W, c, i):
        return torch.cat([W(x), x], -1)


def test_the_shape_checker_sees_an_output_of_another_shape():
    layer = nn.Linear(4, 6)
    ll.attach(layer, Wide)
    assert layer.adapters.default.i.dtype == torch.int64
    with pytest.raises(TypeError, match=r"wide_test: the output is torch.float32 \(2, 10\)"):
        layer(torch.randn(2, 4))


def test_a_start_of_another_shape_is_refused():
    class Off(ll.Variant, name="off_test"):
        c: Float[Tensor, "d_out"] = ll.ParamSpec(lambda shape, generator: torch.zeros(3))

        def forward(self, x, W, c):
            return W(x)

    with pytest.raises(TypeError, match=r"the start of c has \(3,\), its shape is \(6,\)"):
        ll.attach(nn.Linear(4, 6), Off)


def test_describe_says_formula_hyperparameters_and_tensors():
    text = ll.describe("dora")
    assert "2402.09353" in text and "r = 8" in text
    assert "m (d_out): trained" in text and "m0 (d_out): frozen, not saved" in text
    assert ll.describe(ll.LoRA).startswith("lora (LoRA)")
    with pytest.raises(KeyError, match="no variant 'dorra'; did you mean 'dora'"):
        ll.describe("dorra")


def test_every_method_says_what_a_reader_needs():
    for name in BUILT_IN:
        text = ll.describe(name)
        assert "Start" in text and "Shapes" in text, name


def test_divisors_of_a_size():
    assert divisors(12) == "2, 3, 4, 6 or 12" and divisors(7) == "7"
