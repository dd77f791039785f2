"""What the comparisons with PEFT 0.21.2 share: its layer on our base, our tensors against its."""

import peft
import torch
from reference import TOLERANCE, assert_close, inputs, linear, tensors
from torch import nn

import lora_lite as ll


def peft_layer(layer: nn.Linear, config: peft.PeftConfig, dtype: torch.dtype) -> nn.Module:
    """PEFT's layer on a float32 copy of ours, then in `dtype`."""
    twin = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    twin.load_state_dict(layer.state_dict())
    config.target_modules = ["0"]
    model = peft.get_peft_model(nn.Sequential(twin), config).to(dtype)
    return model.base_model.model[0]


def scatter(theirs: dict[str, nn.Parameter], scale: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(3)
    for p in theirs.values():
        p.data = (torch.randn(p.shape, generator=generator) * scale).to(p)


def assert_agree(
    layer: nn.Linear, other: nn.Module, pairs: dict[str, nn.Parameter], sign: float = 1
) -> None:
    """Load PEFT's tensors, `sign` times, into ours; compare outputs and gradients."""
    dtype = layer.weight.dtype
    for key, p in pairs.items():
        tensors(layer)[key].data.copy_(sign * p.data)
    x, x_theirs = (inputs(layer.in_features, dtype).requires_grad_() for _ in range(2))
    y, y_theirs = layer(x), other(x_theirs)
    y_grad = inputs(layer.out_features, dtype).flip(0)
    y.backward(y_grad)
    y_theirs.backward(y_grad)
    tolerance = TOLERANCE[dtype]
    assert_close(y, y_theirs, tolerance, "the output")
    assert_close(x.grad, x_theirs.grad, tolerance, "the gradient to x")
    assert set(pairs) == {key for key, t in tensors(layer).items() if t.requires_grad}
    for key, p in pairs.items():
        assert_close(tensors(layer)[key].grad, sign * p.grad, tolerance, f"the gradient to {key}")


def both(variant, config, d_in, d_out, bias, dtype, **hyper):
    """Our layer and PEFT's on the same base, representable in float32."""
    base = linear(d_in, d_out, bias, dtype=torch.float32)
    other = peft_layer(base, config, dtype)
    layer = base.to(dtype)
    ll.attach(layer, variant, dtype=dtype, seed=0, **hyper)
    return layer, other
