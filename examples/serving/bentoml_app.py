"""BentoML: each worker has a service, which makes the batches.

GOC_ENGINE=engine bentoml serve bentoml_app:Pictures --working-dir examples/serving

BentoML's own batching (``batchable=True``) stays off: there, one wrong request fails its batch.
"""

import os

import bentoml
from bentoml.exceptions import InvalidArgument, ServiceUnavailable
from PIL.Image import Image

from goc_deploy.errors import GocError, UsageError
from goc_deploy.serving import ImageRequest, Service


@bentoml.service(traffic={"timeout": 60}, workers=1)
class Pictures:
    def __init__(self) -> None:
        self.service = Service({"model": os.environ["GOC_ENGINE"]})
        self.service.start()

    @bentoml.on_shutdown
    def drain(self) -> None:
        self.service.drain(30)
        self.service.close()

    @bentoml.api
    async def draw(self, label: int, seed: int = 0) -> Image:
        request = ImageRequest("model", labels=[label], seed=seed, deadline=60)
        try:
            result = await self.service.agenerate(request)
        except UsageError as error:
            raise InvalidArgument(str(error)) from error
        except GocError as error:
            raise ServiceUnavailable(str(error)) from error
        return result.pil()[0]
