"""Adapters under transformers' Trainer. Importing this imports transformers."""

import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lora_lite.adapted import adapters
from lora_lite.checkpoint import load, save
from lora_lite.steps import check_total, step


class AdapterCallback(TrainerCallback):
    """Advances the methods' schedules with the Trainer's optimizer steps, and keeps the adapters.

    Each checkpoint folder gets `adapter.safetensors` (`adapter-NAME.safetensors` where the model
    has several), from which a resumed run takes tensors, schedules and their step numbers: it goes
    on as if it had never stopped.

    resume_from: the checkpoint folder to resume from, where that is not the `checkpoint-N` of the
    Trainer's output_dir.

        Trainer(model, ..., callbacks=[AdapterCallback()])
    """

    def __init__(self, resume_from: str | os.PathLike[str] | None = None) -> None:
        self.resume_from = resume_from

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Raises: ValueError where the model has no adapter, or a file doesn't fit it;
        FileNotFoundError where a run resumes and its checkpoint holds no adapter."""
        for _, _, adapter in adapters(model):
            check_total(adapter, state.max_steps)
        if state.global_step:
            folder = Path(self.resume_from or checkpoint_folder(args, state))
            for name, file in adapter_files(model).items():
                if not (folder / file).is_file():
                    raise FileNotFoundError(
                        f"{folder / file}: not there, and the run resumes at step "
                        f"{state.global_step}; pass AdapterCallback(resume_from=...) the folder "
                        "of a checkpoint that this callback wrote"
                    )
                load(model, folder / file, name)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any,
        **kwargs: Any,
    ) -> None:
        # A step that the gradient scaler left out moved nothing.
        if not getattr(optimizer, "step_was_skipped", False):
            step(model, state.max_steps, optimizer)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        for name, file in adapter_files(model).items():
            save(model, checkpoint_folder(args, state) / file, name)


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer keeps the checkpoint of its present step."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def adapter_files(model: nn.Module) -> dict[str, str]:
    """A file name for each of the model's adapters."""
    names = dict.fromkeys(adapter.attachment.name for _, _, adapter in adapters(model))
    if len(names) == 1:
        return dict.fromkeys(names, "adapter.safetensors")
    return {name: f"adapter-{name}.safetensors" for name in names}
