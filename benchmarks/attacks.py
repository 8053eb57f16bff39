"""Files, rows, policies and run folders of strangers, each given to the command that reads it, with a verdict.

Every attack is a process of its own: `ok` if it ended as expected (an answer, or an error in one line that says what is
wrong), in time, without a traceback, at most 1 GiB above the same command on sound files, and without touching the
canary: a file outside the folders that the attack may read, and a port that nobody may connect to. Attacks on the
servers, `ui` and the client of `data annotate`, are tests (tests/hardening).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from vidsieve.io.machine import machine, write_result
from vidsieve.loading import shipped_policy
from vidsieve.testbed.files import write_scenes
from vidsieve.video.reading import write_video

SECONDS, GIB = 90, 2**30
LAUNCH = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
open(sys.argv[1], "w").write(str(1024 * usage.ru_maxrss))
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A process counts the memory that its parent had when it began, so the parent is a small one."""
CLI = [sys.executable, "-W", "ignore", "-m", "vidsieve"]


@dataclass(frozen=True)
class Attack:
    """A command on what `make` writes into a folder, and how it must end.

    `code` is the exit status and `says` what its output must match, None where any error of one line will do.
    """

    name: str
    make: Callable[[Path], list[str]]
    code: tuple[int, ...] = (2,)
    says: str | None = None


class Yard:
    """Sound files that attacks start from, and the canaries."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        pixels = np.random.default_rng(0).integers(0, 255, (8, 48, 64, 3), np.uint8)
        write_video(folder / "sound.mp4", pixels, 4.0)
        write_scenes(folder / "set", world="dense", seed=7, scenes=2)
        self.secret = folder / "secret.mp4"
        shutil.copy(folder / "sound.mp4", self.secret)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port, self.touched = self.server.getsockname()[1], False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            connection, _ = self.server.accept()
            self.touched = True
            connection.close()

    def row(self, **changed: Any) -> dict[str, Any]:
        """Return a sound row with changes."""
        return {"video": "sound.mp4", "question": "What?", "options": ["a", "b"], "answer": "a"} | changed

    def rows(self, at: Path, *rows: dict[str, Any] | bytes, name: str = "rows.jsonl") -> list[str]:
        """Write rows, with the sound video beside them, and return the command that checks them."""
        shutil.copy(self.folder / "sound.mp4", at / "sound.mp4")
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (at / name).write_bytes(b"\n".join(lines) + b"\n")
        return ["data", "check", str(at / name), "--video-root", str(at)]

    def policy(self, at: Path, name: str = "score", edit: Callable[[dict[str, Any]], None] | None = None) -> list[str]:
        """Copy a shipped policy, edit its configuration, and return the command that loads it."""
        shutil.copytree(shipped_policy(name), at / "policy")
        if edit is not None:
            path = at / "policy" / "config.json"
            config = json.loads(path.read_text())
            config.pop("checksum", None)
            edit(config)
            path.write_text(json.dumps(config))
        return self.asked(at)

    def asked(self, at: Path) -> list[str]:
        """Return the command that answers with the policy in a folder."""
        return ["ask", str(self.folder / "set" / "scene-0000.mp4"), "What?", "--method", str(at / "policy")]


def reading(path: Path, **options: Any) -> list[str]:
    """Return the command that reads a video."""
    return ["python", f"from vidsieve.video.reading import read_video; print(read_video({str(path)!r}, frames=2))"]


def written(at: Path, name: str, data: bytes | str) -> list[str]:
    """Write a file and return the command that reads it as a video."""
    path = at / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return reading(path)


def fifo(at: Path, name: str) -> Path:
    (at / name).unlink(missing_ok=True)
    os.mkfifo(at / name)
    return at / name


def linked(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def sized(path: Path, size: int) -> Path:
    """Make a file longer by zeros that take no space."""
    path.touch()
    os.truncate(path, size)
    return path


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body


def huge_mp4(yard: Yard) -> bytes:
    """Return the sound clip with a header that claims 60,000 × 60,000 pixels."""
    data = bytearray((yard.folder / "sound.mp4").read_bytes())
    place = data.find(b"avc1", data.find(b"stsd"))
    data[place + 28 : place + 32] = struct.pack(">HH", 60000, 60000)
    return bytes(data)


def png(width: int, height: int) -> bytes:
    """Return a PNG of one colour; its size on disk is a thousandth of that in memory."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer, rows = zlib.compressobj(9), b""
    for _ in range(height):
        rows += packer.compress(b"\0" * (1 + 3 * width))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows + packer.flush()) + chunk(b"IEND", b"")


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def videos(yard: Yard) -> Iterator[Attack]:
    """Yield attacks by videos."""
    secret, url = yard.secret, f"http://127.0.0.1:{yard.port}/v.mp4"
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
    sdp = f"v=0\nm=video {yard.port} RTP/AVP 96\nc=IN IP4 127.0.0.1\na=rtpmap:96 H264/90000\n"
    mpd = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
        f'<Representation id="1" bandwidth="1"><BaseURL>{url}</BaseURL></Representation>'
        "</AdaptationSet></Period></MPD>"
    )
    key = f'#EXT-X-KEY:METHOD=AES-128,URI="{secret}"\n#EXTINF'
    entity = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
    texts = {
        "HLS playlist of a file, named mp4": ("v.mp4", hls.format(secret)),
        "HLS playlist of a URL": ("v.m3u8", hls.format(url)),
        "HLS playlist with a data URL": ("v.m3u8", hls.format("data:video/mp4;base64,AAAA")),
        "HLS playlist with a key file": ("v.m3u8", hls.replace("#EXTINF", key).format("a.ts")),
        "master playlist": ("v.mp4", f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{url}\n"),
        "ffconcat script": ("v.mp4", f"ffconcat version 1.0\nfile '{secret}'\n"),
        "ffconcat script of a URL": ("v.txt", f"ffconcat version 1.0\nfile '{url}'\n"),
        "DASH manifest": ("v.mpd", mpd),
        "SDP": ("v.sdp", sdp),
        "SMIL or XML": ("v.mp4", f'<?xml version="1.0"?>{entity}<a>&x;</a>'),
        "subtitles as a video": ("v.srt", "1\n00:00:00,000 --> 00:00:02,000\nhello\n"),
        "filter graph as a file": ("v.lavfi", "testsrc=size=4096x4096"),
    }
    for name, (file, text) in texts.items():
        yield Attack(name, lambda at, file=file, text=text: written(at, file, text))  # type: ignore[misc]
    for name in (
        url,
        f"file:{secret}",
        f"concat:{secret}|{secret}",
        "pipe:0",
        "data:video/mp4;base64,AAAA",
        f"subfile,,start,0,end,999,,:{secret}",
        f"tcp://127.0.0.1:{yard.port}",
        "lavfi:testsrc",
        f"cache:{url}",
        f"crypto:{secret}",
        f"async:{secret}",
        f"{yard.folder}/frame%03d.png",
        f"{yard.folder}/*.mp4",
    ):
        shown = name.replace(str(yard.folder), "").replace(str(yard.port), "PORT")
        yield Attack(f"path {shown}", lambda at, name=name: reading(Path(name)))  # type: ignore[misc]
    yield Attack("FIFO", lambda at: reading(fifo(at, "v.mp4")))
    yield Attack("link to a FIFO", lambda at: reading(linked(at / "l.mp4", fifo(at, "v"))))
    for device in ("/dev/zero", "/dev/random", "/dev/tty", "/dev/stdin", "/proc/self/mem", "/proc/kcore"):
        yield Attack(f"device {device}", lambda at, device=device: reading(Path(device)))  # type: ignore[misc]
    yield Attack("folder", lambda at: reading(at))
    yield Attack("empty file", lambda at: written(at, "v.mp4", b""))
    yield Attack("60,000 × 60,000 pixels in the header", lambda at: written(at, "v.mp4", huge_mp4(yard)), (0, 2))
    yield Attack(
        "a box of 2^63 bytes",
        lambda at: written(at, "v.mp4", box(b"ftyp", b"isom0000") + struct.pack(">I4sQ", 1, b"moov", 2**63)),
    )
    deep = box(b"ftyp", b"isom0000")
    for _ in range(2000):
        deep = box(b"moov", deep)
    yield Attack("2,000 boxes inside each other", lambda at: written(at, "v.mp4", deep))
    yield Attack("sparse file of 1 TB", lambda at: reading(sized(at / "v.mp4", 2**40)))
    yield Attack("gzip named mp4", lambda at: written(at, "v.mp4", gzip.compress(b"\0" * 2**20)))
    y4m = b"YUV4MPEG2 W60000 H60000 F25:1 C420\nFRAME\n"
    yield Attack("raw video of 60,000 × 60,000", lambda at: written(at, "v.y4m", y4m + b"\0" * 9999))
    yield Attack("image of 40,000 × 40,000", lambda at: written(at, "v.png", png(40000, 40000)))
    yield Attack(
        "image of 40,000 × 40,000 in a row",
        lambda at: ((at / "i.png").write_bytes(png(40000, 40000)), yard.rows(at, yard.row(video=None, image="i.png")))[
            1
        ],
        (0, 1, 2),
    )
    yield Attack("a thousand frames of gif, 9,999 × 9,999", lambda at: gif(at), (0, 2))


def gif(at: Path) -> list[str]:
    frames = [Image.new("P", (9999, 9999), n % 2) for n in range(3)]
    frames[0].save(at / "v.gif", save_all=True, append_images=frames[1:])
    return reading(at / "v.gif")


def rows(yard: Yard) -> Iterator[Attack]:
    """Yield attacks by files of rows; a bad row is counted, and the sound one beside it is read."""
    sound = yard.row()
    bad: dict[str, dict[str, Any] | bytes] = {
        "half a surrogate pair": yard.row(question="\ud800"),
        "NUL in a path": yard.row(video="a\0b.mp4"),
        "NUL in a question": yard.row(question="a\0b"),
        "100,000 lists inside each other": b'{"video": "sound.mp4", "question": ' + nested(100_000) + b"}",
        "a number of 10,000 digits": b'{"video": "sound.mp4", "question": "q", "answer": ' + b"9" * 10_000 + b"}",
        "Infinity": b'{"video": "sound.mp4", "question": "q", "answer": Infinity}',
        "not UTF-8": b'{"video": "sound.mp4", "question": "\xff\xfe", "answer": "a"}',
        "UTF-16": '{"video": "sound.mp4"}'.encode("utf-16"),
        "row of 40 MB": yard.row(question="x" * 40_000_000),
        "a list": b"[1, 2, 3]",
        "a string": b'"video"',
        "numbers as texts": yard.row(question=5, options={"a": 1}),
        "100,000 options": yard.row(options=[str(n) for n in range(100_000)]),
        "video outside by dots": yard.row(video="../secret.mp4"),
        "absolute video": yard.row(video=str(yard.secret)),
        "video that is a URL": yard.row(video=f"http://127.0.0.1:{yard.port}/v.mp4"),
        "video that is a device": yard.row(video="/dev/zero"),
        "path of 100,000 characters": yard.row(video="a/" * 50_000),
        "escape codes in a path": yard.row(video="\x1b[2J\x1b]0;owned\x07.mp4"),
        "a playlist as video": yard.row(video="list.mp4"),
    }
    for name, row in bad.items():

        def make(at: Path, row: dict[str, Any] | bytes = row) -> list[str]:
            (at / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{yard.secret}'\n")
            return yard.rows(at, sound, row)

        yield Attack(f"row: {name}", make, (0,), "left out: 1 ")
    yield Attack(
        "row: link out of the folder",
        lambda at: (linked(at / "l.mp4", yard.secret), yard.rows(at, sound, yard.row(video="l.mp4")))[1],
        (0, 1, 2),
    )
    yield Attack(
        "row: FIFO as video",
        lambda at: (fifo(at, "f.mp4"), yard.rows(at, sound, yard.row(video="f.mp4")))[1],
        (0, 1, 2),
    )
    yield Attack("rows from a FIFO", lambda at: ["data", "check", str(fifo(at, "rows.jsonl"))])
    yield Attack("rows from /dev/zero", lambda at: ["data", "check", "/dev/zero"])
    yield Attack("a line of 2 GB without end", lambda at: sparse(at, "rows.jsonl"), (0, 1, 2))
    yield Attack("a JSON list of one 2 GB string", lambda at: sparse(at, "rows.json", b'["'), (0, 1, 2))
    yield Attack(
        "a JSON list without end",
        lambda at: yard.rows(at, b"[" + b'{"video": "sound.mp4"},' * 1000, name="rows.json"),
        (0, 1, 2),
    )
    yield Attack(
        "Parquet that is none", lambda at: yard.rows(at, b"PAR1" + b"\xff" * 400 + b"PAR1", name="rows.parquet")
    )
    yield Attack("Parquet bomb", parquet_bomb, (0, 1, 2))
    for command in (["batch"], ["eval", "questions"], ["train", "cacovid"]):
        yield Attack(f"{command[0]}: FIFO as video", lambda at, command=command: used(yard, at, command), (0, 1, 2))  # type: ignore[misc]


def used(yard: Yard, at: Path, command: list[str]) -> list[str]:
    """Return a command that runs the testbed's model on rows, one of which is a FIFO."""
    fifo(at, "f.mp4")
    given = yard.rows(at, *[yard.row()] * 3, yard.row(video="f.mp4"))[2]
    if command == ["batch"]:
        return ["batch", given, str(at / "out.jsonl"), "--model", "testbed", "--frames", "2", "--max-new-tokens", "2"]
    if command[0] == "eval":
        options = ["--model", "testbed", "--methods", "divprune", "--frames", "2", "--allow-missing"]
        return [*command, given, *options, "--out", str(at / "run")]
    options = ["--model", "testbed", "--steps", "1", "--frames", "2"]
    return [*command, str(at / "run"), "--data", given, *options]


def sparse(at: Path, name: str, start: bytes = b"") -> list[str]:
    (at / name).write_bytes(start)
    os.truncate(at / name, 2**31)
    return ["data", "check", str(at / name)]


def parquet_bomb(at: Path) -> list[str]:
    """Write 10 kB of Parquet that is 4 GB of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 40, pa.int32()), pa.array(["x" * 100_000_000]))
    pq.write_table(pa.table({"video": texts, "question": texts}), at / "rows.parquet", compression="zstd")
    return ["data", "check", str(at / "rows.parquet")]


def policies(yard: Yard) -> Iterator[Attack]:
    """Yield attacks by policy folders."""

    def setting(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
        return lambda config: config.__setitem__(name, value)

    def network(value: Any) -> Callable[[dict[str, Any]], None]:
        def edit(config: dict[str, Any]) -> None:
            for name in config["network"]:
                config["network"][name] = value

        return edit

    for name in ("score", "cacovid"):
        for value in (0, -1, True, "64", 64.5, 10**12, 10**400, None, [64], {"a": 1}, float("nan"), float("inf")):
            shown = str(value)[:12]
            yield Attack(
                f"{name}: hidden_size {shown}",
                lambda at, n=name, v=value: yard.policy(at, n, setting("hidden_size", v)),
            )  # type: ignore[misc]
        for value in (0, -1, 10**9, "x", [[]]):
            yield Attack(
                f"{name}: network {str(value)[:12]}", lambda at, n=name, v=value: yard.policy(at, n, network(v))
            )  # type: ignore[misc]
    yield Attack("network is a list", lambda at: yard.policy(at, edit=setting("network", [1])))
    yield Attack("unknown argument", lambda at: yard.policy(at, edit=setting("network", {"evil": 1})))
    yield Attack("type with escape codes", lambda at: yard.policy(at, edit=setting("type", "\x1b[2J")))
    yield Attack("type is a path", lambda at: yard.policy(at, edit=setting("type", "../../os")))

    def config(data: bytes) -> Callable[[Path], list[str]]:
        def make(at: Path) -> list[str]:
            command = yard.policy(at)
            (at / "policy" / "config.json").write_bytes(data)
            return command

        return make

    def weights(data: bytes, size: int | None = None) -> Callable[[Path], list[str]]:
        def make(at: Path) -> list[str]:
            command = yard.policy(at)
            (at / "policy" / "model.safetensors").write_bytes(data)
            if size is not None:
                os.truncate(at / "policy" / "model.safetensors", size)
            return command

        return make

    yield Attack("config: nested 100,000 deep", config(nested(100_000)))
    yield Attack("config: not UTF-8", config(b"\xff\xfe\0"))
    yield Attack("config: a list", config(b"[]"))
    yield Attack("config: empty", config(b""))
    yield Attack("config: 300 MB of blanks", config(b" " * 300_000_000))
    yield Attack("config: a FIFO", lambda at: (yard.policy(at), fifo(at / "policy", "config.json"), yard.asked(at))[2])
    yield Attack("weights: header of 2^63 bytes", weights(struct.pack("<Q", 2**63) + b"{}"))
    yield Attack("weights: 1 TB of nothing", weights(struct.pack("<Q", 2) + b"{}", 2**40))
    yield Attack("weights: empty", weights(b""))
    yield Attack("weights: a pickle", weights(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR."))
    header = (
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}'
    )
    yield Attack("weights: tensors that overlap", weights(struct.pack("<Q", len(header)) + header + b"\0" * 24))
    yield Attack(
        "weights: a FIFO", lambda at: (yard.policy(at), fifo(at / "policy", "model.safetensors"), yard.asked(at))[2]
    )

    def other(at: Path) -> list[str]:
        command = yard.policy(at)
        save_file({"x": torch.full((4,), float("nan"))}, at / "policy" / "model.safetensors")
        return command

    yield Attack("weights: of another network, NaN", other)


def folders(yard: Yard) -> Iterator[Attack]:
    """Yield attacks by the folders of runs."""

    def begun(at: Path) -> list[str]:
        command = ["train", "score", str(at / "run"), "--steps", "2", "--set", "save_every=1"]
        subprocess.run([*CLI, *command], capture_output=True, check=True, timeout=300)
        return [*command[:3], "--steps", "3", "--set", "save_every=1", "--resume"]

    def edited(change: Callable[[Path], object]) -> Callable[[Path], list[str]]:
        return lambda at: (begun(at), change(at / "run"))[0]

    def zeroed(path: Path) -> None:
        data = bytearray(path.read_bytes())
        middle = len(data) // 2
        data[middle : middle + 4096] = bytes(len(data[middle : middle + 4096]))
        path.write_bytes(data)

    for file in ("checkpoint.safetensors",):
        yield Attack(f"run: zeroed block of {file}", edited(lambda run, f=file: zeroed(run / f)), (0,), "damaged")  # type: ignore[misc]
        yield Attack(f"run: {file} empty", edited(lambda run, f=file: (run / f).write_bytes(b"")), (0,), "damaged")  # type: ignore[misc]
    yield Attack(
        "run: metrics are no JSON", edited(lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe{[")), (0, 2)
    )
    yield Attack(
        "run: folder of another command",
        lambda at: (
            begun(at),
            ["eval", "testbed", "--questions", "20", "--methods", "divprune", "--out", str(at / "run")],
        )[1],
    )
    yield Attack("page of a run that is none", lambda at: ["report", str(at), str(at / "page.html")])
    yield Attack(
        "page of escape codes",
        lambda at: (
            (at / "run.json").write_text('{"\\u001b[2J": [], "task": "\\ud800"}'),
            ["report", str(at), str(at / "page.html")],
        )[1],
    )


def attacked(attack: Attack, yard: Yard, base: int) -> dict[str, Any]:
    """Carry an attack out and return its verdict."""
    with tempfile.TemporaryDirectory(dir=yard.folder) as folder:
        at = Path(folder)
        (at / "in").mkdir()
        command = attack.make(at / "in")
        run = [sys.executable, "-W", "ignore", "-c", command[1]] if command[0] == "python" else [*CLI, *command]
        yard.touched, begun = False, time.perf_counter()
        run = [sys.executable, "-S", "-c", LAUNCH, str(at / "peak"), *run]
        with (at / "out").open("wb") as output:
            files: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            process = subprocess.Popen(run, **files, cwd=at / "in", start_new_session=True)
            try:
                code = process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                code = process.wait()
        seconds = time.perf_counter() - begun
        peak = int((at / "peak").read_text()) if (at / "peak").exists() else 0
        text = (at / "out").read_bytes()[-20_000:].decode(errors="replace").strip()
        error = text.splitlines()[-1] if text else ""
        expected = code in attack.code or (command[0] == "python" and code == 1 and "vidsieve.errors" in error)
        faults = {
            "hangs": code == -9,
            "ends otherwise": not expected,
            "traceback": "Traceback" in text and command[0] != "python",
            "unexpected": "unexpected " in text,
            "escape codes": "\x1b" in text,
            "memory": peak > base + GIB,
            "canary": yard.touched,
            "says otherwise": attack.says is not None and not re.search(attack.says, text),
        }
        verdict = ", ".join(name for name, holds in faults.items() if holds) or "ok"
    place = text.replace(str(yard.folder), "").splitlines()
    return {
        "attack": attack.name,
        "verdict": verdict,
        "code": code,
        "seconds": round(seconds, 2),
        "mib_over": round((peak - base) / 2**20),
        "said": re.sub(r"/in\b|/tmp\w+", "", " ".join(place[-1:]))[-300:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/attacks.json"))
    parser.add_argument("--only", default="", help="a part of the attacks' names")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        yard, results = Yard(Path(folder)), []
        sound = Attack("sound", lambda at: yard.policy(at, "cacovid"), (0,))
        base = attacked(sound, yard, 0)
        size = base["mib_over"] * 2**20
        for kind in (videos, rows, policies, folders):
            for attack in kind(yard):
                if options.only in attack.name:
                    results.append(attacked(attack, yard, size))
                    print(
                        *(results[-1][key] for key in ("verdict", "seconds", "mib_over", "attack", "said")),
                        sep=" | ",
                        flush=True,
                    )
        held = sum(one["verdict"] == "ok" for one in results)
        result = {"machine": machine(), "attacks": len(results), "held": held, "sound": base, "results": results}
        write_result(options.json, result)
        print(f"{held} of {len(results)} held")


if __name__ == "__main__":
    main()
