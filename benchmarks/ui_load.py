"""Memory and file descriptors of `vidsieve ui` while eight users ask 200 questions at once.

``python benchmarks/ui_load.py --out benchmarks/results/ui_load.json``. Every user is one of gradio's own clients and
uploads a scene of the testbed with every question.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import psutil
from gradio_client import Client, handle_file

from vidsieve.testbed.files import write_scene

QUESTIONS = ("what colour is the old mark ?", "where is the chime ?", "what happens first ?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--users", type=int, default=8)
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen([sys.executable, "-m", "vidsieve", "ui", "--port", str(port), "--threads", "1"])
        try:
            rows, failed = measured(server.pid, port, Path(folder), args.questions, args.users)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    result = {
        "gradio": version("gradio"),
        "questions": args.questions,
        "users": args.users,
        "failed": failed,
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measured(pid: int, port: int, folder: Path, questions: int, users: int) -> tuple[list[dict[str, float]], list[str]]:
    """Return one row for every 20 questions, and the errors."""
    clips = [folder / f"{user}.mp4" for user in range(users)]
    for index, clip in enumerate(clips):
        write_scene(clip, world="dense", seed=9, index=index)
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            time.sleep(0.5)
    process, lock, begin = psutil.Process(pid), threading.Lock(), time.monotonic()
    rows: list[dict[str, float]] = []
    failed: list[str] = []
    asked = done = 0

    def measure() -> None:
        rows.append(
            {
                "questions": done,
                "seconds": round(time.monotonic() - begin, 1),
                "rss_mb": round(process.memory_info().rss / 2**20, 1),
                "fds": process.num_fds(),
                "threads": process.num_threads(),
            }
        )

    def user(number: int) -> None:
        nonlocal asked, done
        client = Client(f"http://127.0.0.1:{port}", verbose=False)
        while True:
            with lock:
                if asked >= questions:
                    break
                asked += 1
                mine = asked
            try:
                client.predict(
                    {"video": handle_file(clips[number])} if version("gradio") < "6" else handle_file(clips[number]),
                    QUESTIONS[mine % len(QUESTIONS)],
                    ("cacovid", "divprune", "full")[mine % 3],
                    (0.1, 0.25, 0.5)[mine // 3 % 3],
                    api_name="/ask",
                )
            except Exception as error:
                failed.append(f"{type(error).__name__}: {error}")
            with lock:
                done += 1
                if done % 20 == 0:
                    measure()
        client.close()

    measure()
    threads = [threading.Thread(target=user, args=(number,)) for number in range(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(20)  # heartbeats end
    measure()
    return rows, failed


if __name__ == "__main__":
    main()
