"""Tables of the units of a model: what they read, compute and keep."""

from __future__ import annotations

from collections.abc import Sequence

from goc_deploy.blocks import TokenStream
from goc_deploy.compiler import AddSum, Plan, Predict
from goc_deploy.display.plans import Table
from goc_deploy.engine_dir.manifest import Manifest
from goc_deploy.precision import ITEM_BYTES

ROWS = 2  # of a guided image


def unit_rows(manifest: Manifest) -> Table:
    """Make a row per kind of unit: where it stands, what it computes, and bytes."""
    spec, item = manifest.model, ITEM_BYTES[manifest.precision]
    sizes = {
        graph.name: max((graph.end(parameter) for parameter in graph.parameters), default=0)
        for graph in manifest.graphs
    }
    rows: list[list[str]] = []
    first = 0
    runs = [(run.count, run.units) for run in spec.blocks] or [(spec.depth, spec.block_units[0])]
    for count, units in runs:
        blocks = f"{first}" if count == 1 else f"{first} to {first + count - 1}"
        for unit in units:
            name = f"block_{first:02d}_{unit.branch}"
            tokens = [spec.tokens_of(feature.stream) for feature in unit.features]
            rows.append(
                [
                    blocks,
                    unit.branch,
                    ", ".join(unit.reads),
                    ", ".join(feature.output for feature in unit.features),
                    ", ".join(unit.rows) or "none",
                    f"{sizes.get(name, 0) / 1e6:.2f}",
                    f"{ROWS * sum(tokens) * spec.hidden * item / 1e6:.2f}",
                ]
            )
        first += count
    columns = [
        "blocks",
        "unit",
        "reads",
        "features",
        "rows besides gates",
        "weights MB",
        "features MB/image",
    ]
    return columns, rows


def stream_rows(plans: Sequence[Plan], manifest: Manifest, stream: TokenStream) -> Table:
    """Make a row per plan: which predictions it needs of a stream beside the image.

    Without the removal of those that nothing reads, every predicted unit would predict all its
    features.
    """
    spec = manifest.model
    of_stream = [
        sum(feature.stream == stream for feature in unit.features) for unit in spec.declared_units
    ]
    rows = []
    for plan in plans:
        steps = plan.schedule.coefficients
        every = sum(n for step in steps for n, row in zip(of_stream, step, strict=True) if row)
        ops = [op for step in plan.launches for op in step if isinstance(op, Predict | AddSum)]
        made = sum(
            len(op.predictions) if isinstance(op, Predict) else op.features
            for op in ops
            if op.stream == stream
        )
        saved = ROWS * spec.tokens_of(stream) * (every - made)
        rows.append([plan.name, str(every), str(made), str(saved), str(plan.features_of(stream))])
    columns = [
        "plan",
        f"predictions of the {stream}",
        "that are read",
        "tokens saved/image",
        f"buffers of the {stream}",
    ]
    return columns, rows
