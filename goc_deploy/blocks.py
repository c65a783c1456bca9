"""What the blocks of a model are made of: units, the streams they read, and their features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal, get_args

from msgspec import Meta

from goc_deploy.modulation import SHIFT_AND_SCALE

MAX_BLOCKS = 1_000
TokenStream = Literal["image", "text", "reference"]
ALL_STREAMS: tuple[TokenStream, ...] = get_args(TokenStream)  # in the order of features
STREAMS: tuple[TokenStream, ...] = ("image", "text")  # of a model without reference images
MAX_FEATURES = 3  # of a unit


@dataclass(frozen=True, slots=True)
class Feature:
    """What a unit computes and adds to a stream: ``stream += gate * feature``.

    Attributes:
        stream: ``image``; ``text`` of models whose blocks change the tokens of the caption too;
            ``reference`` of models that read the tokens of other images.
        suffix: distinguishes the features of a unit. The graph's output is ``feature`` and its
            gate ``gate``, both followed by the suffix.
    """

    stream: TokenStream = "image"
    suffix: Annotated[str, Meta(pattern=r"^(_[a-z0-9]+)?$")] = ""

    @property
    def output(self) -> str:
        """Name of the graph's output."""
        return f"feature{self.suffix}"

    @property
    def gate(self) -> str:
        """Name of its gate, an input of the graph."""
        return f"gate{self.suffix}"


IMAGE_FEATURE, TEXT_FEATURE = Feature(), Feature("text", "_text")
REFERENCE_FEATURE = Feature("reference", "_reference")


@dataclass(frozen=True, slots=True)
class Unit:
    """One branch of a block: one graph, and one decision of a schedule at each step.

    Attributes:
        branch: name of the branch, of which a block has one at most.
        rows: the rows of the modulation table that it reads in addition to its gates; the names of
            its inputs.
        features: what it computes, in the order of the streams.
        reads: the streams that it reads. It changes those of its features.
    """

    branch: str
    rows: tuple[str, ...] = SHIFT_AND_SCALE
    features: Annotated[tuple[Feature, ...], Meta(min_length=1, max_length=MAX_FEATURES)] = (
        IMAGE_FEATURE,
    )
    reads: Annotated[tuple[TokenStream, ...], Meta(min_length=1, max_length=3)] = ("image",)


@dataclass(frozen=True, slots=True)
class Blocks:
    """A run of equal blocks.

    Attributes:
        count: number of blocks.
        units: the units of each, in execution order.
    """

    count: Annotated[int, Meta(ge=1, le=MAX_BLOCKS)]
    units: Annotated[tuple[Unit, ...], Meta(min_length=1, max_length=3)]


@dataclass(frozen=True, slots=True)
class FeaturePlace:
    """A feature of a model.

    Attributes:
        unit: index of its unit.
        feature: its declaration.
    """

    unit: int
    feature: Feature


@dataclass(frozen=True, slots=True)
class UnitPlace:
    """Which branch of which block a unit is."""

    block: int
    branch: str


@lru_cache(maxsize=64)
def unit_places(blocks: tuple[tuple[str, ...], ...]) -> tuple[UnitPlace, ...]:
    """The place of every unit, in execution order.

    Args:
        blocks: the branches of each block.
    """
    return tuple(
        UnitPlace(block, branch) for block, branches in enumerate(blocks) for branch in branches
    )


def place_features(units: Sequence[Unit]) -> tuple[FeaturePlace, ...]:
    """The features of a model, stream by stream and unit by unit.

    Adjacent features of a stream have adjacent gates, so one launch predicts them.
    """
    return tuple(
        FeaturePlace(index, feature)
        for stream in ALL_STREAMS
        for index, unit in enumerate(units)
        for feature in unit.features
        if feature.stream == stream
    )
