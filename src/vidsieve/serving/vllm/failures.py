"""Methods that raise in vLLM's worker, and the errors that their requests get in its front end.

An exception in the worker would end the server, and the number of a video's embeddings is fixed with its prompt. So the
worker continues with evenly kept tokens, and appends a line to a file that the server's processes share: the video's
key in vLLM's caches, and the error. The front end reads the file before it processes outputs of the engine. Every
request with that video, also one answered from the caches, is counted and logged, and gets an error (or its answer, if
``on_error`` is ``"uniform"``).

This lasts until the server ends, as the caches may hold results of the other tokens.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from multiprocessing import parent_process
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from torch import Tensor

LOG = logging.getLogger("vllm.vidsieve")
VARIABLE = "VIDSIEVE_SERVER"
"""Environment variable with the name that a server's processes share."""
NAME_BYTES = 8
KEY_BYTES = NAME_BYTES + sha256().digest_size
LONGEST = 500
"""Maximum number of characters of an error."""


@dataclass(frozen=True)
class SelectionFailure:
    """The name of a method that raised, the error in one line, and the server's ``on_error``."""

    method: str
    error: str
    on_error: str

    @classmethod
    def of(cls, method: str, error: Exception, on_error: str) -> SelectionFailure:
        """Return the failure of a method that raised `error`."""
        lines = str(error).strip().splitlines()
        text = f"{type(error).__name__}{': ' + lines[0] if lines else ''}"
        return cls(method, text[:LONGEST], on_error)

    @property
    def message(self) -> str:
        """The error message of the request."""
        return f"{self.method} failed on a video of this request: {self.error}"


@cache
def server_name() -> str:
    """Return the name that the processes of this server share; its first process sets it."""
    if parent_process() is None or VARIABLE not in os.environ:
        os.environ[VARIABLE] = token_hex(NAME_BYTES)
        atexit.register(_path(os.environ[VARIABLE]).unlink, missing_ok=True)
    return os.environ[VARIABLE]


def _path(name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"vidsieve-{name}.jsonl"


def video_key(identity: str) -> str:
    """Return a video's key: the hash of its name in vLLM's caches, which a request may choose."""
    return sha256(identity.encode()).hexdigest()


def report_key(identity: str) -> Tensor:
    """Return the bytes that a video carries to the worker, (KEY_BYTES,) uint8: the server's name, the video's key."""
    return torch.tensor(list(bytes.fromhex(server_name() + video_key(identity))), dtype=torch.uint8)


def report(key: Tensor, failure: SelectionFailure) -> None:
    """Report a failure to the front end, under a video's `report_key`.

    Raises
    ------
    FileNotFoundError
        If the front end has no such file in this machine's temporary folder: the report would be lost.
    """
    both = bytes(key.tolist()).hex()
    name, video = both[: 2 * NAME_BYTES], both[2 * NAME_BYTES :]
    line = json.dumps({"video": video, **asdict(failure)}) + "\n"
    file = os.open(_path(name), os.O_WRONLY | os.O_APPEND)
    try:
        os.write(file, line.encode())  # in one call: several workers write to the file
    finally:
        os.close(file)


class Failures:
    """Failures that the workers of this server report from now on."""

    def __init__(self) -> None:
        self._path = _path(server_name())
        self._known: dict[str, SelectionFailure] = {}
        self._open()
        self._file.seek(0, os.SEEK_END)  # earlier lines are of an earlier engine of this process

    def _open(self) -> None:
        self._path.touch(mode=0o600)
        self._file = self._path.open("rb", buffering=0)
        self._rest = b""

    def __del__(self) -> None:
        self._file.close()

    def expect(self) -> None:
        """Create the file again if it was deleted, before a video reaches the worker."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
                return
        self.known()
        self._file.close()
        self._open()

    def known(self) -> Mapping[str, SelectionFailure]:
        """Return the failures reported so far, by `video_key`."""
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        for line in lines:
            fields = json.loads(line)
            video = fields.pop("video")
            self._known[video] = SelectionFailure(**fields)
        return self._known


@cache
def _counter() -> Any:
    from prometheus_client import Counter

    about = "Requests with a video on which the method failed"
    return Counter("vidsieve_selection_errors", about, ("method", "outcome"))


def count(failure: SelectionFailure) -> None:
    """Add a request to the metric ``vidsieve_selection_errors_total``."""
    _counter().labels(failure.method, "error" if failure.on_error == "fail" else "uniform").inc()


def watch(processor: Any, refusal: Callable[[str], Exception], error: Any) -> None:
    """Patch vLLM's output processor to look for failures before it processes outputs of the engine.

    A request to a server gets an exception, before any of its tokens is returned. A request of the offline ``LLM`` ends
    with the finish reason "error", no text, and the message as its stop reason (an embedding: empty), so that the
    others of its batch are answered.

    Parameters
    ----------
    processor : type
        vLLM's ``OutputProcessor``.
    refusal : callable
        From a message to an exception that vLLM's server answers a request with.
    error : FinishReason
        vLLM's reason "error".
    """
    start, add, process = processor.__init__, processor.add_request, processor.process_outputs
    if getattr(process, "vidsieve", False):
        return

    def started(self: Any, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, **options)
        self.vidsieve_failures = Failures()

    def added(self: Any, request: Any, *arguments: Any, **options: Any) -> None:
        add(self, request, *arguments, **options)
        videos = [feature for feature in request.mm_features or () if feature.modality == "video"]
        if videos:
            self.vidsieve_failures.expect()
            state = self.request_states[request.request_id]
            keys = [video_key(video.mm_hash or video.identifier) for video in videos]
            state.vidsieve_keys = [*getattr(state, "vidsieve_keys", ()), *keys]

    def processed(self: Any, engine_core_outputs: Sequence[Any], *arguments: Any, **options: Any) -> Any:
        failures, aborted = self.vidsieve_failures.known(), []
        for output in engine_core_outputs if failures else ():
            state = self.request_states.get(output.request_id)
            keys = getattr(state, "vidsieve_keys", ())
            failure = next((failures[key] for key in keys if key in failures), None)
            if state is None or failure is None:
                continue
            whole = state.parent_req or state  # of several answers to one request
            if not getattr(whole, "vidsieve_counted", False):
                whole.vidsieve_counted = True
                count(failure)
                outcome = "this error" if failure.on_error == "fail" else "an answer from uniform tokens"
                LOG.error("request %s: %s; it gets %s", state.external_req_id, failure.message, outcome)
            if failure.on_error != "fail":
                continue
            if state.queue is not None:
                aborted += self.abort_requests([whole.request_id], internal=True)
                state.queue.put(refusal(failure.message))
                continue
            aborted.append(output.request_id)
            output.new_token_ids, output.new_logprobs = [], None
            output.finish_reason, output.stop_reason = error, failure.message
            if output.pooling_output is not None:
                output.pooling_output = output.pooling_output[:0]
        processed_outputs = process(self, engine_core_outputs, *arguments, **options)
        processed_outputs.reqs_to_abort.extend(aborted)
        return processed_outputs

    processed.vidsieve = True  # type: ignore[attr-defined]
    processor.__init__, processor.add_request, processor.process_outputs = started, added, processed
