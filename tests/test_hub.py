"""Policies on the hub, against a server that answers what huggingface_hub asks for: no network."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants as constants
import pytest
import torch

from vidsieve import load
from vidsieve.compressors.score import Score, ScorePolicy
from vidsieve.errors import PolicyError
from vidsieve.evaluation.conditions import method_for
from vidsieve.policies import model_card
from vidsieve.registry import check_known
from vidsieve.testing import make_video
from vidsieve.testing.checks import WIDTH
from vidsieve.types import TokenGrid

# huggingface_hub's own upload of large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


def blob_hash(data):
    """Return the hash that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(ThreadingHTTPServer):
    """Model repositories in memory: a commit is a dict of files, and a revision the hash of one."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.revisions: dict[str, dict[str, str]] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.lock = threading.Lock()

    def commit(self, name, changes, branch="main"):
        """Add a commit with changed files on top of a branch, and return its hash."""
        with self.lock:
            commits, revisions = self.repositories[name], self.revisions[name]
            files = {**commits.get(revisions.get(branch, ""), {}), **changes}
            text = json.dumps([len(commits), *sorted((path, blob_hash(data)) for path, data in files.items())])
            revisions[branch] = hashlib.sha1(text.encode()).hexdigest()
            commits[revisions[branch]] = files
            return revisions[branch]

    def create(self, name):
        self.repositories[name], self.revisions[name] = {}, {}


class Answers(BaseHTTPRequestHandler):
    """The endpoints of the hub that a push and a load of a model repository use."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value=b"", status=200, **headers):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status, code):
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def files(self, name, revision):
        """Return the hash and files of a revision; None after refusing it."""
        if name not in self.server.repositories:
            self.refuse(404, "RepoNotFound")
            return None
        commit = self.server.revisions[name].get(revision, revision)
        if commit not in self.server.repositories[name]:
            self.refuse(404, "RevisionNotFound")
            return None
        return commit, self.server.repositories[name][commit]

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            if there := self.files(*found.groups()):
                self.answer([entry(path, data) for path, data in there[1].items()])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            if there := self.files(found[1], found[2] or "main"):
                self.answer({"id": found[1], "sha": there[0], "siblings": [{"rfilename": path} for path in there[1]]})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if there := self.files(found[1], found[2]):
                data = there[1][found[3]]
                etag = entry(found[3], data).get("lfs", {}).get("oid") or blob_hash(data)
                self.answer(data, ETag=f'"{etag}"', X_Repo_Commit=there[0])
        else:
            self.refuse(404, "EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        if path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != "Bearer may-write":
            self.refuse(401, "Unauthorized")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            there = name in self.server.repositories
            if not there:
                self.server.create(name)
            self.answer({"url": f"{self.server.url}/{name}"}, 409 if there else 200)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": modes})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for thing in objects:
                if thing["oid"] not in self.server.large:
                    thing["actions"] = {"upload": {"href": f"{self.server.url}/large/{thing['oid']}"}}
            self.answer({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            changes = {}
            for line in body.splitlines():
                part = json.loads(line)
                value = part["value"]
                if part["key"] == "file":
                    changes[value["path"]] = base64.b64decode(value["content"])
                elif part["key"] == "lfsFile":
                    changes[value["path"]] = self.server.large[value["oid"]]
            commit = self.server.commit(found[1], changes, found[2])
            self.answer({"commitUrl": f"{self.server.url}/{found[1]}/commit/{commit}", "commitOid": commit})
        else:
            self.refuse(404, "EntryNotFound")

    def do_PUT(self):
        data = b""
        if "Content-Length" in self.headers:
            data = self.rfile.read(int(self.headers["Content-Length"]))
        else:  # in chunks, the last of which is empty
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(data).hexdigest() != oid:
            self.refuse(400, "WrongHash")
            return
        self.server.large[oid] = data
        self.answer()


def is_large(path):
    return path.endswith(".safetensors")


def entry(path, data):
    """Return a file as the hub lists it."""
    large = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
    return {"type": "file", "path": path, "size": len(data), "oid": blob_hash(data)} | (large if is_large(path) else {})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of this test's own, and an empty cache; the constants are what HF_ENDPOINT and HF_HOME set at import."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "may-write")
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def policy():
    return ScorePolicy.start(WIDTH, "llava_onevision", hidden=16, seed=3, base_model="Owner/Base")


def equal(policy, other):
    mine, theirs = policy.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_pushed_policy_is_loaded_bit_by_bit_and_by_revision(hub, policy):
    first = policy.push_to_hub("someone/clips")
    hub.revisions["someone/clips"]["v1"] = first
    changed = ScorePolicy.start(WIDTH, "llava_onevision", hidden=16, seed=4)
    second = changed.push_to_hub("someone/clips", message="Train longer")
    assert first != second and set(hub.repositories["someone/clips"][second]) == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    assert equal(ScorePolicy.from_pretrained("someone/clips"), changed)
    assert equal(ScorePolicy.from_pretrained("someone/clips", revision="v1"), policy)
    assert equal(ScorePolicy.from_pretrained("someone/clips", revision=first), policy)
    for method in (
        load("someone/clips@v1", retention=0.5),
        load("score", "someone/clips@v1", retention=0.5),
        method_for("someone/clips@v1").with_retention(0.5),
        method_for("score", "Owner/Base", "someone/clips@v1").with_retention(0.5),
    ):
        assert isinstance(method, Score) and equal(method.policy, policy) and method.retention == 0.5
    with pytest.raises(PolicyError, match="someone/clips has no revision 'v2' at http"):
        load("someone/clips@v2")


def test_the_environment_s_endpoint_and_cache_are_used(hub, policy, tmp_path):
    policy.push_to_hub("someone/clips")
    home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    code = "import vidsieve; print(vidsieve.load('someone/clips').name)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **home, "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "score\n", done.stderr
    assert list((tmp_path / "home" / "hub").glob("models--someone--clips/snapshots/*/model.safetensors"))


def test_only_the_two_files_of_a_policy_are_fetched(hub, policy):
    policy.push_to_hub("someone/clips")
    hub.commit("someone/clips", {"optimizer.pt": pickle.dumps({}), "pytorch_model.bin": pickle.dumps({})})
    load("someone/clips")
    fetched = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert fetched == {"config.json", "model.safetensors"}


def flipped(data):
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda files: {"model.safetensors": flipped(files["model.safetensors"])},
            "it was damaged after it was written",
        ),
        (lambda files: {"model.safetensors": pickle.dumps({"a": 1})}, "no readable safetensors file"),
        (lambda files: {"config.json": files["config.json"].replace(b'"score"', b'"sieve"')}, "its checksum differs"),
        (lambda files: {"config.json": b"{"}, "is not JSON"),
        (lambda files: {"config.json": pickle.dumps({"a": 1})}, "is not UTF-8"),
    ],
    ids=["weights", "weights pickled", "config edited", "config cut", "config pickled"],
)
def test_a_tampered_file_is_refused_in_one_line(hub, policy, change, said):
    good = policy.push_to_hub("someone/clips")
    hub.commit("someone/clips", change(hub.repositories["someone/clips"][good]))
    with pytest.raises(PolicyError, match=said) as refused:
        load("someone/clips")
    assert "\n" not in str(refused.value)
    assert equal(load(f"someone/clips@{good}").policy, policy)


def test_weights_of_another_save_are_refused(hub, policy, tmp_path):
    policy.push_to_hub("someone/clips")
    ScorePolicy.start(WIDTH, "llava_onevision", hidden=16, seed=4).save_pretrained(tmp_path / "other")
    hub.commit("someone/clips", {"model.safetensors": (tmp_path / "other" / "model.safetensors").read_bytes()})
    with pytest.raises(PolicyError, match="of different saves"):
        load("someone/clips")


def test_a_repository_of_pickles_is_no_policy(hub, policy):
    hub.create("someone/pickles")
    hub.commit("someone/pickles", {"config.json": policy.config.to_json().encode(), "model.bin": pickle.dumps({})})
    with pytest.raises(PolicyError, match=r"no model\.safetensors, and no other file is read, pickles never"):
        load("someone/pickles")
    assert not any("model.bin" in path for path in hub.asked)


def test_a_missing_folder_is_told_from_a_hub_name_before_the_hub_is_asked(hub, tmp_path):
    (tmp_path / "runs").mkdir()
    for name in ("runs/score", "./some/one", "/some/one", "a/b/c", "some/one@", "some/one@../two"):
        with pytest.raises(PolicyError, match=f"no policy in {name}: config.json is missing there"):
            load(name)
        with pytest.raises(PolicyError, match="no policy in"):
            check_known(name)
    with pytest.raises(PolicyError, match="runs is a local folder, so the hub is not asked"):
        load("runs/score")
    with pytest.raises(PolicyError, match="is for a name on the hub"):
        ScorePolicy.from_pretrained(tmp_path, revision="v1")
    assert hub.asked == []
    with pytest.raises(PolicyError, match=r"there is no folder some/one, and http://.* shows you no such repository"):
        load("some/one")


def test_out_of_reach_the_error_names_the_cache_and_what_to_do(hub, policy, tmp_path, monkeypatch):
    policy.push_to_hub("someone/clips")
    load("someone/clips")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert equal(load("someone/clips").policy, policy)
    cache = re.escape(str(tmp_path / "cache"))
    with pytest.raises(PolicyError, match=f"cache {cache} does not have it, and HF_HUB_OFFLINE is set: unset it"):
        load("some/one")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(PolicyError, match=f"cache {cache} does not have it, and http://127.0.0.1:1 cannot be reached"):
        load("some/one")
    with pytest.raises(PolicyError, match=r"cannot push to some/one at http://127.0.0.1:1: ") as refused:
        policy.push_to_hub("some/one")
    assert "\n" not in str(refused.value)


def test_a_push_without_leave_is_one_line(hub, policy, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "may-read")
    with pytest.raises(PolicyError, match=r"cannot push to someone/clips at .*401.*hf auth login") as refused:
        policy.push_to_hub("someone/clips")
    assert "\n" not in str(refused.value) and not hub.repositories
    with pytest.raises(PolicyError, match="'clips' is no repository of the hub: give OWNER/NAME"):
        policy.push_to_hub("clips")


def test_the_card_says_what_the_policy_is(hub):
    shipped = load("cacovid", "testbed", variant="paper").policy
    shipped.push_to_hub("someone/paper", measured="### Testbed\n\n| method | % |\n|---|---|\n| cacovid | 47 |")
    card = hub.repositories["someone/paper"][hub.revisions["someone/paper"]["main"]]["README.md"].decode()
    for line in (
        "library_name: vidsieve",
        "| method | cacovid |",
        "| variant | paper |",
        "| base model | testbed:shallow |",
        "| width of its video tokens | 128 |",
        "| steps | 1200 |",
        "| world | sparse |",
        "| cacovid | 47 |",
        'method = vidsieve.load("someone/paper", retention=0.25)',
    ):
        assert line in card.splitlines()
    assert "base_model:" not in card
    plain = model_card(ScorePolicy.start(WIDTH, "none", hidden=16, base_model="Owner/Base").config, "a/b")
    assert "\nbase_model: Owner/Base\n" in plain and "No training record" in plain and "Nothing was measured" in plain
    method = load("someone/paper", retention=0.5)
    assert len(method.compress(make_video(TokenGrid(2, 3, 3), width=128)).indices) == 9
