"""The families that can be exported, by name. A checkpoint is of the first that matches it."""

from __future__ import annotations

from goc_deploy.exporters.architectures.dit import DIT
from goc_deploy.exporters.architectures.flux import FLUX
from goc_deploy.exporters.architectures.flux2 import FLUX2
from goc_deploy.exporters.architectures.pixart import PIXART
from goc_deploy.exporters.architectures.pixart_sigma import PIXART_SIGMA
from goc_deploy.exporters.architectures.qwen import QWEN_IMAGE
from goc_deploy.exporters.architectures.qwen_edit import QWEN_IMAGE_EDIT
from goc_deploy.exporters.architectures.sd3 import SD3
from goc_deploy.exporters.architectures.sit import SIT
from goc_deploy.exporters.architectures.wan import WAN
from goc_deploy.exporters.architectures.z_image import Z_IMAGE

ARCHITECTURES = {
    family.name: family
    for family in (
        DIT,
        PIXART,
        PIXART_SIGMA,
        SD3,
        SIT,
        WAN,
        FLUX,
        FLUX2,
        QWEN_IMAGE,
        QWEN_IMAGE_EDIT,
        Z_IMAGE,
    )
}
