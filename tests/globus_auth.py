"""Globus Auth on loopback, as far as its tokens go, with troubles to switch on.

One login gives a token for each resource server, the second and all others in ``other_tokens``. Refresh tokens are
good once: the exchange of one gives the next, and using a spent one ends all tokens of its login at that resource
server. Errors look as in the recorded answers that globus-sdk is tested with (``globus_sdk.testing``).
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import unquote_plus

from aiohttp import web
from support import secret

CLIENT = "a8a27a1e-3d1c-4b0c-9d6c-1f2f6b1a8f11"
TRANSFER = "transfer.api.globus.org"
TRANSFER_SCOPE = "urn:globus:auth:scope:transfer.api.globus.org:all"
GROUPS = "groups.api.globus.org"
GROUPS_SCOPE = "urn:globus:auth:scope:groups.api.globus.org:view_my_groups"
DATABASE = "6c54e3c5-6b1f-4a54-9f0e-6a8b0a1c9f02"
DATABASE_SCOPE = f"https://auth.globus.org/scopes/{DATABASE}/all"
SCOPES = {TRANSFER_SCOPE: TRANSFER, GROUPS_SCOPE: GROUPS, DATABASE_SCOPE: DATABASE}

_numbers = itertools.count(1)


@dataclass
class Grant:
    """What one login gave at one resource server."""

    resource: str
    scope: str
    is_offline: bool
    refresh_token: str = ""
    spent: set[str] = field(default_factory=set)
    access_tokens: dict[str, float] = field(default_factory=dict)
    is_revoked: bool = False


class GlobusAuth:
    """Use it as an async context manager; it listens on a free port of 127.0.0.1.

    Args:
        access_lifetime: Seconds that an access token lives; 172,800 at the real one.
        clients: Secrets by client id, beside the native app `CLIENT`.

    Attributes:
        rotates: If False, refresh tokens are good again and again, and are not returned.
        requests: Requests by grant type, and ``revoke``.
        scopes: The scope of each login by client credentials.
        replays: Spent refresh tokens that were used again.
        revoked: Tokens that were revoked, in order.
        answer: Members put into every good answer of the token endpoint.
        refusal: If set, the status and the JSON that every request is answered with, and nothing is done.
        headers: Of every answer.
        loses: If True, every request is done, and the connection is cut instead of an answer.
    """

    def __init__(self, access_lifetime: float = 300.0, *, clients: Mapping[str, str] | None = None) -> None:
        self.access_lifetime = access_lifetime
        self.rotates = True
        self.requests: Counter[str] = Counter()
        self.scopes: list[str] = []
        self.replays = 0
        self.revoked: list[str] = []
        self.answer: dict[str, object] = {}
        self.refusal: tuple[int, object] | None = None
        self.headers: dict[str, str] = {}
        self.loses = False
        self._clients = {CLIENT: "", **(clients or {})}
        self._grants: list[Grant] = []
        self._may_answer = asyncio.Event()
        self._may_answer.set()
        self._arrived = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self._site: web.SockSite | None = None
        self._port = 0

    async def __aenter__(self) -> Self:
        application = web.Application()
        application.router.add_post("/v2/oauth2/token", self._token)
        application.router.add_post("/v2/oauth2/token/revoke", self._revoke)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await self.come_up()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._may_answer.set()
        assert self._runner is not None
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    # -- troubles

    async def go_down(self) -> None:
        """Refuse connections from now on."""
        if self._site is not None:
            await self._site.stop()
            self._site = None

    async def come_up(self) -> None:
        if self._site is None:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", self._port))
            self._port = listener.getsockname()[1]
            assert self._runner is not None
            self._site = web.SockSite(self._runner, listener)
            await self._site.start()

    def hang(self) -> None:
        """Do what is asked, and do not answer."""
        self._arrived.clear()
        self._may_answer.clear()

    async def reached(self) -> None:
        """Return once a request hangs."""
        await self._arrived.wait()

    def heal(self) -> None:
        self._may_answer.set()

    # -- what people and administrators do

    def log_in(self, *scopes: str, offline: bool = True, access_lifetime: float | None = None) -> dict[str, object]:
        """Return what the login of a person gives: the answer to the exchange of an authorization code."""
        grants = [Grant(SCOPES[scope], scope, offline) for scope in scopes]
        self._grants += grants
        return self._answer([self._tokens(grant, access_lifetime) for grant in grants])

    def rescind(self, resource: str) -> None:
        """Revoke all that was ever given for a resource server: the person has withdrawn the consent."""
        for grant in self._grants:
            grant.is_revoked |= grant.resource == resource

    def verifier(self, resource: str) -> Callable[[str, str], str | None]:
        """Return what a `TokenDoor` checks logins with: a database that is this resource server."""

        def verify(user: str, password: str) -> str | None:
            for grant in self._grants:
                if password in grant.access_tokens:
                    if grant.resource != resource:
                        return "a token for another resource server"
                    return "expired" if not self._is_active(grant, password) else None
            return "no token of ours"

        return verify

    def _is_active(self, grant: Grant, token: str) -> bool:
        return not grant.is_revoked and time.time() < grant.access_tokens.get(token, 0.0)

    # -- requests

    async def _token(self, request: web.Request) -> web.StreamResponse:
        form = {name: str(value) for name, value in (await request.post()).items()}
        grant_type = form.get("grant_type", "")
        self.requests[grant_type] += 1
        return await self._respond(request, self._refuse(request, form) or self._grant(grant_type, form))

    async def _revoke(self, request: web.Request) -> web.StreamResponse:
        form = {name: str(value) for name, value in (await request.post()).items()}
        self.requests["revoke"] += 1
        refusal = self._refuse(request, form)
        if refusal is None:
            token = form["token"]
            self.revoked.append(token)
            for grant in self._grants:
                grant.access_tokens.pop(token, None)
                if token == grant.refresh_token:
                    grant.refresh_token = ""
        return await self._respond(request, refusal or (200, {"active": False}))

    def _refuse(self, request: web.Request, form: dict[str, str]) -> tuple[int, object] | None:
        if self.refusal is not None:
            return self.refusal
        client, password = form.get("client_id", ""), ""
        if authorization := request.headers.get("Authorization"):
            pair = base64.b64decode(authorization.removeprefix("Basic ")).decode().partition(":")
            client, password = unquote_plus(pair[0]), unquote_plus(pair[2])
        return None if self._clients.get(client) == password else UNAUTHORIZED

    def _grant(self, grant_type: str, form: dict[str, str]) -> tuple[int, object]:
        if grant_type == "client_credentials":
            self.scopes.append(form["scope"])
            by_resource: dict[str, list[str]] = {}
            for scope in form["scope"].split():
                if scope not in SCOPES:
                    return 400, {"error": "invalid_scope"}
                by_resource.setdefault(SCOPES[scope], []).append(scope)
            grants = [Grant(resource, " ".join(scopes), is_offline=False) for resource, scopes in by_resource.items()]
            self._grants += grants
            return 200, self._answer([self._tokens(grant) for grant in grants])
        token = form["refresh_token"]
        for grant in self._grants:
            if token in grant.spent:
                self.replays += 1
                grant.is_revoked = True
            elif token == grant.refresh_token and not grant.is_revoked:
                return 200, self._answer([self._tokens(grant)])
        return 401, {"error": "invalid_grant"}

    def _tokens(self, grant: Grant, access_lifetime: float | None = None) -> dict[str, object]:
        life = self.access_lifetime if access_lifetime is None else access_lifetime
        number = next(_numbers)
        access_token = secret(f"access-{number}")
        grant.access_tokens[access_token] = time.time() + life
        tokens: dict[str, object] = {
            "access_token": access_token,
            "scope": grant.scope,
            "expires_in": life,
            "token_type": "Bearer",
            "resource_server": grant.resource,
        }
        if grant.is_offline and (self.rotates or not grant.refresh_token):
            if grant.refresh_token:
                grant.spent.add(grant.refresh_token)
            grant.refresh_token = tokens["refresh_token"] = secret(f"refresh-{number}")
        return tokens

    def _answer(self, tokens: list[dict[str, object]]) -> dict[str, object]:
        return {**tokens[0], "state": "_default", "other_tokens": tokens[1:], **self.answer}

    async def _respond(self, request: web.Request, answer: tuple[int, object]) -> web.StreamResponse:
        self._arrived.set()
        await self._may_answer.wait()
        if self.loses and request.transport is not None:
            request.transport.abort()
        status, document = answer
        return web.json_response(document, status=status, headers=self.headers)


UNAUTHORIZED = (
    401,
    {
        "errors": [
            {
                "status": "401",
                "id": "1d5e2bb4-8b0a-11f0-9c1f-0242ac110002",
                "code": "UNAUTHORIZED",
                "detail": "Call must be authenticated",
                "title": "Unauthorized",
            }
        ],
        "error_description": "Unauthorized",
        "error": "unauthorized",
    },
)
