"""The callback for Lightning that restores and saves the checkpoints of a run.

It is a callback of `pytorch_lightning` if only that is imported or installed, and otherwise of `lightning.pytorch`.
"""

from __future__ import annotations

import importlib
import logging
import signal
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import reshard

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.utilities.exceptions import SIGTERMException
else:
    is_imported = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
    package = "pytorch_lightning" if is_imported or find_spec("lightning") is None else "lightning.pytorch"
    Callback = importlib.import_module(package).Callback
    SIGTERMException = importlib.import_module(f"{package}.utilities.exceptions").SIGTERMException


logger = logging.getLogger(__name__)


class _Loops:
    """The counters of the loops of a trainer."""

    def __init__(self, fit_loop: Any) -> None:
        self._fit_loop = fit_loop
        self._at_epoch_end: dict[str, Any] | None = None

    def freeze(self) -> None:
        """Return the counters of this moment from `state_dict` until `unfreeze` is called."""
        self._at_epoch_end = self._fit_loop.state_dict()

    def unfreeze(self) -> None:
        self._at_epoch_end = None

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._at_epoch_end or self._fit_loop.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._fit_loop.load_state_dict(state)
        epochs = self._fit_loop.epoch_progress.current
        if epochs.ready == epochs.started == epochs.processed:
            # The epoch is complete. If `max_steps` is set, Lightning would run the end of it again.
            for loop in (self._fit_loop, self._fit_loop.epoch_loop, self._fit_loop.epoch_loop.val_loop):
                loop._restarting = False


class CheckpointCallback(Callback):
    """Restores the latest checkpoint when a fit starts, and passes every optimizer step to the manager.

    A checkpoint contains the model, the optimizers, the learning-rate schedulers, the state of the precision plugin,
    and the counters of the loops. The metrics are those that were logged. The fit ends when the manager says so. As
    when Lightning resumes by itself, the data of an epoch begins again unless its data loader has a state. Several
    optimizers make several steps in a batch: if one of them is due, the last one is saved. The last step of an epoch is
    saved after the validation and `on_train_epoch_end`, unless the fit ends within the epoch.

    After SIGTERM, Lightning ends a fit on one device with an exception, and the callback then saves the last step. On
    several devices, the manager handles the signal.

    Args:
        manager: the manager. Pass `enable_checkpointing=False` to the Trainer, or it saves checkpoints of its own, too.
    """

    def __init__(self, manager: reshard.CheckpointManager) -> None:
        self._manager = manager
        self._loops: _Loops | None = None
        """None if there is no fit."""
        self._state: dict[str, Any] = {}
        self._handler_before: Any = None
        """What handled SIGTERM before Lightning."""
        self._step = 0
        """The last step that was passed to the manager."""
        self._saved_step = 0
        """The last step that was saved or restored."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        schedulers = {f"lr_scheduler_{i}": config.scheduler for i, config in enumerate(trainer.lr_scheduler_configs)}
        model = trainer.strategy.model or pl_module  # with the wrappers of DDP or FSDP
        self._loops = _Loops(trainer.fit_loop)
        self._state = reshard.training_state(
            model, trainer.optimizers, **schedulers, loops=self._loops, precision=trainer.precision_plugin
        )
        self._manager.restore(self._state)
        self._step = self._saved_step = trainer.global_step
        self._handler_before = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # On several ranks, Lightning's handler makes a collective, which can meet one of the training on another rank.
        is_replaced = signal.getsignal(signal.SIGTERM) != self._handler_before
        if is_replaced and trainer.world_size > 1 and self._manager.handles(signal.SIGTERM):
            signal.signal(signal.SIGTERM, self._handler_before)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The hook of the module, and schedulers that depend on a metric, come after this. But Lightning can only resume
        # from the counters that the loops have now.
        if self._loops is not None and trainer.global_step != self._step:
            self._loops.freeze()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
        if self._manager.should_stop and trainer.fit_loop._can_stop_early:
            raise StopIteration  # Lightning ends the fit, before it begins the epoch

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # On several ranks, others may not come here.
        if isinstance(exception, SIGTERMException) and trainer.world_size == 1 and self._loops is not None:
            try:
                self._save(trainer, force=trainer.global_step != self._saved_step)
            except Exception as error:  # Lightning has an exception to raise, and something to end before it
                logger.error("step %d could not be saved: %s: %s", self._step, type(error).__name__, error)
        self._loops = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loops = None

    def _save(self, trainer: Trainer, *, force: bool = False) -> None:
        if trainer.global_step != self._step or force:  # otherwise gradients are accumulated
            passed = range(self._step + 1, trainer.global_step)  # several optimizers make several steps in a batch
            self._step = trainer.global_step
            was_due = any(map(self._manager.is_due, passed))
            if self._manager.save(self._step, self._state, trainer.callback_metrics, force=was_due or force):
                self._saved_step = self._step
            trainer.should_stop = trainer.should_stop or self._manager.should_stop
        if self._loops is not None:
            self._loops.unfreeze()
