"""Where models are known: one file per family, and the mechanism that prunes their inputs."""

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import Encoded, VideoFeatures, VideoSpan
from vidsieve.adapters.plan import Plan
from vidsieve.adapters.pruning import adapter_for, adapter_with, prune
from vidsieve.adapters.session import Session, attach
from vidsieve.adapters.template import Template

__all__ = [
    "Adapter",
    "Encoded",
    "Plan",
    "Session",
    "Template",
    "VideoFeatures",
    "VideoSpan",
    "adapter_for",
    "adapter_with",
    "attach",
    "prune",
]
