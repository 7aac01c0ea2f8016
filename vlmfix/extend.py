"""Gives what a decoder, family, profiler or benchmark outside vlmfix is written with, in one import.

These names, their arguments and their meaning stay as they are within a minor version, and what has to change is told a
minor version before, in the changelog; nothing else below the package's first level is promised.
``docs/extending.md`` describes each and shows how to use them.
"""

from __future__ import annotations

from vlmfix.attention.edit import AttentionEdit as Edit
from vlmfix.attention.edit import (
    BiasEdit,
    CacheEdit,
    Column,
    ColumnReading,
    LayerSet,
    OutputEdit,
    PartEdit,
    ProductBias,
    PromptCacheEdit,
    PromptReading,
    ResidualEdit,
    ScoreEdit,
    Site,
    SplitEdit,
    WeightEdit,
)
from vlmfix.attention.probe import LastRows, TextRows, mass
from vlmfix.attention.session import edited
from vlmfix.decoders.base import Decoder, Refiner, Source
from vlmfix.decoders.logits.plausibility import cut
from vlmfix.decoders.picture.refined import Look, PictureMap, PictureMemo, Refined
from vlmfix.decoding.branches import (
    Branch,
    Contrast,
    with_blanks,
    with_edits,
    with_instruction,
    with_pixels,
    with_question,
    without_picture,
    without_question,
)
from vlmfix.decoding.exits import Exit
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.decoding.strategy import Strategy
from vlmfix.errors import (
    DataError,
    IncompatibleDecodersError,
    LayoutError,
    UnsupportedModelError,
    UsageError,
    VlmfixError,
)
from vlmfix.evals.task import Benchmark, Judged, Numbers, Sample, Tally, Verdict, Workload, plain, ratio
from vlmfix.heads.profiler import Profiler, State
from vlmfix.insight.work import Ran, Work
from vlmfix.language.parameters import Given, HeadList, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.family import Family, by_row
from vlmfix.models.grid import cells
from vlmfix.models.layout import Batch, ImageLayout
from vlmfix.models.llava import Llava

__all__ = [
    "Batch",
    "Benchmark",
    "BiasEdit",
    "Branch",
    "CacheEdit",
    "Checkpoint",
    "Column",
    "ColumnReading",
    "Contrast",
    "DataError",
    "Decoder",
    "DecodingPlan",
    "Edit",
    "Exit",
    "Family",
    "Given",
    "HeadList",
    "ImageLayout",
    "IncompatibleDecodersError",
    "Judged",
    "LastRows",
    "LayerSet",
    "LayoutError",
    "Llava",
    "Look",
    "Numbers",
    "OutputEdit",
    "PartEdit",
    "PictureMap",
    "PictureMemo",
    "ProductBias",
    "Profiler",
    "PromptCacheEdit",
    "PromptReading",
    "Ran",
    "Refined",
    "Refiner",
    "ResidualEdit",
    "Sample",
    "ScoreEdit",
    "Site",
    "Source",
    "SplitEdit",
    "State",
    "Strategy",
    "Tally",
    "TextRows",
    "UnsupportedModelError",
    "UsageError",
    "Verdict",
    "VlmfixError",
    "WeightEdit",
    "Work",
    "Workload",
    "by_row",
    "cells",
    "cut",
    "edited",
    "mass",
    "parameter",
    "plain",
    "ratio",
    "with_blanks",
    "with_edits",
    "with_instruction",
    "with_pixels",
    "with_question",
    "without_picture",
    "without_question",
]
