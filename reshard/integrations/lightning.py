"""The callback for Lightning that restores and saves the checkpoints of a run.

It is a callback of `pytorch_lightning` if only that is imported or installed, and otherwise of `lightning.pytorch`.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import reshard

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    is_imported = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
    is_used = is_imported or find_spec("lightning") is None
    Callback = importlib.import_module("pytorch_lightning" if is_used else "lightning.pytorch").Callback


class CheckpointCallback(Callback):
    """Restores the latest checkpoint when a fit starts, and passes every optimizer step to the manager.

    A checkpoint contains the model, the optimizers, the learning-rate schedulers, the state of the precision plugin,
    and the counters of the loops. The metrics are those that were logged. The fit ends when the manager says so. As
    when Lightning resumes by itself, the data of an epoch begins again unless its data loader has a state. Several
    optimizers make several steps in a batch: if one of them is due, the last one is saved.

    Args:
        manager: the manager. Pass `enable_checkpointing=False` to the Trainer, or it saves checkpoints of its own, too.
    """

    def __init__(self, manager: reshard.CheckpointManager) -> None:
        self._manager = manager
        self._state: dict[str, Any] = {}
        self._step = 0
        """The last step that was passed to the manager."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        schedulers = {f"lr_scheduler_{i}": config.scheduler for i, config in enumerate(trainer.lr_scheduler_configs)}
        model = trainer.strategy.model or pl_module  # with the wrappers of DDP or FSDP
        self._state = reshard.training_state(
            model, trainer.optimizers, **schedulers, loops=trainer.fit_loop, precision=trainer.precision_plugin
        )
        self._manager.restore(self._state)
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # gradients are accumulated
        passed = range(self._step + 1, trainer.global_step)  # several optimizers make several steps in a batch
        self._step = trainer.global_step
        was_due = any(map(self._manager.is_due, passed))
        self._manager.save(self._step, self._state, trainer.callback_metrics, force=was_due)
        trainer.should_stop = trainer.should_stop or self._manager.should_stop
