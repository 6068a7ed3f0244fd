"""A real OpenID Connect server, canaille, which knows one person and two clients.

Use it as a context manager: it runs in a process of its own, on a free port, and forgets everything with its end.
"""

# ruff: noqa: PLC0415, T201 - it is imported where the server is not; the standard output is how it answers

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import TracebackType
from typing import Any, Self


class CanailleServer:
    """The server.

    Args:
        user: Who may log in.
        password: With what.
        client_secret: Of the client ``app``.
        client_key: A public key, as a JSON Web Key, of the client ``signer``.
        lifetime: Seconds that an access token and the refresh token beside it live.
    """

    def __init__(
        self, *, user: str, password: str, client_secret: str, client_key: dict[str, str], lifetime: int
    ) -> None:
        self._settings = {
            "user": user,
            "password": password,
            "client_secret": client_secret,
            "client_key": client_key,
            "lifetime": lifetime,
        }
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "AUTHLIB_INSECURE_TRANSPORT": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(self._settings), file=self._process.stdin, flush=True)
        self.url = self._process.stdout.readline().strip()
        if not self.url:
            self._stop()
            raise RuntimeError("canaille did not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._process is not None:
            with self._process as process:
                process.kill()


def serve(user: str, password: str, client_secret: str, client_key: dict[str, Any], lifetime: int) -> None:
    """Print the address of the issuer, and serve until killed."""
    from canaille import create_app
    from canaille.app import models
    from canaille.backends import Backend
    from werkzeug.serving import make_server

    # The address is part of the configuration: the port comes first.
    server = make_server("127.0.0.1", 0, lambda *_: [], threaded=True)
    address = f"127.0.0.1:{server.port}"
    grants = ["password", "client_credentials", "refresh_token"]
    server.app = app = create_app(
        {
            "SECRET_KEY": "canaille",
            "SERVER_NAME": address,
            "PREFERRED_URL_SCHEME": "http",
            "OAUTH2_TOKEN_EXPIRES_IN": dict.fromkeys(grants, lifetime),
            "CANAILLE": {"DATABASE": "memory"},
        }
    )
    clients = [
        ("app", {"client_secret": client_secret, "token_endpoint_auth_method": "client_secret_basic"}),
        ("signer", {"jwks": json.dumps({"keys": [client_key]}), "token_endpoint_auth_method": "private_key_jwt"}),
    ]
    with app.app_context(), Backend.instance.session():
        person = models.User(user_name=user, password=password, family_name=user, emails=[f"{user}@example.com"])
        Backend.instance.save(person)
        for client_id, proof in clients:
            client = models.Client(
                client_id=client_id, client_name=client_id, grant_types=grants, scope=["openid", "profile"], **proof
            )
            Backend.instance.save(client)
            client.audience = [client]
            Backend.instance.save(client)
    print(f"http://{address}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve(**json.loads(sys.stdin.readline()))
