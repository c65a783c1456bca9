"""LitServe: each worker has a service, which makes the batches.

GOC_ENGINE=engine python examples/serving/litserve_app.py

LitServe's own batching stays off: there, one wrong request fails its whole batch.
"""

import base64
import io
import os

import litserve
from fastapi import HTTPException

from goc_deploy.errors import GocError, UsageError
from goc_deploy.runtime.results import Result
from goc_deploy.serving import HostedModel, ImageRequest, Service


class Pictures(litserve.LitAPI):
    def setup(self, device: str) -> None:
        hosted = HostedModel(os.environ["GOC_ENGINE"], device=device)
        self.service = Service({"model": hosted})
        self.service.start()

    async def decode_request(self, request: dict) -> ImageRequest:  # LitServe reads `dict`
        labels, seed = [request["label"]], request.get("seed", 0)
        return ImageRequest("model", labels=labels, seed=seed, deadline=60)

    async def predict(self, x: ImageRequest) -> Result:
        try:
            return await self.service.agenerate(x)
        except GocError as error:
            status = 400 if isinstance(error, UsageError) else 503
            raise HTTPException(status, str(error)) from error

    async def encode_response(self, output: Result) -> dict[str, str]:
        file = io.BytesIO()
        output.pil()[0].save(file, "PNG")
        return {"png": base64.b64encode(file.getvalue()).decode()}


if __name__ == "__main__":
    server = litserve.LitServer(Pictures(enable_async=True), timeout=60)
    server.run(port=int(os.environ.get("PORT", "8000")), generate_client_file=False)
