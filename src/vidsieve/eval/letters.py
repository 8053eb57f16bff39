"""Which option a generated answer means: `vidsieve.options` has the rule."""

from vidsieve.options import chosen as chosen
