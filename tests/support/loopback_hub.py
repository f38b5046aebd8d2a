"""A Hub on 127.0.0.1, in memory: the part of its protocol that `huggingface_hub` uses to read and write a repository."""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    branches: dict[str, "Repo"] = field(default_factory=dict)
    cut: str = ""
    """The file of which only half is sent, before the connection is closed."""

    def files(self, revision):
        """The commit's id and files at a revision; None if there is no such revision."""
        if revision in ("main", "HEAD"):
            return self.commits[-1] if self.commits else ("0" * 40, {})
        if revision in self.branches:
            return self.branches[revision].files("main")
        every = [commit for repo in (self, *self.branches.values()) for commit in repo.commits]
        return next((commit for commit in every if commit[0] == revision), None)

    def commit(self, changes):
        files = {**(self.commits[-1][1] if self.commits else {}), **changes}
        sha = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits.append((sha, files))
        return sha


class LoopbackHub:
    """The server. `TOKEN` may read and write everything, `READER` may only read, anything else is no token."""

    TOKEN, READER = "hf_writer", "hf_reader"

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def add_repo(self, name, files, **access):
        self.repos[name] = Repo(**access)
        return self.repos[name].commit(files)

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


class Refused(Exception):
    def __init__(self, status, code=None, message=""):
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/models/(?P<repo>.+)/branch/(?P<branch>[^/]+)", "branch"),
        ("POST", r"/api/models/(?P<repo>.+)/preupload/(?P<rev>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>.+)/commit/(?P<rev>[^/]+)", "commit"),
        ("POST", r"/(?P<repo>.+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>\w+)", "lfs_put"),
        ("GET", r"/api/models/(?P<repo>.+)/tree/(?P<rev>[^/]+)", "tree"),
        ("GET", r"/api/models/(?P<repo>.+)/revision/(?P<rev>[^/]+)", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+|[^/]+)", "info"),
        ("(?:GET|HEAD)", r"/(?P<repo>.+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, *_):
        pass

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        try:
            for method, pattern, name in self.ROUTES:
                found = re.fullmatch(pattern, path)
                if found and re.fullmatch(method, self.command):
                    return getattr(self, name)(**found.groupdict())
            raise Refused(404, None, f"no route {self.command} {path}")
        except Refused as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            return self.send(refused.status, b"{}", {**headers, "X-Error-Message": refused.message})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, status, body, headers=None):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def token(self):
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if given and given not in (LoopbackHub.TOKEN, LoopbackHub.READER):
            raise Refused(401, None, "Invalid credentials in Authorization header")
        return given

    def repo(self, name, write=False):
        token, repo = self.token(), self.hub.repos.get(name)
        if repo is None or (repo.private and not token):
            raise Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        if repo.gated and token != LoopbackHub.TOKEN:
            raise Refused(403, "GatedRepo", "Access is restricted")
        if write and token != LoopbackHub.TOKEN:
            raise Refused(403, None, "You don't have the rights to write")
        return repo

    def at(self, repo, rev, write=False):
        found = self.repo(repo, write).files(rev)
        if found is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return found

    def create(self):
        wanted = json.loads(self.body)
        if self.token() != LoopbackHub.TOKEN:
            raise Refused(403, None, "You don't have the rights to create a model")
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repos:
            return self.send(409, url)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.repos[name] = Repo(private=bool(private))
        return self.send(200, url)

    def branch(self, repo, branch):
        own = self.repo(repo, write=True)
        if branch in own.branches:
            return self.send(409, {})
        own.branches[branch] = Repo(commits=list(own.commits))
        return self.send(200, {})

    def validate_yaml(self):
        self.send(200, {"errors": [], "warnings": []})

    def preupload(self, repo, rev):
        self.at(repo, rev, write=True)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.send(200, {"files": files})

    def lfs_batch(self, repo):
        self.repo(repo, write=True)
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}}}
            for wanted in json.loads(self.body)["objects"]
        ]
        self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.blobs[oid] = self.body
        self.send(200, {})

    def commit(self, repo, rev):
        self.at(repo, rev, write=True)
        changes = {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                changes[value["path"]] = self.hub.blobs[value["oid"]]
        own = self.hub.repos[repo]
        sha = own.branches.get(rev, own).commit(changes)
        self.send(200, {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}", "commitOid": sha})

    def info(self, repo, rev="main"):
        sha, files = self.at(repo, rev)
        private = self.hub.repos[repo].private
        self.send(200, {"id": repo, "sha": sha, "private": private, "siblings": [{"rfilename": f} for f in files]})

    def tree(self, repo, rev):
        _, files = self.at(repo, rev)
        entries = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in files.items()
        ]
        self.send(200, entries)

    def resolve(self, repo, rev, path):
        sha, files = self.at(repo, rev)
        if path not in files:
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": sha}
        if path == self.hub.repos[repo].cut and self.command == "GET":
            headers |= {"Content-Length": str(len(files[path]))}
            self.send(200, files[path][: len(files[path]) // 2], headers)
            self.close_connection = True
            return
        self.send(200, files[path], headers)
