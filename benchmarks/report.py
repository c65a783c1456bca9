"""Rewrite the generated parts of docs/performance.md, and draw its plots.

The source is the JSON files beside it.

    python benchmarks/report.py docs/performance.md

Generated parts are between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; the rest is written
by hand.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Found = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "document", type=Path, help="docs/performance.md; its JSON files lie in docs/performance/"
    )
    args = parser.parse_args(argv)
    folder = args.document.with_suffix("")
    runs = [
        json.loads(path.read_text()) for path in sorted(folder.glob("*-batch-*.json"), key=_order)
    ]
    blocks = {"results": "\n".join(map(result_table, runs))}
    plot_totals(runs, folder / "totals.png")
    big = [run for run in runs if run["model"] == "XL/2" and run["batch"] == 1]
    if big:
        blocks["targets"] = targets_table(big[0])
    if (folder / "scaling.json").exists():
        scaling = json.loads((folder / "scaling.json").read_text())
        blocks["scaling"] = scaling_table(scaling)
        plot_scaling(scaling, folder / "scaling.png")
    args.document.write_text(
        with_blocks(args.document.read_text(encoding="utf-8"), blocks), encoding="utf-8"
    )
    return 0


def with_blocks(text: str, blocks: Mapping[str, str]) -> str:
    """The text with the named blocks replaced.

    Raises:
        ValueError: a block has no markers in the text.
    """
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda m, b=block: f"{m[1]}\n{b}\n{m[2]}", text)
        if count != 1:
            raise ValueError(f"the document has {count} blocks named {name}, expected one")
    return text


def _order(path: Path) -> tuple[int, str, int]:
    model, batch = path.stem.rsplit("-batch-", 1)
    sizes = ("demo", "S-2", "B-2", "L-2", "XL-2")
    return (sizes.index(model) if model in sizes else len(sizes), model, int(batch))


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def result_table(run: Found) -> str:
    """One (model, batch): who took how long, and what it was measured with."""
    entries = run["contenders"]
    base = entries["ours none"]["total_ms"] if "ours none" in entries else None
    rows = []
    for name, entry in entries.items():
        rounds, difference = entry["total_ms_rounds"], entry["relative_l2_to_twin"]
        kinds = entry["step_ms_by_kind"]
        ratio = "" if base is None else f"{entry['total_ms'] / base:.3f}"
        shown = "" if difference is None or name == f"pytorch {name[8:]}" else f"{difference:.0e}"
        steps = [f"{kinds[kind]:.2f}" if kind in kinds else "" for kind in ("full", "collapsed")]
        spread = f"{min(rounds) / 1e3:.3f}-{max(rounds) / 1e3:.3f}"
        rows.append([f"`{name}`", f"{entry['total_ms'] / 1e3:.3f}", spread, ratio, *steps, shown])
    rows += [
        [f"`{name}`", "skipped: " + reason, *[""] * 5] for name, reason in run["skipped"].items()
    ]
    columns = [
        "contender",
        "total s",
        "min-max",
        "total / ours without cache",
        "full step ms",
        "collapsed step ms",
        "relative L2 to PyTorch",
    ]
    versions = ", ".join(
        f"{k} {v}"
        for k, v in run["versions"].items()
        if k not in ("python", "numpy", "onnxruntime")
    )
    peaks = run["peaks"]
    heading = (
        f"### {run['model']}, {run['batch']} image{'s' if run['batch'] > 1 else ''}, "
        f"{run['steps']} steps\n"
    )
    return (
        f"{heading}\n{markdown(columns, rows)}\n"
        f"`{run['command']}`, {run['threads']} threads, {run['machine']['processor']}, {versions}, "
        f"{run['date']}. "
        f"Best matrix product {peaks['sgemm_gflops']:.0f} GFLOP/s ({peaks['sgemm_best']}), "
        f"copy {peaks['copy_gb_s']:.1f} GB/s, read {peaks['read_gb_s']:.1f} GB/s.\n"
    )


def targets_table(run: Found) -> str:
    """What the DiT-XL/2 run must reach, and what it reaches."""
    c, load, export = run["contenders"], run["load"], run["export"]
    total = {name: entry["total_ms"] for name, entry in c.items()}
    plain, gc = c["ours fora:2"], c["ours fora:2+gc:1.2"]
    full = c["ours none"]["step_ms_by_kind"]["full"]
    gflops = run["matmul_flops_full_step"] / full / 1e6
    cache = run["cache"]["fora:2+gc:1.2"]
    loop = sum(run["profile_ms"].get(kind, 0) for kind in ("attn", "mlp", "predict ahead"))
    outside = sum(run["profile_ms"].values()) - loop
    best = "pytorch fora:2+gc:1.2"

    def ratio(a: str, b: str) -> str:
        return f"{total[a] / total[b]:.3f}" if a in total and b in total else "not measured"

    rows = [
        [
            "collapsed step / full step, plain",
            "<= 0.010",
            f"{plain['step_ms_by_kind']['collapsed'] / full:.4f}",
        ],
        [
            "collapsed step / full step, gradient",
            "<= 0.015",
            f"{gc['step_ms_by_kind']['collapsed'] / full:.4f}",
        ],
        ["no cache / `fora:2`", ">= 1.94", ratio("ours none", "ours fora:2")],
        ["`fora:2+gc` / `fora:2`", "<= 1.005", ratio("ours fora:2+gc:1.2", "ours fora:2")],
        ["no cache / `fora:2@0.5`", ">= 1.31", ratio("ours none", "ours fora:2@0.5")],
        [
            "per-block engines / one graph, no cache",
            "<= 1.01",
            ratio("ours none", "one graph none"),
        ],
        ["PyTorch no cache / ours no cache", ">= 1.6", ratio("pytorch none", "ours none")],
        ["PyTorch GOC / ours GOC, 50 %", ">= 1.75", ratio(best, "ours fora:2+gc:1.2")],
        [
            "PyTorch no cache / ours GOC, 50 %",
            ">= 3.1",
            ratio("pytorch none", "ours fora:2+gc:1.2"),
        ],
        [
            "torch.compile no cache / ours GOC, 50 %",
            "",
            ratio("torch.compile none", "ours fora:2+gc:1.2"),
        ],
        ["diffusers no cache / ours GOC, 50 %", "", ratio("diffusers none", "ours fora:2+gc:1.2")],
        [
            "GFLOP/s of a full step / best matrix product",
            ">= 0.85",
            (
                f"{gflops:.0f} / {run['peaks']['sgemm_gflops']:.0f} = "
                f"{gflops / run['peaks']['sgemm_gflops']:.2f}"
            ),
        ],
        [
            "cache bytes / two tensors per unit, gradient",
            "<= 0.55",
            f"{cache['cache_bytes'] / cache['naive_cache_bytes']:.3f}",
        ],
        ["export wall time", "< 240 s", f"{export['wall_s']:.0f} s"],
        [
            "export peak RSS / checkpoint",
            "<= 2.0",
            f"{export['peak_rss_bytes'] / export['checkpoint_bytes']:.2f}",
        ],
        [
            "load to first step",
            "< 6 s",
            (
                f"{load['load_s']:.1f} s load and {load['first_step_s']:.1f} s first step, which "
                "computes"
            ),
        ],
        ["resident after load", "", f"{load['resident_bytes'] / 1e9:.2f} GB"],
        [
            "outside blocks and predictions / total no cache",
            "<= 0.015",
            f"{outside / total['ours none']:.4f}",
        ],
    ]
    return markdown(["what", "target", "measured"], rows)


def scaling_table(scaling: Found) -> str:
    """Fitted growth by axis."""
    rows = []
    for axis, curve in scaling["curves"].items():
        values = ", ".join(str(point["value"]) for point in curve["points"])
        for what, fit in curve["fits"].items():
            line = f"{fit['intercept_ms']:.2f} + {fit['slope_ms']:.3f} n"
            rows.append([axis, values, what, f"{fit['exponent']:.2f}", line])
    base = ", ".join(f"{key} {value}" for key, value in scaling["base"].items())
    table = markdown(["axis n", "values", "what", "exponent of n", "ms, straight line"], rows)
    return f"{table}\nAround {base}, 1 image: `{scaling['command']}`, {scaling['date']}.\n"


def plot_totals(runs: Sequence[Found], path: Path) -> None:
    """A bar per contender, a panel per run."""
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(11, 0.6 + sum(0.5 + 0.24 * len(run["contenders"]) for run in runs)),
        layout="constrained",
    )
    heights = [len(run["contenders"]) for run in runs]
    axes = figure.subplots(len(runs), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, run in zip(axes, runs, strict=True):
        names = list(run["contenders"])
        seconds = [entry["total_ms"] / 1e3 for entry in run["contenders"].values()]
        colors = ["#1b7f5a" if name.startswith("ours") else "#9aa0a6" for name in names]
        bars = panel.barh(names, seconds, color=colors)
        panel.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        panel.invert_yaxis()
        panel.tick_params(labelsize=8)
        panel.set_title(
            f"{run['model']}, {run['batch']} images, {run['steps']} steps: seconds",
            fontsize=9,
            loc="left",
        )
        panel.margins(x=0.1)
    figure.savefig(path, dpi=110)


def plot_scaling(scaling: Found, path: Path) -> None:
    """A log-log panel per axis."""
    from matplotlib.figure import Figure

    curves = scaling["curves"]
    figure = Figure(figsize=(3.4 * len(curves), 3.4), layout="constrained")
    for panel, (axis, curve) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
    ):
        values = [point["value"] for point in curve["points"]]
        for what in curve["fits"]:
            exponent = curve["fits"][what]["exponent"]
            panel.loglog(
                values, [p[what] for p in curve["points"]], "o-", label=f"{what} ~ n^{exponent:.2f}"
            )
        panel.set_title(axis, fontsize=9)
        panel.set_xticks(values, labels=[str(value) for value in values], minor=False)
        panel.minorticks_off()
        panel.tick_params(labelsize=8)
        panel.legend(fontsize=6)
    figure.supylabel("ms", fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    raise SystemExit(main())
