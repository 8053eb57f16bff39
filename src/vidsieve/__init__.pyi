"""The public names of vidsieve; `__init__.py` reads them from here."""

from vidsieve._version import __version__ as __version__
from vidsieve.adapters import Adapter as Adapter
from vidsieve.adapters import Session as Session
from vidsieve.adapters import Template as Template
from vidsieve.adapters import attach as attach
from vidsieve.adapters import prune as prune
from vidsieve.compressors.base import Compressor as Compressor
from vidsieve.compressors.base import ScoreCompressor as ScoreCompressor
from vidsieve.compressors.calibrated import calibrated as calibrated
from vidsieve.compressors.composed import Pipeline as Pipeline
from vidsieve.compressors.reuse import Reuse as Reuse
from vidsieve.errors import VidsieveError as VidsieveError
from vidsieve.loading import load as load
from vidsieve.registry import compressors as compressors
from vidsieve.registry import families as families
from vidsieve.retention import Calibration as Calibration
from vidsieve.streaming import Stream as Stream
from vidsieve.types import Need as Need
from vidsieve.types import Prompt as Prompt
from vidsieve.types import Selection as Selection
from vidsieve.types import Stage as Stage
from vidsieve.types import TokenGrid as TokenGrid
from vidsieve.types import Tokens as Tokens
from vidsieve.types import VideoTokens as VideoTokens
from vidsieve.video.reading import read_parts as read_parts
from vidsieve.video.reading import read_video as read_video
