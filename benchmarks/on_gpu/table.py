"""The findings of a run on a GPU as one Markdown table."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.on_gpu.jobs import DONE
from benchmarks.on_gpu.results import COMPILED, MET, MISSED, UNKNOWN, Found, milliseconds
from benchmarks.report import markdown

_US = {"launched_us": "launched", "replayed_us": "replayed"}


def table(found: Found) -> str:
    """Markdown: everything that was found, a row each."""
    rows = [
        *_ceilings(found),
        *_kernel(found),
        *_goldens(found),
        *_dit(found),
        *_judged(found),
        *_parts(found),
    ]
    return f"{title(found)}\n\n" + markdown(
        ("part", "what", "measured", "against", "verdict"), rows
    )


def title(found: Found) -> str:
    """What ran where, in a line."""
    machine = found["machine"]
    if found["dry"]:
        return f"dry run on the CPU: no GPU numbers ({found['date']})"
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"{machine['card']}, driver {machine['driver']}, CUDA {machine['cuda']}, {versions}, "
        f"{found['date']}"
    )


def _ceilings(found: Found) -> Iterator[list[str]]:
    for key, unit in {
        "copy_gb_s": "GB/s",
        "fp16_tflops": "TFLOP/s",
        "bf16_tflops": "TFLOP/s",
    }.items():
        if key in (found["ceilings"] or {}):
            yield ["ceilings", key.split("_")[0], f"{found['ceilings'][key]:.0f} {unit}", "", ""]


def _kernel(found: Found) -> Iterator[list[str]]:
    copy = (found["ceilings"] or {}).get("copy_gb_s")
    for entry in found["kernel"]:
        times = [
            f"{entry[key]:.1f} us {word}" for key, word in _US.items() if entry[key] is not None
        ]
        share = "" if copy is None else f"{100 * entry['gb_s'] / copy:.0f} % of copy"
        measured = f"{', '.join(times)}; {entry['gb_s']:.0f} GB/s"
        yield [
            "kernel",
            f"{entry['form']}, {entry['rows']} rows",
            measured,
            f"{entry['nbytes'] / 1e6:.0f} MB",
            share,
        ]


def _goldens(found: Found) -> Iterator[list[str]]:
    for entry in found["goldens"]:
        what = f"{entry['backend']}, {entry['precision']}, `{entry['plan']}`"
        worst, bound = entry["worst_step"], f"< {entry['most']:.0e}"
        if worst is None:
            key = "not_here" if "not_here" in entry else "failed"
            yield ["goldens", what, entry[key], bound, "not here" if key == "not_here" else MISSED]
        else:
            same = "the same every run" if entry["runs_equal"] else "runs differ"
            verdict = MET if worst < entry["most"] else MISSED
            yield ["goldens", what, f"{worst:.1e}, {same}", bound, verdict]


def _dit(found: Found) -> Iterator[list[str]]:
    dit = found["dit"]
    for run in dit["runs"]:
        compiled = milliseconds(run["contenders"], "", f"{COMPILED} none", "wall")
        for name, entry in run["contenders"].items():
            steps = ", ".join(f"{kind} {ms:.3f}" for kind, ms in entry["step_ms_by_kind"].items())
            against = [f"{entry['gpu_bytes'] / 1e9:.2f} GB"] if entry.get("gpu_bytes") else []
            if entry.get("relative_l2") is not None:
                against.append(f"L2 {entry['relative_l2']:.1e}")
            speed_up = (
                "" if compiled is None else f"{compiled / entry['wall_ms']:.2f} x torch.compile"
            )
            what = f"{dit['model']} {dit['precision']}, {run['images']} images, {name}"
            yield [
                "DiT",
                what,
                f"{entry['wall_ms']:.2f} ms; steps {steps} ms",
                "; ".join(against),
                speed_up,
            ]
        for key, verdict in {"skipped": UNKNOWN, "failed": "failed"}.items():
            for name, reason in run[key].items():
                yield ["DiT", f"{run['images']} images, {name}", reason, "", verdict]


def _judged(found: Found) -> Iterator[list[str]]:
    for entry in found["targets"]:
        value = "" if entry["value"] is None else f"{entry['value']:.3f}"
        what = f"{entry['backend']}, {entry['images']} images: {entry['what']}"
        yield ["targets", what, value, entry["bound"], entry["verdict"]]


def _parts(found: Found) -> Iterator[list[str]]:
    for entry in found["parts"]:
        if entry["state"] != DONE:
            yield [
                "parts",
                entry["part"],
                entry["reason"],
                f"{entry['seconds']:.0f} s",
                entry["state"],
            ]
