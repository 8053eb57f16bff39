"""Print the requirements of this package and of its extras given as arguments, without their upper bounds."""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
extras = project["optional-dependencies"]


def requirements(wanted):
    """Return the requirements of extras, those that an extra takes from another included."""
    for line in wanted:
        own = re.fullmatch(r"vidsieve\[(.+)\]", line)
        yield from requirements(line for extra in own[1].split(",") for line in extras[extra]) if own else [line]


lines = [*project["dependencies"], *requirements(line for extra in sys.argv[1:] for line in extras[extra])]
print("\n".join(re.sub(r",<[\d.]+", "", line) for line in dict.fromkeys(lines)))
