"""Where the SDKs of Azure and Google Cloud ask for tokens, on loopback: metadata servers and token endpoints.

There is no emulator of any of them. What is served here is what the SDKs need, in the words of the vendors' manuals:

- Azure: "How to use managed identities on an Azure VM to acquire an access token", "How to use managed identities for
  App Service" (REST endpoint reference), "Microsoft identity platform and the OAuth 2.0 client credentials flow".
- Google Cloud: "About VM metadata", RFC 7523 for service accounts, and ``generateAccessToken`` of the IAM Service
  Account Credentials API.
"""

from __future__ import annotations

import base64
import functools
import json
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

import anyio.to_thread
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth.compute_engine import _metadata
from support import secret

EMAIL = "app@project.iam.gserviceaccount.com"
_HOST = "127.0.0.1"
_APP_SERVICE = "/msi/token"
_IMDS = "/metadata/identity/oauth2/token"
_GCE = "/computeMetadata/v1/"
_ACCOUNT = f"{_GCE}instance/service-accounts/"


@dataclass(frozen=True)
class Asked:
    """One request for a token: its path, its parameters (query, form or JSON) and its headers."""

    path: str
    parameters: Mapping[str, Any] = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True)
class Answer:
    """What to say instead of giving a token; a status of 0 drops the connection."""

    status: int
    body: str = "{}"
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    content_type: str = "application/json"


class MetadataStub:
    """Every endpoint at once, in threads of its own, so that it answers even where somebody blocks the event loop.

    Attributes:
        lifetime: Seconds that a token lives.
        claims: If not None, tokens are JSON Web Tokens with these claims, and not opaque.
        members: Members that are put into every good answer.
        keeps_until: As metadata servers do, hand the same token out until it has this many seconds left.
        answer: If not None, what every request for a token is answered with.
        email: The service account of the machine.
        issued: When each token ends, in the order in which they were given out.
        asked: Every request for a token.
        pings: Other requests.
    """

    def __init__(
        self, *, lifetime: float = 300, claims: Mapping[str, Any] | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self.lifetime = lifetime
        self.claims = claims
        self.members: dict[str, Any] = {}
        self.keeps_until: float | None = None
        self.answer: Answer | None = None
        self.email = EMAIL
        self.issued: dict[str, float] = {}
        self.asked: list[Asked] = []
        self.pings: list[str] = []
        self._tls = tls
        self._hangs = threading.Event()
        self._arrived = threading.Event()
        self._healed = threading.Event()

    def __enter__(self) -> Self:
        handler = functools.partial(_Handler, self)
        self._server = _Server((_HOST, 0), handler)
        if self._tls is not None:
            self._server.socket = self._tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.heal()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def address(self) -> str:
        return f"{'localhost' if self._tls else _HOST}:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self.address}"

    # Troubles

    def hang(self) -> None:
        """Answer no request for a token, or for the account it is to be for, until `heal`."""
        self._arrived.clear()
        self._healed.clear()
        self._hangs.set()

    async def reached(self) -> None:
        """Return once a request hangs."""
        await anyio.to_thread.run_sync(self._arrived.wait, 10, abandon_on_cancel=True)

    def heal(self) -> None:
        self.answer = None
        self._hangs.clear()
        self._healed.set()

    # Tokens

    def verify(self, user: str, token: str) -> str | None:
        """Say why a token opens no door: for a `TokenDoor`."""
        ends = self.issued.get(token)
        if ends is None:
            return "never given out"
        return "expired" if ends <= time.time() else None

    def token(self) -> tuple[str, float]:
        """Return a token, and when it ends."""
        now = time.time()
        if self.keeps_until is not None and self.issued:
            token, ends = next(reversed(self.issued.items()))
            if ends - now > self.keeps_until:
                return token, ends
        ends = now + self.lifetime
        token = secret(f"token{len(self.issued)}")
        if self.claims is not None:
            token = ".".join(map(_encode, ({"alg": "none"}, {"exp": int(ends), "jti": token, **self.claims}, token)))
        self.issued[token] = ends
        return token, ends

    def wait_if_hanging(self) -> None:
        if self._hangs.is_set():
            self._arrived.set()
            self._healed.wait(30)


class _Server(ThreadingHTTPServer):
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that was cancelled is gone, and one that checks certificates may leave."""


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, stub: MetadataStub, *arguments: Any) -> None:
        self._stub = stub
        super().__init__(*arguments)

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = dict(parse_qsl(address.query))
        path = address.path
        if path in (_APP_SERVICE, _IMDS) or (path.startswith(_ACCOUNT) and path.endswith("/token")):
            self._give(path, query)
        else:
            self._stub.pings.append(path)
            self._tell_about(path)

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        is_json = "json" in self.headers.get("Content-Type", "")
        self._give(urlsplit(self.path).path, json.loads(text) if is_json else dict(parse_qsl(text)))

    def _give(self, path: str, parameters: Mapping[str, Any]) -> None:
        stub = self._stub
        stub.asked.append(Asked(path, parameters, dict(self.headers)))
        stub.wait_if_hanging()
        if stub.answer is not None:
            self._say(stub.answer)
        elif path == _IMDS and self.headers.get("Metadata") != "true":
            self._say(Answer(400, '{"error": "invalid_request"}'))
        else:
            token, ends = stub.token()
            self._say(Answer(200, json.dumps(_good(path, parameters, token, ends) | stub.members)))

    def _tell_about(self, path: str) -> None:
        stub = self._stub
        if path in ("/", _GCE):
            self._say(Answer(200))
        elif path == f"{_GCE}project/project-id":
            self._say(Answer(200, "project", content_type="text/plain"))
        elif path.startswith(_ACCOUNT):
            stub.wait_if_hanging()
            account = {"email": stub.email, "scopes": ["https://www.googleapis.com/auth/cloud-platform"]}
            self._say(Answer(200, json.dumps(account)))
        else:
            self._say(Answer(404))

    def _say(self, answer: Answer) -> None:
        if answer.status == 0:
            self.close_connection = True
            return
        body = answer.body.encode()
        self.send_response(answer.status)
        headers = {"Content-Type": answer.content_type, "Content-Length": str(len(body)), "Metadata-Flavor": "Google"}
        for name, value in {**headers, **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _good(path: str, parameters: Mapping[str, Any], token: str, ends: float) -> dict[str, Any]:
    left = max(round(ends - time.time()), 1)
    if path.endswith(":generateAccessToken"):
        return {"accessToken": token, "expireTime": f"{datetime.fromtimestamp(ends, UTC):%Y-%m-%dT%H:%M:%SZ}"}
    good: dict[str, Any] = {"access_token": token, "token_type": "Bearer"}
    if path == _APP_SERVICE:
        return {**good, "expires_on": str(int(ends)), "resource": parameters["resource"]}
    if path == _IMDS:
        return {**good, "expires_on": str(int(ends)), "expires_in": str(left), "resource": parameters["resource"]}
    return {**good, "expires_in": left}


def _encode(part: object) -> str:
    text = part if isinstance(part, str) else json.dumps(part)
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


# The surroundings that the SDKs look at


@contextmanager
def azure_environment(**variables: str) -> Iterator[None]:
    """Set what azure-identity reads, and nothing else."""
    known = ("CLIENT_ID", "CLIENT_SECRET", "TENANT_ID", "AUTHORITY_HOST", "FEDERATED_TOKEN_FILE", "TOKEN_CREDENTIALS")
    with pytest.MonkeyPatch.context() as patch:
        for name in (*(f"AZURE_{name}" for name in known), "IDENTITY_ENDPOINT", "IDENTITY_HEADER", "MSI_ENDPOINT"):
            patch.delenv(name, raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def app_service(stub: MetadataStub) -> dict[str, str]:
    """Return the variables of an App Service with a managed identity."""
    # Not a planted secret: azure-identity hands exceptions that know their request to its own log.
    return {"IDENTITY_ENDPOINT": f"{stub.url}{_APP_SERVICE}", "IDENTITY_HEADER": "header"}


def virtual_machine(stub: MetadataStub) -> dict[str, str]:
    """Return the variables that make azure-identity take `stub` for the metadata server of a virtual machine."""
    return {"AZURE_POD_IDENTITY_AUTHORITY_HOST": stub.url}


def compute_engine(stub: MetadataStub) -> dict[str, str]:
    """Return the variables that make google-auth take `stub` for the metadata server; read when it is imported."""
    return {"GCE_METADATA_HOST": stub.address, "GCE_METADATA_ROOT": stub.address, "GCE_METADATA_IP": stub.address}


@contextmanager
def google_environment(stub: MetadataStub | None = None, **variables: str) -> Iterator[None]:
    """Set what google-auth reads, and nothing else, and what it has read already."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT", "GCLOUD_PROJECT"):
            patch.delenv(name, raising=False)
        patch.setenv("CLOUDSDK_CONFIG", "/nonexistent")
        if stub is not None:
            patch.setattr(_metadata, "_GCE_METADATA_HOST", stub.address)
            variables |= compute_engine(stub)
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@functools.cache
def private_key() -> str:
    key = rsa.generate_private_key(65537, 2048)
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption()).decode()


def key_of_service_account(stub: MetadataStub, **members: str) -> dict[str, str]:
    """Return what is in the key file of a service account whose token endpoint is `stub`."""
    return {
        "type": "service_account",
        "project_id": "project",
        "private_key_id": "key",
        "private_key": private_key(),
        "client_email": EMAIL,
        "client_id": "1",
        "token_uri": f"{stub.url}/token",
        **members,
    }
