"""Layouts: which part of each tensor each rank holds."""

from .planner.box import Box as Box
from .planner.layout import TP_WORDS as TP_WORDS
from .planner.layout import Layout as Layout
from .planner.layout import LocalTensor as LocalTensor
from .planner.layout import Mesh as Mesh
from .planner.layout import Replicate as Replicate
from .planner.layout import Rule as Rule
from .planner.layout import Shard as Shard
from .planner.layout import StridedShard as StridedShard
from .planner.stages import even_stages as even_stages
