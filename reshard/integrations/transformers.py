"""The callback for the Trainer of Hugging Face transformers that restores and saves the checkpoints of a run."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

import reshard


class CheckpointCallback(TrainerCallback):
    """Restores the latest checkpoint when training starts, and passes every step to the manager.

    A checkpoint contains the model, the optimizer and the learning-rate scheduler. The metrics are the numbers that
    the trainer logs at its step, also during evaluations. If it may log something, a step that is due is therefore
    saved when the next one begins, or when training ends. So an evaluation that fails prevents the save, and after a
    signal the trainer may make one more step. With `load_best_model_at_end`, which replaces the weights, a step is
    saved at once, without these metrics. Training ends when the manager says so.

    After a restore, the trainer begins the data and the count of epochs again, and the first loss that it logs is too
    small, so it is not used as a metric. If the run is finished, the trainer still makes a step, which is undone.

    Args:
        manager: the manager. Pass `save_strategy="no"` to the trainer, or it saves checkpoints of its own, too.
    """

    def __init__(self, manager: reshard.CheckpointManager) -> None:
        self._manager = manager
        self._state: dict[str, Any] = {}
        self._metrics: dict[str, float] = {}
        """What the trainer has logged since the last step began."""
        self._is_pending = False
        """Whether the last step is still to be saved, with what the trainer logs after it."""
        self._is_loss_wrong = False
        """Whether the trainer will log a loss that it divides by all steps since step 0."""
        self._is_finished = False
        """Whether the restored checkpoint is the last one of the run."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        optimizer = getattr(parts["optimizer"], "optimizer", parts["optimizer"])  # Accelerate wraps it
        self._state = reshard.training_state(parts["model"], optimizer, lr_scheduler=parts["lr_scheduler"])
        self._is_pending, self._metrics = False, {}
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
        if "train_runtime" in numbers:  # the summary of the training
            return
        if self._is_loss_wrong and "loss" in numbers:
            del numbers["loss"]
            self._is_loss_wrong = False
        self._metrics |= numbers

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        if self._is_pending:
            self._save(state, control)
        self._metrics = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        if self._is_finished:  # the trainer always makes a step, so undo it
            state.global_step = self._manager.restore(self._state) or 0
            control.should_training_stop = True
            return
        ends_epochs = IntervalStrategy.EPOCH in (args.eval_strategy, args.logging_strategy)
        may_log = control.should_log or control.should_evaluate or ends_epochs
        self._is_pending = may_log and not args.load_best_model_at_end and self._manager.is_due(state.global_step)
        if not self._is_pending:
            self._save(state, control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        if self._is_pending:
            self._save(state, control)

    def _save(self, state: TrainerState, control: TrainerControl) -> None:
        self._is_pending = False
        self._manager.save(state.global_step, self._state, self._metrics)
        control.should_training_stop |= self._manager.should_stop
