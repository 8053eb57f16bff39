"""A server on loopback that speaks OpenAI's chat completions, and can be slow, fail and lie.

``python teacher_server.py PORT --log FILE …`` prints the port once it listens. Every request is a line of the log
before it is answered. The treatment of a row depends on its text alone, so that tests know it: `lie_for`, `fails`.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAILURES = ("429", "500", "drop", "half")
"""Replies that are no answers: too many requests, server error, no reply, a body that breaks off."""
LIES = {
    "null": "too short",
    "short": "too short",
    "no-choices": "malformed answer",
    "not-json": "malformed answer",
    "parts": "malformed answer",
    "surrogate": "malformed answer",
    "refusal": "refusal",
    "refused": "refusal",
    "filter": "refusal",
    "length": "cut off",
    "loop": "repetition",
    "usage": "malformed answer",
    "gzip": "malformed answer",
    "endless": "malformed answer",
}
"""Answers with status 200 that are no captions, and the reasons for which they are set aside."""
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
FLOODS = {
    "status line": (b"HTTP/1.1 200 ", b"a" * 2**16),
    "header": (b"HTTP/1.1 200 OK\r\nX: ", b"a" * 2**16),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 1000),
    "cookies": (b"HTTP/1.1 200 OK\r\n", b"Set-Cookie: a=b; Max-Age=9\r\n" * 1000),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "hints": (b"", b"HTTP/1.1 103 Early Hints\r\nX: y\r\n\r\n"),
    "chunk size": (CHUNKED, b"0" * 2**16),
    "chunk extension": (CHUNKED + b"1;", b"a" * 2**16),
    "trailers": (CHUNKED + b"0\r\n", b"X: y\r\n" * 1000),
}
"""Replies that never get beyond their first lines: how they begin, and what goes on without end."""
USAGE = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}


def share(text: str) -> float:
    """Return a number in [0, 1) that depends on a text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def lie_for(row: str, lie: float) -> str:
    """Return which lie a row is always told, empty for none, where a share of `lie` is lied to."""
    return list(LIES)[int(share(f"which {row}") * len(LIES))] if share(f"lie {row}") < lie else ""


def fails(row: str, fail: float) -> str:
    """Return how a row's first request fails, empty where it does not."""
    return FAILURES[int(share(f"how {row}") * len(FAILURES))] if share(f"fail {row}") < fail else ""


def caption_of(row: str) -> str:
    """Return the caption that a row is given."""
    return f"A dense description of {row}: coloured squares flicker quickly on a small screen, and nothing stays."


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_GET(self):
        self.say(200, {"object": "list", "data": [{"id": "tiny-teacher", "object": "model"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = asked["messages"][-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        images = 0 if isinstance(content, str) else sum(part["type"] == "image_url" for part in content)
        found = re.search(r"row \d+", text)
        row, do, args = found.group() if found else text, "", self.server.args
        with self.server.lock:
            self.server.seen[row] += 1
            if self.path != "/v1/chat/completions":
                do = "404"
            elif args.key and self.headers["Authorization"] != f"Bearer {args.key}":
                do = "401"
            elif args.always:
                do = args.always
            elif row in args.refuse:
                do = args.refuse_with
            elif self.server.seen[row] == 1 and fails(row, args.fail):
                do = fails(row, args.fail)
            else:
                do = lie_for(row, args.lie)
            line = {
                "time": time.time(),
                "row": row,
                "key": self.headers["Idempotency-Key"],
                "does": do,
                "images": images,
                "model": asked["model"],
                "text": text,
            }
            with open(args.log, "a") as file:
                file.write(json.dumps(line) + "\n")
        time.sleep(args.slow)
        self.act(do, row)

    def act(self, do, row):
        if do in ("drop", "half"):
            if do == "half":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{")
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif do == "reset":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        elif do in FLOODS:
            self.close_connection = True
            begin, again = FLOODS[do]
            with contextlib.suppress(OSError):
                self.wfile.write(begin)
                while True:
                    self.wfile.write(again)
        elif do.isdigit():
            echo = f"no: {self.headers['Authorization']} (sk-sec***6789)"
            code = "insufficient_quota" if self.server.args.quota else "bad"
            self.say(int(do), {"error": {"message": echo, "type": code, "code": code}})
        elif do == "redirect":
            self.send_response(307)
            self.send_header("Location", self.server.args.to)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif do == "gzip":  # 64 MiB in 64 kB
            self.say(200, gzip.compress(bytes(2**26)), {"Content-Encoding": "gzip"})
        elif do in ("endless", "drip"):
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.wfile.write(head)
                while True:
                    self.wfile.write(b"10000\r\n" + b" " * 2**16 + b"\r\n" if do == "endless" else b"1\r\n \r\n")
                    time.sleep(0.0 if do == "endless" else 0.1)
        elif do == "not-json":
            self.say(200, b"<html>all is well</html>")
        elif do == "no-choices":
            self.say(200, {"choices": [], "usage": USAGE})
        else:
            said = {
                "null": None,
                "refused": None,
                "refusal": "I'm sorry, but I can't help with describing this video today.",
                "filter": caption_of(row),
                "length": caption_of(row),
                "short": "A red square.",
                "parts": [{"type": "text", "text": caption_of(row)}],
                "surrogate": f"{caption_of(row)} \ud83d",
                "loop": caption_of(row) + " and it goes on and on in the same way" * 12,
                "echo": f"{caption_of(row)} {self.headers['Authorization']}",
            }.get(do, caption_of(row))
            body = self.answer(said)
            body["choices"][0]["finish_reason"] = {"filter": "content_filter", "length": "length"}.get(do, "stop")
            if do == "refused":
                body["choices"][0]["message"]["refusal"] = "This is not something to describe."
            if do == "unmetered":
                body["usage"] = {"total_tokens": 5}
            if do == "usage":
                body["usage"] = {"prompt_tokens": -5, "completion_tokens": "many"}
            self.say(200, body)

    def answer(self, said):
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": "tiny-teacher",
            "usage": USAGE,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}],
        }

    def say(self, status, body, headers=None):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status == 429:
            self.send_header("Retry-After", self.server.args.retry_after)
        self.end_headers()
        self.wfile.write(raw)


class TeacherServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that were killed."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--log", required=True)
    parser.add_argument("--slow", type=float, default=0.0, help="seconds before every reply")
    parser.add_argument("--fail", type=float, default=0.0, help="share of rows whose first request fails")
    parser.add_argument("--lie", type=float, default=0.0, help="share of rows that are told lies")
    parser.add_argument("--always", default="", help="what is done to every request")
    parser.add_argument("--refuse", nargs="*", default=[], help="rows that get no answer")
    parser.add_argument("--refuse-with", default="400", help="what they get")
    parser.add_argument("--retry-after", default="0")
    parser.add_argument("--to", default="", help="where redirects lead")
    parser.add_argument("--key", default="", help="the only key that is taken")
    parser.add_argument("--quota", action="store_true", help="errors say that the account is empty")
    args = parser.parse_args()
    server = TeacherServer(("127.0.0.1", args.port), Handler)
    server.args, server.seen, server.lock = args, Counter(), threading.Lock()
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
