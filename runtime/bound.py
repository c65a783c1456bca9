"""A plan on addresses: the functions to call in each step, in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from goc_deploy import protocols
from goc_deploy.protocols import Buffer


@dataclass(frozen=True, slots=True)
class BoundLaunch:
    """An engine on fixed addresses.

    Attributes:
        name: name of the launch, for reports.
        run: runs the launch.
        inputs: the input tensors that the engine was bound to, by name.
        outputs: the output tensors that the engine was bound to, by name.
    """

    name: str
    run: protocols.Run
    inputs: Mapping[str, Buffer] = field(default_factory=dict)
    outputs: Mapping[str, Buffer] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BoundStep:
    """The launches of a step, in order. Steps of the same kind may share objects.

    Attributes:
        before: launches that only some steps have, which compute values for a whole request or for
            several steps.
        start: modulation, and tokens from the latents.
        updates: the launches of the plan, which change the tokens.
        end: the model output from the tokens, and the sampler.
    """

    before: tuple[BoundLaunch, ...]
    start: tuple[BoundLaunch, ...]
    updates: tuple[BoundLaunch, ...]
    end: tuple[BoundLaunch, ...]

    @property
    def launches(self) -> tuple[BoundLaunch, ...]:
        """All launches except those of ``before``."""
        return (*self.start, *self.updates, *self.end)


@dataclass(frozen=True, slots=True)
class BoundPlan:
    """A plan on addresses.

    Attributes:
        steps: the launches of each step.
        initial: the buffer of x_T, (N, C, H, W).
        latents: the latents after each step, (N, C, H, W).
        noise: the noise of each step if the sampler is stochastic, else one buffer of zeros.
        resets: source and target of copies that must be made before the first step.
    """

    steps: tuple[BoundStep, ...]
    initial: Buffer
    latents: tuple[Buffer, ...]
    noise: tuple[Buffer, ...]
    resets: tuple[tuple[Buffer, Buffer], ...] = ()

    def followed_by(self, rest: BoundPlan) -> BoundPlan:
        """The plan of these steps and the later steps of another one, on the same buffers."""
        return replace(
            self,
            steps=(*self.steps, *rest.steps),
            latents=(*self.latents, *rest.latents),
        )
