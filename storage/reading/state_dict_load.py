"""Reading a checkpoint into a state dict, in place.

A `CheckedLoad` becomes a `PreparedLoad`, and this a `FinishedLoad`.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...planner.chunk_reads import WantedBox
from ...planner.errors import CheckpointError, ShapeMismatchError
from ...planner.text import quoted
from ..errors import DestinationError
from ..formats.source import Source
from ..formats.value_codec import check_no_shard
from ..runtime.deferred_writes import finish_writes
from ..runtime.reports import Cast, RankReport, added
from ..tensors.casts import ScaleNames, check_is_not_scaled, loses_bits
from ..tensors.dtypes import LocalShard, torch_dtype
from ..tensors.local_shards import local_shards
from ..tensors.state_dict import Leaf, Path, name_of, nest, renamed_path
from ..tensors.tensor_classes import is_whole, missing_memory
from .load_options import LoadOptions
from .missing_names import MissingNames, check_missing, check_optimizers
from .name_matching import NameMatch
from .read_tensors import CheckedBoxes, DecodedTensor, ReadOptions, check_is_tensor, counting_metadata, execute_reads
from .value_buffers import ValueBuffer, check_values, decode_all, whole_wants


class CheckedLoad:
    """What one rank loads into its state dict. Creating it checks that everything fits, and changes no tensor.

    Copies of lazy tensors that have been recorded for its tensors are executed, so that they do not overwrite what is
    loaded.

    Args:
        match: where the names of the state dict are in the checkpoint.

    Raises:
        ShapeMismatchError, DtypeError, DestinationError, LayoutError: a tensor does not fit the checkpoint.
        Also what `check_missing` and `check_optimizers` raise.
    """

    def __init__(self, match: NameMatch, options: LoadOptions) -> None:
        self.match = match
        self.source = source = match.source
        check_missing(self.match, options)
        check_optimizers(self.match, options)
        self.allow_pickle = options.allow_pickle
        self.casts: dict[str, Cast] = {}
        """The tensors that are cast to fewer bits, by name."""
        items = [name for _, names in match.containers for name in names]
        self.value_leaves = [leaf for name, leaf in match.present.items() if not match.entry(name).is_tensor]
        """The leaves whose values are replaced."""
        for leaf in self.value_leaves:
            check_no_shard(leaf.name, leaf.value)
        self.value_names = [leaf.name for leaf in self.value_leaves]
        """The names of all values to read, also of those that a dict or a list lacks."""
        self.value_names += [name for name in items if not match.entry(name).is_tensor]
        self._wants, self._destinations = self._find_destinations()
        self._decoded = self._decoded_tensors()
        finish_writes("reshard.load", [*self._destinations, *(value.destination for value in self._decoded)])
        self._item_names = [name for name in items if match.entry(name).is_tensor]
        self._wants += [WantedBox(match.stored_names[name], match.entry(name).whole) for name in self._item_names]
        self.stored_values = [match.stored_names[name] for name in self.value_names]
        """The names of the values in the checkpoint."""
        check_values(source, self.stored_values, options.budget_bytes)
        self._check_containers()
        self.needs = [*self._wants, *whole_wants(source, self.stored_values)]
        """The boxes that this rank reads."""

    def prepare(self, options: ReadOptions) -> PreparedLoad:
        """Read the metadata of all boxes, and create new tensors for the items that the state dict does not have.

        Args:
            options: how values are read to compare them, if two names have one tensor.

        Raises:
            CorruptCheckpointError, StoreError, DestinationError: see `reshard.load`.
        """
        self.source.index(self.needs)  # reads and checks all metadata before tensors of these sizes are allocated
        item_tensors = {name: _empty(self.match, name) for name in self._item_names}
        destinations = [*self._destinations, *item_tensors.values()]
        reads = CheckedBoxes.of(self.source, self._wants, destinations, self._decoded, options)
        return PreparedLoad(self, reads, item_tensors)

    def describe_unexpected_keys(self, unexpected: Sequence[str]) -> str:
        """Return a message about the names of the checkpoint that no state dict has; empty if there are none."""
        if not unexpected:
            return ""
        message = f"{len(unexpected)} names of the checkpoint are not in the state dict: {quoted(unexpected)}"
        return "; ".join(filter(None, (message, MissingNames(self.match).describe_resize(unexpected[0], "list"))))

    def _find_destinations(self) -> tuple[list[WantedBox], list[torch.Tensor]]:
        """Return the boxes to read, and the local tensors to read them into."""
        wants: list[WantedBox] = []
        destinations: list[torch.Tensor] = []
        for leaf in self.match.present.values():
            stored = self.match.stored_names[leaf.name]
            for box, tensor in _shards_to_load(leaf, self.source, stored):
                wants.append(WantedBox(stored, box))
                destinations.append(tensor)
                self._note_cast(leaf.name, torch_dtype(self.source.entry(stored).dtype), tensor.dtype)
        return wants, destinations

    def _decoded_tensors(self) -> list[DecodedTensor]:
        """Return the tensors inside values of the checkpoint, and the local tensors to copy them to."""
        decoded: list[DecodedTensor] = []
        scales = ScaleNames(self.match.decoded_names)
        for leaf, value in self.match.nested:
            if isinstance(value, torch.Tensor):
                for box, tensor in _local_shards(leaf, tuple(value.shape)):
                    check_is_not_scaled(leaf.name, value.dtype, tensor.dtype, scales)
                    self._note_cast(leaf.name, value.dtype, tensor.dtype)
                    decoded.append(DecodedTensor(leaf.name, box.offsets, value.detach()[box.slices], tensor))
        return decoded

    def _check_containers(self) -> None:
        """Check that the values can be replaced in the dicts and lists that contain them."""
        match = self.match
        for leaf in (*self.value_leaves, *(leaf for leaf, _ in (*match.containers, *match.nested))):
            if not isinstance(leaf.container, (MutableMapping, list)):
                raise DestinationError(
                    f"{leaf.name!r} is in a {type(leaf.container).__name__}, in which values cannot be replaced: use a "
                    "dict or a list"
                )

    def _note_cast(self, name: str, stored: torch.dtype, to: torch.dtype) -> None:
        if loses_bits(stored, to):
            self.casts[name] = Cast(name, *(str(dtype).removeprefix("torch.") for dtype in (stored, to)))


@dataclass(frozen=True, slots=True)
class PreparedLoad:
    """A load whose metadata has been read, and whose new tensors have been created."""

    checked: CheckedLoad
    _reads: CheckedBoxes
    _item_tensors: Mapping[str, torch.Tensor]
    """The new tensors, for items that the state dict does not have, by name."""

    def shareable_wants(self) -> list[WantedBox]:
        """Return what this rank may read together with other ranks."""
        return [*self._reads.direct_wants, *whole_wants(self.checked.source, self.checked.stored_values)]

    def run(self, options: ReadOptions) -> FinishedLoad:
        """Read the tensors and values, and write the tensors.

        Raises:
            CorruptCheckpointError, StoreError, DtypeError, UnsafeValueError: see `reshard.load`.
        """
        checked, match = self.checked, self.checked.match
        buffers = ValueBuffer.of(checked.source, checked.stored_values)
        report = execute_reads(checked.source, self._reads, buffers, options)
        decoded = decode_all(buffers, allow_pickle=checked.allow_pickle)
        values = dict(zip(checked.value_names, decoded, strict=True))
        new_values = [(leaf, values[leaf.name]) for leaf in checked.value_leaves]
        for leaf, names in match.containers:
            items = {name: self._item_tensors[name] if name in self._item_tensors else values[name] for name in names}
            new_values.append((leaf, _in_class_of(leaf.value, _assemble(match, leaf, items))))
        casts = tuple(checked.casts.values())
        with_nested = replace(added(report, match.report), seconds=report.seconds, cast=casts)
        return FinishedLoad(counting_metadata(with_nested, checked.source), (*new_values, *match.nested))


@dataclass(frozen=True, slots=True)
class FinishedLoad:
    """A load that has written the tensors of this rank."""

    report: RankReport
    _new_values: Sequence[tuple[Leaf, Any]]
    """Leaves, and their values from the checkpoint."""

    def replace_values(self) -> None:
        """Replace the values of the state dict that are not tensors. Call it when all ranks have succeeded."""
        for leaf, value in self._new_values:
            if not isinstance(leaf.value, torch.Tensor):
                leaf.replace(value)


def _assemble(match: NameMatch, leaf: Leaf, items: Mapping[str, Any]) -> Any:
    """Return a dict or a list whose items are entries of the checkpoint."""
    top = "value"
    paths: dict[str, Path] = {}
    for name in items:
        path = renamed_path(match.source.paths.get(match.stored_names[name], ()), name) or ()
        is_known = name_of(path[: len(leaf.path)]) == leaf.name
        paths[name] = (top, *(path[len(leaf.path) :] if is_known else (name[len(leaf.name) + 1 :],)))
    return nest(items, paths)[top]


def _in_class_of(empty: Any, value: Any) -> Any:
    """Return a dict as one of the same class as an empty dict, if that class is of the standard library."""
    if type(empty) not in (OrderedDict, defaultdict, Counter) or not isinstance(value, dict):
        return value
    filled = copy.copy(empty)
    filled.update(value)
    return filled


def _empty(match: NameMatch, name: str) -> torch.Tensor:
    entry = match.entry(name)
    return torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device="cpu")


def _shards_to_load(leaf: Leaf, source: Source, stored: str) -> Iterable[LocalShard]:
    """Return the parts of a leaf's tensor that this rank holds; nothing if the leaf is not a tensor."""
    entry = source.entry(stored)
    if not isinstance(leaf.value, torch.Tensor):
        if entry.is_tensor:
            raise DestinationError(
                f"{leaf.name!r} is a tensor of shape {entry.shape} in the checkpoint and a {type(leaf.value).__name__} "
                "in the state dict: pass a tensor to load it into"
            )
        return []
    check_is_tensor(source, stored)
    return _local_shards(leaf, entry.shape)


def _local_shards(leaf: Leaf, shape: tuple[int, ...]) -> list[LocalShard]:
    """Return the parts of a leaf's tensor that this rank holds.

    Args:
        shape: the shape of the tensor in the checkpoint.
    """
    tensor: torch.Tensor = leaf.value
    try:
        reason = missing_memory(tensor) if is_whole(tensor) else ""
        if reason:
            raise DestinationError(f"{leaf.name!r} {reason}, so nothing can be loaded into it")
        if tuple(tensor.size()) != shape:
            raise ShapeMismatchError(
                f"{leaf.name!r} has shape {shape} in the checkpoint and {tuple(tensor.size())} in the state dict"
            )
        return [(box, local) for box, local in local_shards(leaf.name, tensor) if box.numel]
    except CheckpointError:
        raise
    except Exception as error:
        raise DestinationError(
            f"{leaf.name!r}, a {type(tensor).__name__}, cannot be loaded into: {type(error).__name__}: {error}"
        ) from error
