"""Small models that the tests adapt."""

import torch
from torch import nn


class MLP(nn.Module):
    """Rectangular layers under nested names, a bias here and none there, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"up": nn.Linear(24, 40), "down": nn.Linear(40, 24, bias=False)})
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x + self.block["down"](torch.tanh(self.block["up"](x)))))


def llama(tie: bool = False, **config):
    """A random Llama of two layers, widths 32 and 48."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(LlamaConfig(**(sizes | config))).eval()


def gpt2():
    """A random GPT-2 of two layers, whose projections are Conv1D."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ).eval()


def gemma(**config):
    """A random Gemma of two layers: norms by 1 + weight, embeddings times √d, a tied head."""
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    return GemmaForCausalLM(GemmaConfig(**(sizes | config))).eval()


def t5():
    """A random T5, whose encoder, decoder and head have embeddings of one weight."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


IDS = torch.arange(20).view(2, 10) % 64
