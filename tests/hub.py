"""A Hugging Face Hub on this machine, for the real client libraries to talk to.

It speaks what huggingface_hub, datasets, diffusers and open_clip ask for: who am I, information and
tree of a repository, files with their ETag and commit (large ones from a store on another host),
creating a repository, uploads and commits. Clients reach it as their proxy: whatever host they ask
for, no name is looked up and nothing leaves this machine. Left out: Xet (clients fall back to LFS),
history (only the newest commit is kept), branches and pull requests.
"""

import asyncio
import base64
import hashlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse
from starlette.routing import Route

ENDPOINT = "http://hub.test"
STORE = "http://store.test"                      # large files lie elsewhere, as on the real Hub
LARGE = (".safetensors", ".parquet", ".bin")     # what .gitattributes sends there
TOKENS = {"hf_ada": "ada", "hf_bob": "bob"}      # ada owns what she makes; bob is a stranger
EXPIRED = "hf_old"


class Hub:
    """Repositories in `folder`, by kind, owner and name; `private` and `gated` hold "owner/name".

    `fault`, a function of an ASGI scope, may return another app that answers in the Hub's place.
    `asked` is what was asked for: (method, host, path).
    """

    def __init__(self, folder: Path):
        self.folder, self.private, self.gated = Path(folder), set(), set()
        self.fault: Callable = lambda scope: None
        self.asked = []
        self.app = Starlette(exception_handlers={HTTPException: explain}, routes=[
            Route(path, getattr(self, name), methods=methods) for path, name, *methods in ROUTES])

    async def __call__(self, scope, receive, send):
        """Take a proxy's full address apart, and let the fault, if there is one, answer."""
        encrypted = scope["method"] == "CONNECT"  # the path is but a host then
        url = urlsplit(f"https://{scope['path']}" if encrypted else scope["path"])
        self.asked.append((scope["method"], url.hostname, url.path))
        first = "store" if url.hostname == "store.test" else url.path.strip("/").split("/")[0]
        named = first in ("api", "datasets", "spaces", "")      # models go without their kind
        scope["path"] = ("/store" if first == "store" else "" if named else "/models") + url.path
        if url.hostname not in (None, "hub.test", "store.test"):
            app = PlainTextResponse("There is no network beyond this machine.", 502)
        else:
            app = self.fault(scope) or self.app
        await app(scope, receive, send)

    # who asks, and for what

    def user(self, request):
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token == EXPIRED:
            refuse(401, 'User Access Token "laptop" is expired')
        if token and token not in TOKENS:
            refuse(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def repository(self, request, write=False, content=True):
        """The folder that a request is about, if the one who asks may have it."""
        kind, owner, name = (request.path_params[key] for key in ("kind", "owner", "name"))
        full, user = f"{owner}/{name}", self.user(request)
        folder = self.folder / kind / full
        if not folder.is_dir() or (full in self.private and user != owner):
            refuse(404 if user else 401, "Repository not found", "RepoNotFound")
        if content and full in self.gated and user != owner:
            refuse(403 if user else 401, f"Access to {full} is restricted", "GatedRepo")
        if write and user != owner:
            refuse(403, "You don't have the rights to write here")
        if request.path_params.get("revision", "main") not in ("main", commit_of(folder)):
            refuse(404, "Invalid rev id", "RevisionNotFound")
        return folder

    def whoami(self, request):
        name = self.user(request) or refuse(401, "Invalid username or password.")
        return JSONResponse({"type": "user", "name": name, "orgs": [], "auth": {
            "type": "access_token", "accessToken": {"displayName": "laptop", "role": "write"}}})

    def auth_check(self, request):
        self.repository(request)
        return PlainTextResponse("ok")

    # reading

    def info(self, request):
        folder = self.repository(request, content=False)
        full = f"{folder.parent.name}/{folder.name}"
        files = [{"rfilename": each["path"]} for each in entries(folder) if each["type"] == "file"]
        return JSONResponse({
            "id": full, "sha": commit_of(folder), "siblings": files, "tags": [], "downloads": 0,
            "private": full in self.private, "gated": "auto" if full in self.gated else False})

    def tree(self, request):
        folder, start = self.repository(request), request.path_params.get("path", "")
        whole = request.query_params.get("recursive", "").lower() in ("1", "true")
        if start and not (folder / start).is_dir():
            refuse(404, f"{start} does not exist on main", "EntryNotFound")
        return JSONResponse([entry for entry in entries(folder)
                             if Path(start) in Path(entry["path"]).parents
                             and (whole or Path(entry["path"]).parent == Path(start))])

    async def paths_info(self, request):
        wanted = (await request.form()).getlist("paths")
        return JSONResponse([entry for entry in entries(self.repository(request))
                             if entry["path"] in wanted])

    def resolve(self, request):
        folder, path = self.repository(request), request.path_params["path"]
        if not (folder / path).is_file():
            refuse(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit_of(folder)})
        etag, size = checksum(folder / path), (folder / path).stat().st_size
        headers = {"X-Repo-Commit": commit_of(folder), "ETag": f'"{etag}"'}
        if path.endswith(LARGE):
            linked = {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(size)}
            self.stored(etag, folder / path)
            return RedirectResponse(f"{STORE}/{etag}", 302, headers | linked)
        return FileResponse(folder / path, headers=headers)

    # the store of large files

    def stored(self, sha256, source=None):
        """Where the store keeps a file; `source` is put there."""
        file = self.folder / "store" / sha256
        if source and not file.exists():
            file.parent.mkdir(exist_ok=True)
            os.link(source, file)
        return file

    async def store(self, request):
        file = self.stored(request.path_params["sha256"])
        if "authorization" in request.headers:   # a token must not leave the Hub
            refuse(400, "Only one auth mechanism allowed")
        if request.method == "PUT":
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(await request.body())
            return PlainTextResponse("ok")
        return FileResponse(file)

    # writing

    async def create(self, request):
        user, wanted = self.user(request), await request.json()
        owner = wanted.get("organization") or user or refuse(401, "Invalid username or password.")
        folder = self.folder / f"{wanted.get('type') or 'model'}s" / owner / wanted["name"]
        if user != owner:
            refuse(403, f'You don\'t have the rights to create a model under "{owner}"')
        url = {"url": f"{ENDPOINT}/{owner}/{folder.name}", "name": f"{owner}/{folder.name}"}
        if folder.exists():
            return JSONResponse(url | {"error": "You already created this repo"}, 409)
        folder.mkdir(parents=True)
        if wanted.get("private"):
            self.private.add(f"{owner}/{folder.name}")
        return JSONResponse(url)

    async def preupload(self, request):
        self.repository(request, write=True)
        return JSONResponse({"files": [
            {"path": file["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular"}
            for file in (await request.json())["files"]]})

    async def batch(self, request):
        self.repository(request, write=True)
        wanted = (await request.json())["objects"]
        return JSONResponse({"transfer": "basic", "objects": [
            one if self.stored(one["oid"]).exists() else
            one | {"actions": {"upload": {"href": f"{STORE}/{one['oid']}"}}} for one in wanted]})

    async def commit(self, request):
        folder = self.repository(request, write=True)
        for line in (await request.body()).splitlines():
            key, value = json.loads(line).values()
            file = folder / value.get("path", "")
            file.parent.mkdir(parents=True, exist_ok=True)
            if key == "file":
                file.write_bytes(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                shutil.copy(self.stored(value["oid"]), file)
            elif key == "deletedFile":
                file.unlink()
        oid, page = commit_of(folder), f"{ENDPOINT}/{folder.parent.name}/{folder.name}"
        return JSONResponse({"commitOid": oid, "commitUrl": f"{page}/commit/{oid}"})

    def fine(self, request):
        """The front page, and cards that are always valid."""
        return JSONResponse({"errors": [], "warnings": []})


REPOSITORY = "/api/{kind}/{owner}/{name}"
ROUTES = [
    ("/", "fine", "GET"),
    ("/api/validate-yaml", "fine", "POST"),
    ("/api/whoami-v2", "whoami", "GET"),
    ("/api/repos/create", "create", "POST"),
    (f"{REPOSITORY}", "info", "GET"),
    (f"{REPOSITORY}/auth-check", "auth_check", "GET"),
    (f"{REPOSITORY}/revision/{{revision}}", "info", "GET"),
    (f"{REPOSITORY}/tree/{{revision}}", "tree", "GET"),
    (f"{REPOSITORY}/tree/{{revision}}/{{path:path}}", "tree", "GET"),
    (f"{REPOSITORY}/paths-info/{{revision}}", "paths_info", "POST"),
    (f"{REPOSITORY}/preupload/{{revision}}", "preupload", "POST"),
    (f"{REPOSITORY}/commit/{{revision}}", "commit", "POST"),
    ("/{kind}/{owner}/{name}.git/info/lfs/objects/batch", "batch", "POST"),
    ("/{kind}/{owner}/{name}/resolve/{revision}/{path:path}", "resolve", "GET"),
    ("/store/{sha256}", "store", "GET", "PUT"),
]


def refuse(status, message, code=None, headers=None):
    raise HTTPException(status, message, {
        "X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})})


def explain(request, refusal):
    return JSONResponse({"error": refusal.detail}, refusal.status_code, refusal.headers)


def checksum(file: Path) -> str:
    """A file's ETag: SHA-256 of a large one, git's name for a small one."""
    content = file.read_bytes()
    if file.name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entries(folder: Path) -> list[dict]:
    """The files and folders of a repository, as the Hub lists them."""
    found = []
    for path in sorted(folder.rglob("*")):
        entry = {"path": path.relative_to(folder).as_posix(), "size": 0,
                 "type": "directory" if path.is_dir() else "file"}
        if path.is_file():
            entry |= {"size": path.stat().st_size, "oid": checksum(path)}
            if path.name.endswith(LARGE):
                entry["lfs"] = {"oid": entry["oid"], "size": entry["size"], "pointerSize": 134}
        found.append({"oid": hashlib.sha1(entry["path"].encode()).hexdigest(), **entry})
    return found


def commit_of(folder: Path) -> str:
    """The newest commit of a repository: it follows from what lies there."""
    return hashlib.sha1(json.dumps(entries(folder)).encode()).hexdigest()


@contextmanager
def serving(hub: Hub):
    """Serve `hub` on a free port of the loopback; yields the proxy's address."""
    config = uvicorn.Config(hub, log_level="critical", http="h11", lifespan="off", ws="none")
    server, listening = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = server.force_exit = True
    thread.join()


def environment(proxy: str, home: Path, token: str = "") -> dict[str, str]:
    """The variables that send a Hub client to `proxy`, with a home and perhaps a login."""
    return {"HF_ENDPOINT": ENDPOINT, "HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "ALL_PROXY": proxy,
            "http_proxy": proxy, "https_proxy": proxy, "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost", "HF_HOME": str(home), "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1"}


# faults: each is an app that answers instead of the Hub

def status(code: int, **headers):
    return JSONResponse({"error": "the test wants it so"}, code, headers)


async def hang(scope, receive, send):
    """Accept the question and never answer."""
    await asyncio.sleep(3600)


def cut(hub: Hub):
    """Send half of a large file, then close the connection."""
    async def app(scope, receive, send):
        content = hub.stored(scope["path"].rpartition("/")[2]).read_bytes()
        length = (b"content-length", str(len(content)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": content[:len(content) // 2]})
    return app


def damaged(hub: Hub):
    """Send a large file of the right length, but with wrong bytes at both ends."""
    async def app(scope, receive, send):
        content = bytearray(hub.stored(scope["path"].rpartition("/")[2]).read_bytes())
        content[:64] = content[-64:] = bytes(64)
        await PlainTextResponse(bytes(content))(scope, receive, send)
    return app
