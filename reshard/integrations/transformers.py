"""The callback for the Trainer of Hugging Face transformers that restores and saves the checkpoints of a run."""

from __future__ import annotations

from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

import reshard


class CheckpointCallback(TrainerCallback):
    """Restores the latest checkpoint when training starts, and passes every step to the manager.

    A checkpoint contains the model, the optimizer and the learning-rate scheduler. The metrics are the numbers that
    the trainer logs at its step, those of an evaluation included. Training ends when the manager says so. After a
    restore, the trainer begins the data and the count of epochs again, and the first loss that it logs is too small, so
    it is not used as a metric. If the run is finished, the trainer still makes a step, which is undone.

    Args:
        manager: the manager. Pass `save_strategy="no"` to the trainer, or it saves checkpoints of its own, too.
    """

    def __init__(self, manager: reshard.CheckpointManager) -> None:
        self._manager = manager
        self._state: dict[str, Any] = {}
        self._metrics: dict[str, float] = {}
        """What the trainer has logged since the last step began."""
        self._awaited: Literal["evaluation", "log"] | None = None
        """What the save of the last step waits for."""
        self._is_loss_wrong = False
        """Whether the trainer will log a loss that it divides by all steps since step 0."""
        self._is_finished = False
        """Whether the restored checkpoint is the last one of the run."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        optimizer = getattr(parts["optimizer"], "optimizer", parts["optimizer"])  # Accelerate wraps it
        self._state = reshard.training_state(parts["model"], optimizer, lr_scheduler=parts["lr_scheduler"])
        state.global_step = self._manager.restore(self._state) or 0
        self._is_loss_wrong = state.global_step > 0
        self._is_finished = 0 < state.max_steps <= state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **parts: Any,
    ) -> None:
        numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        if self._is_loss_wrong and "loss" in numbers:
            del numbers["loss"]
            self._is_loss_wrong = False
        self._metrics |= numbers
        if self._awaited == "log":
            self._save(state, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        if self._awaited == "evaluation":
            self._save(state, control)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        if self._awaited is not None:  # the trainer has logged nothing
            self._save(state, control)
        self._metrics = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        if self._is_finished:  # the trainer always makes a step, so undo it
            state.global_step = self._manager.restore(self._state) or 0
            control.should_training_stop = True
            return
        epoch = float(state.epoch or 0)
        ends = IntervalStrategy.EPOCH if epoch.is_integer() else None
        if control.should_evaluate or (args.eval_strategy == ends and args.eval_delay <= epoch):
            self._awaited = "evaluation"
        elif control.should_log or args.logging_strategy == ends:
            self._awaited = "log"
        else:
            self._save(state, control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        if self._awaited is not None and not args.load_best_model_at_end:  # which may have replaced the weights
            self._save(state, control)

    def _save(self, state: TrainerState, control: TrainerControl) -> None:
        self._awaited = None
        self._manager.save(state.global_step, self._state, self._metrics)
        control.should_training_stop |= self._manager.should_stop
