"""Videos without end: the best tokens of a stream in bounded memory, and a question at any time."""

from vidsieve.streaming.evictors import BASELINES as BASELINES
from vidsieve.streaming.stream import Stream as Stream
