"""Feed mutants of every kind of file to what reads it. Nothing but an error of ours may come out.

python -m tests.fuzz.run ENGINE_DIR --seconds 300 [--seed 0] [--kind manifest]...
"""

from __future__ import annotations

import argparse
import io
import logging
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

import goc_deploy
from goc_deploy.compiler import check_plan
from goc_deploy.compiler.plan_file import plan_from_json
from goc_deploy.conditions.tensor_files import array_from_npy, arrays_from_file
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.graph_check import check_graph, external_tensors
from goc_deploy.engine_dir.manifest import MANIFEST_NAME
from goc_deploy.engine_dir.manifest_file import manifest_from_json, manifest_to_json
from goc_deploy.engine_dir.reading import file_entry
from goc_deploy.errors import GocError
from goc_deploy.exporters.checkpoint import load_checkpoint
from goc_deploy.schedule.schedule import schedule_from_json
from tests.fuzz.mutations import mutated_bytes, mutated_json

SLOW_SECONDS = 60.0
TENSORS = {"a": torch.arange(6.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}

Trial = Callable[[random.Random], None]


def trials(engine: Path, folder: Path) -> dict[str, Trial]:
    """Kind of file -> a function that makes a mutant of it and reads it."""
    directory = EngineDir.open(engine)
    manifest = directory.manifest
    entry, graphs = manifest.plans[-1], tuple(manifest.graphs())
    schedule = directory.plan(entry.name).schedule
    sound = {
        path: (engine / path).read_bytes() for path in (MANIFEST_NAME, entry.plan, entry.schedule)
    }
    with goc_deploy.load(engine, backend="onnxruntime") as pipe:
        expected = pipe.generate([1]).latents
    copy = Path(shutil.copytree(engine, folder / "engine"))

    def plan(generator: random.Random) -> None:
        check_plan(
            plan_from_json(mutated_json(sound[entry.plan], generator), schedule, "plan"),
            manifest.model,
        )

    def graph(generator: random.Random) -> None:
        unit = generator.choice(graphs)
        content = mutated_bytes((engine / unit.onnx).read_bytes(), generator)
        check_graph(content, external_tensors(manifest.parts(unit)), unit.onnx)

    def engine_with(path: str, generator: random.Random, *, listed: bool) -> None:
        """Load and run an engine directory with one changed file; unless it is listed so, the output may not change."""
        before = (copy / path).read_bytes()
        content = mutated_bytes(before, generator)
        (copy / path).write_bytes(content)
        try:
            if listed:
                files = tuple(
                    file_entry(copy, f.path) if f.path == path else f for f in manifest.files
                )
                (copy / MANIFEST_NAME).write_text(manifest_to_json(replace(manifest, files=files)))
            with goc_deploy.load(copy, backend="onnxruntime") as pipe:
                found = pipe.generate([1]).latents
            assert listed or np.array_equal(found, expected), (
                f"{path} was changed, and with it the output"
            )
        finally:
            (copy / path).write_bytes(before)
            (copy / MANIFEST_NAME).write_bytes(sound[MANIFEST_NAME])

    def file(name: str, content: bytes, read: Callable[[Path], object]) -> Trial:
        def trial(generator: random.Random) -> None:
            (folder / name).write_bytes(mutated_bytes(content, generator))
            read(folder / name)

        return trial

    def written(write: Callable[[io.BytesIO], object]) -> bytes:
        memory = io.BytesIO()
        write(memory)
        return memory.getvalue()

    legacy = written(lambda f: torch.save(TENSORS, f, _use_new_zipfile_serialization=False))
    arrays = {"a": np.arange(6.0), "b": np.ones((2, 3), np.float16)}
    return {
        "manifest": lambda g: (
            manifest_from_json(mutated_json(sound[MANIFEST_NAME], g), "manifest") and None
        ),
        "plan": plan,
        "schedule": lambda g: (
            schedule_from_json(mutated_json(sound[entry.schedule], g), "schedule") and None
        ),
        "graph": graph,
        "engine": lambda g: engine_with(g.choice(manifest.files).path, g, listed=g.random() < 0.7),
        "npz": file("x.npz", written(lambda f: np.savez_compressed(f, **arrays)), arrays_from_file),
        "npy": file("x.npy", written(lambda f: np.save(f, arrays["a"])), array_from_npy),
        "safetensors": file("x.safetensors", save(TENSORS), arrays_from_file),
        "checkpoint": file("x.pt", written(lambda f: torch.save(TENSORS, f)), load_checkpoint),
        "legacy checkpoint": file("y.pt", legacy, load_checkpoint),
        "safetensors checkpoint": file("z.safetensors", save(TENSORS), load_checkpoint),
    }


def main() -> int:
    """Run trials until the time is over; 1 and the seeds of those that failed, else 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append")
    options = parser.parse_args()
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    done: Counter[str] = Counter()
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        known = trials(options.engine, Path(folder))
        chosen = {name: known[name] for name in options.kind or known}
        end, seed = time.monotonic() + options.seconds, options.seed
        while time.monotonic() < end:
            seed += 1
            for name, trial in chosen.items():
                started = time.monotonic()
                try:
                    trial(random.Random(f"{name} {seed}"))
                except GocError:
                    done[f"{name} refused"] += 1
                except Exception:
                    failed.append(f"{name}, --seed {seed - 1}: {traceback.format_exc(limit=-4)}")
                if time.monotonic() - started > SLOW_SECONDS:
                    failed.append(f"{name}, --seed {seed - 1}: took more than {SLOW_SECONDS} s")
                done[name] += 1
    for name in chosen:
        print(f"{name}: {done[name]} mutants, {done[f'{name} refused']} refused")
    print("\n".join(failed[:20]), file=sys.stderr)
    print(f"{sum(done[name] for name in chosen)} mutants, {len(failed)} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
