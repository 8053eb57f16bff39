"""The vLLM plug-in against transformers, over real HTTP: the same answers from the same tokens, and what a load does.

Needs an environment of its own (`make test-vllm`). Servers are started by `vidsieve serve`, asked by the official
`openai` client; the transformers path runs here, on the frames that vLLM's own reader makes of the same files.

    PYTHONPATH=. python benchmarks/vllm_serving.py --json benchmarks/results/vllm.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import openai
import torch

import vidsieve
from vidsieve.loading import load_model, shipped_model
from vidsieve.testbed.files import write_scene
from vidsieve.video.reading import write_video
from vllm_models import CHUNK, ENGINE, FRAMES, RETENTIONS, TOKENS, locally, policies, questions, qwen


@dataclass
class Server:
    """A running server: its address, and the file that its log goes to."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]
    client: openai.OpenAI = field(init=False)

    def __post_init__(self) -> None:
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=600, max_retries=0)

    @cached_property
    def name(self) -> str:
        """The served model's name."""
        return self.client.models.list().data[0].id

    def ask(
        self,
        video: Path | Sequence[Path],
        text: str,
        /,
        tokens: int = TOKENS,
        options: Mapping[str, Any] | None = None,
        **asked: Any,
    ) -> Any:
        """Return the answer of one chat completion about a video, or several; `options` are the client's own."""
        videos = [video] if isinstance(video, Path) else video
        content: list[dict[str, Any]] = [
            {"type": "video_url", "video_url": {"url": one.resolve().as_uri()}} for one in videos
        ]
        content.append({"type": "text", "text": text})
        extra: dict[str, Any] = {"mm_processor_kwargs": {"vidsieve": asked}} if asked else {}
        return self.client.chat.completions.create(
            model=self.name,
            max_tokens=tokens,
            **{"temperature": 0, **(options or {})},
            messages=[{"role": "user", "content": content}],
            extra_body=extra | {"ignore_eos": False},
        )

    def said(self) -> list[tuple[str, int, int, str]]:
        """Return every selection in the log: method, kept, of, digest."""
        found = re.findall(r"(\w+) kept (\d+) of (\d+) video tokens, (\w{12})", self.log.read_text(errors="replace"))
        return [(name, int(kept), int(total), mark) for name, kept, total, mark in found]

    def metric(self, name: str) -> float:
        """Return the sum of a metric on the server's page."""
        import urllib.request

        page = urllib.request.urlopen(f"{self.url}/metrics").read().decode()
        return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if re.match(rf"{name}(\{{| )", line))

    def memory(self) -> float:
        """Return the resident megabytes of the server and its children."""
        done = subprocess.run(["ps", "-eo", "pid,ppid,rss"], capture_output=True, text=True, check=True)
        rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()[1:]]
        known = {self.process.pid}
        for _ in range(4):
            known |= {pid for pid, parent, _ in rows if parent in known}
        return sum(rss for pid, _, rss in rows if pid in known) / 1024


def environment(plugins: Path | None) -> dict[str, str]:
    """Return the variables of a server that finds packages in the folder `plugins` too."""
    paths = [path for path in (plugins and str(plugins), os.environ.get("PYTHONPATH")) if path]
    return os.environ | ENGINE | ({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})


@contextlib.contextmanager
def serving(model: str, folder: Path, *options: str, plugins: Path | None = None) -> Iterator[Server]:
    """Run `vidsieve serve` until the block ends; it finds packages in the folder `plugins` too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / f"server-{port}.log"
    command = [
        sys.executable,
        "-m",
        "vidsieve",
        "serve",
        model,
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--enforce-eager",
        "--limit-mm-per-prompt",
        '{"video": 2, "image": 0}',
        "--skip-mm-profiling",
        "--allowed-local-media-path",
        str(folder),
        "--media-io-kwargs",
        json.dumps({"video": {"num_frames": FRAMES, "video_backend": "opencv"}}),
        *options,
    ]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment(plugins))
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        for _ in range(600):
            with contextlib.suppress(openai.APIError, IndexError):
                server.client.models.list()
                break
            if process.poll() is not None:
                raise SystemExit(log.read_text(errors="replace")[-3000:])
            time.sleep(1)
        yield server
    except openai.APIError:
        print(log.read_text(errors="replace")[-6000:], file=sys.stderr)
        raise
    finally:
        process.terminate()
        process.wait(60)


def parity(
    name: str,
    model: Any,
    processor: Any,
    where: str,
    folders: dict[str, str],
    videos: list[tuple[Path, str]],
    folder: Path,
) -> dict[str, Any]:
    """Return how the server's answers compare with those of transformers."""
    result: dict[str, Any] = {"model": name, "rows": []}
    for method in ("score", "cacovid"):
        options = (
            "--method",
            method,
            "--policy",
            folders[method],
            "--retention",
            "0.25",
            "--mm-processor-kwargs",
            json.dumps({"do_sample_frames": False}),  # the reader has sampled
            "--max-num-batched-tokens",
            str(CHUNK),
            "--max-num-seqs",
            "8",
        )
        with serving(where, folder, *options) as server:
            jobs = [((video,), question, kept) for video, question in videos for kept in RETENTIONS]
            last = {question: video for video, question in videos}  # two videos in a prompt, of which one comes twice
            pairs = [(video, list(last.values())[-1 - number]) for number, (video, _) in enumerate(videos[:6])]
            jobs += [(pair, videos[n][1], kept) for n, pair in enumerate(pairs) for kept in RETENTIONS]

            def ask(job: tuple[Sequence[Path], str, float], server: Server = server, method: str = method) -> Any:
                clips, question, kept = job
                more = {"question": question} if method == "cacovid" else {}
                return server.ask(clips, question, retention=kept, **more)

            with ThreadPoolExecutor(6) as pool:  # pruned and unpruned ones in one batch
                answers = list(pool.map(ask, jobs))
            marks = {mark for *_, mark in server.said()}
            tally = {
                (len(clips), kept): dict.fromkeys(("requests", "same_text", "same_tokens", "same_indices"), 0)
                for clips, _, kept in jobs
            }
            differ, texts = [], set()
            for (clips, question, kept), answer in zip(jobs, answers, strict=True):
                chosen = vidsieve.load(method, folders[method], retention=kept) if kept < 1 else None
                text, length, kept_marks = locally(model, processor, clips, question, chosen)
                said, counts = answer.choices[0].message.content.strip(), tally[len(clips), kept]
                texts.add(text)
                counts["requests"] += 1
                counts["same_text"] += said == text
                counts["same_tokens"] += answer.usage.prompt_tokens == length
                counts["same_indices"] += kept_marks <= marks
                if said != text:
                    differ.append([[clip.name for clip in clips], question, kept, said, text])
            row: dict[str, Any] = {
                "method": method,
                "by_retention": {kept: tally[1, kept] for kept in RETENTIONS},
                "two_videos": {kept: tally[2, kept] for kept in RETENTIONS},
                "different_texts": len(texts),
                "differ": differ[:5],
            }
            video = videos[0][0]
            first = [question for where, question in videos if where == video][:2]
            before = len(server.said())
            for question in first:
                server.ask(video, question, retention=0.05, question=question)  # ignored where it is not read
            fresh = server.said()[before:]
            row["two_questions_one_video"] = {"selected": len(fresh), "different": len({mark for *_, mark in fresh})}
            hits, selected = server.metric("vllm:mm_cache_hits_total"), len(server.said())
            again = {"question": first[0]} if method == "cacovid" else {}
            server.ask(video, first[0], retention=0.05, **again)
            time.sleep(1)
            row["repeated"] = {
                "mm_cache_hits": server.metric("vllm:mm_cache_hits_total") - hits,
                "selected_again": len(server.said()) - selected,
                "prefix_cache_hits": server.metric("vllm:prefix_cache_hits_total"),
            }
            row["metrics"] = {
                "video_tokens": server.metric("vidsieve_video_tokens_total"),
                "kept": server.metric("vidsieve_video_tokens_kept_total"),
            }
            row["faults"] = faults(server, video, first[0], folder, method, processor.video_token)
            result["rows"].append(row)
            print(json.dumps(row))
    return result


def faults(server: Server, video: Path, question: str, folder: Path, method: str, mark: str) -> dict[str, Any]:
    """Return what wrong requests get, and whether the server lives on; `mark` is a video's placeholder."""
    broken = folder / "broken.mp4"
    broken.write_bytes(b"nothing")
    fresh = folder / f"fresh-{method}.mp4"  # refused with a video that vLLM has not seen, it must answer about it later
    write_scene(fresh, world="dense", seed=92, index=0)
    good: dict[str, Any] = {"question": question} if method == "cacovid" else {}
    found: dict[str, Any] = {}
    limit = server.client.models.list().data[0].model_extra["max_model_len"]
    for name, where, text, fields in (
        ("wrong field", video, question, good | {"retension": 0.1}),
        ("wrong retention", video, question, good | {"retention": 3}),
        ("too long", fresh, "what " * 10_000, good),
        ("unreadable video", broken, question, good),
        # Fits but for the video's tokens: refused when vLLM has the video in its cache, and its engine has not.
        ("too long with the video", fresh, "what " * (limit - 50), good | {"retention": 1.0}),
        ("placeholder in the text", video, f"what is {mark} ?", good),
        *(
            []
            if method != "cacovid"
            else [
                ("no question", video, question, {}),
                ("question without a word", video, question, {"question": "<|im_end|> what"}),
                ("long question", video, question, {"question": "what " * 10_000}),
                ("placeholder in the question", video, question, {"question": f"what is {mark} ?"}),
            ]
        ),
    ):
        try:
            server.ask(where, text, **fields)
            found[name] = "answered"
        except openai.APIStatusError as error:
            found[name] = [error.status_code, str(error.message)[:200]]
    found["lives_on"] = all(server.ask(one, question, **good).usage.prompt_tokens for one in (video, fresh))
    found["after too long with the video"] = []  # vLLM's own: a 500, then answers
    for _ in range(2):
        try:
            server.ask(fresh, question, **good, retention=1.0)
            found["after too long with the video"].append("answered")
        except openai.APIStatusError as error:
            found["after too long with the video"].append(error.status_code)
    return found


def install(folder: Path, name: str, group: str, target: str) -> Path:
    """Write the metadata of a distribution whose only module offers `target` as an entry point; return the folder."""
    about = folder / f"{name}-0.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n{name} = {name}:{target}\n")
    return folder


FRAGILE = """
from dataclasses import dataclass
from typing import ClassVar

from vidsieve.compressors.divprune import DivPrune


@dataclass(frozen=True)
class Fragile(DivPrune):
    name: ClassVar[str] = "fragile"

    def _select(self, video, budget, generator):
        if video.grid.frames < 8:
            raise ZeroDivisionError("a marked video")
        return super()._select(video, budget, generator)
"""


OFFLINE = """
import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, question, *videos = sys.argv[1:]
    llm = LLM(
        model, dtype="float32", enforce_eager=True, skip_mm_profiling=True, allowed_local_media_path="/",
        limit_mm_per_prompt={"video": 1, "image": 0}, hf_overrides={"vidsieve": {"method": "fragile"}},
        media_io_kwargs={"video": {"num_frames": 16, "video_backend": "opencv"}},
    )
    ask = [{"type": "text", "text": question}]
    prompts = [
        [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": Path(video).as_uri()}}, *ask]}]
        for video in videos
    ]
    answers = [answer.outputs[0] for answer in llm.chat(prompts, SamplingParams(temperature=0, max_tokens=8))]
    del llm
    print(json.dumps([[answer.text, answer.finish_reason, answer.stop_reason] for answer in answers]))
"""


def failing(where: str, folder: Path) -> dict[str, Any]:
    """Return what requests get whose method raises: DivPrune that does so on short videos, installed as a plug-in."""
    plugins = install(folder / "plugins", "fragile", "vidsieve.compressors", "Fragile")
    (plugins / "fragile.py").write_text(FRAGILE)
    ordinary, marked, second = (folder / f"{name}.mp4" for name in ("ordinary", "marked", "second"))
    write_scene(ordinary, world="dense", seed=93, index=0)
    frames = np.random.default_rng(4).integers(0, 255, (2, 4, 144, 144, 3), np.uint8)
    write_video(marked, frames[0], 8.0)
    write_video(second, frames[1], 8.0)
    question, found = "what colour is the new seal ?", {}

    def asked(server: Server, video: Path | Sequence[Path], **options: Any) -> Any:
        """Return the answer, or status and message, or of a stream what came before its error, and the message."""
        pieces: list[str] = []
        try:
            answer = server.ask(video, question, options=options)
            if not options.get("stream"):
                return answer.choices[0].message.content
            for piece in answer:
                pieces += [choice.delta.content or "" for choice in piece.choices]
            return "".join(pieces)
        except openai.APIStatusError as error:
            return [error.status_code, str(error.message)[:200]]
        except openai.APIError as error:
            return ["".join(pieces), str(error.message)[:200]]

    for on_error, options in (("fail", ()), ("uniform", ("--on-error", "uniform"))):
        with serving(where, folder, "--method", "fragile", *options, plugins=plugins) as server:
            row = found[on_error] = {}
            for name, video, more in (
                ("ordinary", ordinary, {}),
                ("marked", marked, {}),
                ("marked, from the caches", marked, {}),
                ("marked, streamed", marked, {"stream": True}),
                ("marked, two answers", marked, {"n": 2, "temperature": 1}),
                ("ordinary and another marked one", [ordinary, second], {}),
                ("ordinary again", ordinary, {}),
            ):
                got = asked(server, video, **more)
                row[name] = {"got": got, "counted": server.metric("vidsieve_selection_errors_total")}
            with ThreadPoolExecutor(4) as pool:  # in one batch
                got = list(pool.map(lambda video, server=server: asked(server, video), [marked, ordinary] * 2))
            row["at once"] = {"got": got, "counted": server.metric("vidsieve_selection_errors_total")}
            said = re.findall(r"request (chatcmpl-\w+): fragile failed .*ZeroDivisionError", server.log.read_text())
            row["requests named in the log"] = len(said)
            print(on_error, json.dumps(row))
    (plugins / "offline.py").write_text(OFFLINE)
    command = [sys.executable, plugins / "offline.py", where, question, ordinary, marked, ordinary]
    done = subprocess.run(command, env=environment(plugins), stdout=subprocess.PIPE, text=True, check=True)
    found["fail, offline"] = json.loads(done.stdout.splitlines()[-1])
    print("offline", found["fail, offline"])
    return found


def load(folder: Path, requests: int, concurrency: int, layers: int) -> dict[str, Any]:
    """Return throughput, latencies and memory of many requests, all tokens against a tenth."""
    from transformers import LlavaOnevisionForConditionalGeneration

    model, processor = load_model("testbed")
    config = model.config
    # The testbed's eyes, an LLM that takes time, and frames enough for two thousand tokens and more.
    config.text_config.update(
        {
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "layer_types": ["full_attention"] * layers,
            "max_position_embeddings": 8192,
        }
    )
    torch.manual_seed(0)
    where = folder / "load"
    LlavaOnevisionForConditionalGeneration(config).save_pretrained(where)
    processor.save_pretrained(where)
    rng = np.random.default_rng(3)
    clips = []
    for number in range(requests + 1):  # one to begin with
        clip = folder / "clips" / f"{number}.mp4"
        write_video(clip, rng.integers(0, 255, (64, 144, 144, 3), np.uint8), 8.0, crf=40)
        clips.append(clip)
    rows = {}
    for name, options in (("all tokens", ()), ("10 %", ("--method", "divprune", "--retention", "0.1"))):
        # The cache of pixels, four gigabytes by default, would grow all through the run.
        more = (
            "--mm-processor-cache-gb",
            "0.3",
            "--max-num-batched-tokens",
            "4096",
            "--max-model-len",
            "4096",
            "--media-io-kwargs",
            json.dumps({"video": {"num_frames": 64, "video_backend": "opencv"}}),
        )
        with serving(str(where), folder, *options, *more) as server:
            server.ask(clips[0], "what colour is the new seal ?")
            grown: list[float] = []

            def ask(clip: Path, server: Server = server, grown: list[float] = grown) -> tuple[float, int | None]:
                start = time.perf_counter()
                try:
                    tokens = server.ask(clip, "what colour is the new seal ?").usage.prompt_tokens
                except openai.APIError:
                    tokens = None
                spent = time.perf_counter() - start
                if int(clip.stem) % 20 == 0:
                    grown.append(round(server.memory()))
                return spent, tokens

            start = time.perf_counter()
            with ThreadPoolExecutor(concurrency) as pool:
                spent = list(pool.map(ask, clips[1:]))
            wall = time.perf_counter() - start
            times = sorted(seconds for seconds, _ in spent)
            rows[name] = {
                "requests": len(spent),
                "errors": sum(t is None for _, t in spent),
                "prompt_tokens": statistics.median(t for _, t in spent if t is not None),
                "requests_per_second": len(spent) / wall,
                "p50_s": times[len(times) // 2],
                "p95_s": times[int(0.95 * len(times))],
                "megabytes": grown,
            }
            print(name, json.dumps(rows[name]))
    ratio = rows["10 %"]["requests_per_second"] / rows["all tokens"]["requests_per_second"]
    return {"concurrency": concurrency, "rows": rows, "throughput_ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--load", type=int, default=200)
    parser.add_argument("--only", choices=("testbed", "qwen2_5_vl", "qwen3_vl", "failing", "load"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    import transformers
    import vllm

    result: dict[str, Any] = {
        "tokens_a_step": CHUNK,
        "versions": {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    if options.json and options.json.exists():
        result = json.loads(options.json.read_text()) | result
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        videos = questions(folder, 5, 4)[: options.requests]
        if options.only in (None, "testbed"):
            model, processor = load_model("testbed:shallow")
            made = policies(model, folder / "testbed")
            where = str(shipped_model("testbed:shallow"))
            result["testbed"] = parity("testbed:shallow", model, processor, where, made, videos, folder)
        for family, said in (("qwen2_5_vl", "Qwen2.5-VL, tiny"), ("qwen3_vl", "Qwen3-VL, tiny")):
            if options.only in (None, family):
                model, processor = qwen(family, folder / family)
                made = policies(model, folder / family)
                result[family] = parity(said, model, processor, str(folder / family), made, videos, folder)
        if options.only in (None, "failing"):
            result["failing"] = failing(str(shipped_model("testbed:shallow")), folder)
        if options.only in (None, "load"):
            result["load"] = load(folder, options.load, 16, layers=4)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
