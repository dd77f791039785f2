"""Adapters on transformers models, under accelerate, checkpointing and at 7-billion scale."""

import copy

import pytest
import torch
from models import IDS, gpt2, llama
from settings import BUILT_IN, LINEAR, SMALL

import lora_lite as ll
from lora_lite.testing import calibration_for, snapshot, unchanged
from lora_lite.variant import configure


@pytest.mark.parametrize("variant", BUILT_IN)
def test_a_llama_trains_and_detaches(variant):
    model = llama()
    before = snapshot(model)
    configured = configure(variant, **SMALL[variant][0])
    batches = calibration_for(configured, [dict(input_ids=IDS)])
    ll.attach(model, variant=configured, calibration=batches)
    prompt = dict(prompt_lengths=torch.tensor([4])) if configured.needs_prompt else {}
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=5e-2))
    ll.schedule(model, optimizer, total=8)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS, **prompt).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.02
    ll.detach(model)
    unchanged(model, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    grads = []
    for on in (False, True):
        model = llama().train()
        ll.attach(model, "dora", r=4, seed=0)
        if on:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_generation_runs_through_the_adapters():
    model = llama()
    ll.attach(model, "lora", r=4)
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    base = model.generate(IDS, **options)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.adapters.default.B.normal_(std=5)
    assert not torch.equal(model.generate(IDS, **options), base)
    with ll.disabled(model):
        assert torch.equal(model.generate(IDS, **options), base)


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("variant", ["lora", "dora", "pissa"])
def test_a_model_dispatched_by_accelerate(variant, place, tmp_path):
    """Its forwards sit on the instances, and offloaded weights are there only while they run."""
    from accelerate import dispatch_model

    model = llama()
    logits = model(IDS).logits
    where = {name: "cpu" for name, _ in model.named_children()}
    where |= {"model": "cpu"} if place == "cpu" else {}
    if place == "disk":
        where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        where |= {"model.layers.0": "disk", "model.layers.1": "cpu", "lm_head": "cpu"}
    model = dispatch_model(model, where, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    before = snapshot(model) if place == "cpu" else None
    layer = model.model.layers[0].mlp.up_proj
    forward = layer.__dict__.get("forward")
    assert forward is not None
    ll.attach(model, variant, r=4)
    assert torch.equal(model(IDS).logits, logits)
    with torch.no_grad():
        layer.adapters.default.B.add_(1)
    assert not torch.equal(model(IDS).logits, logits)
    ll.detach(model)
    assert layer.__dict__["forward"] is forward
    assert torch.equal(model(IDS).logits, logits)
    if before:
        unchanged(model, before)


def test_a_copy_of_an_adapted_llama_is_its_own():
    model = llama()
    ll.attach(model, "jora", k=4)
    twin = copy.deepcopy(model)
    ll.detach(model)
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
    layers = twin.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.up_proj
    assert [hasattr(layer, "adapters") for layer in layers] == [True, False]


def test_seven_billion_parameters_are_planned_on_the_meta_device():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    before = snapshot(model)
    chart = ll.plan(model, "jora", ["q_proj", "v_proj"], S_L=96, S_R=96, k=24)
    # 64 modules of 4096²: 96 + 96 angles, a diagonal of 4096 and 4096 magnitudes each.
    assert chart.trainable == 64 * (96 + 96 + 4096 + 4096) == 536_576
    assert chart.base_parameters == 6_738_415_616
    text = str(ll.plan(model, "lora", r=16))
    assert "224 layers, 39,976,960 trained parameters" in text and "MiB on the device" in text
    unchanged(model, before)


def test_gpt2_conv1d_trains_like_the_linear_layer_it_equals():
    model = gpt2()
    conv = model.transformer.h[0].attn.c_attn
    linear = torch.nn.Linear(32, 96)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias)
    x = torch.randn(2, 3, 32)
    for variant in LINEAR:
        one, other = copy.deepcopy(conv), copy.deepcopy(linear)
        configured = configure(variant, **SMALL[variant][0])
        for layer in (one, other):
            batches = calibration_for(configured, [torch.ones(3, 32), torch.eye(32)])
            ll.attach(layer, configured, seed=0, calibration=batches)
        torch.testing.assert_close(one(x), other(x))
