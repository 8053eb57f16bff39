"""How vLLM's front end learns of failed selections, and what their requests get, with stand-ins for what is vLLM's."""

from __future__ import annotations

import os
import tempfile
from types import SimpleNamespace

import pytest
import torch

from vidsieve.serving.vllm import failures
from vidsieve.serving.vllm.failures import (
    KEY_BYTES,
    VARIABLE,
    Failures,
    SelectionFailure,
    report,
    report_key,
    server_name,
    video_key,
    watch,
)

MESSAGE = "fragile failed on a video of this request: ZeroDivisionError: a marked video"


def failure(on_error="fail"):
    return SelectionFailure.of("fragile", ZeroDivisionError("a marked video\nand more"), on_error)


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


# -- what the worker tells -------------------------------------------------------------------------------------


def test_failures_are_told_under_the_keys_of_their_videos(folder):
    failures = Failures()
    assert not failures.known()
    key = report_key("../a name that a request chose")
    assert key.dtype == torch.uint8 and key.shape == (KEY_BYTES,)
    assert torch.equal(key, report_key("../a name that a request chose"))
    report(key, failure())
    report(report_key("other"), failure("uniform"))
    wanted = SelectionFailure("fragile", "ZeroDivisionError: a marked video", "fail")
    assert failures.known() == {
        video_key("../a name that a request chose"): wanted,
        video_key("other"): failure("uniform"),
    }
    assert wanted.message == MESSAGE
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert not Failures().known(), "what an earlier engine of a process reported"


def test_a_line_that_is_not_complete_is_read_later(folder):
    failures = Failures()
    report(report_key("video"), failure())
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:20])
    assert not failures.known()
    with file.open("ab") as end:
        end.write(whole[20:])
    assert failures.known() == {video_key("video"): failure()}


def test_a_file_that_was_cleaned_away_is_there_for_the_next_video(folder):
    ours, theirs = Failures(), Failures()  # two front ends of a server
    report(report_key("first"), failure())
    (file,) = folder.iterdir()
    file.unlink()
    ours.expect()
    ours.expect()
    report(report_key("second"), failure())
    assert set(ours.known()) == {video_key("first"), video_key("second")}
    theirs.expect()
    assert video_key("second") in theirs.known()


def test_a_worker_that_no_front_end_would_hear_raises():
    with pytest.raises(FileNotFoundError):
        report(report_key("video"), failure())


def test_an_error_is_one_short_line():
    assert SelectionFailure.of("fragile", ValueError(), "fail").error == "ValueError"
    assert len(SelectionFailure.of("fragile", ValueError("x" * 10_000), "fail").error) == failures.LONGEST


def test_the_processes_of_a_server_share_its_name(monkeypatch):
    server_name.cache_clear()
    monkeypatch.setenv(VARIABLE, "00" * 8)
    first = server_name()
    assert first != "00" * 8 and os.environ[VARIABLE] == first, "another server's, started from this one's process"
    server_name.cache_clear()
    monkeypatch.setattr(failures, "parent_process", lambda: "the first process")
    assert server_name() == first


# -- what requests get -----------------------------------------------------------------------------------------


class Queue(list):
    put = list.append


class Processor:
    """What of vLLM's output processor is called."""

    def __init__(self):
        self.request_states, self.aborted, self.seen = {}, [], []

    def add_request(self, request, prompt, parent_req=None, request_index=0, queue=None):
        self.request_states[request.request_id] = SimpleNamespace(
            request_id=request.request_id,
            external_req_id=request.request_id.split("-")[0],
            parent_req=parent_req,
            queue=queue,
        )

    def abort_requests(self, names, internal):
        assert internal
        gone = [
            name for name, state in self.request_states.items() if (state.parent_req or state).request_id in set(names)
        ]
        for name in gone:
            self.request_states.pop(name).queue.put("aborted")
        return gone

    def process_outputs(self, engine_core_outputs, engine_core_timestamp=None):
        self.seen += [o.request_id for o in engine_core_outputs if o.request_id in self.request_states]
        return SimpleNamespace(request_outputs=[], reqs_to_abort=["stopped"])


@pytest.fixture
def served(monkeypatch):
    """A watched output processor, and what was counted."""
    kind = type("Watched", (Processor,), {})
    watch(kind, RuntimeError, "error")
    process = kind.process_outputs
    watch(kind, RuntimeError, "error")  # vLLM may load plug-ins more than once
    assert kind.process_outputs is process
    told = []
    monkeypatch.setattr(failures, "count", told.append)
    return kind(), told


def ask(processor, name, *videos, queue=None, parent=None):
    features = [SimpleNamespace(modality="image", mm_hash="marked", identifier="marked")]
    features += [SimpleNamespace(modality="video", mm_hash=video, identifier=f"adapter:{video}") for video in videos]
    request = SimpleNamespace(request_id=name, mm_features=features if videos else None)
    processor.add_request(request, "prompt", parent, 0, queue)
    return request


def output(name, **more):
    fields = dict.fromkeys(("finish_reason", "stop_reason", "pooling_output")) | {"new_token_ids": [1]}
    return SimpleNamespace(**fields | {"request_id": name, "new_logprobs": "l"} | more)


def test_a_request_whose_selection_failed_gets_an_error_and_the_others_go_on(served, caplog):
    processor, told = served
    queues = {name: Queue() for name in ("a-1", "b-1", "c-1", "text-1")}
    for name, videos in (("a-1", ["fine"]), ("b-1", ["fine", "marked"]), ("text-1", [])):
        ask(processor, name, *videos, queue=queues[name])
    report(report_key("marked"), failure())
    done = processor.process_outputs([output("a-1"), output("b-1"), output("text-1"), output("gone")])
    assert processor.seen == ["a-1", "text-1"] and done.reqs_to_abort == ["stopped", "b-1"]
    assert [str(error) for error in queues["b-1"]] == ["aborted", MESSAGE] and not queues["a-1"] + queues["text-1"]
    assert isinstance(queues["b-1"][-1], RuntimeError), "the last that vLLM's queue is given is what a request gets"
    assert told == [failure()] and f"request b: {MESSAGE}; it gets this error" in caplog.text
    ask(processor, "c-1", "marked", queue=queues["c-1"])  # from vLLM's caches: nothing is reported again
    assert processor.process_outputs([output("a-1"), output("c-1")]).reqs_to_abort == ["stopped", "c-1"]
    assert len(told) == 2 and str(queues["c-1"][-1]) == MESSAGE


def test_several_answers_to_one_request_are_one_failure(served):
    processor, told = served
    queue, parent = Queue(), SimpleNamespace(request_id="a-1")
    for name in ("0_a-1", "1_a-1"):
        ask(processor, name, "marked", queue=queue, parent=parent)
    report(report_key("marked"), failure())
    done = processor.process_outputs([output("0_a-1"), output("1_a-1")])
    assert done.reqs_to_abort == ["stopped", "0_a-1", "1_a-1"] and not processor.seen and len(told) == 1
    assert [str(found) for found in queue] == ["aborted", "aborted", MESSAGE]


def test_offline_a_request_ends_with_the_reason_error(served):
    processor, told = served
    ask(processor, "0-1", "marked")
    ask(processor, "1-1", "marked")
    ask(processor, "2-1", "fine")
    report(report_key("marked"), failure())
    outputs = [output("0-1"), output("1-1", pooling_output=torch.ones(4)), output("2-1")]
    done = processor.process_outputs(outputs)
    assert vars(outputs[0]) == vars(
        output("0-1", new_token_ids=[], new_logprobs=None, finish_reason="error", stop_reason=MESSAGE)
    )
    assert outputs[1].pooling_output.numel() == 0 and outputs[2].new_token_ids == [1]
    assert (
        done.reqs_to_abort == ["stopped", "0-1", "1-1"] and processor.seen == ["0-1", "1-1", "2-1"] and len(told) == 2
    )


def test_under_uniform_a_request_is_answered_counted_and_named(served, caplog):
    processor, told = served
    queue = Queue()
    ask(processor, "a-1", "marked", queue=queue)
    report(report_key("marked"), failure("uniform"))
    for _ in range(3):
        assert processor.process_outputs([output("a-1")]).reqs_to_abort == ["stopped"]
    assert processor.seen == ["a-1"] * 3 and not queue
    assert told == [failure("uniform")]
    assert caplog.text.count(f"request a: {MESSAGE}; it gets an answer from uniform tokens") == 1


def test_the_metric_says_method_and_outcome(monkeypatch):
    seen = []

    class Counter:
        def labels(self, method, outcome):
            seen.append((method, outcome))
            return self

        def inc(self):
            seen.append("one")

    monkeypatch.setattr(failures, "_counter", Counter)
    failures.count(failure())
    failures.count(failure("uniform"))
    assert seen == [("fragile", "error"), "one", ("fragile", "uniform"), "one"]
