"""PEFT's trainable tokens: E' = E with the rows token_indices replaced by T, looked up and, where a
head shares the weight, multiplied by."""

import peft
import pytest
import torch
import torch.nn.functional as F
from models import IDS, gemma, llama
from reference import TOLERANCE, assert_close, in_dtypes
from safetensors.torch import load_file
from torch import nn

import lora_lite as ll
from lora_lite.bench.memory import LiveStorages
from lora_lite.shapes import unchecked
from lora_lite.testing import snapshot, unchanged

LAWS = {"trainable_tokens": [dict(token_indices=(3, 1, 12))]}

ROWS, D, INDEX = 30, 8, (7, 2, 29)
# 7 stands three times, 2 once; 29 never.
TOKENS = torch.tensor([[7, 3, 7, 2, 11], [0, 7, 28, 3, 5]])


class Scaled(nn.Embedding):
    """Gemma's and BART's: rows times a number."""

    embed_scale = 3.0

    def forward(self, ids):
        return self.embed_scale * super().forward(ids)


class Language(nn.Module):
    """An embedding, something nonlinear, and a head that may share its weight."""

    def __init__(self, tie, bias, kind=nn.Embedding, **options):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.embed = kind(ROWS, D, **options)
        self.head = nn.Linear(D, ROWS, bias=bias)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


MODELS = dict(
    tied=dict(tie=True, bias=False),
    tied_with_bias=dict(tie=True, bias=True),
    untied=dict(tie=False, bias=True),
    tied_and_scaled=dict(tie=True, bias=False, kind=Scaled),
    padded=dict(tie=True, bias=False, padding_idx=7),
)
on_models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def adapted(model, dtype=torch.float64, moved=1.0, index=INDEX):
    model = Language(**model).to(dtype)
    ll.attach(model, "trainable_tokens", targets=["embed"], token_indices=index, dtype=dtype)
    if moved:
        T = tokens(model)
        generator = torch.Generator().manual_seed(3)
        T.data = (torch.randn(T.shape, generator=generator) * moved).to(dtype)
    return model


def tokens(model):
    return model.embed.adapters["default"].tokens


def replaced(E, T, index=INDEX):
    """E', row by row."""
    rows = list(E)
    for k, i in enumerate(index):
        rows[i] = T[k]
    return torch.stack(rows)


def output_gradient(dtype=torch.float64):
    generator = torch.Generator().manual_seed(6)
    return torch.randn(*TOKENS.shape, ROWS, generator=generator).to(dtype)


@on_models
@in_dtypes
def test_matches_its_definition(model, dtype):
    """Output and the gradients to T and to what the head reads, by a dense E'."""
    made, tolerance = adapted(model, dtype), TOLERANCE[dtype]
    h = torch.tanh(made.embed(TOKENS)).detach().requires_grad_()
    y, z = made(TOKENS), made.head(h)
    y.backward(output_gradient(dtype))
    gradient = tokens(made).grad.clone()
    z.backward(output_gradient(dtype))

    T = tokens(made).detach().double().requires_grad_()
    E_new = replaced(made.embed.weight.detach().double(), T)
    U = E_new if model["tie"] else made.head.weight.detach().double()
    b = 0 if made.head.bias is None else made.head.bias.detach().double()
    scale = getattr(made.embed, "embed_scale", 1.0)
    h_ref = h.detach().double().requires_grad_()
    y_ref = torch.tanh(scale * E_new[TOKENS]) @ U.T + b
    (want,) = torch.autograd.grad(y_ref, T, output_gradient(), retain_graph=True)
    z_ref = h_ref @ U.T + b
    z_ref.backward(output_gradient())
    assert_close(y, y_ref.to(dtype), tolerance, "the output")
    assert_close(gradient, want.to(dtype), tolerance, "the gradient to T")
    assert_close(z, z_ref.to(dtype), tolerance, "the head's output")
    assert_close(h.grad, h_ref.grad.to(dtype), tolerance, "the gradient to the head's input")
    assert [n for n, p in made.named_parameters() if p.requires_grad] == [
        "embed.adapters.default.tokens"
    ]
    assert made.embed.weight.grad is None and made.head.weight.grad is None


@on_models
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_starts_as_identity(model, dtype):
    """Bit for bit, also with rows kept wider than the table."""
    plain = Language(**model).to(dtype)
    for wide in {dtype, torch.float32}:
        made = Language(**model).to(dtype)
        ll.attach(made, "trainable_tokens", targets=["embed"], token_indices=INDEX, dtype=wide)
        assert torch.equal(made(TOKENS), plain(TOKENS))
        assert tokens(made).dtype == wide


def test_shapes_and_parameter_count():
    chart = ll.plan(Language(tie=True, bias=False), "trainable_tokens", token_indices=list(INDEX))
    assert chart.sites[0].shapes == dict(tokens=(3, D), index=(3,), slot=(ROWS,))
    assert chart.trainable == 3 * D and list(chart.sites[0].tied) == ["head"]
    assert (
        not ll.plan(Language(tie=False, bias=False), "trainable_tokens", token_indices=INDEX)
        .sites[0]
        .tied
    )


def test_row_k_is_token_indices_k():
    made = adapted(MODELS["untied"])
    for k, i in enumerate(INDEX):
        assert_close(made.embed(torch.tensor(i)), tokens(made)[k])
    assert torch.equal(tokens(adapted(MODELS["untied"], moved=0)), made.embed.weight[list(INDEX)])


@on_models
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_other_rows_stay_bit_for_bit(model, dtype):
    made, plain = adapted(model, dtype), Language(**model).to(dtype)
    others = [i for i in range(ROWS) if i not in INDEX]
    every, h = torch.arange(ROWS), torch.randn(2, D).to(dtype)
    assert torch.equal(made.embed(every)[others], plain.embed(every)[others])
    assert not (made.embed(every) == plain.embed(every))[list(INDEX)].all(1).any()
    assert torch.equal(made.head(h)[:, others], plain.head(h)[:, others])
    assert bool((made.head(h) == plain.head(h)).all()) != model["tie"]


@on_models
def test_the_gradient_is_a_sum_over_occurrences_and_the_heads_positions(model):
    """By hand: δ of the lookup at each place where the token stands, and δ_i h of each position."""
    made = adapted(model)
    e = made.embed(TOKENS)
    h = torch.tanh(e)
    e.retain_grad()
    h.retain_grad()
    y_grad = output_gradient()
    made.head(h).backward(y_grad)
    for k, i in enumerate(INDEX):
        want = torch.zeros(D).double()
        for at in zip(*torch.where(TOKENS == i)):
            want += getattr(made.embed, "embed_scale", 1.0) * e.grad[at]
        if model["tie"]:
            for at in ((i, j) for i in range(2) for j in range(5)):
                want += y_grad[at][INDEX[k]] * h.detach()[at]
        if want.any():
            assert_close(tokens(made).grad[k], want)
        else:
            # 29 stands nowhere: without the head nothing moves it.
            assert i == 29 and not model["tie"] and not tokens(made).grad[k].any()


def test_a_token_that_is_not_in_the_input_moves_by_the_head_alone():
    for tie in (False, True):
        made = adapted(dict(tie=tie, bias=False), index=(29,))
        made(TOKENS).square().sum().backward()
        assert bool(tokens(made).grad.any()) == tie


def test_a_padding_index_trains_as_any_other():
    """nn.Embedding gives its padding row no gradient; what is trained here is another tensor."""
    made = adapted(dict(tie=False, bias=False, padding_idx=7))
    made(TOKENS).square().sum().backward()
    assert tokens(made).grad[0].any()


@pytest.mark.parametrize(
    "index, message",
    [
        ((), "the model is to train no token; say which by token_indices"),
        ((3, -1), "the model has 30 rows, and token_indices has -1; use 0 … 29"),
        ((3, 30), "the model has 30 rows, and token_indices has 30; use 0 … 29"),
        ((3, 5, 3), "the model would train row 3 twice; say it once"),
        ((3.0,), "must be a tuple of int"),
        ((True,), "must be a tuple of int"),
        (3, "must be a tuple of int"),
    ],
    ids=["none", "negative", "beyond", "twice", "fraction", "bool", "number"],
)
def test_bad_indices_are_refused(index, message):
    model = nn.Embedding(ROWS, D)
    before = snapshot(model)
    with unchecked(), pytest.raises(ValueError, match=f"trainable_tokens: .*{message}"):
        ll.attach(model, "trainable_tokens", token_indices=index)
    unchanged(model, before)


@pytest.mark.parametrize("tie", [False, True])
def test_nothing_of_the_tables_size_is_made(tie):
    """Neither in forward nor in backward: PEFT copies the table in each and makes its gradient."""
    model = nn.ModuleDict({"embed": nn.Embedding(4000, 64), "head": nn.Linear(64, 4000)})
    if tie:
        model["head"].weight = model["embed"].weight
    ll.attach(model, "trainable_tokens", token_indices=(5, 3999))
    T = model["embed"].adapters["default"].tokens
    T.data += 1
    with LiveStorages() as live:
        y = model["head"](model["embed"](torch.tensor([[5, 7, 3999]])))
        y.square().sum().backward()
    assert T.grad.any()
    # A few times the logits of three positions; the table is 64 times those of one.
    assert live.peak < model["embed"].weight.nbytes / 2


def test_a_look_up_keeps_the_tokens_places_alone():
    layer, ids = nn.Embedding(400, 64), torch.randint(400, (256,))
    ll.attach(layer, "trainable_tokens", token_indices=(5, 399))
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t.nbytes) and t, lambda t: t
    ):
        layer(ids)
    assert sum(kept.values()) <= 256 * 8


def test_a_file_holds_the_trained_rows_alone(tmp_path):
    for tie in (False, True):
        model = llama(tie)
        ll.attach(model, "trainable_tokens", token_indices=(3, 60))
        model.model.embed_tokens.adapters.default.tokens.data.normal_()
        ll.save(model, tmp_path / "a.safetensors")
        held = load_file(tmp_path / "a.safetensors")
        assert {key: tuple(t.shape) for key, t in held.items()} == {
            "model.embed_tokens.tokens": (2, 32)
        }
        fresh = llama(tie)
        ll.load(fresh, tmp_path / "a.safetensors")
        assert torch.equal(fresh(IDS).logits, model(IDS).logits)


def test_rows_do_not_decay():
    (group,) = ll.param_groups(adapted(MODELS["tied"]), lr=0.1, weight_decay=0.5)
    assert group["weight_decay"] == 0


def test_adapters_of_other_rows_commute_and_of_the_same_add():
    one, two = adapted(MODELS["tied"]), adapted(MODELS["tied"], index=(4, 5))
    plain, T = one.embed.weight.detach().clone(), [tokens(m).detach().clone() for m in (one, two)]
    both = replaced(replaced(plain, T[0]), T[1], (4, 5))
    for order in ((INDEX, (4, 5)), ((4, 5), INDEX)):
        model = Language(**MODELS["tied"]).double()
        for index in order:
            options = dict(name=str(index[0]), dtype=torch.float64, targets=["embed"])
            ll.attach(model, "trainable_tokens", token_indices=index, **options)
            own = model.embed.adapters[str(index[0])].tokens
            own.data.copy_(T[0] if index == INDEX else T[1])
        y = model(TOKENS)
        assert_close(y, torch.tanh(both[TOKENS]) @ both.T)
        ll.merge(model)
        assert torch.equal(model.embed.weight, both) and model.head.weight is model.embed.weight
        assert_close(model(TOKENS), y)
    options = dict(name="again", dtype=torch.float64, targets=["embed"])
    ll.attach(one, "trainable_tokens", token_indices=(2,), **options)
    one.embed.adapters["again"].tokens.data += 1
    want = replaced(plain, T[0])
    want[2] += 1
    assert_close(one(TOKENS), torch.tanh(want[TOKENS]) @ want.T)


@on_models
@in_dtypes
def test_merging_writes_the_rows_at_both_ends(model, dtype):
    made = adapted(model, dtype)
    y, before, T = made(TOKENS), snapshot(made), tokens(made).detach().clone()
    want = replaced(made.embed.weight.detach(), T)
    with ll.merged(made):
        assert torch.equal(made.embed.weight, want)
        assert (made.head.weight is made.embed.weight) == model["tie"]
        assert_close(made(TOKENS), y, TOLERANCE[dtype])
    unchanged(made, before)
    ll.merge(made)
    assert torch.equal(made.embed.weight, want)
    assert (made.head.weight is made.embed.weight) == model["tie"]
    assert_close(made(TOKENS), y, TOLERANCE[dtype])


def test_merging_keeps_every_bit_of_other_rows():
    """Also the sign of a zero, which a sum with zero loses."""
    model = adapted(MODELS["tied"], torch.float32)
    with torch.no_grad():
        model.embed.weight[4] = torch.tensor([0.0, -0.0] * 4)
    before = model.embed.weight.detach().clone().view(torch.int32)
    ll.merge(model)
    others = [i for i in range(ROWS) if i not in INDEX]
    after = model.embed.weight.detach().view(torch.int32)
    assert torch.equal(after[others], before[others]) and not torch.equal(after, before)


PEFT_MODELS = dict(tied=lambda: llama(tie=True), untied=llama, gemma=gemma)


@pytest.mark.parametrize("make", PEFT_MODELS.values(), ids=PEFT_MODELS)
@in_dtypes
def test_peft_agrees(make, dtype):
    """Logits, the gradient and the merged model; its tensor holds rows, whatever its name says."""
    index = [9, 3, 60]
    model, other = make().to(dtype), make().to(dtype)
    config = peft.TrainableTokensConfig(token_indices=index, target_modules=["embed_tokens"])
    other = peft.get_peft_model(other, config)
    theirs = other.base_model.model.model.embed_tokens.trainable_tokens_delta["default"]
    ll.attach(model, "trainable_tokens", token_indices=index, dtype=dtype)
    ours = model.model.embed_tokens.adapters.default.tokens
    assert_close(ours, theirs.to(dtype), 1e-6, "the start")
    rows = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours.copy_(rows)
        theirs.data = rows.to(dtype)
    logits, wanted = (m(IDS).logits for m in (model, other))
    assert_close(logits, wanted, TOLERANCE[dtype], "the logits")
    for out in (logits, wanted):
        (out * out.detach().flip(0)).sum().backward()
    assert_close(ours.grad, theirs.grad, 2 * TOLERANCE[dtype], "the gradient")
    plain = other.merge_and_unload()
    ll.merge(model)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        got, want = (getattr(m, name)().weight for m in (model, plain))
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gemmas_scale_is_what_its_layer_rounds_it_to(dtype):
    """√32 in bfloat16 is not √32: by the frozen layer with the rows put in its place."""
    model, plain = gemma().to(dtype), gemma().to(dtype)
    ll.attach(model, "trainable_tokens", token_indices=(3, 5))
    T = model.model.embed_tokens.adapters.default.tokens
    with torch.no_grad():
        T.copy_(torch.randn(2, 32).to(dtype))
        plain.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        plain.model.embed_tokens.weight[[3, 5]] = T.to(dtype)
    ids = torch.tensor([3, 5, 7])
    assert torch.equal(model.model.embed_tokens(ids), plain.model.embed_tokens(ids))
    h = torch.randn(2, 32).to(dtype)
    assert_close(model.lm_head(h), F.linear(h, plain.lm_head.weight), 1e-2)
