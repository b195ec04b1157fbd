"""A small double of the Hugging Face Hub on loopback, for tests that drive the real ``huggingface_hub`` client.

It keeps model repositories in memory and speaks what the client speaks: who am I, create a repository, branches,
preupload, LFS upload with its checks, commits, trees, and downloads with the headers and error codes of the Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_double"
USER = "me"
# What the Hub's own .gitattributes sends to LFS, as far as checkpoints have such files.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".zip")
FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass(frozen=True)
class Blob:
    """One version of one file."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    """A model repository: commits (their files), and branches that point at them."""

    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {branch} {message}".encode()).hexdigest()
        self.commits[oid] = files
        self.messages.append(message)
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str:
        """The commit of a branch or of a commit's own name. Raises ``Refused``."""
        if revision in self.branches:
            return self.branches[revision]
        if revision in self.commits:
            return revision
        raise Refused(404, f"no revision {revision}", "RevisionNotFound")

    @property
    def files(self) -> dict[str, Blob]:
        """The files of ``main``."""
        return self.commits[self.branches["main"]]


class Refused(Exception):
    """An answer that is an error: status, the Hub's message, and its ``X-Error-Code``."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


@dataclass
class HubDouble:
    """The state of the double; ``url`` is its endpoint.

    Attributes:
        repos: repositories by id.
        store: LFS objects by their sha256.
        requests: ``(method, path, status)`` of everything that was asked.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    store: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def environment(self, home: Any, token: str | None = TOKEN) -> dict[str, str]:
        """The variables that send a process with an empty cache under ``home`` to this double."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            **({"HF_TOKEN": token} if token else {}),
        }

    def find(self, repo_id: str, authorized: bool) -> Repo:
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not authorized):
            raise Refused(404 if authorized else 401, "Repository not found", "RepoNotFound")
        return repo


@dataclass(frozen=True)
class Request:
    """What a route gets."""

    hub: HubDouble
    match: re.Match[str]
    body: bytes
    authorized: bool

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def repo_id(self) -> str:
        return self.match["repo"]

    def reads(self) -> Repo:
        return self.hub.find(self.repo_id, self.authorized)

    def writes(self) -> Repo:
        self.authenticated()
        repo = self.reads()
        if not self.repo_id.startswith(f"{USER}/"):
            raise Refused(403, f"You don't have the rights to write to {self.repo_id}")
        return repo

    def authenticated(self) -> None:
        if not self.authorized:
            raise Refused(401, "Invalid username or password.")

    def revision(self, repo: Repo) -> str:
        return repo.resolve(unquote(self.match["revision"] or "main"))


Answer = tuple[int, bytes, dict[str, str]]
ROUTES: list[tuple[str, re.Pattern[str], Callable[[Request], Answer]]] = []


def route(method: str, pattern: str) -> Callable[[Callable[[Request], Answer]], Callable[[Request], Answer]]:
    def add(function: Callable[[Request], Answer]) -> Callable[[Request], Answer]:
        ROUTES.append((method, re.compile(pattern + r"\Z"), function))
        return function

    return add


def answer(data: Any, status: int = 200) -> Answer:
    return status, json.dumps(data).encode(), {"Content-Type": "application/json"}


@route("GET", "/api/whoami-v2")
def whoami(request: Request) -> Answer:
    request.authenticated()
    return answer(
        {"type": "user", "id": "0", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}}
    )


@route("POST", "/api/repos/create")
def create_repo(request: Request) -> Answer:
    request.authenticated()
    asked = request.json
    owner = asked.get("organization") or USER
    repo_id = f"{owner}/{asked['name']}"
    if owner != USER:
        raise Refused(403, f"You don't have the rights to create a model under the namespace {owner}")
    with request.hub.lock:
        if repo_id in request.hub.repos:
            # The client reads the address off this refusal, too.
            return answer({"error": "You already created this model repo", "url": f"{request.hub.url}/{repo_id}"}, 409)
        request.hub.repos[repo_id] = Repo(private=asked.get("visibility") == "private")
        request.hub.repos[repo_id].commit(
            "main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit"
        )
    return answer({"url": f"{request.hub.url}/{repo_id}", "name": repo_id, "id": "0"})


@route("POST", "/api/validate-yaml")
def validate_yaml(request: Request) -> Answer:
    found = FRONT_MATTER.match(request.json["content"])
    if found is None:
        return answer({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    try:
        metadata = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return answer({"error": "Invalid YAML", "errors": [{"message": str(error)}]}, 400)
    wrong = [key for key in ("tags", "datasets") if not isinstance(metadata.get(key, []), (list, str))]
    if wrong:
        return answer(
            {"error": "Invalid metadata", "errors": [{"message": f"{key} must be a list"} for key in wrong]}, 400
        )
    return answer({"errors": [], "warnings": []})


@route("POST", f"/api/models/{REPO}/branch/(?P<revision>[^/]+)")
def create_branch(request: Request) -> Answer:
    repo, name = request.writes(), unquote(request.match["revision"])
    if name in repo.branches:
        raise Refused(409, f"Reference refs/heads/{name} already exists")
    repo.branches[name] = repo.resolve(request.json.get("startingPoint", "main"))
    return answer({}, 201)


@route("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)")
def preupload(request: Request) -> Answer:
    repo = request.writes()
    tree = repo.commits[request.revision(repo)]
    files = []
    for file in request.json["files"]:
        known = tree.get(file["path"])
        oid = None if known is None else known.sha256 if known.lfs else known.git_oid
        mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) or file["size"] > 10 * 2**20 else "regular"
        files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return answer({"files": files})


@route("POST", f"/{REPO}[.]git/info/lfs/objects/batch")
def lfs_batch(request: Request) -> Answer:
    request.writes()
    objects = []
    for item in request.json["objects"]:
        wanted = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] not in request.hub.store:
            home = f"{request.hub.url}/lfs/{item['oid']}/{item['size']}"
            wanted["actions"] = {"upload": {"href": home}, "verify": {"href": home + "/verify"}}
        objects.append(wanted)
    return answer({"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})/(?P<size>[0-9]+)")
def lfs_put(request: Request) -> Answer:
    if (
        len(request.body) != int(request.match["size"])
        or hashlib.sha256(request.body).hexdigest() != request.match["oid"]
    ):
        raise Refused(422, "the uploaded bytes are not those that were announced")
    request.hub.store[request.match["oid"]] = request.body
    return answer({})


@route("POST", "/lfs/(?P<oid>[0-9a-f]{64})/(?P<size>[0-9]+)/verify")
def lfs_verify(request: Request) -> Answer:
    stored, asked = request.hub.store.get(request.match["oid"]), request.json
    if stored is None or asked["oid"] != request.match["oid"] or asked["size"] != len(stored):
        raise Refused(404, "no such object")
    return answer({})


@route("POST", f"/api/models/{REPO}/commit/(?P<revision>[^/]+)")
def commit(request: Request) -> Answer:
    repo = request.writes()
    branch = unquote(request.match["revision"])
    header, *operations = [json.loads(line) for line in request.body.splitlines()]
    with request.hub.lock:
        files = dict(repo.commits[repo.resolve(branch)])
        for operation in operations:
            _apply(files, operation["key"], operation["value"], request.hub.store)
        oid = repo.commit(branch, files, header["value"]["summary"])
    return answer({"success": True, "commitOid": oid, "commitUrl": f"{request.hub.url}/{request.repo_id}/commit/{oid}"})


def _apply(files: dict[str, Blob], key: str, value: dict[str, Any], store: dict[str, bytes]) -> None:
    if key == "file":
        files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
    elif key == "lfsFile":
        content = store.get(value["oid"])
        if content is None or len(content) != value["size"]:
            raise Refused(400, f"{value['path']} points to an LFS object that was not uploaded")
        files[value["path"]] = Blob(content, lfs=True)
    elif key == "deletedFile":
        if files.pop(value["path"], None) is None:
            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
    else:
        raise Refused(400, f"unknown operation {key}")


@route("GET", f"/api/models/{REPO}(?:/revision/(?P<revision>[^/]+))?")
def model_info(request: Request) -> Answer:
    repo = request.reads()
    oid = request.revision(repo)
    siblings = [{"rfilename": path} for path in sorted(repo.commits[oid])]
    facts = {"_id": "0", "id": request.repo_id, "modelId": request.repo_id, "private": repo.private, "tags": []}
    return answer(
        {**facts, "sha": oid, "siblings": siblings, "downloads": 0, "likes": 0, "disabled": False, "gated": False}
    )


@route("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
def tree(request: Request) -> Answer:
    repo = request.reads()
    oid = request.revision(repo)
    under = f"{unquote(request.match['path'])}/" if request.match["path"] else ""
    files = {path: blob for path, blob in sorted(repo.commits[oid].items()) if path.startswith(under)}
    if under and not files:
        raise Refused(404, f"{under} does not exist on {oid}", "EntryNotFound", {"X-Repo-Commit": oid})
    return answer([_entry(path, blob) for path, blob in files.items()])


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    lfs = {"lfs": {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}} if blob.lfs else {}
    return {"type": "file", "path": path, "size": len(blob.content), "oid": blob.git_oid, **lfs}


@route("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(request: Request) -> Answer:
    repo = request.reads()
    oid = request.revision(repo)
    blob = repo.commits[oid].get(unquote(request.match["path"]))
    if blob is None:
        raise Refused(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": oid})
    if not blob.lfs:
        return 200, blob.content, {"ETag": f'"{blob.git_oid}"', "X-Repo-Commit": oid}
    # The Hub redirects to another host here, with these headers on the redirect; the double has one host only.
    linked = {"X-Linked-Size": str(len(blob.content)), "X-Linked-Etag": f'"{blob.sha256}"'}
    return 200, blob.content, {**linked, "ETag": f'"{blob.sha256}"', "X-Repo-Commit": oid}


class _Handler(BaseHTTPRequestHandler):
    """Finds the route of a request; a HEAD is a GET without its body."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def serve(self) -> None:
        path = urlsplit(self.path).path
        try:
            status, body, headers = self._answer("GET" if self.command == "HEAD" else self.command, path, self._body())
        except Refused as error:
            status, body, headers = answer({"error": error.message}, error.status)
            headers |= error.headers | {"X-Error-Message": error.message}
            headers |= {"X-Error-Code": error.code} if error.code else {}
        self.server.hub.requests.append((self.command, path, status))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def _answer(self, method: str, path: str, body: bytes) -> Answer:
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        for verb, pattern, function in ROUTES:
            match = pattern.match(path)
            if verb == method and match:
                return function(Request(self.server.hub, match, body, authorized))
        raise Refused(404, f"the double has no {method} {path}")

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: what was asked is in ``HubDouble.requests``."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: HubDouble) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub


@contextmanager
def hub_double() -> Iterator[HubDouble]:
    """A running double; it ends with the ``with`` block."""
    hub = HubDouble()
    server = _Server(hub)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
