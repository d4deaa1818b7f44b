"""A Hugging Face hub on 127.0.0.1, as far as huggingface_hub asks it for models: make, look, commit, download.

Files are kept in memory. A commit changes its branch whole or not at all, as the real one does. Every request is noted.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from transformers.utils import hub as transformers_hub

TOKEN = "hf_of_a_writer"
READER = "hf_of_a_reader"
LFS_SUFFIXES = (".safetensors", ".onnx")
Files = dict[str, bytes]


@dataclass
class Repository:
    """One model repository: its commits by id, and what names them."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, revision: str, files: Mapping[str, bytes], title: str) -> str:
        """Let a branch hold exactly these files."""
        sha = hashlib.sha1(f"{len(self.titles)} {title}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.titles.append(title)
        self.branches[revision] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """Return the commit that a branch, a tag or a commit's own id means."""
        sha = self.branches.get(revision, self.tags.get(revision, revision))
        return sha if sha in self.commits else None


class FakeHub:
    """The state of the hub, and what tests ask and arrange.

    Attributes:
        url: Where it listens, once it runs.
        lfs: Whether large files go the way of LFS; else everything goes into the commit itself.
        requests: Method and path of every request so far.
        unknown: Those that this hub has no answer to.
        failures: Method and a part of the path to the status and message that such requests get.
    """

    def __init__(self) -> None:
        self.url = ""
        self.lfs = False
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.unknown: list[tuple[str, str]] = []
        self.failures: dict[tuple[str, str], tuple[int, str]] = {}
        self.lock = threading.Lock()

    def make(self, repo_id: str) -> Repository:
        """Return a repository, which is made as the hub makes it if it is missing."""
        repository = self.repositories.setdefault(repo_id, Repository())
        if not repository.branches:
            repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial")
        return repository

    def put(self, repo_id: str, files: Mapping[str, bytes], *, revision: str = "main") -> str:
        """Add files to a repository, which is made if it is missing; return the commit."""
        repository = self.make(repo_id)
        former = repository.commits[repository.branches.get(revision, repository.branches["main"])]
        return repository.commit(revision, {**former, **files}, "put")

    def files(self, repo_id: str, revision: str = "main") -> Files:
        """Return what a repository holds, but for `.gitattributes`."""
        repository = self.repositories[repo_id]
        files = dict(repository.commits[repository.resolve(revision) or ""])
        files.pop(".gitattributes")
        return files

    def writes(self) -> list[tuple[str, str]]:
        """Return the requests that change something or send content."""
        return [each for each in self.requests if each[0] not in ("GET", "HEAD")]

    def is_lfs(self, path: str) -> bool:
        """Say whether a file goes the way of LFS."""
        return self.lfs and path.endswith(LFS_SUFFIXES)


class RefusalError(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.content = json.dumps({"error": message, **more}).encode()


@contextmanager
def running(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """Run a hub, and have huggingface_hub of this process talk to it alone, with an empty cache and no token."""
    hub = FakeHub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    point_at(hub.url, monkeypatch, tmp_path)
    try:
        yield hub
    finally:
        close_session()
        server.shutdown()
        thread.join()
        server.server_close()


def point_at(url: str, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Have huggingface_hub of this process, which has read its environment already, ask one address."""
    settings = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "cache"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / "harnesses.json"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value, raising=False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # transformers keeps one client, with the address of when it was first asked.
    monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)
    # The client of before has its own idea of proxies.
    close_session()


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        """Keep stderr for what is tested."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        with self.state.lock:
            # Asked once a process, by any request, for its user agent.
            if path != "/api/agent-harnesses":
                self.state.requests.append((self.command, path))
            try:
                self._fail_as_arranged(path)
                content, headers = self._route(path, body)
                status = 200
            except RefusalError as refusal:
                status, content = refusal.status, refusal.content
                headers = {"X-Error-Message": refusal.message}
                if refusal.code:
                    headers["X-Error-Code"] = refusal.code
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _fail_as_arranged(self, path: str) -> None:
        for (method, part), (status, message) in self.state.failures.items():
            if method == self.command and part in path:
                raise RefusalError(status, message)

    def _route(self, path: str, body: bytes) -> tuple[bytes, dict[str, str]]:
        words = path.strip("/").split("/")
        if words[:2] == ["api", "models"] and len(words) >= 4:
            answer = self._model("/".join(words[2:4]), words[4:], body)
        elif path == "/api/repos/create":
            answer = self._create(json.loads(body))
        elif path == "/api/agent-harnesses":
            answer = {"standardEnvVars": [], "harnesses": {}}
        elif path == "/api/validate-yaml":
            answer = self._validate(json.loads(body)["content"])
        elif path.endswith(".git/info/lfs/objects/batch"):
            answer = self._batch(json.loads(body))
        elif self.command == "PUT" and words[0] == "lfs":
            if hashlib.sha256(body).hexdigest() != words[1]:
                raise RefusalError(400, "content and oid differ")
            self.state.blobs[words[1]] = body
            answer = {}
        elif len(words) > 4 and words[2] == "resolve":
            return self._resolve("/".join(words[:2]), words[3], "/".join(words[4:]))
        else:
            self.state.unknown.append((self.command, path))
            raise RefusalError(404, "this hub has no such page")
        return json.dumps(answer).encode(), {"Content-Type": "application/json"}

    def _model(self, repo_id: str, words: list[str], body: bytes) -> Any:
        repository = self._readable(repo_id)
        verb, rest = (words[0], "/".join(words[1:])) if words else ("revision", "main")
        if verb == "revision":
            sha = self._sha(repository, rest)
            names = [{"rfilename": name} for name in sorted(repository.commits[sha])]
            return {"id": repo_id, "sha": sha, "private": repository.private, "siblings": names}
        if verb == "tree":
            revision, _, folder = rest.partition("/")
            return self._tree(repository.commits[self._sha(repository, revision)], folder)
        if verb == "refs":
            return {
                "branches": _refs("heads", repository.branches),
                "converts": [],
                "tags": _refs("tags", repository.tags),
            }
        if verb not in ("branch", "preupload", "commit"):
            self.state.unknown.append((self.command, self.path))
            raise RefusalError(404, "this hub has no such page")
        self._need_writer()
        if verb == "branch":
            if rest in repository.branches:
                raise RefusalError(409, "the branch exists")
            repository.branches[rest] = repository.branches["main"]
            return {}
        files = repository.commits[self._sha(repository, rest)]
        if verb == "preupload":
            return {"files": [self._mode(each, files) for each in json.loads(body)["files"]]}
        return self._commit(repo_id, repository, rest, body)

    def _tree(self, files: Files, folder: str) -> Any:
        prefix = f"{folder}/" if folder else ""
        entries = []
        for path, content in sorted(files.items()):
            if path.startswith(prefix):
                entry = {
                    "type": "file",
                    "path": path,
                    "size": len(content),
                    "oid": git_oid(content),
                }
                if self.state.is_lfs(path):
                    oid = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
                entries.append(entry)
        if folder and not entries:
            raise RefusalError(404, f"{folder} does not exist", "EntryNotFound")
        return entries

    def _create(self, wanted: dict[str, Any]) -> Any:
        self._need_writer()
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] == "others":
            raise RefusalError(403, "you may not write to others")
        assert wanted.get("type", "model") == "model"
        if repo_id in self.state.repositories:
            raise RefusalError(409, "it is there already", url=f"{self.state.url}/{repo_id}")
        repository = self.state.make(repo_id)
        repository.private = wanted.get("visibility") == "private" or wanted.get("private", False)
        return {"url": f"{self.state.url}/{repo_id}"}

    def _validate(self, card: str) -> Any:
        if card.startswith("---\n") and "\n---\n" not in card:
            raise RefusalError(400, "the metadata has no end")
        return {"errors": [], "warnings": []}

    def _mode(self, wanted: dict[str, Any], files: Files) -> Any:
        path, lfs = wanted["path"], self.state.is_lfs(wanted["path"])
        answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        if path in files:
            content = files[path]
            answer["oid"] = hashlib.sha256(content).hexdigest() if lfs else git_oid(content)
        return answer

    def _batch(self, wanted: dict[str, Any]) -> Any:
        self._need_writer()
        objects = [
            {
                "oid": each["oid"],
                "size": each["size"],
                "actions": {"upload": {"href": f"{self.state.url}/lfs/{each['oid']}"}},
            }
            for each in wanted["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _commit(self, repo_id: str, repository: Repository, revision: str, body: bytes) -> Any:
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        parent = self._sha(repository, revision)
        if header.get("parentCommit", parent) != parent:
            raise RefusalError(412, "a commit has happened since")
        files = dict(repository.commits[parent])
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.state.blobs[value["oid"]]
            else:
                assert key == "deletedFile", key
                del files[value["path"]]
        wants_pr = "create_pr=1" in urlsplit(self.path).query
        sha = repository.commit("refs/pr/1" if wants_pr else revision, files, header["summary"])
        answer = {"commitUrl": f"{self.state.url}/{repo_id}/commit/{sha}", "commitOid": sha}
        if wants_pr:
            answer["pullRequestUrl"] = f"{self.state.url}/{repo_id}/discussions/1"
        return answer

    def _resolve(self, repo_id: str, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
        repository = self._readable(repo_id)
        sha = self._sha(repository, revision)
        content = repository.commits[sha].get(path)
        if content is None:
            raise RefusalError(404, f"there is no {path}", "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{git_oid(content)}"'}
        if self.state.is_lfs(path):
            headers["X-Linked-ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(content))
        return content, headers

    def _sha(self, repository: Repository, revision: str) -> str:
        sha = repository.resolve(revision)
        if sha is None:
            raise RefusalError(404, f"there is no revision {revision}", "RevisionNotFound")
        return sha

    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _readable(self, repo_id: str) -> Repository:
        repository = self.state.repositories.get(repo_id)
        if repository is None or (repository.private and self._token() is None):
            raise RefusalError(404, "there is no such repository", "RepoNotFound")
        return repository

    def _need_writer(self) -> None:
        token = self._token()
        if token is None:
            raise RefusalError(401, "who are you?")
        if token != TOKEN:
            raise RefusalError(403, "this token may only read")


def git_oid(content: bytes) -> str:
    """Return git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _refs(kind: str, names: Mapping[str, str]) -> list[dict[str, str]]:
    return [
        {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha}
        for name, sha in names.items()
    ]
