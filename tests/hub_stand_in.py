"""A Hub on loopback, for the real client: repositories with commits, large files, branches, tokens.

It keeps to what `huggingface_hub` asks of the real one: repositories are made, files announced
("preupload"), large ones sent by the LFS batch protocol, and one commit makes all of them current at
once. Faults can be set: a connection that breaks in an upload, a download that ends early or differs.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_right"
OWNER = "me"

_LARGE = re.compile(r".*\.(safetensors|bin|msgpack|h5)")


@dataclass
class Repository:
    """Commits in order, each a whole tree (path → SHA-256 of the content), and branches."""

    private: bool = False
    trees: dict[str, dict[str, str]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, tree: dict[str, str]) -> str:
        number = f"{len(self.trees)} {sorted(tree.items())}"
        name = hashlib.sha1(number.encode(), usedforsecurity=False).hexdigest()
        self.trees[name] = tree
        self.branches[branch] = name
        return name

    def resolve(self, revision: str) -> str | None:
        found = self.branches.get(revision, revision)
        return found if found in self.trees else None


@dataclass
class Faults:
    """What goes wrong, each until it is taken back.

    Attributes:
        uploads_left: large files that still arrive; in those after them the connection ends half way.
        cut_download: large files end after this many bytes.
        tamper: changes one byte of every large file on its way down.
        status: answers every request with this status.
    """

    uploads_left: int | None = None
    cut_download: int | None = None
    tamper: bool = False
    status: int | None = None


class HubStandIn:
    """`with HubStandIn() as hub:` serves at `hub.url` until the end of the block."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.contents: dict[str, bytes] = {}
        self.faults = Faults()
        self.uploaded: list[str] = []
        self.requests: list[str] = []
        self.unknown: list[str] = []

    def __enter__(self) -> HubStandIn:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision of a repository holds."""
        commit = self.repositories[repo].resolve(revision)
        assert commit is not None
        return {
            path: self.contents[key] for path, key in self.repositories[repo].trees[commit].items()
        }

    def put(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commits files beside those that are there."""
        repository = self.repositories.setdefault(repo, Repository())
        tree = dict(repository.trees.get(repository.branches.get(branch, ""), {}))
        for path, content in files.items():
            tree[path] = self.store(content)
        return repository.commit(branch, tree)

    def store(self, content: bytes) -> str:
        key = hashlib.sha256(content).hexdigest()
        self.contents[key] = content
        return key


def _handler(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(
            self, status: int, content: bytes | dict[str, Any] | list[Any] = b"", **headers: str
        ) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            headers.setdefault("Content_Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status: int, message: str, code: str = "") -> None:
            headers = {"X_Error_Message": message, **({"X_Error_Code": code} if code else {})}
            self.answer(status, {"error": message}, **headers)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def handle_request(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if hub.faults.status is not None:
                self.body()
                self.refuse(hub.faults.status, "the Hub is out of order")
                return
            for pattern, method in _ROUTES:
                if found := re.fullmatch(pattern, f"{self.command} {path}"):
                    getattr(self, method)(**found.groupdict())
                    return
            self.body()
            hub.unknown.append(f"{self.command} {self.path}")
            self.refuse(404, f"no such page: {path}")

        do_GET = do_HEAD = do_POST = do_PUT = handle_request

        def user(self) -> bool:
            """Whether the token is right; answers if it is not."""
            if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                return True
            self.body()
            self.refuse(401, "Invalid username or password.")
            return False

        def repository(self, repo: str) -> Repository | None:
            found = hub.repositories.get(repo)
            if found is None:
                self.body()
                self.refuse(404, f"Repository not found: {repo}", "RepoNotFound")
            return found

        def nothing(self) -> None:
            self.answer(200, {})

        # -- pages of the Hub ------------------------------------------------------------------------

        def whoami(self) -> None:
            if self.user():
                self.answer(200, {"type": "user", "name": OWNER, "orgs": []})

        def create(self) -> None:
            if not self.user():
                return
            asked = json.loads(self.body())
            repo = f"{asked.get('organization') or OWNER}/{asked['name']}"
            if repo in hub.repositories:
                self.answer(
                    409,
                    {"error": "You already created this model repo", "url": hub.url + "/" + repo},
                )
                return
            hub.repositories[repo] = Repository(private=asked.get("visibility") == "private")
            hub.put(
                repo, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
            )
            self.answer(200, {"url": f"{hub.url}/{repo}", "name": repo, "id": repo})

        def validate_yaml(self) -> None:
            content = json.loads(self.body())["content"]
            try:
                metadata = yaml.safe_load(content.split("---")[1])
                wrong = [] if isinstance(metadata, dict) else ["the metadata is no mapping"]
            except yaml.YAMLError as error:
                wrong = [str(error)]
            errors = [{"message": message} for message in wrong]
            self.answer(400 if wrong else 200, {"errors": errors, "warnings": []})

        def info(self, repo: str, revision: str | None = None) -> None:
            repository = self.repository(repo)
            if repository is None:
                return
            commit = repository.resolve(revision or "main")
            if commit is None:
                self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
                return
            siblings = [{"rfilename": path} for path in sorted(repository.trees[commit])]
            self.answer(
                200,
                {
                    "id": repo,
                    "modelId": repo,
                    "sha": commit,
                    "private": repository.private,
                    "siblings": siblings,
                    "tags": [],
                },
            )

        def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
            repository = self.repository(repo)
            commit = repository and repository.resolve(revision)
            if repository is None or commit is None:
                if repository is not None:
                    self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
                return
            entries = []
            if folder is not None:
                self.refuse(404, f"{folder} does not exist", "EntryNotFound")
                return
            for path, key in sorted(repository.trees[commit].items()):
                size = len(hub.contents[key])
                entry: dict[str, Any] = {
                    "type": "file",
                    "path": path,
                    "size": size,
                    "oid": key[:40],
                }
                if _LARGE.fullmatch(path):
                    entry["lfs"] = {"oid": key, "size": size, "pointerSize": 130}
                entries.append(entry)
            self.answer(200, entries)

        def refs(self, repo: str) -> None:
            if (repository := self.repository(repo)) is not None:
                branches = [
                    {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                    for name, commit in repository.branches.items()
                ]
                self.answer(200, {"branches": branches, "converts": [], "tags": []})

        def branch(self, repo: str, branch: str) -> None:
            if not self.user() or (repository := self.repository(repo)) is None:
                return
            self.body()
            if branch in repository.branches:
                self.answer(409, {"error": f"Reference already exists: {branch}"})
                return
            repository.branches[branch] = repository.branches["main"]
            self.answer(200, {})

        # -- uploads ---------------------------------------------------------------------------------

        def preupload(self, repo: str, revision: str) -> None:
            if not self.user() or self.repository(repo) is None:
                return
            files = json.loads(self.body())["files"]
            self.answer(
                200,
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if _LARGE.fullmatch(file["path"]) else "regular",
                            "shouldIgnore": False,
                        }
                        for file in files
                    ]
                },
            )

        def lfs_batch(self, repo: str) -> None:
            if not self.user() or self.repository(repo) is None:
                return
            objects = []
            for wanted in json.loads(self.body())["objects"]:
                entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
                if wanted["oid"] not in hub.contents:
                    entry["actions"] = {"upload": {"href": f"{hub.url}/storage/{wanted['oid']}"}}
                objects.append(entry)
            self.answer(
                200,
                {"transfer": "basic", "objects": objects},
                Content_Type="application/vnd.git-lfs+json",
            )

        def upload(self, oid: str) -> None:
            size = int(self.headers["Content-Length"])
            if hub.faults.uploads_left == 0:
                self.rfile.read(size // 2)
                self.close_connection = True
                self.connection.close()
                return
            if hub.faults.uploads_left is not None:
                hub.faults.uploads_left -= 1
            content = self.rfile.read(size)
            if hub.store(content) != oid:
                self.refuse(400, "the content is not what was announced")
                return
            hub.uploaded.append(oid)
            self.answer(200)

        def commit(self, repo: str, revision: str) -> None:
            if not self.user() or (repository := self.repository(repo)) is None:
                return
            tree = dict(repository.trees[repository.branches[revision]])
            for line in self.body().splitlines():
                operation = json.loads(line)
                value = operation["value"]
                if operation["key"] == "file":
                    tree[value["path"]] = hub.store(base64.b64decode(value["content"]))
                elif operation["key"] == "lfsFile":
                    if value["oid"] not in hub.contents:
                        self.refuse(400, f"{value['path']} was never uploaded")
                        return
                    tree[value["path"]] = value["oid"]
                elif operation["key"] == "deletedFile":
                    del tree[value["path"]]
            oid = repository.commit(revision, tree)
            self.answer(200, {"commitUrl": f"{hub.url}/{repo}/commit/{oid}", "commitOid": oid})

        # -- downloads -------------------------------------------------------------------------------

        def resolve(self, repo: str, revision: str, path: str) -> None:
            if (repository := self.repository(repo)) is None:
                return
            commit = repository.resolve(revision)
            if commit is None:
                self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
                return
            key = repository.trees[commit].get(path)
            if key is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("X-Repo-Commit", commit)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = hub.contents[key]
            headers = {
                "X_Repo_Commit": commit,
                "ETag": f'"{key}"',
                "X_Linked_Size": str(len(content)),
                "X_Linked_ETag": f'"{key}"',
            }
            if _LARGE.fullmatch(path) and self.command == "GET":
                if hub.faults.tamper:
                    content = content[:-1] + bytes([content[-1] ^ 1])
                if hub.faults.cut_download is not None:
                    content = content[: hub.faults.cut_download]
            first = re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range") or "")
            self.answer(206 if first else 200, content[int(first[1]) if first else 0 :], **headers)

    return Handler


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = [
    (r"GET /api/whoami-v2", "whoami"),
    (r"GET /api/agent-harnesses", "nothing"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate_yaml"),
    (rf"GET /api/models/{_REPO}", "info"),
    (rf"GET /api/models/{_REPO}/revision/(?P<revision>.+)", "info"),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
    (rf"GET /api/models/{_REPO}/refs", "refs"),
    (rf"POST /api/models/{_REPO}/branch/(?P<branch>.+)", "branch"),
    (rf"POST /api/models/{_REPO}/preupload/(?P<revision>.+)", "preupload"),
    (rf"POST /api/models/{_REPO}/commit/(?P<revision>.+)", "commit"),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /storage/(?P<oid>[0-9a-f]{64})", "upload"),
    (rf"(GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


@contextlib.contextmanager
def out_of_order(hub: HubStandIn, **faults: Any) -> Iterator[None]:
    """Faults for the length of a block."""
    hub.faults = Faults(**faults)
    try:
        yield
    finally:
        hub.faults = Faults()
