"""The build of a TensorRT engine from an ONNX graph. It runs in the build process only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from goc_deploy.engines.tensorrt.library import Library, message_log
from goc_deploy.engines.tensorrt.scratch import limit_options, logged_bytes
from goc_deploy.engines.tensorrt.timing_cache import timings_of, use_timings

_NO_LAUNCH = {"shape_call", "wait", "signal", "NoOp", "Constant", "Shuffle", "copy_d2h"}
_PLUGIN_LAYERS = ("PluginV3", "custom_layer")
_LAYER = re.compile(r"Name: .*?, LayerType: (\w+)")
_COMPILED = re.compile(r"_myl(\d+)_\d+,")
_PROFILE = re.compile(r"\[profile (\d+)\]")


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """Settings of a build.

    Attributes:
        profiles: per optimisation profile, input -> smallest, usual and largest shape, for inputs
            with dynamic dimensions.
        capabilities: compute capabilities of the GPUs to build for; without meaning if the library
            builds for the GPU of the machine.
        scratch_limit_bytes: limit on scratch memory, 0 for no limit.
    """

    profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]]
    capabilities: Sequence[str]
    scratch_limit_bytes: int


@dataclass(frozen=True, slots=True)
class BuildReport:
    """Result of a build.

    Attributes:
        refusal: why there is no engine, or empty.
        kernels: number of launches per run, in the profile with most, or None if the library does
            not report it.
        plugin_layers: number of these that are the plugin.
        scratch_bytes: scratch memory at the largest shapes, or None if the library does not report
            it.
        takes_timings: whether the timings that the build received fit this library and GPU.
    """

    refusal: str = ""
    kernels: int | None = None
    plugin_layers: int = 0
    scratch_bytes: int | None = None
    takes_timings: bool = True


@dataclass(frozen=True, slots=True)
class Built:
    """An engine (empty if it was refused), the report, and the timings with those of this build."""

    engine: bytes
    report: BuildReport
    timings: bytes = b""


def engine_from_onnx(
    library: Library, graph: bytes, request: BuildRequest, timings: bytes = b""
) -> Built:
    """Build an engine from a graph that contains its weights, or has them as inputs.

    The network is strongly typed: every tensor has the type that the graph states.

    Args:
        library: the TensorRT library.
        graph: the ONNX graph.
        request: settings of the build.
        timings: timings of earlier builds; TensorRT for RTX has none.
    """
    trt, messages = library.trt, message_log(library.trt)
    builder = trt.Builder(messages)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, messages)
    if not parser.parse(graph):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = (
            f"node {e.node_name()} ({e.node_operator()}): {_first_line(e.desc())}" for e in errors
        )
        return Built(b"", BuildReport("; ".join(reasons)))
    try:
        config = config_from_request(library, builder, network, request)
        takes_timings = library.cross_compiles or use_timings(config, timings)
        engine = builder.build_serialized_network(network, config)
    except Exception as error:  # of any type; the parent process adds the unit's name
        return Built(b"", BuildReport(f"{type(error).__name__}: {_first_line(str(error))}"))
    if engine is None:
        errors = [_first_line(text) for text in messages.errors()]
        return Built(b"", BuildReport("; ".join(errors) or "the builder gives no reason"))
    report = _report([text for _, text in messages.lines])
    report = replace(report, takes_timings=takes_timings)
    return Built(
        bytes(memoryview(engine)), report, b"" if library.cross_compiles else timings_of(config)
    )


def config_from_request(library: Library, builder: Any, network: Any, request: BuildRequest) -> Any:
    """Set profiles, one stream for all layers, and no TF32, for each library by Polygraphy."""
    trt = library.trt
    from polygraphy.backend.trt import Profile, create_config

    profiles = []
    for shapes in request.profiles:
        profiles.append(Profile())
        for name, (low, usual, high) in shapes.items():
            profiles[-1].add(name, tuple(low), tuple(usual), tuple(high))
    options: dict[str, Any] = {
        "profiles": profiles,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        **limit_options(trt, request.scratch_limit_bytes),
    }
    if library.cross_compiles:
        from polygraphy.backend.tensorrt_rtx import create_config_rtx

        targets = [
            tuple(int(part) for part in capability.split("."))
            for capability in request.capabilities
        ]
        config = create_config_rtx(builder, network, compute_capabilities=targets, **options)
    else:
        config = create_config(builder, network, **options)
    config.max_aux_streams = 0
    config.clear_flag(trt.BuilderFlag.TF32)
    if library.cross_compiles:
        # Without this flag a run may allocate memory, and could then not be recorded.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    return config


def _report(messages: Sequence[str]) -> BuildReport:
    """Read the builder's log, the only source on an engine's content without a GPU."""
    listed = [text for text in messages if text.startswith("Layers:")]
    scratch = logged_bytes(messages)
    if not listed:
        return BuildReport(scratch_bytes=scratch)
    runs = [
        [kind for kind in kinds if kind not in _NO_LAUNCH] for kinds in _layer_kinds(listed[-1])
    ]
    longest = max(runs, key=len, default=[])
    plugin_layers = sum(kind in _PLUGIN_LAYERS for kind in longest)
    return BuildReport(kernels=len(longest), plugin_layers=plugin_layers, scratch_bytes=scratch)


def _layer_kinds(listed: str) -> list[list[str]]:
    """Return the kinds of the layers of each profile.

    All profiles are in one list. The tensors of the second and later profiles are marked with their
    profile. Layers that a compiler made together have its number in their names, and one of them
    has such a tensor. Layers without a mark count for the first profile, so that its number of
    kernels is too large rather than too small.
    """
    layers = [
        (m[1], _COMPILED.search(m[0]), _PROFILE.search(line))
        for line in listed.splitlines()
        if (m := _LAYER.match(line))
    ]
    profile_of = {compiled[1]: mark[1] for _, compiled, mark in layers if compiled and mark}
    kinds: dict[str, list[str]] = {}
    for kind, compiled, mark in layers:
        profile = mark[1] if mark else profile_of.get(compiled[1], "0") if compiled else "0"
        kinds.setdefault(profile, []).append(kind)
    return list(kinds.values())


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "no reason is given")
