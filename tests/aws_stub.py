"""Where botocore asks for credentials, secrets and passwords, on loopback, and with troubles to switch on.

moto is the emulator where it will do; it has no Redshift Serverless, its credentials live as long as real ones, and
nothing ever goes wrong with it. What is served here speaks as the vendor's manuals say: "Container credential
provider" (AWS SDKs and Tools Reference Guide), "Retrieve security credentials from instance metadata" (Amazon EC2 User
Guide), and the API references of STS, Secrets Manager, Redshift and Redshift Serverless.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest
from aiohttp import web
from support import secret

from asyncpool_creds.testing.sigv4 import SigV4Verifier

REGION = "eu-west-1"
_ROLE = "/latest/meta-data/iam/security-credentials/"


@dataclass(frozen=True)
class Asked:
    """One request."""

    operation: str
    parameters: Mapping[str, Any] = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True)
class Refusal:
    """What to say instead of a good answer."""

    status: int
    code: str
    message: str = "no"
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


class AwsStub:
    """Every service at one address.

    Attributes:
        lifetime: Seconds that credentials and passwords live.
        lifetimes: The same for those that are given out next, before `lifetime` holds.
        refresh_in: Seconds until the ``nextRefreshTime`` of Redshift Serverless; None: it says nothing of it.
        verifiers: Are told of every key that is given out.
        asked: Every request for something.
        refusal: If not None, what every request is answered with.
        garbage: If not None, the text that every request is answered with.
        secret: What Secrets Manager has: the members of its answer.
        passwords: Those of Redshift: user and end, by password.
    """

    def __init__(self, *verifiers: SigV4Verifier, lifetime: float = 300) -> None:
        self.lifetime = lifetime
        self.lifetimes: list[float] = []
        self.refresh_in: float | None = None
        self.verifiers = list(verifiers)
        self.asked: list[Asked] = []
        self.refusal: Refusal | None = None
        self.garbage: str | None = None
        self.secret: dict[str, Any] = {}
        self.passwords: dict[str, tuple[str, datetime]] = {}
        self._numbers = itertools.count(1)
        self._go_on = asyncio.Event()
        self._go_on.set()
        self._reached = asyncio.Event()
        self.port = 0
        self._operations = {
            "Container": self._give_container_key,
            "Instance": self._give_instance_key,
            "AssumeRole": self._assume_role,
            "AssumeRoleWithWebIdentity": self._assume_role,
            "GetSecretValue": self._get_secret_value,
            "GetClusterCredentials": self._get_cluster_credentials,
            "GetCredentials": self._get_credentials,
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def operations(self) -> list[str]:
        return [asked.operation for asked in self.asked]

    # Troubles

    async def fail(self) -> None:
        self.refusal = Refusal(503, "ServiceUnavailable")

    def hang(self) -> None:
        self._reached.clear()
        self._go_on.clear()

    async def hangs(self) -> None:
        await self._reached.wait()

    async def heal(self) -> None:
        self.refusal = self.garbage = None
        self._go_on.set()

    # What a door asks

    def verify_password(self, user: str, password: str) -> str | None:
        owner, ends = self.passwords.get(password, ("", datetime.min.replace(tzinfo=UTC)))
        if owner != user:
            return "never given out"
        return "expired" if ends <= datetime.now(UTC) else None

    # Serving

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._serve)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.port = runner.addresses[0][1]
            yield
        finally:
            self._go_on.set()
            await runner.cleanup()

    async def _serve(self, request: web.Request) -> web.Response:
        if request.path == "/latest/api/token":
            return web.Response(text="metadata-token")
        if request.path == _ROLE:
            return web.Response(text="role")
        operation, parameters = await self._read(request)
        self.asked.append(Asked(operation, parameters, dict(request.headers)))
        if not self._go_on.is_set():
            self._reached.set()
            await self._go_on.wait()
        is_xml = "Action" in parameters
        if self.garbage is not None:
            return web.Response(text=self.garbage, content_type="application/json")
        if self.refusal is not None:
            return _refuse(self.refusal, is_xml=is_xml)
        answer = self._operations[operation](parameters)
        if is_xml:
            body = f"<{operation}Response><{operation}Result>{_xml(answer)}</{operation}Result></{operation}Response>"
            return web.Response(text=body, content_type="text/xml")
        return web.json_response(answer, content_type="application/x-amz-json-1.1")

    async def _read(self, request: web.Request) -> tuple[str, dict[str, Any]]:
        if request.path == "/container":
            return "Container", {}
        if request.path.startswith(_ROLE):
            return "Instance", {}
        if target := request.headers.get("X-Amz-Target"):
            return target.rpartition(".")[2], json.loads(await request.text())
        form = {name: str(value) for name, value in (await request.post()).items()}
        return form["Action"], form

    # Operations

    def _key(self) -> tuple[str, str, str, datetime]:
        number = next(self._numbers)
        key = (f"ASIAEXAMPLE{number}", secret(f"key{number}"), secret(f"session{number}"))
        lifetime = self.lifetimes.pop(0) if self.lifetimes else self.lifetime
        ends = datetime.now(UTC) + timedelta(seconds=lifetime)
        for verifier in self.verifiers:
            verifier.add_key(key[0], key[1], session_token=key[2], expires_at=ends)
        return *key, ends

    def _give_container_key(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        access_key, secret_key, session_token, ends = self._key()
        return {
            "AccessKeyId": access_key,
            "SecretAccessKey": secret_key,
            "Token": session_token,
            "Expiration": ends.isoformat(),
        }

    def _give_instance_key(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        answer = self._give_container_key(parameters)
        return {**answer, "Code": "Success", "Expiration": answer["Expiration"].partition(".")[0] + "Z"}

    def _assume_role(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        access_key, secret_key, session_token, ends = self._key()
        return {
            "Credentials": {
                "AccessKeyId": access_key,
                "SecretAccessKey": secret_key,
                "SessionToken": session_token,
                "Expiration": ends.isoformat(),
            },
            "AssumedRoleUser": {"Arn": f"{parameters['RoleArn']}/session", "AssumedRoleId": "AROAEXAMPLE:session"},
        }

    def _get_secret_value(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return {"Name": parameters["SecretId"], "VersionStages": [parameters["VersionStage"]], **self.secret}

    def _password(self, user: str) -> tuple[str, datetime]:
        password = secret(f"password{next(self._numbers)}")
        self.passwords[password] = (user, datetime.now(UTC) + timedelta(seconds=self.lifetime))
        return password, self.passwords[password][1]

    def _get_cluster_credentials(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        user = ("IAMA:" if parameters.get("AutoCreate") == "true" else "IAM:") + parameters["DbUser"]
        password, ends = self._password(user)
        return {"DbUser": user, "DbPassword": password, "Expiration": ends.isoformat()}

    def _get_credentials(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        password, ends = self._password("IAMR:role")
        answer = {"dbUser": "IAMR:role", "dbPassword": password, "expiration": ends.timestamp()}
        if self.refresh_in is not None:
            answer["nextRefreshTime"] = datetime.now(UTC).timestamp() + self.refresh_in
        return answer


def _xml(answer: object) -> str:
    if isinstance(answer, Mapping):
        return "".join(f"<{name}>{_xml(value)}</{name}>" for name, value in answer.items())
    return escape(str(answer))


def _refuse(refusal: Refusal, *, is_xml: bool) -> web.Response:
    if is_xml:
        error = _xml({"Error": {"Type": "Sender", "Code": refusal.code, "Message": refusal.message}})
        body = f"<ErrorResponse>{error}<RequestId>1</RequestId></ErrorResponse>"
        return web.Response(status=refusal.status, text=body, content_type="text/xml", headers=refusal.headers)
    document = {"__type": refusal.code, "message": refusal.message}
    return web.json_response(document, status=refusal.status, headers=refusal.headers)


@contextmanager
def environment(**variables: str) -> Iterator[Path]:
    """Set these variables and no others of AWS, without files of the user's; yields a directory for files."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="asyncpool-aws-") as directory:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        defaults = {
            "AWS_CONFIG_FILE": f"{directory}/config",
            "AWS_SHARED_CREDENTIALS_FILE": f"{directory}/credentials",
            "AWS_EC2_METADATA_DISABLED": "true",
            "BOTO_CONFIG": f"{directory}/boto",
        }
        for name, value in {**defaults, **variables}.items():
            patch.setenv(name, value)
        yield Path(directory)


def static_key(*verifiers: SigV4Verifier) -> dict[str, str]:
    """Return the environment of a long-lived key that `verifiers` know."""
    for verifier in verifiers:
        verifier.add_key("AKIAEXAMPLE", secret("static"))
    return {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": secret("static")}


@contextmanager
def web_identity(stub: AwsStub) -> Iterator[None]:
    """Sign with credentials for which a web identity is exchanged at `stub`, anew for every token."""
    with environment(AWS_ENDPOINT_URL_STS=stub.url, AWS_ROLE_ARN="arn:aws:iam::123456789012:role/app") as directory:
        (directory / "token").write_text(secret("identity"), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(directory / "token"))
            yield
