from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from goc_deploy.engine_dir.plans import load_plan
from goc_deploy.engine_dir.reading import read_manifest
from goc_deploy.errors import EngineDirError


def test_a_plan_that_computes_what_its_schedule_does_not_is_refused(golden_engine: Path) -> None:
    manifest = read_manifest(golden_engine)
    none, fora = manifest.plans[0], manifest.plans[1]
    mixed = replace(none, schedule=fora.schedule)
    with pytest.raises(EngineDirError, match="and its schedule do not fit together"):
        load_plan(golden_engine, replace(manifest, plans=(mixed,)), none.name)
