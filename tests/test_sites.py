"""Layers that are no plain linear ones: norms, embeddings with what is tied to them, and blocks."""

import copy
import re
import sys

import pytest
import torch
from models import IDS, MLP, gemma, gpt2, llama, t5
from safetensors.torch import load_file
from torch import multiprocessing as mp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lora_lite as ll
from lora_lite.adapted import PROMPTS, clean
from lora_lite.shapes import unchecked
from lora_lite.testing import move, snapshot, unchanged
from lora_lite.variant import whole

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


def test_norms_that_a_fused_path_reads_by_itself_are_refused():
    model = nn.ModuleDict({"enc": nn.TransformerEncoderLayer(8, 2, 8), "norm": nn.LayerNorm(8)})
    with pytest.raises(ValueError, match=r"enc.norm1 is read by enc .*fast path"):
        ll.attach(model, "ln_tuning")
    assert sites(model, "ln_tuning", targets=["norm"]) == ["norm"]


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
    assert names == [
        f"model.embed_tokens.adapters.default.{t}" for t in ("tokens", "index", "slot")
    ]
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


def test_a_file_of_a_tied_model_wants_the_tie(tmp_path):
    """Without it the head would keep the base's rows, and the function be another."""
    adapted_model = adapted(llama(tie=True))
    ll.save(adapted_model, tmp_path / "tied.safetensors")
    model = llama()
    model.load_state_dict(llama(tie=True).state_dict())
    before = snapshot(model)
    match = "embed_tokens shares its weight with nothing, and did with lm_head when it was saved"
    with pytest.raises(ValueError, match=match):
        ll.load(model, tmp_path / "tied.safetensors")
    unchanged(model, before)
    ll.load(model, tmp_path / "tied.safetensors", force=True)
    ll.save(model, tmp_path / "untied.safetensors")
    with pytest.raises(ValueError, match="with lm_head, and did with nothing when"):
        ll.load(llama(tie=True), tmp_path / "untied.safetensors")


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
    """Resizing draws new rows at random; they are the adapter's to say, and no mark of a base."""
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
    with pytest.raises(
        ValueError, match="embed_tokens is 32×64, and the adapter was made for 32×66"
    ):
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


EDITS = dict(p=1, s=1)
PADDED = torch.ones(2, 10, dtype=torch.long)
PADDED[0, :4] = 0
LENGTHS = torch.tensor([6, 10])


def edited(model=None, **hyper):
    return adapted(llama() if model is None else model, "reft", **(hyper or EDITS))


def grads(model):
    return {clean(n): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_blocks_by_default_suffix_expression_and_predicate():
    names = ["model.layers.0", "model.layers.1"]
    assert sites(llama(), "reft") == names
    assert sites(gpt2(), "reft") == ["transformer.h.0", "transformer.h.1"]
    assert sites(llama(), "reft", targets=["layers.1"]) == names[1:]
    assert sites(llama(), "reft", targets=r".*layers\.[01]") == names
    assert sites(llama(), "reft", targets=lambda name, m: name.endswith("0")) == names[:1]
    assert sites(llama(), "reft", exclude=["layers.0"]) == names[1:]
    chart = ll.plan(llama(), "reft", overrides={"layers.1": dict(r=2)})
    assert [site.shapes["R"] for site in chart.sites] == [(1, 4, 32), (1, 2, 32)]


def test_a_block_elsewhere_than_in_a_list_is_named():
    """torchvision's stand in an nn.Sequential; a part of a block will do as well."""
    model = nn.Sequential(nn.Linear(8, 8), Block(), Block())
    with pytest.raises(ValueError, match="holds no blocks in an nn.ModuleList; say which by `targ"):
        sites(model, "reft")
    assert sites(model, "reft", targets=["1", "2"]) == ["1", "2"]
    with pytest.raises(ValueError, match="only 0, a Linear, which this method can't adapt"):
        sites(model, "reft", targets=["0"])
    ll.attach(model, "reft", targets=["2"], **EDITS)
    move(model)
    h = torch.randn(2, 4, 8)
    edit = model(h, prompt_lengths=3) - model[2].frozen(model[1](model[0](h)))
    assert [bool(row.any()) for row in edit[0]] == [True, False, True, False]
    with pytest.raises(ValueError, match="only model.layers, a ModuleList, which this"):
        sites(llama(), "reft", targets=["layers"])
    part = edited(llama(), targets=["self_attn"], **EDITS)
    assert not torch.equal(part(IDS, prompt_lengths=2).logits, llama()(IDS).logits)


def test_blocks_alike_are_one_line_of_the_plan():
    assert re.search(r"2 ×  layers\.\* +32 × 32 +260  R\[1, 4, 32\]", str(ll.plan(llama(), "reft")))
    assert "1 ×  embed_tokens" in str(ll.plan(llama(), "trainable_tokens", **TOKENS))
    assert "2 ×  * " in str(ll.plan(nn.ModuleList([Block(), Block()]), "reft"))


def test_norms_by_default_suffix_expression_and_predicate():
    names = sites(llama(), "ln_tuning")
    assert len(names) == 5 and all("norm" in name for name in names)
    assert len(sites(gpt2(), "ln_tuning")) == 5
    assert sites(llama(), "ln_tuning", targets=["norm"]) == ["model.norm"]
    assert len(sites(llama(), "ln_tuning", targets=["input_layernorm"])) == 2
    assert len(sites(llama(), "ln_tuning", targets=r".*layers\.0\..*norm")) == 2
    assert len(sites(llama(), "ln_tuning", exclude=["post_attention_layernorm"])) == 3
    with pytest.raises(ValueError, match="matches only .*q_proj, a Linear, which this method"):
        sites(llama(), "ln_tuning", targets=["q_proj"])


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(), "reft: model.layers.0 does not know the prompts; call the model with prompt_le"),
        (dict(prompt_lengths=[6, 9, 3]), "prompt_lengths has 3 lengths, .* 2 examples; give one"),
        (dict(prompt_lengths=torch.ones(2)), r"prompt_lengths is torch.float32 of shape \(2,\)"),
        (dict(prompt_lengths=torch.ones(2, 1).long()), r"of shape \(2, 1\); give whole numbers"),
        (dict(prompt_lengths=[]), r"of shape \(0,\); give"),
        (dict(prompt_lengths=6, attention_mask=torch.ones(2, 1, 10, 10)), "attention_mask has 4"),
    ],
    ids=["none", "three", "fractions", "axes", "empty", "mask"],
)
def test_a_call_that_does_not_say_its_prompts_is_refused(call, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        edited()(IDS, **call)


def test_lengths_may_be_said_in_several_ways():
    model = edited()
    want = model(IDS, prompt_lengths=torch.tensor([6, 6])).logits
    for lengths in ([6, 6], (6, 6), 6, torch.tensor(6), torch.tensor([6], dtype=torch.int32)):
        assert torch.equal(model(IDS, prompt_lengths=lengths).logits, want)
        with ll.prompts(model, lengths):
            assert torch.equal(model(IDS).logits, want)
            assert not torch.equal(model(IDS, prompt_lengths=3).logits, want)
            with ll.prompts(model, 3):
                assert not torch.equal(model(IDS).logits, want)
            assert torch.equal(model(IDS).logits, want)
    with pytest.raises(RuntimeError), ll.prompts(model, 6):
        raise RuntimeError
    with pytest.raises(ValueError, match="does not know the prompts"):
        model(IDS)


def test_lengths_that_are_none_are_refused():
    model = edited()
    for lengths, match in (
        ([3, 0], r"lengths=\[3, 0\] must be ≥ 1"),
        ([2.5], "lengths is torch.fl"),
    ):
        with unchecked(), pytest.raises(ValueError, match=match), ll.prompts(model, lengths):
            pass
    with pytest.raises(ValueError, match="no adapter on the model asks for its prompts"):
        with ll.prompts(adapted(llama()), 3):
            pass
    with pytest.raises(ValueError, match="no adapters; attach one first"), ll.prompts(llama(), 3):
        pass


class Told(nn.Module):
    """Blocks under a model that looks at no mask itself."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, h, attention_mask=None, past_key_values=None, cache_params=None):
        for layer in self.layers:
            h = layer(h)
        return h


class Block(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.linear = nn.Linear(d, d)

    def forward(self, h):
        return h + torch.tanh(self.linear(h))


class Uncounted:
    """A cache that can't say how long it is, as Mamba's."""

    def get_seq_length(self):
        raise ValueError("no attention layers")


def told(*blocks):
    return edited(Told(blocks or [Block(), Block()]))


def test_the_mask_is_that_of_the_batch_and_of_all_its_tokens():
    model, h = told(), torch.randn(2, 10, 8)
    for mask in (torch.ones(3, 10), torch.ones(2, 9)):
        with pytest.raises(ValueError, match="and the call has 2 examples of 10 tokens; give"):
            model(h, attention_mask=mask, prompt_lengths=3)
    with pytest.raises(ValueError, match="attention_mask has the type dict"):
        model(h, attention_mask=dict(full=PADDED), prompt_lengths=3)
    want = model(h, PADDED, prompt_lengths=LENGTHS)
    assert torch.equal(model(h, attention_mask=PADDED.bool(), prompt_lengths=LENGTHS), want)
    assert not torch.equal(model(h, prompt_lengths=LENGTHS), want)


def test_a_cache_that_can_not_be_counted_needs_the_mask():
    model, h = told(), torch.randn(2, 10, 8)
    for where in ("past_key_values", "cache_params"):
        for cache in (Uncounted(), ((h, h),)):
            with pytest.raises(ValueError, match="cache does not say how many tokens.*attention_m"):
                model(h, prompt_lengths=3, **{where: cache})
            model(h, prompt_lengths=3, attention_mask=PADDED, **{where: cache})


def test_prompts_are_forgotten_after_a_call_and_after_one_that_failed():
    model = edited()
    model(IDS, prompt_lengths=LENGTHS)
    for call in (model, model.model):
        with pytest.raises(ValueError, match="does not know the prompts"):
            call(IDS)
    with pytest.raises(ValueError, match="examples; give one"):
        model(IDS, prompt_lengths=[1, 2, 3])
    with pytest.raises(ValueError, match="does not know the prompts"):
        model.model(IDS)
    with ll.disabled(model):
        model(IDS)


def test_an_encoder_that_is_called_by_itself_is_the_model_to_adapt():
    model = t5()
    with pytest.raises(
        ValueError, match="reads prompts by its encoder, .* attach to model.encoder"
    ):
        ll.attach(model, "reft", targets=r"encoder\.block\.[01]")
    base = model(input_ids=IDS, attention_mask=PADDED, labels=IDS).logits
    edited(model.encoder)
    with ll.prompts(model, LENGTHS):
        assert not torch.equal(model(input_ids=IDS, attention_mask=PADDED, labels=IDS).logits, base)
        model.generate(IDS, attention_mask=PADDED, max_new_tokens=3, num_beams=2)


def test_replicas_of_data_parallel_are_refused():
    model = told()
    replica = model._replicate_for_data_parallel()
    with pytest.raises(ValueError, match="replicas would take each other's prompts"):
        replica(torch.randn(2, 4, 8), prompt_lengths=2)


MICRO = [
    dict(input_ids=IDS, attention_mask=PADDED, prompt_lengths=LENGTHS),
    dict(input_ids=IDS.flip(1), attention_mask=PADDED.flip(1), prompt_lengths=LENGTHS // 2),
]


def accumulated(model, between=lambda: None):
    """The gradients of two micro-batches, whose backwards come after both forwards."""
    model.train()
    losses = [model(**batch, labels=IDS, use_cache=False).loss for batch in MICRO]
    between()
    sum(losses).backward()
    return grads(model)


def plainly(model):
    """The same, each backward after its own forward."""
    model.train()
    for batch in MICRO:
        model(**batch, labels=IDS, use_cache=False).loss.backward()
    return grads(model)


def by_transformers(reentrant):
    def on(model):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    return on


def by_torch(reentrant):
    def on(model):
        model.enable_input_require_grads()
        for i, layer in enumerate(model.model.layers):
            how = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
            model.model.layers[i] = checkpoint_wrapper(layer, checkpoint_impl=how)

    return on


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", [by_transformers, by_torch])
def test_checkpointing_runs_each_block_again_with_its_own_prompts(how, reentrant):
    """Also after other calls: of another micro-batch, of the base alone, and of none."""
    want = plainly(edited())
    for between in (lambda m: None, lambda m: m(IDS, prompt_lengths=3), lambda m: m.train()):
        model = edited()
        how(reentrant)(model)

        def other(model=model, between=between):
            with torch.no_grad():
                between(model)
                with ll.disabled(model):
                    model(IDS)

        got = accumulated(model, other)
        assert got.keys() == want.keys() and len(want) == 6
        for name in want:
            torch.testing.assert_close(got[name], want[name])


def test_nothing_is_kept_of_a_call_that_is_over():
    model = told()
    before = len(PROMPTS)
    y = model(torch.randn(2, 10, 8, requires_grad=True), prompt_lengths=3)
    assert len(PROMPTS) > before
    del y
    assert len(PROMPTS) == before
    assert model.layers[0].adapters.default.attachment.prompt is None


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_blocks_under_torch_func(transform):
    model, h = told(), torch.randn(2, 10, 8)

    def loss(h):
        return model(h, prompt_lengths=3).square().sum()

    x = h.clone().requires_grad_()
    loss(x).backward()
    if transform == "grad":
        assert torch.allclose(torch.func.grad(loss)(h), x.grad)
    elif transform == "jvp":
        slope = torch.func.jvp(loss, (h,), (torch.ones_like(h),))[1]
        assert torch.allclose(slope, x.grad.sum(), rtol=1e-4)
    else:
        each = torch.func.vmap(lambda h: loss(h[None]))(h)
        assert torch.allclose(each.sum(), loss(h))


def test_hooks_come_and_go_with_the_adapters_that_ask(tmp_path):
    model = llama()
    before = snapshot(model)
    edited(model)
    ll.attach(model, "direft", name="second", p=0, s=1)
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    with torch.no_grad():
        logits = model(IDS, prompt_lengths=LENGTHS).logits
        torch.save(model, tmp_path / "model.pt")
        for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
            assert torch.equal(twin(IDS, prompt_lengths=LENGTHS).logits, logits)
            ll.detach(twin)
            unchanged_hooks = twin._forward_pre_hooks, twin._forward_hooks
            assert not any(unchanged_hooks)
        assert torch.equal(model(IDS, prompt_lengths=LENGTHS).logits, logits)
    ll.detach(model, "default")
    model(IDS, prompt_lengths=LENGTHS)
    ll.detach(model)
    unchanged(model, before)


def test_a_part_that_is_detached_takes_its_adapter_off_the_tied_head():
    model, base = adapted(llama(tie=True)), llama(tie=True)
    h = torch.randn(2, 32)
    assert not torch.equal(model.lm_head(h), base.lm_head(h))
    ll.detach(model.model)
    assert torch.equal(model.lm_head(h), base.lm_head(h))
    ll.attach(model, "trainable_tokens", **TOKENS)
    ll.detach(model)
    assert type(model.lm_head) is nn.Linear


def test_what_a_diagnosis_says_of_each_site():
    model = llama(tie=True)
    for variant, hyper in (("ln_tuning", {}), ("trainable_tokens", TOKENS), ("reft", EDITS)):
        ll.attach(model, variant, name=variant, **hyper)
    move(model)
    rows = ll.diagnose(model).rows
    table = model.model.embed_tokens
    delta = table.adapters.trainable_tokens.tokens - table.weight[[3, 5]]
    for row in rows:
        if row["method"] == "trainable_tokens":
            assert row["change"] == pytest.approx((delta.norm() / table.weight.norm()).item(), 1e-5)
            values = torch.linalg.svdvals(delta.detach())
            p = values / values.sum()
            assert row["spectral_entropy"] == pytest.approx(-(p * p.log()).sum().item(), 1e-5)
        elif row["method"] == "ln_tuning":
            assert row["change"] > 0 and "effective_rank" not in row
        else:
            assert row["change"] is None
    assert len(rows) == 5 + 1 + 2 and len(str(ll.diagnose(model)).splitlines()) == 9


def test_the_spectrum_of_a_large_table_is_that_of_its_trained_rows(monkeypatch):
    seen = []
    module = sys.modules["lora_lite.diagnose"]
    monkeypatch.setattr(module, "spectrum", lambda d: seen.append(d.shape) or (1.0, 0.0))
    ll.diagnose(adapted(llama()))
    assert seen == [(2, 32)]


BOTH = [("ln_tuning", {}), ("trainable_tokens", TOKENS), ("reft", EDITS), ("direft", EDITS)]


def call(model):
    asked = any("PromptHook" in type(h).__name__ for h in model._forward_pre_hooks.values())
    return model(IDS, **(dict(prompt_lengths=LENGTHS) if asked else {})).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora_first", [True, False])
@pytest.mark.parametrize("variant, hyper", BOTH, ids=[name for name, _ in BOTH])
def test_beside_lora_on_other_layers(variant, hyper, lora_first, dtype, tmp_path):
    """Each switches, scales, saves, loads and goes by itself; the order of other layers is none."""
    model = llama(tie=True).to(dtype)
    before, base = snapshot(model), call(model)
    pair = [("lora", "lora", dict(r=4)), (variant, "own", hyper)]
    for name, as_name, more in pair if lora_first else pair[::-1]:
        ll.attach(model, name, name=as_name, seed=0, **more)
    assert torch.equal(call(model), base)
    move(model, scale=0.3)
    both = call(model)
    alone = {}
    for name, other in (("lora", "own"), ("own", "lora")):
        with ll.disabled(model, other):
            alone[name] = call(model)
        assert not torch.equal(alone[name], base) and not torch.equal(alone[name], both)
        with ll.strength(model, 0.0, other):
            error = (call(model) - alone[name]).norm() / base.norm()
            assert error < {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    with ll.disabled(model):
        assert torch.equal(call(model), base)
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    groups = ll.param_groups(model, lr=0.1)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(trained)
    for name in ("lora", "own"):
        ll.save(model, tmp_path / f"{name}.safetensors", name)
    fresh = llama(tie=True).to(dtype)
    for name in ("own", "lora"):
        ll.load(fresh, tmp_path / f"{name}.safetensors")
    assert torch.equal(call(fresh), both)
    ll.detach(model, "lora")
    assert torch.equal(call(model), alone["own"])
    ll.detach(model)
    unchanged(model, before)
    if fresh.model.layers[0].__dict__.get("kinds"):
        with pytest.raises(ValueError, match=f"{variant}: model.layers.0 can't be merged"):
            ll.merge(fresh)
        return
    kept, tolerance = snapshot(fresh), {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    with ll.merged(fresh):
        assert (call(fresh) - both).norm() / both.norm() < tolerance
    unchanged(fresh, kept)
    ll.merge(fresh)
    assert (call(fresh) - both).norm() / both.norm() < tolerance
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight


@pytest.mark.parametrize("variant, hyper", BOTH, ids=[name for name, _ in BOTH])
def test_on_a_bfloat16_model_tensors_are_float32_and_activations_are_not(variant, hyper):
    model = llama(tie=True).bfloat16()
    ll.attach(model, variant, **hyper)
    move(model)
    with torch.no_grad():
        assert call(model).dtype == torch.bfloat16
    call(model).float().square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32} == {p.grad.dtype for p in trained}
    assert all(p.grad.isfinite().all() and p.grad.any() for p in trained)


@pytest.mark.parametrize("variant, hyper", BOTH, ids=[name for name, _ in BOTH])
def test_a_llama_under_compile_and_checkpointing(variant, hyper):
    """The whole model is one graph; checkpointing inside it runs its blocks again in it."""
    model = llama(tie=True).train()
    ll.attach(model, variant, seed=0, **hyper)
    move(model, scale=0.3)
    call(model).square().sum().backward()
    want = grads(model)
    model.zero_grad()
    torch._dynamo.reset()
    by_transformers(False)(model)
    with unchecked():
        torch.compile(call, backend="aot_eager")(model).square().sum().backward()
    for name, grad in want.items():
        torch.testing.assert_close(grads(model)[name], grad)


def trained_by(parallel, variant, hyper, rows):
    """The gradients of a tied llama on some rows of a batch, in one of the ways to train on
    several ranks."""
    model = llama(tie=True).train()
    ll.attach(model, variant, seed=0, **hyper)
    move(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if parallel == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    wrapped = nn.parallel.DistributedDataParallel(model) if parallel == "ddp" else model
    prompts = dict(prompt_lengths=LENGTHS[rows]) if "reft" in variant else {}
    logits = wrapped(IDS[rows], attention_mask=PADDED[rows], use_cache=False, **prompts).logits
    (logits.square().mean((1, 2)).sum() * (1 if parallel is None else 2)).backward()
    own = {clean(name): p.grad for name, p in wrapped.named_parameters() if p.grad is not None}
    return {name: whole(grad) for name, grad in own.items()}


def _rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    out = {
        f"{parallel}-{variant}": trained_by(parallel, variant, hyper, slice(rank, rank + 1))
        for parallel in ("ddp", "fsdp")
        for variant, hyper in BOTH
    }
    torch.save(out, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_train_as_one(tmp_path):
    """DDP and FSDP2, each rank with its own prompts, under checkpointing."""
    mp.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for variant, hyper in BOTH:
        want = trained_by(None, variant, hyper, slice(0, 2))
        for parallel in ("ddp", "fsdp"):
            for rank in ranks:
                got = rank[f"{parallel}-{variant}"]
                assert got.keys() == want.keys() and want
                for name, grad in want.items():
                    torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6)
