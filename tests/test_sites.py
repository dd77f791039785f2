"""Layers that are no plain linear ones: norms, embeddings with what is tied to them, and blocks."""

import copy

import pytest
import torch
from models import IDS, MLP, gemma, gpt2, llama, t5
from safetensors.torch import load_file
from torch import nn

import lora_lite as ll
from lora_lite.shapes import unchecked
from lora_lite.testing import move, snapshot, unchanged

TOKENS = dict(token_indices=(3, 5))


class GatedNorm(nn.Module):
    """A norm that takes a second argument, as Mamba's do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x, gate=None):
        gated = x if gate is None else x * gate
        return self.weight * gated / gated.square().mean(-1, keepdim=True).sqrt()


class FrozenBatchNorm(nn.Module):
    """By channel, and its weight is a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(8))


def test_a_norm_gets_the_other_arguments_of_its_call():
    norm, x, gate = GatedNorm(), torch.randn(2, 8), torch.randn(2, 8)
    plain = norm(x, gate)
    ll.attach(norm, "ln_tuning")
    assert torch.equal(norm(x, gate), plain) and torch.equal(norm(x, gate=gate), plain)
    assert not torch.equal(norm(x), plain)
    move(norm)
    gamma = norm.adapters.default.weight
    assert torch.allclose(norm(x, gate), gamma * plain)
    ll.attach(norm, "ln_tuning", name="second")
    assert torch.allclose(norm(x, gate=gate), gamma * plain)


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(8, elementwise_affine=False),
        nn.LayerNorm((4, 8)),
        nn.GroupNorm(2, 8),
        nn.BatchNorm1d(8),
        nn.InstanceNorm1d(8, affine=True),
        FrozenBatchNorm(),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_norms_of_another_kind_are_named(norm):
    model = nn.ModuleDict({"inner": nn.ModuleDict({"norm": norm}), "other": nn.LayerNorm(8)})
    assert [s.name for s in ll.plan(model, "ln_tuning").sites] == ["other"]
    kind = type(norm).__name__
    with pytest.raises(ValueError, match=f"targets: 'norm' matches only inner.norm, a {kind}, "):
        ll.attach(model, "ln_tuning", targets=["norm"])


@pytest.mark.parametrize("variant, hyper", [("ln_tuning", {}), ("trainable_tokens", TOKENS)])
def test_what_is_offloaded_is_refused(variant, hyper, tmp_path):
    from accelerate import dispatch_model

    where = {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    where |= {"model.layers.0": "disk", "model.layers.1": "cpu", "lm_head": "cpu"}
    options = dict(main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    model = dispatch_model(llama(), where, **options)
    with pytest.raises(ValueError, match=rf"{variant}: model\.\S* is offloaded between calls"):
        ll.attach(model, variant, **hyper)
    assert not any("adapters" in name for name, _ in model.named_modules())


def sites(model, variant, **arguments):
    return [site.name for site in ll.plan(model, variant, **arguments).sites]


def adapted(model, variant="trainable_tokens", **hyper):
    ll.attach(model, variant, seed=0, **(hyper or TOKENS))
    move(model)
    return model


def test_a_table_of_several_layers_is_adapted_at_all_of_them():
    """T5 looks tokens up by its encoder's and its decoder's embedding, never by the shared one."""
    model, other = adapted(t5()), t5()
    chart = ll.plan(other, "trainable_tokens", **TOKENS)
    tied = ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]
    assert [(s.name, list(s.tied)) for s in chart.sites] == [("shared", tied)]
    assert "shared + encoder.embed_tokens + decoder.embed_tokens + lm_head" in str(chart)
    assert chart.trainable == 2 * 32
    with torch.no_grad():
        other.shared.weight[[3, 5]] = model.shared.adapters.default.tokens
    want, got = (m(input_ids=IDS, labels=IDS.flip(1)).logits for m in (other, model))
    torch.testing.assert_close(got, want)
    for each in ("encoder.embed_tokens", r".*embed_tokens", lambda name, layer: "tok" in name):
        assert len(sites(t5(), "trainable_tokens", targets=each, **TOKENS)) == 1
    assert sites(t5(), "trainable_tokens", targets=["embed_tokens"], **TOKENS) == tied[:1]


def test_a_borrowed_adapter_is_saved_once_and_by_transformers_too(tmp_path):
    model = adapted(llama(tie=True))
    names = [name for name in model.state_dict() if "adapters" in name]
    assert names == [f"model.embed_tokens.adapters.default.{t}" for t in ("tokens", "index", "slot")]
    model.save_pretrained(tmp_path)
    assert torch.equal(
        load_file(tmp_path / "model.safetensors")[names[0]],
        model.model.embed_tokens.adapters.default.tokens,
    )
    assert model.lm_head.borrowed["default"] is model.model.embed_tokens.adapters.default
    ll.save(model, tmp_path / "a.safetensors")
    assert list(load_file(tmp_path / "a.safetensors")) == ["model.embed_tokens.tokens"]


def test_copies_and_pickles_borrow_from_their_own(tmp_path):
    model = adapted(llama(tie=True))
    logits = model(IDS).logits
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(twin(IDS).logits, logits)
        own = twin.model.embed_tokens.adapters.default
        assert twin.lm_head.borrowed["default"] is own
        assert own is not model.model.embed_tokens.adapters.default
        own.tokens.data.zero_()
        assert not torch.equal(twin(IDS).logits, logits)
        ll.detach(twin)
        assert type(twin.lm_head) is nn.Linear and not hasattr(twin.lm_head, "borrowed")
        assert torch.equal(twin(IDS).logits, llama(tie=True)(IDS).logits)
    assert torch.equal(model(IDS).logits, logits)
    double = model.double()
    assert double(IDS).logits.dtype == torch.float64


@pytest.mark.parametrize("order", ["head first", "head second"])
def test_a_tied_head_carries_an_adapter_of_its_own_beside_the_borrowed_one(order, tmp_path):
    """They compose in the order attached, which a rotation of the input tells apart."""
    model = llama(tie=True)
    before = snapshot(model)
    own = dict(targets=["lm_head"], name="head", block_size=8)
    steps = [("oft", own), ("trainable_tokens", TOKENS)]
    for variant, arguments in steps if order == "head first" else steps[::-1]:
        ll.attach(model, variant, seed=0, **arguments)
    move(model, scale=0.3)
    h = torch.randn(2, 3, 32)
    tokens, head = model.model.embed_tokens.adapters.default, model.lm_head
    alone = nn.Linear(32, 64, bias=False)
    alone.weight = nn.Parameter(head.weight.detach().clone())
    ll.attach(alone, "oft", block_size=8)
    alone.adapters["default"].q.data.copy_(head.adapters["head"].q)
    E, turned = alone.weight.detach().clone(), alone(h)
    delta = torch.zeros_like(E).index_copy(0, torch.tensor([3, 5]), tokens.tokens - E[[3, 5]])
    if order == "head first":
        want = turned + h @ delta.T
    else:
        alone.weight.data += delta
        want = alone(h)
    torch.testing.assert_close(head(h), want)
    assert not torch.allclose(turned + h @ delta.T, alone(h)) or order == "head first"
    with pytest.raises(ValueError, match="weight is shared by .*embed_tokens.*lm_head"):
        ll.merge(model)
    assert [row["layer"] for row in ll.diagnose(model).rows] == ["model.embed_tokens", "lm_head"]
    assert list(ll.delta_weights(model)) == ["model.embed_tokens", "lm_head"]
    ll.save(model, tmp_path / "tokens.safetensors", "default")
    ll.save(model, tmp_path / "head.safetensors", "head")
    fresh = llama(tie=True)
    for name in ("head", "tokens") if order == "head first" else ("tokens", "head"):
        ll.load(fresh, tmp_path / f"{name}.safetensors")
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    ll.detach(model, "default")
    torch.testing.assert_close(model.lm_head(h), turned)
    ll.detach(model, "head")
    unchanged(model, before)


class Positions(nn.Embedding):
    """Looks up places, not tokens, as OPT's and BART's do."""

    def forward(self, ids):
        return super().forward(torch.arange(ids.shape[1]) + 2)


def test_what_looks_something_else_up_is_no_table_of_tokens():
    model = nn.ModuleDict({"places": Positions(12, 8), "tokens": nn.Embedding(64, 8)})
    assert sites(model, "trainable_tokens", **TOKENS) == ["tokens"]
    with pytest.raises(ValueError, match="only places, a Positions, which this method can't"):
        ll.attach(model, "trainable_tokens", targets=["places"], **TOKENS)
    ll.attach(model, "trainable_tokens", **TOKENS)
    assert sites(model, "trainable_tokens", name="b", **TOKENS) == ["tokens"]


def test_which_embedding():
    assert sites(gpt2(), "trainable_tokens", **TOKENS) == ["transformer.wte"]
    assert sites(llama(), "trainable_tokens", **TOKENS) == ["model.embed_tokens"]
    model = nn.ModuleDict({"words": nn.Embedding(64, 8), "places": nn.Embedding(9, 8)})
    with pytest.raises(ValueError, match="has the embeddings words, places; say which by"):
        ll.attach(model, "trainable_tokens", **TOKENS)
    assert sites(model, "trainable_tokens", targets=["places"], **TOKENS) == ["places"]
    assert sites(nn.Embedding(9, 8), "trainable_tokens", **TOKENS) == [""]
    with pytest.raises(ValueError, match="MLP has no layer of the kind 'embedding' to adapt"):
        ll.attach(MLP(), "trainable_tokens", **TOKENS)


def test_a_table_that_rescales_itself_is_refused():
    model = nn.Embedding(9, 8, max_norm=1.0)
    with pytest.raises(ValueError, match="the model rescales its rows where it looks them up"):
        ll.attach(model, "trainable_tokens", **TOKENS)


def test_a_table_resized_after_the_attach_is_refused():
    for tie in (False, True):
        model = adapted(llama(tie))
        model.resize_token_embeddings(70)
        with unchecked(), pytest.raises(ValueError, match="has 70 rows, and had 64 when it was"):
            model(IDS)


def test_new_tokens_load_on_a_base_whose_new_rows_started_elsewhere(tmp_path):
    """Resizing draws the new rows at random; they are the adapter's to say, and no mark of a base."""
    new = dict(token_indices=(64, 65))
    model, other = llama(), llama()
    for seed, each in enumerate((model, other)):
        torch.manual_seed(seed)
        each.resize_token_embeddings(66)
    other.lm_head.load_state_dict(model.lm_head.state_dict())
    ids = torch.tensor([[64, 2, 65, 7]])
    assert not torch.equal(model(ids).logits, other(ids).logits)
    adapted(model, **new)
    ll.save(model, tmp_path / "a.safetensors")
    ll.load(other, tmp_path / "a.safetensors")
    torch.testing.assert_close(other(ids).logits, model(ids).logits)
    third = llama()
    third.resize_token_embeddings(66)
    third.model.embed_tokens.weight.data[0] += 1
    with pytest.raises(ValueError, match="model.embed_tokens has other weights than the base"):
        ll.load(third, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="embed_tokens is 32×64, and the adapter was made for 32×66"):
        ll.load(llama(), tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", [gemma, llama, t5, lambda: llama(tie=True)])
def test_merging_writes_the_trained_rows_rounded_once(model, dtype):
    """Also where they are far from the base's, and where the layer scales what it looks up."""
    model = model().to(dtype)
    ll.attach(model, "trainable_tokens", **TOKENS)
    embedding = model.get_input_embeddings()
    tokens = embedding.adapters.default.tokens
    tokens.data = torch.randn(2, 32) * torch.tensor([[0.01], [30.0]])
    want = embedding.weight.detach().clone()
    want[[3, 5]] = tokens.detach().to(dtype)
    few = 0 if dtype == torch.float32 else 2  # T − E has 24 bits, and T may lie between two
    before = snapshot(model)
    delta = next(iter(ll.delta_weights(model).values()))
    assert delta.dtype == (torch.float32 if dtype == torch.bfloat16 else torch.float64)
    assert not delta[[0, 1, 2, 4, 6]].any()
    with ll.merged(model):
        assert (embedding.weight != want).sum() <= few
        head = getattr(model, "lm_head", None)
        assert (head.weight is embedding.weight) == model.config.tie_word_embeddings
    unchanged(model, before)
    report = ll.merge(model)
    assert (embedding.weight != want).sum() <= few
    assert (report.layers[0].lost > 1e-5) == (dtype == torch.bfloat16)
    assert (head.weight is embedding.weight) == model.config.tie_word_embeddings
