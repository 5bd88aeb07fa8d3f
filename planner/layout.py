"""Layouts: which part of each tensor each rank holds. This needs no GPU, no processes and no torch.

A placement describes how one mesh dimension splits a tensor, as in torch.distributed.tensor. `Shard` splits a dimension
as torch.chunk does: into parts of ceil(n / ranks) elements; the last parts can be smaller or empty. `StridedShard`
describes FSDP over a dimension that TP has already split. `Replicate` keeps the tensor whole. The placements of a
tensor apply from the first mesh dimension to the last.

A `Layout` assigns placements to tensors by patterns of their names. A rule is a placement of torch, or a word of a
tensor-parallel plan ("colwise", "rowwise", "replicate"), as in the `tp_plan` of a Hugging Face config.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from .box import Box
from .errors import LayoutError


@dataclass(frozen=True, slots=True)
class Shard:
    """Dimension `dim` of the tensor is split over the mesh dimension. A negative `dim` counts from the last."""

    dim: int


@dataclass(frozen=True, slots=True)
class StridedShard:
    """Each of `split_factor` equal parts of dimension `dim` is split over the mesh dimension, as by torch's
    `_StridedShard`."""

    dim: int
    split_factor: int

    def __post_init__(self) -> None:
        if self.split_factor < 1:
            raise LayoutError(
                f"split_factor must be 1 or more, got {self.split_factor}: pass the number of parts that other mesh "
                "dimensions split the dimension into"
            )


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank of the mesh dimension holds the whole tensor."""


Placement = Shard | StridedShard | Replicate
REPLICATE = Replicate()


class TorchPlacement(Protocol):
    """A placement of torch.distributed.tensor: `Shard`, `Replicate` or `_StridedShard`.

    The planner does not import torch, so it recognizes torch's classes by these methods.
    """

    def is_shard(self, dim: int | None = None) -> bool: ...

    def is_replicate(self) -> bool: ...


class TorchMesh(Protocol):
    """A torch.distributed.device_mesh.DeviceMesh."""

    @property
    def mesh(self) -> Any:
        """A tensor of the global ranks, with one dimension for each mesh dimension."""

    @property
    def mesh_dim_names(self) -> tuple[str, ...] | None: ...


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks in a grid of named dimensions. The last dimension varies fastest, as in torch's DeviceMesh."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.sizes) or not self.names or len(set(self.names)) != len(self.names):
            raise LayoutError(
                f"a mesh needs one distinct name for each size, got names {self.names} and sizes {self.sizes}: pass "
                'sizes by name, such as {"dp": 2, "tp": 4}'
            )
        if any(type(name) is not str for name in self.names) or any(type(size) is not int for size in self.sizes):
            raise LayoutError(
                f"a mesh has names that are strings and sizes that are integers, got names {self.names!r} and sizes "
                f"{self.sizes!r}"
            )
        if any(size < 1 for size in self.sizes):
            raise LayoutError(
                f"every mesh dimension needs 1 rank or more, got {dict(zip(self.names, self.sizes, strict=True))}"
            )

    @classmethod
    def of(cls, mesh: Mesh | TorchMesh | Mapping[str, int] | int) -> Mesh:
        """Return a mesh.

        Args:
            mesh: the sizes by name, as `{"dp": 2, "tp": 4}`; the size of a mesh with the single dimension "tp"; or a
                DeviceMesh with the ranks 0 to n - 1 in order.

        Raises:
            LayoutError: it is none of these.
        """
        if isinstance(mesh, Mesh):
            return mesh
        if isinstance(mesh, int):
            return cls(("tp",), (mesh,))
        if isinstance(mesh, Mapping):
            return cls(tuple(mesh), tuple(mesh.values()))
        if not hasattr(mesh, "mesh_dim_names") or not hasattr(mesh, "mesh"):
            raise LayoutError(
                f'a mesh is a size, sizes by name such as {{"dp": 2, "tp": 4}}, or a DeviceMesh, got {mesh!r}'
            )
        return cls._from_torch(mesh)

    @classmethod
    def _from_torch(cls, mesh: TorchMesh) -> Mesh:
        ranks, sizes = mesh.mesh.flatten().tolist(), tuple(mesh.mesh.shape)
        names = mesh.mesh_dim_names or (("tp",) if len(sizes) == 1 else None)
        if names is None:
            raise LayoutError(f"the dimensions of {mesh} have no names: pass mesh_dim_names to init_device_mesh")
        if ranks != list(range(len(ranks))):
            sizes_by_name = dict(zip(names, sizes, strict=True))
            raise LayoutError(
                f"a layout counts ranks from 0 in the order of the mesh, but this mesh has the ranks {ranks}: pass the "
                f"sizes instead, as {sizes_by_name}, and each rank's position in the mesh as its rank"
            )
        return cls(tuple(names), sizes)

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes)

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """Return the position of a rank in each mesh dimension. Raises LayoutError."""
        if not isinstance(rank, int):
            raise LayoutError(f"a rank must be an integer from 0 to {self.world_size - 1}, got {rank!r}")
        if not 0 <= rank < self.world_size:
            raise LayoutError(
                f"rank {rank} is not in the mesh {self}: pass a rank from 0 to {self.world_size - 1}, or a larger mesh"
            )
        return tuple(int(i) for i in np.unravel_index(rank, self.sizes))

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in zip(self.names, self.sizes, strict=True))


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """The part of a tensor that one rank holds."""

    shape: tuple[int, ...]
    """The shape of the local tensor."""
    boxes: tuple[Box, ...]
    """The boxes of the global tensor that form the local tensor: one box, or none if the local tensor is empty. There
    are several boxes only if a strided split of uneven parts leaves gaps between them."""
    local_offsets: tuple[tuple[int, ...], ...]
    """The offsets of each box in the local tensor."""


def local_tensor(
    shape: Sequence[int], mesh_sizes: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> LocalTensor:
    """Return the part of a tensor that the rank at `coordinate` of a mesh holds, as DTensor computes it.

    Raises:
        LayoutError: the placements do not fit the mesh or the shape.
    """
    if not len(mesh_sizes) == len(coordinate) == len(placements):
        raise LayoutError(
            f"a mesh of {len(mesh_sizes)} dimensions needs as many coordinates and placements, got {coordinate} and "
            f"{placements}"
        )
    return _apply(shape, list(zip(mesh_sizes, coordinate, placements, strict=True)))


def held_tensor(
    shape: Sequence[int],
    mesh_sizes: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
    order: Sequence[int] | None = None,
) -> LocalTensor:
    """Return the part of a DTensor that a rank really holds. It differs from `local_tensor` for uneven FSDP over TP.

    FSDP2 splits the part that TP has assigned to a rank, and records this as a strided shard with the number of TP
    parts as split factor. The two agree if TP's parts are equal. If they are not, the placements describe a part that
    no rank holds: of 28 rows under FSDP 4 x TP 3, rank (3, 0) holds row 9, but DTensor computes rows 9 and 19 (torch
    2.13).

    Args:
        order: the mesh dimensions in the order in which they split the tensor. Default: from the first to the last.

    Raises:
        LayoutError: the placements do not fit the mesh or the shape.
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
    """Return the number of parts that the mesh dimensions after `at` split a dimension of the tensor into."""
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
            dims = f"dim must be from {-len(shape)} to {len(shape) - 1}" if shape else "it can only be replicated"
            raise LayoutError(f"{placement} does not fit a tensor of shape {tuple(shape)}: {dims}")
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
    """Cut the indices in `runs` into `factor` equal pieces, and return part `at` of `size` of each piece."""
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
    """Return the indices at the positions [begin, end) of `runs`."""
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
_NO_TP_DIMENSIONS = frozenset(
    (
        "batch",
        "cp",
        "data",
        "ddp",
        "dp",
        "dp_replicate",
        "dp_shard",
        "fsdp",
        "hsdp",
        "pp",
        "replicate",
        "shard",
        "stage",
    )
)
"""Names of mesh dimensions over which words of tensor parallelism cut nothing."""
TP_WORDS: Mapping[str, tuple[Placement, Placement]] = MappingProxyType(
    {
        "colwise": _COLWISE,
        "colwise_rep": _COLWISE,
        "colwise_gather_output": _COLWISE,
        "local_colwise": _COLWISE,
        "rowwise": _ROWWISE,
        "rowwise_rep": _ROWWISE,
        "rowwise_split_input": _ROWWISE,
        "packed_colwise": (StridedShard(-2, 2), Shard(0)),
        "packed_rowwise": (StridedShard(-1, 2), REPLICATE),
        "local_rowwise": _ROWWISE,
        "embedding_rowwise": _COLWISE,
        "embedding_colwise": (Shard(-1), Shard(0)),
        "replicate": _REPLICATE,
        "replicated": _REPLICATE,
        "sequence_parallel": _REPLICATE,
        **dict.fromkeys(
            (
                "replicated_with_grad_allreduce",
                "all_reduce",
                "mla_kv_a_proj",
                "moe_tp_experts",
                "moe_identity_expert",
                "local_params",
            ),
            _REPLICATE,
        ),
    }
)
"""The placements of a weight (two dimensions or more) and of a bias, by the words of tensor-parallel plans.

The words are those of Hugging Face's tp_plan. They mean what ColwiseParallel and RowwiseParallel of
torch.distributed.tensor.parallel do to a Linear module. These classes split the other dimension of an Embedding: use
"embedding_colwise" and "embedding_rowwise" for it. Words with "packed" are for a weight that consists of two, such as
the gate and the up projections: each half is cut. Dimensions count from the last, so that the words also fit stacked
experts.
"""

AnyPlacement = Placement | TorchPlacement
Rule = str | AnyPlacement | Sequence[AnyPlacement] | Mapping[str, AnyPlacement]


@dataclass(frozen=True, slots=True)
class Layout:
    """Which part of every tensor each rank of a mesh holds.

    Example:
        >>> layout = Layout({"dp": 2, "tp": 4}, {"*.up": "colwise", "*.down": "rowwise"})
        >>> layout.local("layers.0.up.weight", (4096, 1024), rank=1).boxes
        (Box(offsets=(1024, 0), sizes=(1024, 1024)),)
    """

    mesh: Mesh
    rules: tuple[tuple[str, Rule], ...]
    """Patterns and their rules. The first pattern that matches a tensor is used. A tensor that no pattern matches is
    replicated. `Checkpoint.plan` and `Checkpoint.load_rank` raise LayoutError if no pattern matches any of the tensors,
    and log a warning that names the patterns that match no tensor of the checkpoint.

    A pattern is compared with the name of the tensor and with the names of the modules that contain it. `*`, `?` and
    `[...]` have the meaning of `fnmatch`; `glob.escape` makes a pattern of a name.

    A rule is one of: a tensor-parallel word; a placement for the mesh dimension "tp", or for the only one; placements
    by mesh dimension; a sequence with one placement for each mesh dimension. The tensor is replicated over mesh
    dimensions that a rule does not name. Placements are those of torch.distributed.tensor."""
    stages: tuple[tuple[str, int], ...]
    """Names of tensors and the coordinate of the mesh dimension "pp" that holds each. A tensor that is not listed is on
    all stages. `even_stages` distributes layers evenly."""
    _stage_of: Mapping[str, int] = field(init=False, repr=False, compare=False)
    _literals: Mapping[str, int] = field(init=False, repr=False, compare=False)
    """The positions of the rules whose pattern has no special characters."""
    _globs: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """The positions of the other rules."""
    _found: dict[tuple[str, int], tuple[Placement, ...]] = field(init=False, repr=False, compare=False)
    """The placements that were looked up, which are the same for all ranks."""
    has_empty_rules: bool = field(init=False, repr=False, compare=False)
    """Whether an empty mapping of rules was passed, perhaps because a plan was expected that does not exist."""

    def __init__(
        self,
        mesh: Mesh | TorchMesh | Mapping[str, int] | int,
        rules: Mapping[str, Rule] | None = None,
        stages: Mapping[str, int] | None = None,
    ) -> None:
        if rules is not None and not isinstance(rules, Mapping):
            raise LayoutError(f'rules must map patterns to rules, such as {{"*.up": "colwise"}}, got {rules!r}')
        object.__setattr__(self, "mesh", Mesh.of(mesh))
        object.__setattr__(self, "rules", tuple((rules or {}).items()))
        object.__setattr__(self, "has_empty_rules", rules is not None and not rules)
        literals = {pattern: at for at, (pattern, _) in enumerate(self.rules) if _is_literal(pattern)}
        object.__setattr__(self, "_literals", MappingProxyType(literals))
        globs = (at for at, (pattern, _) in enumerate(self.rules) if pattern not in literals)
        object.__setattr__(self, "_globs", tuple(globs))
        object.__setattr__(self, "stages", tuple(sorted((stages or {}).items())))
        object.__setattr__(self, "_stage_of", dict(self.stages))
        object.__setattr__(self, "_found", {})
        self._check_stages()
        for pattern, rule in self.rules:
            self._placements(pattern, rule, ndim=2)

    def __reduce__(self) -> tuple[Any, ...]:
        rules = dict(self.rules) if self.rules or self.has_empty_rules else None
        return Layout, (self.mesh, rules, dict(self.stages))

    @property
    def world_size(self) -> int:
        return self.mesh.world_size

    def _check_stages(self) -> None:
        if not self.stages:
            return
        if "pp" not in self.mesh.names:
            raise LayoutError(
                f'stages need the mesh dimension "pp", but the mesh is {self.mesh}: add it, or omit stages'
            )
        size = self.mesh.sizes[self.mesh.names.index("pp")]
        for name, stage in self.stages:
            if not isinstance(stage, int) or not 0 <= stage < size:
                raise LayoutError(
                    f"{name!r} is on stage {stage!r}, but the mesh {self.mesh} has only the stages 0 to {size - 1}: "
                    'use one of them, or a larger "pp"'
                )

    def holds(self, name: str, rank: int) -> bool:
        """Return whether a rank is on the stage that holds a tensor. Raises LayoutError."""
        if name not in self._stage_of:
            return True
        return self._stage_of[name] == self.mesh.coordinate(rank)[self.mesh.names.index("pp")]

    def placements(self, name: str, ndim: int) -> tuple[Placement, ...]:
        """Return one placement for each mesh dimension, for the tensor of this name. Raises LayoutError."""
        found = self._found.get((name, ndim))
        if found is None:
            at = self._first_match(name)
            pattern, rule = ("", {}) if at is None else self.rules[at]
            found = self._found[name, ndim] = self._placements(pattern, rule, ndim)
        return found

    def _first_match(self, name: str) -> int | None:
        """Return the position of the first rule that matches a name. A layout may have a rule for each tensor."""
        parts = name.split(".")
        modules = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
        first = min((self._literals[module] for module in modules if module in self._literals), default=None)
        for at in self._globs:
            if first is not None and at > first:
                break
            if matches(self.rules[at][0], name):
                return at
        return first

    def local(self, name: str, shape: Sequence[int], rank: int) -> LocalTensor:
        """Return what a rank holds of the tensor of this name and global shape. Raises LayoutError."""
        placements = self.placements(name, len(shape))
        try:
            return local_tensor(shape, self.mesh.sizes, self.mesh.coordinate(rank), placements)
        except LayoutError as error:
            raise LayoutError(f"{name!r}: {error}") from None

    def _placements(self, pattern: str, rule: Rule, ndim: int) -> tuple[Placement, ...]:
        if isinstance(rule, Sequence) and not isinstance(rule, str):
            if len(rule) != len(self.mesh.sizes):
                raise LayoutError(
                    f"{pattern!r}: mesh {self.mesh} has {len(self.mesh.sizes)} dimensions, got {len(rule)} placements: "
                    "pass one for each mesh dimension"
                )
            return tuple(_placement(pattern, placement, ndim) for placement in rule)
        by_name = (
            rule if isinstance(rule, Mapping) else {self._dimension_of(pattern, rule): _placement(pattern, rule, ndim)}
        )
        unknown = set(by_name) - set(self.mesh.names)
        if unknown:
            raise LayoutError(
                f"{pattern!r} has placements for {sorted(unknown, key=str)}, but the mesh has only the dimensions "
                f"{list(self.mesh.names)}: use their names"
            )
        return tuple(_placement(pattern, by_name.get(name, REPLICATE), ndim) for name in self.mesh.names)

    def _dimension_of(self, pattern: str, rule: object) -> str:
        """Return the mesh dimension of a rule that names none. Raises LayoutError."""
        if len(self.mesh.names) == 1:
            name = self.mesh.names[0]
            cuts = isinstance(rule, str) and TP_WORDS.get(rule, _REPLICATE) is not _REPLICATE
            if cuts and name in _NO_TP_DIMENSIONS:
                raise LayoutError(
                    f"{pattern!r}: {rule!r} is a word of tensor parallelism, but the only dimension of the mesh is "
                    f"{name!r}: name it 'tp', or pass a placement such as {{{name!r}: Shard(0)}}"
                )
            return name
        if "tp" not in self.mesh.names:
            raise LayoutError(
                f"{pattern!r}: the rule does not name a dimension of mesh {self.mesh}, and none of them is named 'tp': "
                f"pass placements by mesh dimension, such as {{{self.mesh.names[0]!r}: Shard(0)}}"
            )
        return "tp"


def _placement(pattern: str, rule: str | AnyPlacement, ndim: int) -> Placement:
    if not isinstance(rule, str):
        return _from_torch(pattern, rule)
    if rule not in TP_WORDS:
        raise LayoutError(f"{pattern!r}: unknown tensor-parallel word {rule!r}; known words are {', '.join(TP_WORDS)}")
    weight, bias = TP_WORDS[rule]
    if ndim == 0:
        return REPLICATE
    return weight if ndim >= 2 else bias


def _from_torch(pattern: str, placement: AnyPlacement) -> Placement:
    """Return the planner's placement for one of torch. Raises LayoutError."""
    if isinstance(placement, type):
        raise LayoutError(f"{pattern!r}: got the class {placement.__name__}: pass an instance, such as Shard(0)")
    if isinstance(placement, Shard | StridedShard | Replicate):
        return placement
    dim, split_factor = getattr(placement, "dim", None), getattr(placement, "split_factor", None)
    if isinstance(dim, int) and isinstance(split_factor, int):
        return StridedShard(dim, split_factor)
    if hasattr(placement, "is_shard") and isinstance(dim, int) and placement.is_shard():
        return Shard(dim)
    if hasattr(placement, "is_replicate") and placement.is_replicate():
        return REPLICATE
    raise LayoutError(
        f"{pattern!r}: expected a tensor-parallel word, or Shard or Replicate of torch.distributed.tensor, got "
        f"{placement!r}"
    )


def unused_rules(layout: Layout, names: Iterable[str]) -> list[str]:
    """Return the patterns of a layout that match none of the names.

    "layers.*.up" and "*.layers.*.up" count as one pattern: the plan in a Hugging Face config becomes rules of both
    forms, and only one of them matches.
    """
    modules = {".".join(parts[:n]) for parts in (name.split(".") for name in names) for n in range(1, len(parts) + 1)}
    patterns = [pattern for pattern, _ in layout.rules]
    # A layout may have a rule for each tensor. A pattern without special characters needs no search.
    used = {
        pattern.removeprefix("*.")
        for pattern in patterns
        if (pattern in modules if _is_literal(pattern) else any(fnmatch.fnmatchcase(name, pattern) for name in modules))
    }
    return [pattern for pattern in patterns if pattern.removeprefix("*.") not in used]


def _is_literal(pattern: str) -> bool:
    return not any(character in pattern for character in "*?[")


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern matches a name, or the name of a module that contains it."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:n]), pattern) for n in range(len(parts), 0, -1))
