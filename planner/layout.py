"""Which boxes of a tensor a rank holds: meshes and placements, without a GPU and without processes.

A placement says how one mesh dimension cuts a tensor, in the meaning of torch.distributed.tensor: `Shard` splits a
dimension into ceil-sized parts as torch.chunk does, `StridedShard` is what FSDP over TP gives to a dimension that TP
has cut already, `Replicate` leaves it whole. The placements apply from the first mesh dimension to the last.

A `Layout` assigns placements to tensors by the pattern of their names, in placements or in the words of
tensor-parallel plans ("colwise", "rowwise", "replicate"), as in the `tp_plan` of a Hugging Face config.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from .box import Box
from .errors import LayoutError


@dataclass(frozen=True, slots=True)
class Shard:
    """Dimension `dim` of the tensor is split over the mesh dimension; negative counts from the last."""

    dim: int


@dataclass(frozen=True, slots=True)
class StridedShard:
    """As `Shard`, applied to each of `split_factor` parts of dimension `dim`: DTensor's `_StridedShard`."""

    dim: int
    split_factor: int

    def __post_init__(self) -> None:
        if self.split_factor < 1:
            raise LayoutError(f"split_factor must be 1 or more, got {self.split_factor}")


@dataclass(frozen=True, slots=True)
class Replicate:
    """The tensor is whole on every rank of the mesh dimension."""


Placement = Shard | StridedShard | Replicate
REPLICATE = Replicate()


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks in a grid of named dimensions, the last varying fastest, as in torch's DeviceMesh."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.sizes) or not self.names or len(set(self.names)) != len(self.names):
            raise LayoutError(f"a mesh needs one distinct name for each size: names {self.names}, sizes {self.sizes}")
        if any(type(name) is not str for name in self.names) or any(type(size) is not int for size in self.sizes):
            raise LayoutError(
                f"a mesh has names that are strings and sizes that are integers, got names {self.names!r} and sizes "
                f"{self.sizes!r}"
            )
        if any(size < 1 for size in self.sizes):
            raise LayoutError(f"a mesh dimension has 1 rank or more: {dict(zip(self.names, self.sizes, strict=True))}")

    @classmethod
    def of(cls, mesh: Mesh | Mapping[str, int] | int) -> Mesh:
        """A mesh from `{"dp": 2, "tp": 4}`, or from a size, which is the size of "tp" alone."""
        if isinstance(mesh, Mesh):
            return mesh
        if isinstance(mesh, int):
            return cls(("tp",), (mesh,))
        if not isinstance(mesh, Mapping):
            raise LayoutError(f'a mesh is a size, or sizes by name as in {{"dp": 2, "tp": 4}}, got {mesh!r}')
        return cls(tuple(mesh), tuple(mesh.values()))

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes)

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """Where a rank stands in the mesh. Raises LayoutError."""
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"rank {rank} is not in the mesh {self}, which has ranks 0 to {self.world_size - 1}")
        return tuple(int(i) for i in np.unravel_index(rank, self.sizes))

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in zip(self.names, self.sizes, strict=True))


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """What one rank holds of a tensor."""

    shape: tuple[int, ...]
    """Of the local tensor."""
    boxes: tuple[Box, ...]
    """The parts of the global tensor that it is made of: one, or none where it is empty; more only where a strided
    split of uneven parts leaves gaps between them."""
    local_offsets: tuple[tuple[int, ...], ...]
    """Where each box begins in the local tensor."""


def local_tensor(
    shape: Sequence[int], mesh_sizes: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> LocalTensor:
    """What the rank at `coordinate` of a mesh holds of a tensor of this global shape, as DTensor computes it.

    Raises LayoutError.
    """
    if not len(mesh_sizes) == len(coordinate) == len(placements):
        raise LayoutError(f"a mesh of {len(mesh_sizes)} dimensions needs as many placements, got {placements}")
    return _apply(shape, list(zip(mesh_sizes, coordinate, placements, strict=True)))


def held_tensor(
    shape: Sequence[int],
    mesh_sizes: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
    order: Sequence[int] | None = None,
) -> LocalTensor:
    """What a rank really holds of a DTensor: `local_tensor`, but for what FSDP has split after TP.

    FSDP2 states such a split as a strided shard, whose factor is the size of the mesh dimensions after it that shard
    the same dimension of the tensor; what it does is to split TP's part. Both are the same where TP's parts are even.
    Where they are not, the placements give what no rank holds: of 28 rows under FSDP 4 x TP 3, rank (3, 0) holds row
    9, and DTensor computes rows 9 and 19 (torch 2.13).

    Args:
        order: the mesh dimensions in the order in which they split the tensor, where that is not from the first to the
            last.

    Raises LayoutError.
    """
    if order is not None:
        return _apply(shape, [(mesh_sizes[at], coordinate[at], placements[at]) for at in order])
    if not all(
        placement.split_factor == _shards_after(at, placement.dim, mesh_sizes, placements)
        for at, placement in enumerate(placements)
        if isinstance(placement, StridedShard)
    ):
        return local_tensor(shape, mesh_sizes, coordinate, placements)
    first: list[tuple[int, int, Placement]] = []
    last: list[tuple[int, int, Placement]] = []
    for size, at, placement in zip(mesh_sizes, coordinate, placements, strict=True):
        if isinstance(placement, StridedShard):
            last.insert(0, (size, at, Shard(placement.dim)))
        else:
            first.append((size, at, placement))
    return _apply(shape, first + last)


def _shards_after(at: int, dim: int, mesh_sizes: Sequence[int], placements: Sequence[Placement]) -> int:
    """Into how many parts the mesh dimensions after `at` split a dimension of the tensor."""
    return math.prod(
        size
        for size, placement in zip(mesh_sizes[at + 1 :], placements[at + 1 :], strict=True)
        if not isinstance(placement, Replicate) and placement.dim == dim
    )


def _apply(shape: Sequence[int], steps: Sequence[tuple[int, int, Placement]]) -> LocalTensor:
    """Split a tensor by (mesh size, coordinate, placement), one after another."""
    held = {d: [(0, n)] for d, n in enumerate(shape)}
    for size, at, placement in steps:
        if isinstance(placement, Replicate):
            continue
        dim = placement.dim + len(shape) if placement.dim < 0 else placement.dim
        if not 0 <= dim < len(shape):
            raise LayoutError(f"{placement} does not fit a tensor of shape {tuple(shape)}")
        factor = placement.split_factor if isinstance(placement, StridedShard) else 1
        held[dim] = _split(held[dim], factor, size, at)

    local_shape = tuple(sum(stop - start for start, stop in held[d]) for d in range(len(shape)))
    boxes: list[tuple[list[int], list[int], list[int]]] = [([], [], [])]
    for d in range(len(shape)):
        grown = []
        at_local = 0
        for start, stop in held[d]:
            grown += [([*o, start], [*s, stop - start], [*at, at_local]) for o, s, at in boxes]
            at_local += stop - start
        boxes = grown
    return LocalTensor(
        local_shape,
        tuple(Box(tuple(offsets), tuple(sizes)) for offsets, sizes, _ in boxes),
        tuple(tuple(at) for _, _, at in boxes),
    )


def _split(runs: list[tuple[int, int]], factor: int, size: int, at: int) -> list[tuple[int, int]]:
    """Part `at` of `size` of the indices in `runs`, taken from each of `factor` equal pieces of them."""
    total = sum(stop - start for start, stop in runs)
    piece = -(-total // factor)
    taken: list[tuple[int, int]] = []
    for begin in range(0, total, piece) if piece else ():
        end = min(begin + piece, total)
        part = -(-(end - begin) // size)
        taken += _take(runs, min(begin + at * part, end), min(begin + (at + 1) * part, end))
    joined: list[tuple[int, int]] = []
    for start, stop in taken:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _take(runs: list[tuple[int, int]], begin: int, end: int) -> list[tuple[int, int]]:
    """The indices at positions [begin, end) of those in `runs`."""
    taken = []
    position = 0
    for start, stop in runs:
        low = max(begin - position, 0)
        high = min(end - position, stop - start)
        if low < high:
            taken.append((start + low, start + high))
        position += stop - start
    return taken


_COLWISE = (Shard(-2), Shard(0))
_ROWWISE = (Shard(-1), REPLICATE)
_REPLICATE = (REPLICATE, REPLICATE)
TP_WORDS: Mapping[str, tuple[Placement, Placement]] = MappingProxyType(
    {
        "colwise": _COLWISE,
        "colwise_rep": _COLWISE,
        "colwise_gather_output": _COLWISE,
        "local_colwise": _COLWISE,
        "rowwise": _ROWWISE,
        "rowwise_rep": _ROWWISE,
        "local_rowwise": _ROWWISE,
        "embedding_rowwise": _COLWISE,
        "embedding_colwise": (Shard(-1), Shard(0)),
        "replicate": _REPLICATE,
        "replicated": _REPLICATE,
        "sequence_parallel": _REPLICATE,
    }
)
"""The placements of a weight of two dimensions or more, and of a bias, by the words of tensor-parallel plans: those
of torch.distributed.tensor.parallel's ColwiseParallel and RowwiseParallel for Linear, and of Hugging Face's tp_plan.
Of an Embedding the same classes of torch split the other dimension: there, say "embedding_colwise" and so on.
Counted from the last dimension, so that they serve stacked experts too.
"""

Rule = str | Placement | Sequence[Placement] | Mapping[str, Placement]


@dataclass(frozen=True, slots=True)
class Layout:
    """Which part of every tensor each rank of a mesh holds.

    Example:
        >>> layout = Layout({"dp": 2, "tp": 4}, {"layers.*.up": "colwise", "layers.*.down": "rowwise"})
        >>> layout.local("layers.0.up.weight", (4096, 1024), rank=1).boxes
        (Box(offsets=(1024, 0), sizes=(1024, 1024)),)
    """

    mesh: Mesh
    rules: tuple[tuple[str, Rule], ...]
    """Patterns and rules; the first pattern that matches decides, and a tensor that none matches is replicated.

    A pattern is matched against the tensor's name and against the names of the modules that hold it; `*` stands for
    anything. A rule is a tensor-parallel word, a placement for the "tp" dimension (or the only one), placements by
    mesh dimension, or one placement for each mesh dimension. Dimensions that a rule does not name are replicated."""
    stages: tuple[tuple[str, int], ...]
    """Which coordinate of the mesh dimension "pp" holds a tensor, by its name; one that is not here is on all of
    them. `planner.stages.even_stages` deals layers evenly."""
    _stage_of: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __init__(
        self,
        mesh: Mesh | Mapping[str, int] | int,
        rules: Mapping[str, Rule] | None = None,
        stages: Mapping[str, int] | None = None,
    ) -> None:
        object.__setattr__(self, "mesh", Mesh.of(mesh))
        object.__setattr__(self, "rules", tuple((rules or {}).items()))
        object.__setattr__(self, "stages", tuple(sorted((stages or {}).items())))
        object.__setattr__(self, "_stage_of", dict(self.stages))
        self._check_stages()
        for pattern, rule in self.rules:
            self._placements(pattern, rule, ndim=2)

    @property
    def world_size(self) -> int:
        return self.mesh.world_size

    def _check_stages(self) -> None:
        if not self.stages:
            return
        if "pp" not in self.mesh.names:
            raise LayoutError(f'stages are of the mesh dimension "pp", which {self.mesh} does not have')
        size = self.mesh.sizes[self.mesh.names.index("pp")]
        for name, stage in self.stages:
            if not isinstance(stage, int) or not 0 <= stage < size:
                raise LayoutError(
                    f"{name!r} is on stage {stage!r}, and the mesh {self.mesh} has stages 0 to {size - 1}"
                )

    def holds(self, name: str, rank: int) -> bool:
        """Whether a rank is of the stage that holds a tensor. Raises LayoutError."""
        if name not in self._stage_of:
            return True
        return self._stage_of[name] == self.mesh.coordinate(rank)[self.mesh.names.index("pp")]

    def placements(self, name: str, ndim: int) -> tuple[Placement, ...]:
        """One placement for each mesh dimension, for the tensor of this name. Raises LayoutError."""
        for pattern, rule in self.rules:
            if matches(pattern, name):
                return self._placements(pattern, rule, ndim)
        return (REPLICATE,) * len(self.mesh.sizes)

    def local(self, name: str, shape: Sequence[int], rank: int) -> LocalTensor:
        """What a rank holds of the tensor of this name and global shape. Raises LayoutError."""
        placements = self.placements(name, len(shape))
        try:
            return local_tensor(shape, self.mesh.sizes, self.mesh.coordinate(rank), placements)
        except LayoutError as error:
            raise LayoutError(f"{name!r}: {error}") from None

    def _placements(self, pattern: str, rule: Rule, ndim: int) -> tuple[Placement, ...]:
        if isinstance(rule, Sequence) and not isinstance(rule, str):
            if len(rule) != len(self.mesh.sizes):
                raise LayoutError(
                    f"{pattern!r}: {len(rule)} placements for the {len(self.mesh.sizes)} of mesh {self.mesh}"
                )
            return tuple(_placement(pattern, placement, ndim) for placement in rule)
        by_name = rule if isinstance(rule, Mapping) else {self._tp_dimension(pattern): _placement(pattern, rule, ndim)}
        unknown = set(by_name) - set(self.mesh.names)
        if unknown:
            raise LayoutError(f"{pattern!r} places {sorted(unknown)}, which the mesh {self.mesh} does not have")
        return tuple(_placement(pattern, by_name.get(name, REPLICATE), ndim) for name in self.mesh.names)

    def _tp_dimension(self, pattern: str) -> str:
        if len(self.mesh.names) == 1:
            return self.mesh.names[0]
        if "tp" not in self.mesh.names:
            raise LayoutError(f"{pattern!r}: which dimension of mesh {self.mesh} is it for? Name one of them 'tp'")
        return "tp"


def _placement(pattern: str, rule: str | Placement, ndim: int) -> Placement:
    if isinstance(rule, Shard | StridedShard | Replicate):
        return rule
    if not isinstance(rule, str):
        raise LayoutError(
            f"{pattern!r}: expected a tensor-parallel word or reshard's Shard, StridedShard or Replicate, got {rule!r}"
        )
    if rule not in TP_WORDS:
        raise LayoutError(f"{pattern!r}: unknown tensor-parallel word {rule!r}; known are {', '.join(TP_WORDS)}")
    weight, bias = TP_WORDS[rule]
    if ndim == 0:
        return REPLICATE
    return weight if ndim >= 2 else bias


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches a tensor's name, or that of a module that holds it."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:n]), pattern) for n in range(len(parts), 0, -1))
