"""What `benchmarks.roofline` predicts beside what `benchmarks/gpu.py` measured."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.make_checkpoint import spec_of
from benchmarks.on_gpu.results import OURS, Found
from benchmarks.on_gpu.table import title
from benchmarks.report import markdown
from benchmarks.roofline import GPUS, PLANS, Counter, Gpu, predicted
from goc_deploy.precision import ITEM_BYTES


def compared(found: Found) -> str:
    """Markdown: a table per number of images.

    The predictions are at datasheet peaks and at the measured ceilings.

    Raises:
        ValueError: a dry run, or neither the card's datasheet nor its ceilings are known.
    """
    if found["dry"]:
        raise ValueError("the file is of a dry run on the CPU, which measures no GPU")
    gpus = list(known_peaks(found))
    if not gpus:
        raise ValueError(
            f"no peaks are known for {found['machine']['card']}, and none were measured"
        )
    tables = [_table(found, run, gpus) for run in found["dit"]["runs"]]
    return "\n".join([title(found), "", *tables])


def known_peaks(found: Found) -> Iterator[Gpu]:
    """Of the card's datasheet, where `benchmarks.roofline.GPUS` has it, and as measured."""
    words = set(found["machine"]["card"].split())
    for gpu in GPUS:
        if words >= set(gpu.name.split()) - {"SXM"} and "PCIe" not in words:
            yield Gpu(f"{gpu.name} datasheet", gpu.teraflops, gpu.gigabytes_per_second)
    ceilings, precision = found["ceilings"] or {}, found["dit"]["precision"]
    if {f"{precision}_tflops", "copy_gb_s"} <= ceilings.keys():
        yield Gpu("measured ceilings", ceilings[f"{precision}_tflops"], ceilings["copy_gb_s"])


def _table(found: Found, run: Found, gpus: list[Gpu]) -> str:
    dit, images = found["dit"], run["images"]
    counter = Counter(spec_of(dit["model"], 256), 2 * images, ITEM_BYTES[dit["precision"]])
    backends = [
        backend
        for backend in OURS
        if any(name.startswith(f"{backend} ") for name in run["contenders"])
    ]
    rows = []
    for plan in PLANS:
        steps, wholes = zip(
            *(predicted(plan, counter, dit["steps"], images, gpu)[1:] for gpu in gpus), strict=True
        )
        kind = "full" if plan == "none" else "collapsed"
        entries = [run["contenders"].get(f"{backend} {plan}") for backend in backends]
        of_step = [entry and entry["step_ms_by_kind"].get(kind) for entry in entries]
        rows.append([f"{kind} step, `{plan}`", *_cells(steps, of_step)])
        rows.append(
            [f"total, `{plan}`", *_cells(wholes, [entry and entry["wall_ms"] for entry in entries])]
        )
    heads = [f"predicted, {gpu.name}" for gpu in gpus] + [
        f"measured, {b} (x prediction)" for b in backends
    ]
    plural = "s" if images > 1 else ""
    text = (
        f"DiT-{dit['model']} 256, {dit['precision']}, {images} image{plural} with guidance, "
        f"{dit['steps']} steps:"
    )
    return f"{text}\n\n{markdown(['', *heads], rows)}"


def _cells(seconds: tuple[float, ...], measured: list[float | None]) -> Iterator[str]:
    """Predictions in milliseconds, then measurements and their ratio to the last prediction."""
    yield from (f"{1e3 * value:.2f} ms" for value in seconds)
    for ms in measured:
        yield "" if ms is None else f"{ms:.2f} ms ({ms / (1e3 * seconds[-1]):.2f})"
