"""LoReFT and DiReFT (arXiv:2404.03592 §3.2 eqs. 2 and 3) at the positions of §4.1."""

import math

import pytest
import torch
from models import IDS, llama
from reference import TOLERANCE, assert_close, in_dtypes, settings
from torch import nn
from transformers import Trainer, TrainingArguments

import lora_lite as ll
from lora_lite.shapes import unchecked
from lora_lite.testing import move, snapshot, unchanged
from lora_lite.variants.reft import orthonormal

LAWS = {
    "reft": [dict(p=1, s=1), dict(r=2, p=0, s=2, tied=False)],
    "direft": [dict(p=1, s=1), dict(p=2, s=1, tied=False)],
}

D, R = 12, 3


class Block(nn.Module):
    """A residual block; it gives back a tuple or its hidden states alone."""

    def __init__(self, pair):
        super().__init__()
        self.linear, self.pair = nn.Linear(D, D), pair

    def forward(self, h, scale=1.0):
        h = h + scale * torch.tanh(self.linear(h))
        return (h, "kept") if self.pair else h


class Stack(nn.Module):
    """Blocks under a model with a mask and a cache."""

    def __init__(self, blocks=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block(pair=i % 2 == 0) for i in range(blocks))
        generator = torch.Generator().manual_seed(4)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / D**0.5

    def forward(self, h, attention_mask=None, past_key_values=None):
        for block in self.blocks:
            out = block(h, scale=0.7)
            h = out[0] if block.pair else out
            assert not block.pair or out[1:] == ("kept",)
        return h


class Cache:
    """As many tokens as were seen."""

    def __init__(self, seen):
        self.seen = seen

    def get_seq_length(self):
        return self.seen


def adapted(variant="reft", dtype=torch.float64, moved=0.3, blocks=2, **hyper):
    model = Stack(blocks).to(dtype)
    ll.attach(model, variant, dtype=dtype, seed=0, r=R, **hyper)
    if moved:
        move(model, seed=3, scale=moved)
    return model


def own(block, name="default"):
    return block.adapters[name].tensors()


def positions(n, p, s):
    """§4.1: {which of the p + s: position} in a prompt of n tokens, counted from 0."""
    if n < p + s:
        first, last = min(p, math.floor(n / 2)), min(s, math.ceil(n / 2))
    else:
        first, last = p, s
    leading = {i: i for i in range(first)}
    return leading | {p + s - 1 - i: n - 1 - i for i in range(last)}


def gram_schmidt(raw):
    """Orthonormal rows, one after the other."""
    rows = []
    for v in raw:
        for u in rows:
            v = v - (v @ u) * u
        rows.append(v / v.norm())
    return torch.stack(rows)


def loreft(h, R, A, b):
    R = gram_schmidt(R)
    return h + R.T @ (A @ h + b - R @ h)


def direft(h, W1, W2, b):
    return h + W2.T @ (W1 @ h + b)


FORMULAS = dict(reft=loreft, direft=direft)


def dense(model, variant, p, s, h, lengths, mask, tensors):
    """The model token by token: the frozen block, then the edit where the token stands there."""
    for block, own in zip(model.blocks, tensors):
        h = h + 0.7 * torch.tanh(h @ block.linear.weight.double().T + block.linear.bias.double())
        rows = []
        for b in range(len(h)):
            real = [t for t in range(h.shape[1]) if mask is None or mask[b, t]]
            at = {real[i]: k for k, i in positions(int(lengths[b]), p, s).items() if i < len(real)}
            row = []
            for t in range(h.shape[1]):
                if t in at:
                    which = at[t] if len(own["b"]) > 1 else 0
                    edit = {key: tensor[which] for key, tensor in own.items()}
                    row.append(FORMULAS[variant](h[b, t], **edit))
                else:
                    row.append(h[b, t])
            rows.append(torch.stack(row))
        h = torch.stack(rows)
    return h


T = 9
MASKS = dict(
    none=(None, [9, 4, 1, 7]),
    left=([[0] * 4 + [1] * 5, [1] * 9, [0] * 7 + [1] * 2, [0] * 2 + [1] * 7], [5, 9, 2, 6]),
    right=([[1] * 5 + [0] * 4, [1] * 9, [1] * 1 + [0] * 8, [1] * 7 + [0] * 2], [5, 3, 1, 7]),
    holes=(
        [[0, 1, 0, 1, 1, 1, 0, 1, 1], [1] * 9, [1, 0] * 4 + [1], [0, 0] + [1] * 7],
        [4, 8, 5, 3],
    ),
)
"""(mask, lengths): where lengths are less than the tokens that count, answers follow the prompt."""

on_masks = pytest.mark.parametrize("mask, lengths", MASKS.values(), ids=MASKS)
on_positions = pytest.mark.parametrize(
    "p, s", [(1, 1), (2, 0), (0, 3), (3, 2), (2, 3), (7, 7)], ids=lambda n: str(n)
)


def hidden(dtype=torch.float64, batch=4, tokens=T):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, tokens, D, generator=generator).to(dtype)


@pytest.mark.parametrize("variant", FORMULAS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@on_positions
@on_masks
@in_dtypes
def test_matches_token_by_token(variant, tied, p, s, mask, lengths, dtype):
    """Output and gradients to h and to every tensor, by loops over examples and tokens."""
    model = adapted(variant, dtype, p=p, s=s, tied=tied)
    mask = None if mask is None else torch.tensor(mask)
    h, y_grad = hidden(dtype).requires_grad_(), hidden(dtype).flip(0)
    y = model(h, attention_mask=mask, prompt_lengths=torch.tensor(lengths))
    y.backward(y_grad)

    tensors = [
        {key: t.detach().double().requires_grad_() for key, t in own(block).items()}
        for block in model.blocks
    ]
    h_ref = h.detach().double().requires_grad_()
    y_ref = dense(model, variant, p, s, h_ref, lengths, mask, tensors)
    y_ref.backward(y_grad.double())
    tolerance = TOLERANCE[dtype]
    assert_close(y, y_ref.to(dtype), tolerance, "the output")
    assert_close(h.grad, h_ref.grad.to(dtype), tolerance, "the gradient to h")
    for block, wanted in zip(model.blocks, tensors):
        assert set(wanted) == {k for k, t in own(block).items() if t.requires_grad}
        for key, want in wanted.items():
            assert_close(own(block)[key].grad, want.grad.to(dtype), 10 * tolerance, key)


@pytest.mark.parametrize("n", range(1, 12))
@on_positions
def test_positions_of_every_length(n, p, s):
    """Which tokens move, and by which of the untied edits: b alone, of a size for each."""
    model = adapted("reft", moved=0, blocks=1, p=p, s=s, tied=False)
    tensors = own(model.blocks[0])
    tensors["b"].data = torch.arange(1, p + s + 1).double()[:, None].expand(-1, R).contiguous()
    h = hidden(batch=1, tokens=12)
    edit = model(h, prompt_lengths=n) - Stack(1).double()(h)
    found = {}
    for t in range(12):
        size = edit[0, t].norm().item() / R**0.5
        if size > 1e-9:
            found[round(size) - 1] = t
            assert size == pytest.approx(round(size))
    assert found == positions(n, p, s)


def test_the_edits_of_the_paper():
    """{1, …, p} ∪ {n − s + 1, …, n}; p ← min(p, ⌊n/2⌋), s ← min(s, ⌈n/2⌉) where n < p + s."""
    assert sorted(positions(9, 2, 3).values()) == [0, 1, 6, 7, 8]
    assert sorted(positions(3, 7, 7).values()) == [0, 1, 2]
    assert sorted(positions(3, 0, 7).values()) == [1, 2]
    assert positions(1, 7, 7) == {13: 0}


@pytest.mark.parametrize("mask", [None, "left"])
@pytest.mark.parametrize("steps", [[9], [1] * 9, [4, 1, 1, 3], [2, 7], [8, 1]])
def test_in_parts_with_a_cache_as_in_one(mask, steps):
    """Positions are counted from the prompt's first token, wherever a call begins."""
    model = adapted(p=2, s=2)
    mask = None if mask is None else torch.tensor(MASKS[mask][0])
    lengths = torch.tensor([5, 9, 2, 6])
    h = hidden()
    want = model(h, attention_mask=mask, prompt_lengths=lengths)
    parts, seen = [], 0
    for n in steps:
        parts.append(
            model(
                h[:, seen : seen + n],
                attention_mask=None if mask is None else mask[:, : seen + n],
                past_key_values=Cache(seen),
                prompt_lengths=lengths,
            )
        )
        seen += n
    assert_close(torch.cat(parts, 1), want, 1e-14)


def test_padding_does_not_change_what_the_real_tokens_get():
    model, lengths = adapted(p=2, s=2), [5, 3]
    alone = [hidden(batch=1, tokens=n) for n in (6, 3)]
    want = [model(h, prompt_lengths=[n]) for h, n in zip(alone, lengths)]
    for left in (True, False):
        padded = hidden(batch=2)
        mask = torch.zeros(2, T, dtype=torch.long)
        for i, h in enumerate(alone):
            where = slice(T - h.shape[1], T) if left else slice(0, h.shape[1])
            padded[i, where], mask[i, where] = h[0], 1
        got = model(padded, attention_mask=mask, prompt_lengths=lengths)
        for i, y in enumerate(want):
            assert_close(got[i][mask[i].bool()], y[0], 1e-14)


def test_padding_may_hold_nan():
    """A row of attention in which all is masked gives NaN; it stays where it is."""
    model = adapted(p=2, s=1)
    mask, lengths = torch.tensor(MASKS["left"][0]), [5, 9, 1, 6]
    h = hidden().masked_fill(mask[..., None] == 0, float("nan"))
    y = model(h, attention_mask=mask, prompt_lengths=lengths)
    y[mask.bool()].square().sum().backward()
    assert y[mask.bool()].isfinite().all()
    for block in model.blocks:
        assert all(t.grad.isfinite().all() and t.grad.any() for t in own(block).values())


# The formula.


def edit_of(model, h):
    """What the only block's edit makes of each h: all of them are edited."""
    with torch.no_grad():
        for p in model.blocks[0].linear.parameters():
            p.zero_()
    return model(h, prompt_lengths=h.shape[1])


def raw_and_rows(model):
    tensors = own(model.blocks[0])
    return tensors, gram_schmidt(tensors["R"].detach()[0])


def test_the_subspace_takes_the_learnt_value_and_the_rest_stays():
    """R h' = A h + b; what is orthogonal to R's rows is untouched."""
    model, h = adapted(p=3, s=2, blocks=1), hidden(tokens=5)
    tensors, rows = raw_and_rows(model)
    new = edit_of(model, h)
    assert_close(new @ rows.T, h @ tensors["A"][0].T + tensors["b"][0])
    apart = torch.eye(D).double() - rows.T @ rows
    assert_close(new @ apart, h @ apart)
    assert not torch.allclose(new, h)


def test_without_a_the_edit_is_idempotent():
    model, h = adapted(p=3, s=2, blocks=1), hidden(tokens=5)
    own(model.blocks[0])["A"].data.zero_()
    once = edit_of(model, h)
    assert_close(edit_of(model, once), once)
    assert not torch.allclose(once, h)


def test_the_edit_is_affine():
    """h' = M h + c with M = I + Rᵀ(A − R), c = Rᵀ b."""
    model, h = adapted(p=3, s=2, blocks=1), hidden(tokens=5)
    tensors, rows = raw_and_rows(model)
    M = torch.eye(D).double() + rows.T @ (tensors["A"][0] - rows)
    assert_close(edit_of(model, h), h @ M.T + tensors["b"][0] @ rows)


@pytest.mark.parametrize("scale", [2.0**-20, 1.0, 2.0**20])
@pytest.mark.parametrize("near, error", [(1.0, 1e-14), (1e-2, 1e-11), (1e-4, 1e-7)])
def test_rows_are_orthonormal_for_every_raw_value(scale, near, error):
    """R Rᵀ = I and the span stays, for any lengths of the raw rows. For rows that nearly agree the
    error grows as their condition squared, in float64."""
    raw = torch.randn(2, R, D).double()
    raw[:, 1] = raw[:, 0] + near * raw[:, 1]
    rows = orthonormal(scale * raw)
    span = torch.linalg.qr(raw.mT).Q
    assert_close(rows @ rows.mT, torch.eye(R).double().expand(2, R, R), error)
    assert_close(rows @ span @ span.mT, rows, 1e-10)
    coarse = orthonormal((scale * raw).float())
    assert coarse.dtype == torch.float32
    assert_close(coarse @ coarse.mT, torch.eye(R).expand(2, R, R), 1e-6)


def test_the_rows_stay_orthonormal_as_they_train():
    model = adapted(p=2, s=2, moved=0)
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=0.3), weight_decay=0.1)
    h, goal = hidden(), hidden().flip(0)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(h, prompt_lengths=6) - goal).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < losses[0]
    for block in model.blocks:
        W = block.kinds["default"](block)
        rows = block.adapters["default"].variant.prepare(W, **own(block))["R"][0]
        assert_close(rows @ rows.T, torch.eye(R).double())


@pytest.mark.parametrize("variant", FORMULAS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_starts_as_identity(variant, tied, dtype):
    """Bit for bit where the tensors are as wide as the model's and at least float32; A is R rounded
    where they are not."""
    h = hidden(dtype)
    want = Stack().to(dtype)(h)
    for own_dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = Stack().to(dtype)
        ll.attach(model, variant, dtype=own_dtype, seed=0, p=2, s=2, tied=tied)
        got = model(h, prompt_lengths=6)
        wide = own_dtype == torch.promote_types(dtype, torch.float32) or variant == "direft"
        assert torch.equal(got, want) or not wide
        assert_close(got, want, 1e-2 if torch.bfloat16 in (own_dtype, dtype) else 1e-6)
    model = adapted(variant, moved=0, p=2, s=2, tied=tied)
    if variant == "reft":
        rows = own(model.blocks[0])["R"].detach()
        assert_close(rows @ rows.mT, torch.eye(R).double().expand(len(rows), R, R), 1e-6)
        assert not torch.allclose(rows, own(model.blocks[1])["R"])


def test_a_small_edit_survives_bfloat16():
    """A − R is taken in float32: rounding A first would lose a change of 1e-3."""
    model = Stack(1).to(torch.bfloat16)
    ll.attach(model, "reft", p=2, s=2, r=R)
    tensors = own(model.blocks[0])
    h = torch.zeros(1, 4, D, dtype=torch.bfloat16)
    h[..., 0] = 64
    with torch.no_grad():
        tensors["A"] += 1e-3 * torch.randn(tensors["A"].shape)
        edit = edit_of(model, h)[..., 1:].float()
    rows = gram_schmidt(tensors["R"].detach()[0].double())
    want = (h.double() @ (tensors["A"].detach()[0].double() - rows).T) @ rows
    assert_close(edit, want[..., 1:].float(), 2e-2)


@settings(
    tied=dict(p=2, s=3),
    untied=dict(p=2, s=3, tied=False),
    first=dict(p=1, s=0),
)
@pytest.mark.parametrize("variant", FORMULAS)
def test_shapes_and_parameter_count(variant, hyper):
    """2 r d + r for each edit: one a layer, or untied one a position."""
    chart = ll.plan(Stack(), variant, r=R, **hyper)
    n = 1 if hyper.get("tied", True) else 5
    names = dict(reft=("R", "A"), direft=("W1", "W2"))[variant]
    assert chart.sites[0].shapes == {**dict.fromkeys(names, (n, R, D)), "b": (n, R)}
    assert chart.trainable == 2 * n * (2 * R * D + R)


def test_the_papers_count():
    """App. G.2: "We then train a rank-4 LoReFT at layer 15 […] (32,772 learned parameters in
    total)"."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    assert ll.plan(model, "reft", ["layers.15"], r=4).trainable == 32_772


@settings(
    rank=(dict(r=13), "blocks.0 has a width of 12, less than r=13; use r ≤ 12"),
    no_rank=(dict(r=0), "r=0 must be ≥ 1"),
    nowhere=(dict(p=0, s=0), "p=0 and s=0 must be ≥ 0, and one of them ≥ 1"),
    negative=(dict(p=-1, s=3), "p=-1 and s=3 must be ≥ 0"),
    layer=(dict(targets=["blocks.7"]), "targets: 'blocks.7' matches no layer"),
)
@pytest.mark.parametrize("variant", FORMULAS)
def test_what_cannot_work_is_refused(variant, hyper):
    hyper, match = hyper
    model = Stack()
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        ll.attach(model, variant, **hyper)
    unchanged(model, before)


@pytest.mark.parametrize("variant", FORMULAS)
def test_merging_is_refused(variant):
    model = adapted(variant, p=1, s=1)
    match = f"{variant}: blocks.0 can't be merged: what it does to a token depends on where"
    for call in (ll.merge, ll.delta_weights):
        with pytest.raises(ValueError, match=match):
            call(model)
    with pytest.raises(ValueError, match=match), ll.merged(model):
        pass
    assert all(row["change"] is None for row in ll.diagnose(model).rows)


def test_broken_rows_in_a_file_are_refused(tmp_path):
    """NaN, and rows that depend on each other, which no orthonormal ones span."""
    for fault, match in (
        (lambda R: R[0, 1].copy_(2 * R[0, 0]), "reft: blocks.1 has an R of dependent rows"),
        (lambda R: R.zero_(), "reft: blocks.1 has an R of dependent rows"),
        (lambda R: R[0, 0].fill_(float("nan")), "blocks.1.R has NaN or infinite numbers"),
    ):
        model = adapted(p=1, s=1)
        fault(own(model.blocks[1])["R"].data)
        ll.save(model, tmp_path / "a.safetensors")
        fresh = Stack().double()
        before = snapshot(fresh)
        with pytest.raises(ValueError, match=match):
            ll.load(fresh, tmp_path / "a.safetensors")
        unchanged(fresh, before)
    model = adapted(p=1, s=1)
    own(model.blocks[1])["R"].data *= 1e3
    ll.save(model, tmp_path / "a.safetensors")
    ll.load(fresh := Stack().double(), tmp_path / "a.safetensors")
    h = hidden()
    assert torch.equal(fresh(h, prompt_lengths=3), model(h, prompt_lengths=3))


def test_two_edits_compose_in_order():
    """The second sees what the first left, at its own positions."""
    model = adapted(p=1, s=0, blocks=1)
    ll.attach(model, "direft", dtype=torch.float64, seed=1, r=R, p=2, s=1, name="second")
    move(model, seed=5, scale=0.3)
    h, frozen = hidden(), Stack(1).double()(hidden())
    first, second = own(model.blocks[0]), own(model.blocks[0], "second")
    want = frozen.clone()
    for b in range(4):
        want[b, 0] = loreft(want[b, 0], *(first[k][0] for k in ("R", "A", "b")))
        for t in (0, 1, 5):
            want[b, t] = direft(want[b, t], *(second[k][0] for k in ("W1", "W2", "b")))
    assert_close(model(h, prompt_lengths=6), want.detach())


# Under transformers.

MASK = torch.ones(2, 10, dtype=torch.long)
MASK[0, :4] = 0
LENGTHS = torch.tensor([6, 10])


def edited_llama(**hyper):
    model = llama()
    ll.attach(model, "reft", seed=0, **(dict(p=2, s=2) | hyper))
    move(model, scale=0.5)
    return model


def test_left_padding_changes_nothing_for_a_llama():
    model, short = edited_llama(), IDS[:1, 4:]
    want = model(short, prompt_lengths=6).logits
    got = model(IDS, attention_mask=MASK, prompt_lengths=LENGTHS).logits
    torch.testing.assert_close(got[:1, 4:], want)
    assert not torch.allclose(want, llama()(short).logits)


@settings(greedy=dict(), beams=dict(num_beams=3), sampled=dict(do_sample=True))
def test_generation_equals_one_pass_over_what_it_wrote(hyper):
    """With left padding and a cache: what is generated is never edited, and beams know which
    prompt is theirs."""
    model, more = edited_llama(tied=False), 5
    options = dict(do_sample=False) | hyper
    with ll.prompts(model, LENGTHS):
        out = model.generate(
            IDS,
            attention_mask=MASK,
            max_new_tokens=more,
            min_new_tokens=more,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
            num_return_sequences=hyper.get("num_beams", 2 if hyper else 1),
            **options,
        )
    times = len(out.sequences) // 2
    mask = torch.cat([MASK, torch.ones(2, more, dtype=torch.long)], 1).repeat_interleave(times, 0)
    whole = model(
        out.sequences, attention_mask=mask, prompt_lengths=LENGTHS.repeat_interleave(times)
    ).logits[:, 9:-1]
    if "num_beams" not in hyper:
        torch.testing.assert_close(torch.stack(out.logits, 1), whole)
    else:
        written = out.sequences[:, 10:, None]
        scores = whole.log_softmax(-1).gather(2, written)[..., 0].sum(1) / more
        torch.testing.assert_close(out.sequences_scores, scores, rtol=1e-4, atol=1e-4)


def test_answers_train_the_edits_of_their_prompts_and_are_not_edited():
    model = edited_llama()
    labels = IDS.clone()
    labels[:, :7] = -100
    call = dict(labels=labels, prompt_lengths=7, output_hidden_states=True)
    out = model(IDS, **call)
    out.loss.backward()
    assert all(t.grad.any() for layer in model.model.layers for t in own(layer).values())
    with ll.disabled(model):
        base = model(IDS, **call)
    moved = (out.hidden_states[1] != base.hidden_states[1]).any(-1)
    assert (
        moved[0].nonzero().flatten().tolist() == [0, 1, 5, 6] == moved[1].nonzero()[:, 0].tolist()
    )


def test_a_llama_compiles_whole():
    model = edited_llama()
    call = dict(attention_mask=MASK, prompt_lengths=LENGTHS, use_cache=False)
    want = model(IDS, **call).logits
    want.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    with unchecked():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = compiled(IDS, **call).logits
        torch.testing.assert_close(got, want)
        got.square().sum().backward()
        for name, grad in grads.items():
            torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad)
        other = dict(call, prompt_lengths=LENGTHS // 2)
        torch.testing.assert_close(compiled(IDS, **other).logits, model(IDS, **other).logits)


def test_a_trainers_batches_carry_prompt_lengths(tmp_path):
    """A column of the data set reaches the hook, and the model learns."""
    model = llama()
    ll.attach(model, "reft", seed=0, p=2, s=2, r=4)
    seen = []
    attachment = model.model.layers[0].adapters.default.attachment
    model.model.layers[0].register_forward_hook(
        lambda *_: seen.append(attachment.prompt.lengths.tolist())
    )
    rows = [
        dict(input_ids=IDS[i % 2], labels=IDS[i % 2], prompt_lengths=3 + i % 5) for i in range(24)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=4,
        remove_unused_columns=False,
        gradient_checkpointing=True,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=5e-2))
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.02
    assert len(seen) >= 12 and all(len(lengths) == 4 for lengths in seen)
    assert {n for lengths in seen for n in lengths} == {3, 4, 5, 6, 7}
