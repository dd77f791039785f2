"""Under transformers' Trainer: schedules follow its steps, and a resumed run is the same run."""

import shutil

import pytest
import torch
from models import IDS, llama
from transformers import Trainer, TrainingArguments

import lora_lite as ll
from lora_lite.adapted import adapters
from lora_lite.trainer import AdapterCallback

SELECTING = dict(k=4, ema_beta=0.5, warmup_ratio=0.5, update_interval=2, ecd_temp_annealing=True)


def trainer(folder, callback=None, variant="jora", steps=8, more=(), **hyper):
    """A Trainer of a small adapted Llama; two micro-batches a step."""
    model = llama()
    ll.attach(model, variant, targets=["q_proj", "down_proj"], seed=0, **hyper)
    for name, other in more:
        ll.attach(model, other, targets=["q_proj"], seed=1, name=name)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(64, (40, 10), generator=generator)
    data = [dict(input_ids=row, labels=row) for row in rows]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=3,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=1e-2))
    callback = callback or AdapterCallback()
    return Trainer(
        model, arguments, train_dataset=data, optimizers=(optimizer, None), callbacks=[callback]
    )


def test_schedules_follow_the_trainers_optimizer_steps(tmp_path):
    run = trainer(tmp_path, **SELECTING)
    run.train()
    for _, _, adapter in adapters(run.model):
        assert (adapter.attachment.step, adapter.attachment.total) == (8, 8)
        tensors = adapter.tensors()
        assert sum(int(tensors[f"active_{side}"].sum()) for side in "LR") == 4
        assert float(tensors["temperature"]) == 1.0
        assert tensors["ema_row"].any() and tensors["churn_R"][0] > 0


def test_what_enters_has_no_moments_in_the_trainers_optimizer(tmp_path):
    run = trainer(tmp_path, k=4, ema_beta=0.2)
    run.train()
    fresh = 0
    for _, _, adapter in adapters(run.model):
        for side in "LR":
            theta = getattr(adapter, f"theta_{side}")
            entered = getattr(adapter, f"active_{side}") & (theta == 0)
            assert not run.optimizer.state[theta]["exp_avg_sq"][entered].any()
            fresh += int(entered.sum())
    assert fresh > 2


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = trainer(tmp_path / "a", **SELECTING)
    whole.train()
    resumed = trainer(tmp_path / "a", **SELECTING)
    with torch.no_grad():
        for p in resumed.model.parameters():
            if p.requires_grad:
                p.add_(1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    after = resumed.model.state_dict()
    assert any("pairs" in name for name in after)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(after[name], tensor), name
    assert adapters(resumed.model)[0][2].attachment.step == 8


def test_checkpoints_hold_adapters_that_load_elsewhere(tmp_path):
    run = trainer(tmp_path, steps=3, more=[("second", "lora")])
    run.train()
    files = {path.name for path in (tmp_path / "checkpoint-3").glob("adapter*")}
    assert files == {"adapter-default.safetensors", "adapter-second.safetensors"}
    model = llama()
    for file in sorted(files):
        ll.load(model, tmp_path / "checkpoint-3" / file)
    assert torch.equal(model(IDS).logits, run.model.eval()(IDS).logits)


def test_a_checkpoint_elsewhere_is_resumed_where_it_is_named(tmp_path):
    trainer(tmp_path / "a", steps=3).train()
    shutil.move(tmp_path / "a" / "checkpoint-3", tmp_path / "kept")
    with pytest.raises(FileNotFoundError, match=r"resumes at step 3; pass AdapterCallback\(resume"):
        trainer(tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "kept"))
    run = trainer(tmp_path / "b", AdapterCallback(resume_from=tmp_path / "kept"))
    run.train(resume_from_checkpoint=str(tmp_path / "kept"))
    assert adapters(run.model)[0][2].attachment.step == 8


def test_a_model_without_adapters_is_refused(tmp_path):
    run = trainer(tmp_path)
    ll.detach(run.model)
    with pytest.raises(ValueError, match="the model has no adapters"):
        run.train()


def test_steps_that_the_scaler_skipped_do_not_count(tmp_path):
    run = trainer(tmp_path, k=4)
    state = run.state
    state.max_steps = 8

    class Scaled(torch.optim.SGD):
        step_was_skipped = True

    optimizer = Scaled(ll.param_groups(run.model, lr=0.1))
    attachment = adapters(run.model)[0][2].attachment
    callback = AdapterCallback()
    for skipped, want in ((True, 0), (False, 1), (True, 1), (False, 2)):
        optimizer.step_was_skipped = skipped
        callback.on_optimizer_step(run.args, state, run.control, run.model, optimizer)
        assert attachment.step == want
