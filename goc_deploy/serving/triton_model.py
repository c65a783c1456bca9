"""The model that Triton's Python backend runs: a `Service` for one engine directory.

``model.py`` of a model repository imports `TritonPythonModel`
(`goc_deploy.serving.triton_repository` writes it). Each instance of a model is a process.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from goc_deploy.cancellation import CancelToken
from goc_deploy.errors import CancelledError, GocError, UsageError
from goc_deploy.runtime.results import Result
from goc_deploy.serving.requests import HostedModel, ImageRequest, ServiceLimits
from goc_deploy.serving.service import Service
from goc_deploy.serving.triton_metrics import TritonMetrics
from goc_deploy.serving.triton_requests import error_response, image_request, response

logger = logging.getLogger(__name__)

CANCEL_SECONDS = 0.02  # between two looks whether requests were cancelled


class TritonPythonModel:
    """Draws the requests that Triton's dynamic batcher hands over together."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine directory and warm it up.

        Args:
            args: of the Python backend: configuration, name, version, folder and instance.

        Raises:
            GocError: the configuration is wrong, or the engine directory cannot be loaded.
        """
        pb_utils = import_module("triton_python_backend_utils")  # exists inside of Triton only
        self._utils, self._name = pb_utils, args["model_name"]
        config = json.loads(args["model_config"])
        most = int(config["max_batch_size"])
        if most < 1:
            raise UsageError("max_batch_size must be at least 1: the first dimension is the image")
        self._service = Service(
            {self._name: _hosted(config["parameters"], args)},
            limits=ServiceLimits(
                queued_images=2**31,  # Triton has the queue; here is what it handed over.
                images_per_request=most,
                batch_images=most,
                max_delay_seconds=0,
            ),
            metrics=TritonMetrics(pb_utils, args.get("model_instance_name", self._name)),
        )
        self._service.start()

    def is_ready(self) -> bool:
        """Whether requests are accepted."""
        return self._service.ready()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Draw requests together; the response of one that fails is its error."""
        calls = [self._call(request) for request in requests]
        fitting = [call for call in calls if call.wanted is not None]
        futures = self._service.submit_many(call.wanted for call in fitting if call.wanted)
        for call, future in zip(fitting, futures, strict=True):
            call.future = future
        while running := [call for call in calls if not call.future.done()]:
            wait([call.future for call in running], CANCEL_SECONDS)
            for call in running:
                if call.request.is_cancelled():
                    call.token.cancel()
        return [self._response(call) for call in calls]

    def finalize(self) -> None:
        """Free everything."""
        self._service.close()

    def _call(self, request: Any) -> _Call:
        call, name = _Call(request), self._name
        try:
            if request.is_cancelled():
                raise CancelledError("the request was cancelled before it ran")
            model = self._service.models[name]
            call.wanted = image_request(request, self._utils, name, model, call.token)
        except Exception as error:
            call.future.set_exception(error)
        return call

    def _response(self, call: _Call) -> Any:
        try:
            result = call.future.result()
            assert call.wanted is not None
            return response(call.request, self._utils, call.wanted, result)
        except Exception as error:
            if not isinstance(error, GocError):
                logger.exception("a request failed")
            return error_response(self._utils, error)


@dataclass(slots=True)
class _Call:
    """A request of Triton, what it is for the service, and its result.

    ``wanted`` is None, and ``future`` has the error, if the request does not fit.
    """

    request: Any
    wanted: ImageRequest | None = None
    token: CancelToken = field(default_factory=CancelToken)
    future: Future[Result] = field(default_factory=Future)


def _hosted(parameters: Mapping[str, Mapping[str, str]], args: Mapping[str, str]) -> HostedModel:
    """The engine directory of a model, on the device of its instance.

    Raises:
        UsageError: a parameter is missing or wrong.
    """
    values = {key: value["string_value"] for key, value in parameters.items()}
    try:
        folder, plans = Path(args["model_repository"]), tuple(json.loads(values["plans"]))
        engine_dir, backend = folder / values["engine_dir"], values["backend"]
        threads = int(values["threads"])
    except (KeyError, ValueError) as cause:
        raise UsageError(
            f"the parameters of {args['model_name']} in config.pbtxt are not those that goc-serve "
            f"writes: {type(cause).__name__} {cause}"
        ) from cause
    gpu = f"cuda:{args['model_instance_device_id']}"
    device = {"CPU": "cpu", "GPU": gpu}.get(args["model_instance_kind"], "auto")
    return HostedModel(engine_dir, plans, backend=backend, device=device, threads=threads)
