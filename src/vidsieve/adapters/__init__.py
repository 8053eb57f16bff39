"""Where models are known: one file per family, and the mechanism that prunes their inputs."""

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import Encoded, Template, VideoFeatures, VideoSpan
from vidsieve.adapters.plan import Plan
from vidsieve.adapters.pruning import adapter_for, prune
from vidsieve.adapters.session import Session, attach

__all__ = [
    "Adapter",
    "Encoded",
    "Plan",
    "Session",
    "Template",
    "VideoFeatures",
    "VideoSpan",
    "adapter_for",
    "attach",
    "prune",
]
