"""vLLM under load, with all tokens and with fewer, dropped by vidsieve and by vLLM's own pruning: throughput, latency.

Needs an environment of its own (`make test-vllm`), and two cores for itself. Every row is a server of its own, asked by
the official `openai` client with so many requests in flight. A row that the result file has, with the same settings, is
not measured again. `--read` writes the page from a result and measures nothing.

    PYTHONPATH=. python benchmarks/vllm_load.py --json benchmarks/results/vllm_load.json --page docs/serving.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import timeit
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from pages import inserted, percent, table
from vidsieve.io.files import writing
from vidsieve.io.machine import machine, write_result
from vidsieve.testing.tiny_models import FAMILIES, processor_for
from vidsieve.video.reading import write_video
from vllm_models import policies, telling_time
from vllm_serving import Server, serving

QUESTION = "what colour is the home ?"
ALL = "all tokens"
REPORTED = 12_239
"""Tokens of a prompt in the public report of EVS that halves throughput (vllm-project/vllm, pull request 51221)."""


@dataclass(frozen=True)
class Load:
    """A random Qwen3-VL, videos, what is asked about them, and at which concurrency.

    Parameters
    ----------
    llm : width, width of the MLP, layers, heads, heads of keys and values
    tower : width, width of the MLP, layers, heads
    patch : int
        Side of a patch in pixels; a token is two by two of them, in two frames.
    clip : frames, height, width
    videos : int
        Number of different videos; with one, it is in vLLM's caches before the clock starts.
    tokens : int
        Tokens of an answer.
    methods : names; "vllm" is vLLM's own EVS
    kept : retentions
    least, each : int
        Requests at a concurrency of C: `each` · C, `least` at least.
    """

    llm: tuple[int, int, int, int, int]
    tower: tuple[int, int, int, int]
    patch: int
    clip: tuple[int, int, int]
    videos: int
    tokens: int
    methods: tuple[str, ...]
    kept: tuple[str, ...]
    concurrencies: tuple[int, ...]
    least: int
    each: int

    @property
    def video_tokens(self) -> int:
        """Tokens of a video."""
        frames, height, width = self.clip
        return frames // 2 * (height // self.patch // 2) * (width // self.patch // 2)

    def requests(self, concurrency: int) -> int:
        """Return the number of requests at a concurrency."""
        return max(self.least, self.each * concurrency)

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield method and retention of each row, all tokens first."""
        yield ALL, "1"
        yield from ((method, kept) for kept in self.kept for method in self.methods)


CONCURRENCIES = (1, 2, 4, 8, 16, 32)
LOADS = {
    "videos": Load(
        llm=(640, 1792, 12, 10, 2),
        tower=(128, 256, 3, 4),
        patch=8,
        clip=(32, 128, 128),
        videos=80,
        tokens=12,
        methods=("evs", "score", "vllm"),
        kept=("0.25", "0.1"),
        concurrencies=CONCURRENCIES,
        least=8,
        each=2,
    ),
    "answers": Load(
        llm=(128, 256, 2, 4, 2),
        tower=(64, 128, 3, 2),
        patch=4,
        clip=(60, 160, 320),
        videos=1,
        tokens=64,
        methods=("evs", "vllm"),
        kept=("0.5",),
        concurrencies=CONCURRENCIES,
        least=4,
        each=2,
    ),
}
"""Each request a video of its own and a short answer; or one video in the caches and long answers, as in the report."""
MODES = (ALL, "evs", "score", "vllm")


def small(load: Load) -> Load:
    """Return a load of few requests at its smallest retention."""
    return replace(load, kept=load.kept[-1:], concurrencies=(1, 2), least=4, each=2)


def build(load: Load, folder: Path) -> dict[str, str]:
    """Write a load's model and processor to a folder; return the folders of untrained policies by method."""
    width, inner, layers, heads, key_heads = load.llm
    third = width // heads // 6
    config = FAMILIES["qwen3_vl"]().config
    config.text_config.update(
        {
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "head_dim": width // heads,
            "max_position_embeddings": 2**16,
            "rope_parameters": dict(config.text_config.rope_parameters)
            | {"mrope_section": [width // heads // 2 - 2 * third, third, third]},
        }
    )
    names = "hidden_size", "intermediate_size", "depth", "num_heads"
    tower = dict(zip(names, load.tower, strict=True)) | {"patch_size": load.patch, "out_hidden_size": width}
    config.vision_config.update(tower)
    torch.manual_seed(0)
    model = type(FAMILIES["qwen3_vl"]())(config).eval()
    model.lm_head.weight.data[100:] = 0  # words only: no answer ends before its last token
    model.save_pretrained(folder)
    processor = processor_for("qwen3_vl")
    for part in (processor.image_processor, processor.video_processor):
        part.patch_size = load.patch
        part.size = {"shortest_edge": 64, "longest_edge": int(np.prod(load.clip))}
    processor.tokenizer = telling_time(processor.tokenizer)
    processor.save_pretrained(folder)
    processor.tokenizer = AutoTokenizer.from_pretrained(folder)
    return policies(model, folder / "policies")


def clips(load: Load, folder: Path) -> list[Path]:
    """Write a load's videos, coloured squares that change, and one to begin with; return their paths."""
    frames, height, width = load.clip
    draw, paths = np.random.default_rng(5), [folder / "clips" / f"{number}.mp4" for number in range(load.videos + 1)]
    for path in paths:
        squares = draw.integers(0, 255, (frames, height // 32, width // 32, 3), np.uint8)
        write_video(path, squares.repeat(32, 1).repeat(32, 2), 8.0, crf=30)
    return paths


def options(method: str, kept: str, folders: dict[str, str]) -> list[str]:
    """Return the options of a row's server."""
    if method == ALL:
        return []
    if method == "vllm":
        return ["--video-pruning-method", "evs", "--video-pruning-rate", str(1 - float(kept))]
    policy = ["--policy", folders[method]] if method in folders else []
    return ["--method", method, "--retention", kept, *policy]


def measured(load: Load, where: Path, videos: Sequence[Path], method: str, kept: str, folders: Any) -> dict[str, Any]:
    """Return a row: by concurrency, what its requests took."""
    once = load.videos == 1
    more = (
        *("--max-num-seqs", str(max(load.concurrencies))),
        *("--max-model-len", "32768", "--max-num-batched-tokens", "4096"),
        *("--media-io-kwargs", json.dumps({"video": {"num_frames": load.clip[0], "video_backend": "opencv"}})),
        *("--mm-processor-kwargs", json.dumps({"do_sample_frames": False})),
        *(() if once else ("--no-enable-prefix-caching", "--mm-processor-cache-gb", "0")),
    )
    with serving(str(where), where, *options(method, kept, folders), *more) as server:
        warm, *others = videos
        for clip in (warm, *(others if once else ())):
            ask(server, clip, load.tokens)
        endless, rows = cycle(others), {}
        for concurrency in load.concurrencies:
            asked = list(islice(endless, load.requests(concurrency)))
            rows[str(concurrency)] = level(server, asked, concurrency, load.tokens)
            print(f"{method} {kept}, {concurrency} at a time: {json.dumps(rows[str(concurrency)])}", flush=True)
    return rows


def level(server: Server, videos: Sequence[Path], concurrency: int, tokens: int) -> dict[str, Any]:
    """Return throughput and latencies of one request about each video, so many of them in flight."""
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(lambda video: ask(server, video, tokens), videos))
    wall = time.perf_counter() - start
    firsts, wholes, prompts = zip(*answers, strict=True)
    return {
        "requests": len(videos),
        "requests_per_second": len(videos) / wall,
        "p50_s": statistics.median(wholes),
        "p95_s": sorted(wholes)[int(0.95 * len(wholes))],
        "first_token_p50_s": statistics.median(firsts),
        "prompt_tokens": statistics.median(prompts),
    }


def ask(server: Server, video: Path, tokens: int) -> tuple[float, float, int]:
    """Return seconds to an answer's first token and to its end, and the tokens of its prompt."""
    start, first = time.perf_counter(), 0.0
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    for piece in server.ask(video, QUESTION, tokens=tokens, options=stream):
        first = first or time.perf_counter() - start
        usage = piece.usage
    if usage.completion_tokens != tokens:
        raise RuntimeError(f"{video.name}: {usage.completion_tokens} tokens were answered, not {tokens}")
    return first, time.perf_counter() - start, usage.prompt_tokens


def position_seconds(prompt: int) -> dict[str, float]:
    """Return what asking for positions takes per running request in a step that only decodes, vLLM's own and ours."""
    from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

    from vidsieve.serving.vllm.positions import CarriesPositions

    config = SimpleNamespace(image_token_id=1, video_token_id=2, vision_start_token_id=3)
    ids, rows = [2] * prompt, torch.arange(prompt).expand(3, -1).contiguous()
    model = SimpleNamespace(config=config, _selector=object())
    model._recompute_mrope_positions = Qwen3VLForConditionalGeneration._recompute_mrope_positions
    found = {}
    for name, owner in (("vllm", Qwen3VLForConditionalGeneration), ("vidsieve", CarriesPositions)):
        timer = timeit.Timer(lambda owner=owner: owner.recompute_mrope_positions(model, ids, [], rows, prompt))
        found[name] = min(timer.repeat(20, 20)) / 20
    return found


def digest(load: Load, method: str, kept: str) -> str:
    """Return the hash of what a row is measured with."""
    import vllm

    settings = {"load": asdict(load), "row": [method, kept], "vllm": vllm.__version__}
    del settings["load"]["methods"], settings["load"]["kept"]
    return sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


# -- page -----------------------------------------------------------------------------------------------------


def page(result: dict[str, Any]) -> Iterator[str]:
    """Yield the measured part of the page."""
    for name, heading in (
        ("videos", "Every request a video of its own, {tokens} tokens each answer"),
        ("answers", "One video, already in vLLM's caches, {tokens} tokens each answer"),
    ):
        if name not in result["loads"]:
            continue
        load, rows = result["loads"][name]["load"], result["loads"][name]["rows"]
        counts = list(rows[ALL]["levels"])
        yield f"{heading.format(**load)}: requests a second (p95 in seconds) by requests in flight.\n"
        lines = []
        for key, row in rows.items():
            cells = [f"{at['requests_per_second']:.2f} ({at['p95_s']:.2f})" for at in row["levels"].values()]
            lines.append([key, f"{row['levels'][counts[-1]]['prompt_tokens']:,.0f}", *cells])
        yield from table(["", "prompt", *counts], lines)
        yield ""
    seconds = result["positions"]
    yield (
        f"In a step that only decodes vLLM asks the model for positions of every running request: {REPORTED:,} tokens "
        f"take its own EVS {1e3 * seconds['vllm']:.2f} ms, and the plug-in {1e3 * seconds['vidsieve']:.3f} ms."
    )


def label(method: str, kept: str) -> str:
    """Return a row's name."""
    if method == ALL:
        return ALL
    name = "vLLM's own EVS" if method == "vllm" else f"`{method}`"
    return f"{name}, {percent(float(kept))}"


def run(loads: Mapping[str, Load], modes: Sequence[str], path: Path | None) -> dict[str, Any]:
    """Return the result; rows that the file has are kept, and it is written after each."""
    result: dict[str, Any] = json.loads(path.read_text("utf-8")) if path and path.exists() else {"loads": {}}
    import vllm

    result |= {"machine": machine(), "vllm": vllm.__version__, "positions": position_seconds(REPORTED)}
    for name, load in loads.items():
        part = result["loads"].setdefault(name, {"rows": {}}) | {"load": asdict(load)}
        result["loads"][name] = part
        with tempfile.TemporaryDirectory() as at:
            folder = Path(at)
            folders, videos = build(load, folder), clips(load, folder)
            for method, kept in load.rows():
                key, mark = label(method, kept), digest(load, method, kept)
                done = part["rows"].get(key)
                if method not in modes or (done and done["settings"] == mark):
                    continue
                start = time.perf_counter()
                levels = measured(load, folder, videos, method, kept, folders)
                part["rows"][key] = {"settings": mark, "seconds": time.perf_counter() - start, "levels": levels}
                if path:
                    write_result(path, result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--modes", nargs="+", choices=MODES, help="rows to measure; all if not given")
    parser.add_argument("--small", action="store_true", help="few requests, two rows if --modes is not given")
    parser.add_argument("--page", type=Path, help="document whose measured part is written")
    parser.add_argument("--read", type=Path, help="write the document from this result, and measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.read:
        result = json.loads(arguments.read.read_text("utf-8"))
    else:
        loads = {name: small(LOADS[name]) if arguments.small else LOADS[name] for name in arguments.loads}
        result = run(loads, arguments.modes or (MODES[:2] if arguments.small else MODES), arguments.json)
    text = "\n".join(page(result))
    print(text)
    if arguments.page:
        made = inserted(arguments.page.read_text("utf-8"), f"\n{text}\n")
        with writing(arguments.page) as temporary:
            temporary.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
