"""goc-eval and the script behind docs/results.md.

They run on the shipped demo model and on one that makes latents.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import results
from goc_deploy.api import add_plan
from goc_deploy.api.exporting import export_with
from goc_deploy.engine_dir.manifest_file import manifest_to_json
from goc_deploy.engine_dir.reading import read_manifest
from goc_deploy.errors import ConflictError, GocError, UsageError
from goc_deploy.evaluation.evaluate import evaluate
from goc_deploy.evaluation.sampling import class_labels
from goc_deploy.options import EvalOptions, ExportOptions, no_progress
from goc_deploy.schedule import Schedule
from tests.conftest import GOLDEN, MNIST, Command
from tests.reference import relative_l2

IMAGES = 8
ENGINE_PLANS = ["none", "fora-2", "fora-2+gc-1.0"]
CLASSIFIER = str(MNIST / "classifier.onnx")
SMALL = EvalOptions(num_images=IMAGES)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "digits.npz"
    script = [sys.executable, MNIST / "make_reference.py", path, "--images", "300"]
    subprocess.run(script, check=True, capture_output=True, timeout=60)
    return path


def test_plans_are_compared_on_the_same_noise_and_the_samples_can_be_read_back(
    demo_engine: Path, reference: Path, command: Command, tmp_path: Path
) -> None:
    samples, found_at, html = tmp_path / "samples", tmp_path / "eval.json", tmp_path / "eval.html"
    scored = ("--features", CLASSIFIER, "--reference", reference)
    done = command(
        "goc-eval", demo_engine, "--num-images", IMAGES, "--batch-size", 6,
        "--trajectory-images", 5, *scored, "--converged", 25, "--converged-images", 2,
        "--samples-output", samples, "--json", found_at, "--html", html, "--resamples", 7,
    )  # fmt: skip
    assert "L2 to converged" in done.stdout
    assert "8 samples for 64 features: FID needs more images than features" in done.stderr
    found = json.loads(found_at.read_text())
    assert found["resamples"] == 7
    plain, gc = found["plans"]["fora-2"], found["plans"]["fora-2+gc-1.0"]
    assert list(found["plans"]) == ENGINE_PLANS
    assert plain["baseline"] == gc["baseline"] == "none"
    assert found["plans"]["none"]["full_step_equivalents"] == 20
    assert plain["full_step_equivalents"] == 10
    assert gc["metrics"]["relative_l2"]["value"] < 0.8 * plain["metrics"]["relative_l2"]["value"]
    assert gc["metrics"]["psnr_db"]["value"] > plain["metrics"]["psnr_db"]["value"]
    assert plain["metrics"].keys() == {
        "relative_l2",
        "converged_relative_l2",
        "psnr_db",
        "ssim",
        "fid",
        "sfid",
        "kid",
        "inception_score",
        "precision",
        "recall",
        "agreement",
    }
    assert len(plain["step_errors"]) == 20
    assert plain["step_errors"][0] == 0
    assert all(plan["ms_per_image"] > 0 for plan in found["plans"].values())
    assert "fora-2+gc-1.0" in html.read_text()
    assert str(tmp_path) not in html.read_text().replace(str(samples), "").replace(
        str(reference), ""
    )

    again = tmp_path / "again.json"
    command(
        "goc-eval", demo_engine, "--samples", samples, *scored, "--json", again, "--resamples", 7
    )
    kept = json.loads(again.read_text())
    for name in ENGINE_PLANS:
        entry, metrics = kept["plans"][name], found["plans"][name]["metrics"]
        assert entry["ms_per_image"] is None
        assert entry["metrics"].keys() == metrics.keys() - {"relative_l2", "converged_relative_l2"}
        for key, estimate in entry["metrics"].items():
            assert estimate == pytest.approx(metrics[key], rel=1e-5), key


def test_the_images_are_those_of_goc_run_and_plans_without_images_are_compared_by_latents(
    golden_engine: Path, command: Command, tmp_path: Path
) -> None:
    options = replace(SMALL, plans=("none", "fora:2+gc:1.2"), cfg_scale=2.0, seed=5, batch_size=5)
    found = evaluate(golden_engine, options, no_progress).report
    labels = ",".join(map(str, class_labels("balanced", IMAGES, 10, 5)))
    latents = []
    for plan in options.plans:
        out = tmp_path / "x.npy"
        arguments = (
            "--plan",
            plan,
            "--labels",
            labels,
            "--cfg-scale",
            2.0,
            "--seed",
            5,
            "--latents-output",
            out,
        )
        command("goc-run", golden_engine, *arguments)
        latents.append(np.load(out))
    expected = np.mean([relative_l2(x, y) for x, y in zip(latents[1], latents[0], strict=True)])
    metrics = found["plans"]["fora-2+gc-1.2"]["metrics"]
    assert metrics.keys() == {"relative_l2"}
    assert metrics["relative_l2"]["value"] == pytest.approx(expected, rel=1e-3)
    assert found["plans"]["fora-2+gc-1.2"]["step_errors"][-1] == pytest.approx(expected, rel=1e-3)
    assert any("4-channel latents, which need a VAE" in warning for warning in found["warnings"])


def test_the_paper_s_table_is_one_command(
    golden_engine: Path, command: Command, tmp_path: Path
) -> None:
    engine, found_at, html = (
        Path(shutil.copytree(golden_engine, tmp_path / "e")),
        tmp_path / "e.json",
        tmp_path / "e.html",
    )
    asked = (
        "--preset",
        "paper",
        "--router",
        GOLDEN / "router.pt",
        "--num-images",
        4,
        "--cfg-scale",
        2,
        "--threads",
        1,
    )
    done = command("goc-eval", engine, *asked, "--json", found_at, "--html", html)
    found = json.loads(found_at.read_text())
    plans = found["plans"]
    methods = {plan["method"]: name for name, plan in plans.items()}
    assert list(methods) == [
        "no cache",
        "FORA-50",
        "FORA-50 + GC",
        "FORA-50 + GOC",
        "FORA-25",
        "FORA-25 + GC",
        "FORA-25 + GOC",
        "L2C",
        "L2C + GC",
        "L2C + GOC",
    ]
    assert (methods["no cache"], methods["FORA-50"]) == ("none", "fora-2")
    assert (
        {"fora-2+goc", "fora-2@0.5+goc", "l2c-router+goc"} <= set(found["added_plans"]) < set(plans)
    )
    assert "added to" in done.stderr
    assert "threads are ignored" not in done.stderr
    table = done.stdout.split("converged")[0]
    assert all(
        column in table
        for column in ("method", "caching level %", "FLOPs (T)", "speed-up", "relative L2")
    )
    schedules = {name: Schedule.load(engine / "schedules" / f"{name}.json") for name in plans}
    for base in ("FORA-50", "FORA-25", "L2C"):
        plain, gc, goc = (plans[methods[base + more]] for more in ("", " + GC", " + GOC"))
        assert plain["computed_units"] == gc["computed_units"] == goc["computed_units"]
        eta = schedules[methods[f"{base} + GOC"]].provenance["god"]["eta"]
        assert gc["policy"].endswith(f"+gc:{eta}")
    none, half = plans["none"], plans["fora-2"]
    assert half["computed_units"] * 2 == none["computed_units"]
    assert 0.5 < half["flops_per_image"] / none["flops_per_image"] < 0.52
    assert "<td>50.0</td>" in html.read_text()
    manifest = (engine / "manifest.json").read_bytes()
    again = command("goc-eval", engine, *asked)
    assert "added to" not in again.stderr
    assert (engine / "manifest.json").read_bytes() == manifest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "book"}, "preset 'book' is not one of paper"),
        ({"preset": "paper", "plans": ("none",)}, "a preset chooses the plans"),
        ({"router": GOLDEN / "router.pt"}, "a router is for a preset"),
        ({"preset": "paper"}, "plan fora-2 has 4 steps of ddim, but none has 20 of ddim"),
    ],
)
def test_a_preset_that_does_not_fit_is_refused(
    options: dict, message: str, golden_engine: Path, tmp_path: Path
) -> None:
    engine = Path(shutil.copytree(golden_engine, tmp_path / "engine"))
    if "4 steps" in message:
        manifest = read_manifest(engine)
        plans = tuple(entry for entry in manifest.plans if entry.name != "fora-2")
        listed = {
            path
            for entry in manifest.plans
            if entry not in plans
            for path in (entry.plan, entry.schedule)
        }
        files = tuple(file for file in manifest.files if file.path not in listed)
        (engine / "manifest.json").write_text(
            manifest_to_json(replace(manifest, plans=plans, files=files))
        )
        add_plan(engine, "fora:2", steps=4)
    before = (engine / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match=message):
        evaluate(engine, replace(SMALL, **options), no_progress)
    assert (engine / "manifest.json").read_bytes() == before


def test_what_does_not_fit_is_refused_before_anything_is_sampled(
    demo_engine: Path, golden_engine: Path, reference: Path, tmp_path: Path
) -> None:
    wrong_size = tmp_path / "wrong.npz"
    np.savez(wrong_size, arr_0=np.zeros((9, 32, 32, 3), np.uint8))
    other_features = tmp_path / "other.npz"
    np.savez(other_features, mu=np.zeros(2048), sigma=np.eye(2048))
    scored = replace(SMALL, features=CLASSIFIER)
    for engine, options, message in (
        (demo_engine, replace(SMALL, plans=("fora:5",)), "there is no plan 'fora:5'"),
        (demo_engine, replace(SMALL, plans=("fora:2",)), "no plan computes everything"),
        (demo_engine, replace(SMALL, plans=("none", "none")), "named twice"),
        (demo_engine, replace(SMALL, reference=reference), "`reference` needs `features`"),
        (
            demo_engine,
            replace(scored, reference=wrong_size),
            "images of 32x32, this model makes 28x28",
        ),
        (
            demo_engine,
            replace(scored, reference=other_features),
            "statistics of 2048 features but .* has 64",
        ),
        (demo_engine, replace(scored, reference=tmp_path / "no.npz"), "cannot be read as an"),
        (
            demo_engine,
            replace(SMALL, samples=tmp_path),
            "for plan none; write samples with `samples_output`",
        ),
        (demo_engine, replace(SMALL, seed=-1), "seed must be"),
        (golden_engine, replace(SMALL, features=CLASSIFIER), "`features` needs images"),
        (golden_engine, replace(SMALL, samples_output=tmp_path), "`samples_output` needs images"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(engine, options, no_progress)


def test_samples_that_do_not_fit_together_are_refused(demo_engine: Path, tmp_path: Path) -> None:
    options = replace(SMALL, plans=("none", "fora:2"), samples=tmp_path)
    black = np.zeros((4, 28, 28, 3), np.uint8)
    np.savez(tmp_path / "none.npz", arr_0=black, arr_1=np.arange(4))
    for arrays, message in (
        ({"arr_0": black}, "lacks arr_0 or arr_1"),
        ({"arr_0": black[:, :9], "arr_1": np.arange(4)}, "other labels or sizes"),
        ({"arr_0": black[:3], "arr_1": np.arange(3)}, "other labels or sizes"),
        ({"arr_0": black, "arr_1": np.zeros(4)}, "other labels or sizes"),
    ):
        np.savez(tmp_path / "fora-2.npz", **arrays)
        with pytest.raises(UsageError, match=message):
            evaluate(demo_engine, options, no_progress)


def test_images_that_were_decoded_elsewhere_are_judged_by_their_own_size(
    demo_engine: Path, golden_engine: Path, tmp_path: Path
) -> None:
    options = replace(SMALL, plans=("none", "fora:2"), samples=tmp_path)
    pictures = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3)).astype(np.uint8)
    for plan in ("none", "fora-2"):
        np.savez(tmp_path / f"{plan}.npz", arr_0=pictures, arr_1=np.arange(4))
    found = evaluate(golden_engine, options, no_progress).report
    assert found["images"] == 4
    assert found["plans"]["fora-2"]["metrics"]["ssim"]["value"] == pytest.approx(1)
    with pytest.raises(UsageError, match="has images of 64x64, this model makes 28x28"):
        evaluate(demo_engine, options, no_progress)


ROWS = """
converged_steps = 6
converged_images = 3
calibration_images = 2
[[table]]
name = "main"
title = "A table"
rows = [
    { title = "no cache", spec = "none", steps = 4 },
    { title = "FORA", spec = "fora:2", steps = 4 },
]
[[table]]
name = "more"
title = "Another"
rows = [{ title = "searched", spec = "search:2,steps=4,reference=6", steps = 0 }]
"""


def test_rows_of_the_results_are_made_once_and_survive_an_interruption(
    demo_engine: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, rows, work, numbers, document = (
        tmp_path / n for n in ("engine", "rows.toml", "work", "numbers", "r.md")
    )
    shutil.copytree(demo_engine, engine)
    rows.write_text(ROWS)
    document.write_text(
        "kept\n<!-- begin main -->\n<!-- end main -->\n<!-- begin more -->\n<!-- end more -->\n"
    )
    shared = [
        "--rows",
        rows,
        "--work",
        work,
        "--numbers",
        numbers,
        "--reference",
        reference,
        "--document",
        document,
    ]
    sampling = ["--images", 9, "--chunk-images", 4, "--processes", 1]
    arguments = [str(word) for word in (engine, *shared, *sampling)]
    assert results.main([*arguments, "--tables", "main"]) == 0
    text = document.read_text()
    assert text.startswith("kept\n")
    (line,) = [line for line in text.splitlines() if "`fora:2`" in line]
    assert line.startswith("| FORA | `fora:2` | 4 | 50 | 0.0007 | 2.00 |  | 0.")
    assert "searched" not in text

    chunks = sorted((work / "fora-2.T4").glob("latents-*.npz"))
    assert len(chunks) == 3
    times = [chunk.stat().st_mtime_ns for chunk in chunks]
    kept = json.loads((numbers / "fora-2.T4.json").read_text())
    chunks[1].unlink()
    (numbers / "fora-2.T4.json").unlink()
    capsys.readouterr()
    assert results.main([*arguments, "--tables", "main"]) == 0
    assert capsys.readouterr().err.splitlines() == ["fora-2.T4: 3 of 3 chunks"]
    again = json.loads((numbers / "fora-2.T4.json").read_text())
    assert again == kept
    now = [chunk.stat().st_mtime_ns for chunk in chunks]
    assert [a == b for a, b in zip(times, now, strict=True)] == [True, False, True]

    shutil.rmtree(work)  # what is measured needs no samples
    assert results.main([*arguments, "--tables", "main", "--do", "clock"]) == 0
    assert not work.exists()
    (line,) = [line for line in document.read_text().splitlines() if "`fora:2`" in line]
    assert float(line.split("|")[7]) > 0  # the speed-up
    assert results.main(arguments) == 0
    (line,) = [line for line in document.read_text().splitlines() if "searched" in line]
    assert line.startswith(
        "| searched | `search:2,steps=4,reference=6` | 4 | 50 | 0.0007 | 2.00 |  | 0."
    )

    assert results.main([*arguments, "--seed", "1"]) == ConflictError.exit_code
    assert "holds samples that differ in seed; delete it" in capsys.readouterr().err


def test_plans_are_compared_with_an_engine_directory_in_full_precision(
    demo_engine: Path, tmp_path: Path
) -> None:
    coarse = tmp_path / "coarse"
    plans = ("none", "fora:2")
    options = ExportOptions(num_heads=4, quantize=("w4",), plans=plans, max_batch=4)
    export_with(MNIST / "dit_mnist.pt", coarse, options)
    names = ("none", "fora-2")
    chosen = replace(SMALL, plans=names, full_precision=demo_engine, num_images=5)
    report = evaluate(coarse, chosen, no_progress).report
    rows = report["plans"]
    assert list(rows) == ["none", "fora-2", "none@full", "fora-2@full"]
    assert {row["baseline"] for row in rows.values()} == {"none@full"}
    error = {name: row["metrics"].get("relative_l2", {}).get("value") for name, row in rows.items()}
    assert error["none@full"] is None  # it is the reference
    assert error["none"] > 0.05
    assert error["fora-2"] > error["fora-2@full"] > 0
    alone = evaluate(demo_engine, replace(chosen, full_precision=None, batch_size=4), no_progress)
    same = alone.report["plans"]["fora-2"]["metrics"]["relative_l2"]["value"]
    assert error["fora-2@full"] == pytest.approx(same, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": Path("samples")}, "`full_precision` runs plans, so it does not go"),
        ({"full_precision": GOLDEN}, "manifest.json"),
    ],
)
def test_a_wrong_reference_in_full_precision_is_refused(
    changes: dict[str, Path], message: str, demo_engine: Path
) -> None:
    options = replace(SMALL, **{"full_precision": demo_engine, **changes})  # type: ignore[arg-type]
    with pytest.raises(GocError, match=message):
        evaluate(demo_engine, options, no_progress)


def test_a_reference_of_another_model_or_without_the_plan_is_refused(
    demo_engine: Path, golden_engine: Path
) -> None:
    with pytest.raises(UsageError, match="holds another model"):
        evaluate(demo_engine, replace(SMALL, full_precision=golden_engine), no_progress)
