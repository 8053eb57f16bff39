"""Check the wheel and the sdist in a folder: their files, metadata and version."""

import argparse
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

ROOT = Path(__file__).parents[1]


def tracked() -> set[str]:
    """Return the paths of the files that git tracks and the checkout has."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}


def faults(folder: Path, files: set[str], version: str = "") -> list[str]:
    """Return what is wrong with the distributions in a folder, one line each.

    Parameters
    ----------
    files : set of str
        Paths that the sdist must hold; the wheel must hold those below ``src``.
    version : str
        What their version must be; empty: not compared.
    """
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        return [f"{folder} holds {len(wheels)} wheels and {len(sdists)} sdists, must hold one of each"]
    with zipfile.ZipFile(wheels[0]) as wheel:
        in_wheel = set(wheel.namelist())
        info = next(name.partition("/")[0] for name in in_wheel if name.endswith(".dist-info/METADATA"))
        wheel_metadata = Metadata.from_email(wheel.read(f"{info}/METADATA"))
        entries = wheel.read(f"{info}/entry_points.txt").decode()
    with tarfile.open(sdists[0]) as sdist:
        in_sdist = {name.partition("/")[2] for name in sdist.getnames()}
        (packed,) = (name for name in sdist.getnames() if name.count("/") == 1 and name.endswith("/PKG-INFO"))
        sdist_metadata = Metadata.from_email(sdist.extractfile(packed).read())
    package = {name.removeprefix("src/") for name in files if name.startswith("src/")}
    code = {name for name in in_wheel if not name.startswith(f"{info}/")}
    found = [f"the wheel lacks {name}" for name in sorted(package - code)]
    found += [f"the wheel has {name}, which is not tracked" for name in sorted(code - package)]
    found += [f"the sdist lacks {name}" for name in sorted(files - in_sdist)]
    found += [f"the sdist has {name}, which is not tracked" for name in sorted(in_sdist - files - {"PKG-INFO"})]
    if f"{info}/licenses/LICENSE" not in in_wheel:
        found.append("the wheel lacks its licence")
    if "vidsieve = vidsieve.cli:main" not in entries:
        found.append("the wheel has no command vidsieve")
    for kind, metadata in (("wheel", wheel_metadata), ("sdist", sdist_metadata)):
        if version and str(metadata.version) != version:
            found.append(
                f"the {kind} is of version {metadata.version}, must be {version}: see src/vidsieve/_version.py"
            )
        if metadata.description_content_type != "text/markdown" or not metadata.description:
            found.append(f"the {kind} has no description in Markdown")
    return found


def main() -> None:
    """Print what is right or wrong, and exit with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--version", default="", help="what their version must be; default: not compared")
    options = parser.parse_args()
    found = faults(options.folder, tracked(), options.version)
    if found:
        sys.exit("\n".join(found))
    print(
        f"{options.folder}: {', '.join(sorted(path.name for path in options.folder.iterdir()))} are as they should be"
    )


if __name__ == "__main__":
    main()
