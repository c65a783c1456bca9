"""The build of a job's engine in a build process, with the plugin if it can be used."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace

from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engines.tensorrt.build import BuildReport, BuildRequest
from goc_deploy.engines.tensorrt.jobs import Job, graph_of_job
from goc_deploy.engines.tensorrt.library import is_out_of_memory
from goc_deploy.engines.tensorrt.process import BuildProcess, BuildProcessError, build_process
from goc_deploy.engines.tensorrt.timing_cache import TimingCache
from goc_deploy.errors import EnvironmentUnsupportedError, ResourceError

logger = logging.getLogger(__name__)


class Builder:
    """Builds engines in processes: one process with the plugin, one without.

    Args:
        backend: the backend to build for.
        stack: ends the processes.
        timings: timings that every build reads and extends, or None if the library has none.
        gpu: number of the GPU to build on.
    """

    def __init__(
        self, backend: str, stack: ExitStack, timings: TimingCache | None = None, gpu: int = 0
    ) -> None:
        self._backend, self._stack, self._timings, self._gpu = backend, stack, timings, gpu
        self._processes: dict[bool, BuildProcess] = {}

    def build(self, directory: EngineDir, job: Job) -> tuple[Job, bytes, BuildReport]:
        """Build a job; if the plugin cannot be used, build from the function bodies.

        Returns:
            The job that was built, the engine, and the report.

        Raises:
            EnvironmentUnsupportedError: naming the unit, the op and the reason.
            ConflictError, ResourceError: the timings cannot be written, or there is not enough
                memory.
        """
        try:
            return (job, *self._build(graph_of_job(directory, job), job))
        except EnvironmentUnsupportedError as cause:
            if job.recipe.plugin_sha256 is None:
                raise
            logger.warning(
                "%s; it is built from the function bodies instead, which takes more launches", cause
            )
        job = replace(job, recipe=replace(job.recipe, plugin_sha256=None))
        return (job, *self._build(graph_of_job(directory, job), job))

    def _build(self, graph: bytes, job: Job) -> tuple[bytes, BuildReport]:
        target, uses_plugin = job.recipe.target, job.recipe.plugin_sha256 is not None
        if uses_plugin not in self._processes:
            process = build_process(self._backend, plugin=uses_plugin, gpu=self._gpu)
            self._processes[uses_plugin] = self._stack.enter_context(process)
        gpus = ", ".join(target.capabilities)
        where = f"unit {job.name}: {target.backend} {target.version} for {gpus}"
        where += " with the plugin" if uses_plugin else ""
        try:
            request = BuildRequest(
                job.profiles, target.capabilities, job.recipe.scratch_limit_bytes
            )
            built = self._processes[uses_plugin].build(
                graph, request, self._timings.content if self._timings else b""
            )
        except BuildProcessError as death:
            del self._processes[uses_plugin]
            raise EnvironmentUnsupportedError(f"{where} cannot be built: {death}") from death
        report = built.report
        if is_out_of_memory(report.refusal):
            raise ResourceError(
                f"{where} cannot be built: there is not enough GPU memory ({report.refusal}); set "
                "`EngineOptions.scratch_limit_bytes`, export with "
                "a smaller `max_batch`, or end what else uses the GPU"
            )
        if report.refusal:
            raise EnvironmentUnsupportedError(f"{where} cannot be built: {report.refusal}")
        if self._timings:
            if not report.takes_timings:
                self._timings.refused()
            self._timings.keep(built.timings)
        return built.engine, report
