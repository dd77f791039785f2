"""Row scales that keep a weight's total energy Σ ‖w_i‖²."""

import torch
from jaxtyping import Float
from torch import Tensor


def oer_softmax(
    g: Float[Tensor, " n"], norms: Float[Tensor, " n"], temperature: float
) -> Float[Tensor, " n"]:
    """s − 1 for s_i² = p_i/p⁰_i, p⁰ = ‖w_i‖²/E and p = softmax(log p⁰ + g/T).

    Σ (s_i ‖w_i‖)² = E for every g and T, and g = 0 gives exact zeros. Rows without energy keep
    s = 1 and stay out of the softmax.
    """
    log_energy = 2 * norms.log()
    shift = torch.logsumexp(log_energy + g / temperature, 0) - torch.logsumexp(log_energy, 0)
    s_1 = torch.expm1((g / temperature - shift) / 2)
    return torch.where(norms > 0, s_1, 0)


def ecd_tanh(
    g: Float[Tensor, " n"], norms: Float[Tensor, " n"], temperature: float, alpha: float
) -> Float[Tensor, " n"]:
    """s − 1 for s_i = a_i √(E / Σ ‖w_j‖² a_j²), a = 1 + α tanh(g/T)."""
    a = 1 + alpha * torch.tanh(g / temperature)
    energy = norms.square()
    return a * (energy.sum() / (energy * a.square()).sum()).sqrt() - 1
