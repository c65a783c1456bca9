"""One ONNX graph to one TensorRT engine. Runs in the build process only."""

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
    """How to build a graph.

    Attributes:
        profiles: of each optimisation profile: input -> smallest, usual and largest shape, for inputs with dynamic
            dimensions.
        capabilities: GPUs to build for; of no meaning where the library builds for the GPU of the machine.
        workspace_bytes: most scratch memory, 0 for no limit.
    """

    profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]]
    capabilities: Sequence[str]
    workspace_bytes: int


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What came of a build.

    Attributes:
        refusal: why there is no engine, or empty.
        kernels: launches of one run, of the profile with most, or None where the library does not tell.
        plugin_layers: how many of them are the plugin.
        activation_bytes: scratch memory at the largest shapes, or None where the library does not tell.
        takes_timings: whether the timings that the build was given are of this library and GPU.
    """

    refusal: str = ""
    kernels: int | None = None
    plugin_layers: int = 0
    activation_bytes: int | None = None
    takes_timings: bool = True


@dataclass(frozen=True, slots=True)
class Built:
    """An engine, empty where it was refused; what came of it; and the timings, with those of this build."""

    engine: bytes
    report: BuildReport
    timings: bytes = b""


def engine_from_onnx(
    library: Library, graph: bytes, request: BuildRequest, timings: bytes = b""
) -> Built:
    """Build an engine from a graph that holds all its weights, or has them as inputs.

    The network is strongly typed: every tensor has the type that the graph says.

    Args:
        library: what builds.
        graph: the ONNX graph.
        request: how to build it.
        timings: of earlier builds, which TensorRT for RTX has none of.
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
        taken = library.cross_compiles or use_timings(config, timings)
        engine = builder.build_serialized_network(network, config)
    except (
        Exception
    ) as error:  # Polygraphy and the bindings raise all kinds; the parent names the unit
        return Built(b"", BuildReport(f"{type(error).__name__}: {_first_line(str(error))}"))
    if engine is None:
        errors = [_first_line(text) for text in messages.errors()]
        return Built(b"", BuildReport("; ".join(errors) or "the builder gives no reason"))
    report = replace(_report([text for _, text in messages.lines]), takes_timings=taken)
    return Built(
        bytes(memoryview(engine)), report, b"" if library.cross_compiles else timings_of(config)
    )


def config_from_request(library: Library, builder: Any, network: Any, request: BuildRequest) -> Any:
    """The profiles, all layers on one stream, no TF32; Polygraphy knows how each library says so."""
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
        **limit_options(trt, request.workspace_bytes),
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
        config.set_flag(
            trt.BuilderFlag.REQUIRE_USER_ALLOCATION
        )  # without it a run may allocate, and not be recorded
    return config


def _report(messages: Sequence[str]) -> BuildReport:
    """Read what the builder logged: without a GPU nothing else tells what is in an engine."""
    listed = [text for text in messages if text.startswith("Layers:")]
    scratch = logged_bytes(messages)
    if not listed:
        return BuildReport(activation_bytes=scratch)
    runs = [
        [kind for kind in kinds if kind not in _NO_LAUNCH] for kinds in _layer_kinds(listed[-1])
    ]
    longest = max(runs, key=len, default=[])
    plugin_layers = sum(kind in _PLUGIN_LAYERS for kind in longest)
    return BuildReport(kernels=len(longest), plugin_layers=plugin_layers, activation_bytes=scratch)


def _layer_kinds(listed: str) -> list[list[str]]:
    """Kinds of the layers of each profile.

    All profiles are in one list. The tensors of the second and later ones are marked with their profile; layers that a
    compiler made together have its number in their names, and one of them has such a tensor. What has no mark counts for
    the first, so that it is rather taken to have too many kernels than too few.
    """
    found = [
        (m[1], _COMPILED.search(m[0]), _PROFILE.search(line))
        for line in listed.splitlines()
        if (m := _LAYER.match(line))
    ]
    profile_of = {compiled[1]: mark[1] for _, compiled, mark in found if compiled and mark}
    kinds: dict[str, list[str]] = {}
    for kind, compiled, mark in found:
        profile = mark[1] if mark else profile_of.get(compiled[1], "0") if compiled else "0"
        kinds.setdefault(profile, []).append(kind)
    return list(kinds.values())


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "no reason is given")
