"""What a run on a GPU found, as it is kept in a file: its format, medians, and the targets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

Found = dict[str, Any]

FORMAT = 1
KEYS = (
    "format",
    "dry",
    "date",
    "command",
    "machine",
    "ceilings",
    "kernel",
    "goldens",
    "dit",
    "targets",
    "parts",
)
FIRST = 2  # steps that no median counts: nothing is cached before them
OURS = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime")
COMPILED = "torch.compile"
MET, MISSED, UNKNOWN = "met", "missed", "not measured"


def check(found: Found) -> Found:
    """The findings, if they have the format of this version.

    Raises:
        ValueError: they do not.
    """
    if found.get("format") != FORMAT:
        raise ValueError(
            f"the file has format {found.get('format')!r}, and this version reads {FORMAT}"
        )
    if missing := [key for key in KEYS if key not in found]:
        raise ValueError(f"the file lacks {', '.join(missing)}")
    for run in found["dit"]["runs"]:
        for name, entry in run["contenders"].items():
            if missing := [key for key in ("wall_ms", "step_ms_by_kind") if key not in entry]:
                raise ValueError(
                    f"{run['images']} images, {name}: the file lacks {', '.join(missing)}"
                )
    return found


def read(path: Path) -> Found:
    """Findings from a file.

    Raises:
        ValueError: it holds something else.
    """
    return check(json.loads(path.read_text(encoding="utf-8")))


def summary(runs: Sequence[Found]) -> Found:
    """Medians over the runs of a contender, each as `benchmarks.on_gpu.ours.one_run` has it."""
    step_ms = [median(run["step_ms"][k] for run in runs) for k in range(len(runs[0]["step_ms"]))]
    kinds = runs[0]["kinds"]
    by_kind = {
        kind: median(late)
        for kind in sorted(set(kinds))
        if (
            late := [
                ms
                for k, (ms, of) in enumerate(zip(step_ms, kinds, strict=True))
                if of == kind and k >= FIRST
            ]
        )
    }
    walls = [run["wall_ms"] for run in runs]
    return {
        "wall_ms": median(walls),
        "wall_ms_rounds": walls,
        "step_ms": step_ms,
        "step_ms_by_kind": by_kind,
    }


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio with a bound.

    Attributes:
        what: the ratio in words.
        images: of the run that it is read from.
        above: numerator, as (contender, kind of step or ``wall``); ``ours`` stands for the backend.
        below: denominator.
        bound: what it must not pass.
        least: whether the bound is the least value; else it is the most.
    """

    what: str
    images: int
    above: tuple[str, str]
    below: tuple[str, str]
    bound: float
    least: bool

    def value(self, contenders: Mapping[str, Found], backend: str) -> float | None:
        """The ratio, or None where a side was not measured."""
        above, below = (
            milliseconds(contenders, backend, *side) for side in (self.above, self.below)
        )
        return above / below if above is not None and below else None

    def verdict(self, value: float | None) -> str:
        """``met``, ``missed`` or ``not measured``."""
        if value is None:
            return UNKNOWN
        return MET if (value >= self.bound if self.least else value <= self.bound) else MISSED


def milliseconds(
    contenders: Mapping[str, Found], backend: str, contender: str, kind: str
) -> float | None:
    """Of a contender; of ``torch.compile none`` the fastest mode."""
    if contender.startswith(COMPILED):
        plan = contender.removeprefix(COMPILED)
        entries = [
            e for name, e in contenders.items() if name.startswith(COMPILED) and name.endswith(plan)
        ]
    else:
        name = contender.replace("ours", backend, 1)
        entries = [contenders[name]] if name in contenders else []
    values = [e["wall_ms"] if kind == "wall" else e["step_ms_by_kind"].get(kind) for e in entries]
    return min((value for value in values if value is not None), default=None)


def _targets() -> Iterator[Target]:
    none, compiled = ("ours none", "wall"), (f"{COMPILED} none", "wall")
    for images, share, speed_up in ((1, 0.08, 1.85), (8, 0.03, 1.95)):
        for plan in ("fora:2", "fora:2+gc:1.2"):
            sides = (f"ours {plan}", "collapsed"), ("ours none", "full")
            yield Target(f"collapsed step of `{plan}` / full step", images, *sides, share, False)
        yield Target("`none` / `fora:2`", images, none, ("ours fora:2", "wall"), speed_up, True)
        yield Target("torch.compile / `none`", images, compiled, none, 1.0, True)
        yield Target(
            "torch.compile / `fora:2+gc:1.2`",
            images,
            compiled,
            ("ours fora:2+gc:1.2", "wall"),
            1.9,
            True,
        )


TARGETS = tuple(_targets())


def judged(runs: Sequence[Found], backends: Sequence[str]) -> list[Found]:
    """Every target on every backend of ours."""
    found = []
    for backend in backends:
        for target in TARGETS:
            contenders = next(
                (run["contenders"] for run in runs if run["images"] == target.images), {}
            )
            value = target.value(contenders, backend)
            sign = ">=" if target.least else "<="
            entry = {
                "backend": backend,
                "images": target.images,
                "what": target.what,
                "value": value,
            }
            found.append(
                {**entry, "bound": f"{sign} {target.bound}", "verdict": target.verdict(value)}
            )
    return found
