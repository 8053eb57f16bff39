"""Random files: rows, policies and videos that others may send. Each gives data or a VidsieveError, soon and in bounds.

`make fuzz` runs each target for 20 s from a new seed. A failure prints its seed; this runs one case again:

    python tests/hardening/test_fuzz.py TARGET SEED
"""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

SECONDS = float(os.environ.get("VIDSIEVE_FUZZ_SECONDS", "1"))
SEED = int(os.environ.get("VIDSIEVE_FUZZ_SEED", "0"))
DEADLINE, MEMORY = 60, 2**30
"""Seconds that a case may take, and bytes above those of the first one."""

TEXTS = [
    "",
    " ",
    "a",
    "\0",
    "\ud800",
    "A. a dog",
    "<answer>B</answer>",
    "../../etc/passwd",
    "x" * 5000,
    "a/" * 5000,
    "é",
]
NUMBERS = [0, 1, -1, 64.5, True, 2**31, 2**63, 10**12, 10**400, 1e308, float("nan"), float("inf"), -0.0]
OTHERS = [None, [], {}, [[]], [{}], [None] * 300, {"a": {"b": []}}]
VIDEO_R1 = {"problem_id": 1, "problem": "What? Options:\nA. a\nB. b", "data_type": "video", "path": "./a.mp4"}
ROWS = [
    {"video": "a.mp4", "question": "What is it?", "options": ["A. a", "B. b"], "answer": "B", "kind": "x"},
    {"video": "a.mp4", "caption": "A dog.", "prompt": "Describe."},
    {"frames": [["a.png", 3], ["b.png", 2]], "caption": "A dog, a cat."},
    VIDEO_R1 | {"problem_type": "multiple choice", "options": ["A. a", "B. b"], "solution": "A"},
    VIDEO_R1 | {"problem_type": "numerical", "options": None, "solution": "<answer>1,200</answer>"},
    {
        "id": 1,
        "video": "a",
        "conversations": [{"from": "human", "value": "<image>\nA?"}, {"from": "gpt", "value": "b"}],
    },
    {"videoID": "a", "timestamp": "0", "caption": "A dog.", "url": "x"},
]


def places(value, path=()):
    """Yield the path of every part of a value."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def edited(value, chance):
    """Return a value of JSON with some parts replaced, removed, renamed or nested."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice([0, 1, 1, 1, 2, 5])):
        path = chance.choice(list(places(value)))
        if not path:
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        kind = chance.randrange(6)
        if kind == 0:
            del holder[path[-1]]
        elif kind == 1 and isinstance(holder, dict):
            holder[chance.choice(TEXTS)] = holder[path[-1]]
        elif kind == 2:
            for _ in range(chance.choice([1, 70, 300])):
                holder[path[-1]] = [holder[path[-1]]]
        else:
            holder[path[-1]] = copy.deepcopy(chance.choice([*TEXTS, *NUMBERS, *OTHERS]))
    return value


def damaged(data, chance, most=None):
    """Return bytes, most of the time with some of the first `most` changed, moved or left out."""
    data = bytearray(data)
    for _ in range(chance.choice([0, 1, 1, 2, 8, 40])):
        end = min(len(data), most or len(data))
        if end < 2:
            break
        at, length = chance.randrange(end), chance.choice([1, 1, 2, 4, 8, 64])
        kind = chance.randrange(6)
        if kind == 0:
            del data[at : at + length]
        elif kind == 1:
            data[at:at] = chance.randbytes(length)
        elif kind == 2:
            data[at : at + length] = bytes([chance.choice([0, 1, 127, 128, 255])]) * length
        elif kind == 3:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 4:
            other = chance.randrange(end)
            data[at : at + length] = data[other : other + length]
        elif chance.random() < 0.2:
            del data[at:]
    return bytes(data)


def fuzz_rows(folder, chance):
    from vidsieve.evaluation.benchmarks.questions import read
    from vidsieve.io.limits import limits
    from vidsieve.serving.batch_groups import Rows
    from vidsieve.training.data.table import load_rows

    limits.row = chance.choice([300, 4000, 2**24])
    base = chance.choice(ROWS)
    rows = [edited(base, chance) if chance.random() < 0.7 else base for _ in range(chance.choice([1, 3, 20]))]
    kind = chance.choice(["jsonl", "json", "csv", "parquet"])
    path = folder / f"rows.{kind}"
    if kind == "csv":
        names = [*dict.fromkeys(str(name) for row in rows if isinstance(row, dict) for name in row)]
        table = [names, *([str(row.get(name, "")) for name in names] for row in rows if isinstance(row, dict))]
        data = "\n".join(",".join(f'"{cell}"' for cell in line) for line in table).encode("utf-8", "surrogatepass")
    elif kind == "parquet":
        import pyarrow
        from pyarrow.parquet import write_table

        try:
            write_table(pyarrow.Table.from_pylist(rows), path, compression=chance.choice(["zstd", "snappy", "none"]))
        except (pyarrow.ArrowException, ValueError, TypeError, AttributeError, OverflowError):
            write_table(pyarrow.Table.from_pylist([ROWS[1]] * 5), path)
        data = path.read_bytes()
    else:
        texts = [json.dumps(row) for row in rows]
        data = (f"[{', '.join(texts)}]" if kind == "json" else "\n".join(texts)).encode()
    path.write_bytes(damaged(data, chance))

    def grouped(path):
        rows = Rows(path, path.parent, 2)
        return [rows.group(number) for number in range(rows.groups)]

    return [read, grouped, lambda path: [*load_rows(path, empty=True, present=False)]], path


def fuzz_policies(folder, chance):
    from vidsieve import load
    from vidsieve.compressors._decoder import BlockShape
    from vidsieve.compressors.cacovid import CaCoVIDPolicy
    from vidsieve.compressors.score import ScorePolicy
    from vidsieve.testing import make_video
    from vidsieve.types import TokenGrid

    shape, variant = BlockShape(32, 2, 1, 16, 48), chance.choice(["ours", "paper", "official", ""])
    made = (
        CaCoVIDPolicy.of_shape(shape, "none", variant=variant) if variant else ScorePolicy.start(32, "none", hidden=16)
    )
    made.save_pretrained(folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    if chance.random() < 0.7:
        config.write_text(json.dumps(edited(json.loads(config.read_text()), chance)))
    if chance.random() < 0.2:
        config.write_bytes(damaged(config.read_bytes(), chance))
    if chance.random() < 0.5:
        data = weights.read_bytes()
        size = 8 + int.from_bytes(data[:8], "little")
        if chance.random() < 0.5:
            header = json.dumps(edited(json.loads(data[8:size]), chance)).encode()
            weights.write_bytes(len(header).to_bytes(8, "little") + header + data[size:])
        else:
            weights.write_bytes(damaged(data, chance, chance.choice([8, size, None])))
    return [lambda folder: load(folder, retention=0.5).compress(make_video(TokenGrid(2, 3, 3)))], folder


CONTAINERS = {
    "mp4": "mpeg4",
    "mkv": "mpeg4",
    "avi": "mjpeg",
    "gif": "gif",
    "webm": "libvpx",
    "mov": "mjpeg",
}


def fuzz_videos(folder, chance):
    import av
    import numpy as np

    from vidsieve.video.reading import read_video

    kind = chance.choice(list(CONTAINERS))
    path, base = folder / f"video.{kind}", Path(tempfile.gettempdir(), f"vidsieve-fuzz-{os.getpid()}.{kind}")
    if not base.exists():
        with av.open(str(base), "w", format={"mkv": "matroska"}.get(kind, kind)) as container:
            stream = container.add_stream(CONTAINERS[kind], rate=8)
            stream.width, stream.height = 64, 48
            stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(CONTAINERS[kind], "yuv420p")
            for number in range(8):
                pixels = np.full((48, 64, 3), number * 30, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    data = base.read_bytes()
    path.write_bytes(damaged(data, chance, chance.choice([64, 1024, None])))
    return [lambda path: read_video(path, frames=4)], path


TARGETS = {"rows": fuzz_rows, "policies": fuzz_policies, "videos": fuzz_videos}


def case(target, seed):
    """Make the file of a seed and read it in every way."""
    import torch

    from vidsieve.errors import VidsieveError

    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        readers, path = TARGETS[target](Path(folder), random.Random(f"{target} {seed}"))
        for read in readers:
            try:
                read(path)
            except VidsieveError as error:
                assert len(str(error)) < 3000, f"an error of {len(str(error))} characters: {error!s:.300}"


def main(target, seed, seconds=0.0):
    """Run the cases from a seed on for some seconds, at least one."""
    end = used = 0.0
    while not end or time.monotonic() < end:
        print(f"python tests/hardening/test_fuzz.py {target} {seed}", flush=True)
        faulthandler.dump_traceback_later(DEADLINE, exit=True)
        case(target, seed)
        faulthandler.cancel_dump_traceback_later()
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        end, used = end or time.monotonic() + seconds, used or peak  # the first one imports
        assert peak < used + MEMORY, f"{(peak - used) / 2**20:.0f} MiB more than the first case"
        seed += 1


@pytest.mark.parametrize("target", TARGETS)
def test_random_files_give_data_or_an_error(target, tmp_path):
    command = [sys.executable, __file__, target, str(SEED), str(SECONDS)]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS + 120)
    last = "\n".join(done.stdout.splitlines()[-1:])
    assert done.returncode == 0, f"{last}\n{done.stderr[-3000:]}"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:]))
