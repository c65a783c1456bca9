"""Serving: many requests at a time on engine directories that are loaded once.

>>> from goc_deploy.serving import ImageRequest, Service
>>> with Service({"digits": "engine_dir"}) as service:                   # doctest: +SKIP
...     images = service.generate(ImageRequest("digits", labels=[2, 0, 7])).images
"""

from goc_deploy.serving.health import Health
from goc_deploy.serving.metrics import Metrics
from goc_deploy.serving.requests import HostedModel, ImageRequest, ServiceLimits
from goc_deploy.serving.service import Service

__all__ = ["Health", "HostedModel", "ImageRequest", "Metrics", "Service", "ServiceLimits"]
