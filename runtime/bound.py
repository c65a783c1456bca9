"""What a plan becomes on addresses: functions to call, in order, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from goc_deploy import protocols
from goc_deploy.protocols import Buffer


@dataclass(frozen=True, slots=True)
class BoundLaunch:
    """An engine on fixed addresses.

    Attributes:
        name: what it is, for reports.
        run: runs it.
        inputs, outputs: the tensors that it was bound to, by name.
    """

    name: str
    run: protocols.Launch
    inputs: Mapping[str, Buffer] = field(default_factory=dict)
    outputs: Mapping[str, Buffer] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BoundStep:
    """Launches of a step, in order. Steps of a kind may have the same objects.

    Attributes:
        before: those that only some steps have: what is computed for a whole request, or for
            several steps.
        start: modulation, and tokens from the latents.
        updates: the launches of the plan, which change the tokens.
        end: the prediction from the tokens, and the sampler.
    """

    before: tuple[BoundLaunch, ...]
    start: tuple[BoundLaunch, ...]
    updates: tuple[BoundLaunch, ...]
    end: tuple[BoundLaunch, ...]

    @property
    def launches(self) -> tuple[BoundLaunch, ...]:
        """All but those of ``before``."""
        return (*self.start, *self.updates, *self.end)


@dataclass(frozen=True, slots=True)
class BoundPlan:
    """A plan on addresses.

    Attributes:
        steps: what to launch.
        initial: where x_T is put, (N, C, H, W).
        latents: where they are after each step.
        noise: of each step where the sampler is stochastic, else one buffer of zeros.
        resets: copies, from and to, to be made before the first step.
    """

    steps: tuple[BoundStep, ...]
    initial: Buffer
    latents: tuple[Buffer, ...]
    noise: tuple[Buffer, ...]
    resets: tuple[tuple[Buffer, Buffer], ...] = ()
