"""The loaded engines of a model, and their launches: engines on addresses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field

from goc_deploy.compiler import Plan
from goc_deploy.conditions.captions import PromptEmbeds
from goc_deploy.protocols import Buffer, Engine, Run, Stream
from goc_deploy.runtime.bound import BoundLaunch
from goc_deploy.runtime.modulation_tables import ModulationTables
from goc_deploy.runtime.weights import Weights


@dataclass(frozen=True, slots=True)
class Engines:
    """The loaded engines of a model.

    Attributes:
        units: engines of units and of the graphs around the blocks, by name.
        predict: engines of predict graphs, by signature.
        captions: the stored captions of the engine directory, or None.
        segments: engines of segments, by signature.
        weights: the weights of ``units`` and ``segments``.
        tables: modulation tables that are not computed per request, or None without any.
    """

    units: MutableMapping[str, Engine]
    predict: Mapping[str, Engine]
    captions: PromptEmbeds | None = None
    segments: MutableMapping[str, Engine] = field(default_factory=dict)
    weights: Weights = field(default_factory=Weights)
    tables: ModulationTables | None = None

    def holds_table(self, plan: Plan) -> bool:
        """Whether the session puts the modulation table of a plan in its place, not a launch."""
        return self.tables is not None and self.tables.holds(plan)


class Launches:
    """Binds engines to addresses. A launch with equal addresses is bound once.

    Args:
        engines: the engines.
        stream: the stream of the launches.
    """

    def __init__(self, engines: Engines, stream: Stream) -> None:
        self.engines, self.stream = engines, stream
        self._bound: dict[tuple[object, ...], BoundLaunch] = {}

    def unit(
        self, name: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> BoundLaunch:
        """The launch of a unit, or of a graph around the blocks, by its name."""
        return self.engine(name, self.engines.units[name], inputs, outputs)

    def predict(
        self,
        name: str,
        signature: str,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
    ) -> BoundLaunch:
        """The launch of a predict or accumulate graph."""
        return self.engine(name, self.engines.predict[signature], inputs, outputs)

    def engine(
        self, name: str, engine: Engine, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> BoundLaunch:
        """The launch of an engine; its name is for reports."""
        tensors = [*inputs.items(), *outputs.items()]
        key = (id(engine), *[(tensor, b.pointer, b.shape) for tensor, b in tensors])
        if key not in self._bound:
            run = engine.bind(inputs, outputs, self.stream)
            self._bound[key] = BoundLaunch(name, run, inputs, outputs)
        return self._bound[key]

    def own(self, name: str, key: object, bind: Callable[[], Run]) -> BoundLaunch:
        """A launch of the device itself, which ``bind`` makes if there is none of this key."""
        if (name, key) not in self._bound:
            self._bound[name, key] = BoundLaunch(name, bind())
        return self._bound[name, key]
