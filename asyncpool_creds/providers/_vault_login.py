"""How to log in at Vault: what each auth method sends, or the token that somebody else takes care of."""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn, Protocol, runtime_checkable
from urllib.parse import quote

import anyio
import anyio.to_thread

from asyncpool_creds._errors import ProviderError
from asyncpool_creds._tracebacks import clears_frames
from asyncpool_creds.providers._arguments import check_text

__all__ = [
    "FIT_FOR_HEADER",
    "AppRoleAuth",
    "JWTAuth",
    "KubernetesAuth",
    "TokenAuth",
    "TokenFileAuth",
    "Unpicklable",
    "VaultAuth",
    "VaultLogin",
    "parse_path",
    "require_text",
]

# Where Kubernetes mounts the token of a pod's service account (its manual, "Configure Service Accounts for Pods").
_SERVICE_ACCOUNT_TOKEN: Final = "/var/run/secrets/kubernetes.io/serviceaccount/token"  # noqa: S105 - a path
_LONGEST_FILE: Final = 1 << 16
# What can be sent in a header; anything else would end up in an exception of the HTTP library, secret and all.
FIT_FOR_HEADER: Final = re.compile(r"[!-~]+")


class Unpicklable:
    """Holds a secret that must not be written down by accident."""

    __slots__ = ()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} holds a secret and cannot be pickled; make one where it is needed")


@dataclass(frozen=True, slots=True)
class VaultLogin(Unpicklable):
    """A login request.

    Args:
        path: Where to, such as ``"auth/ldap/login/ann"``.
        document: What is posted there.
        advice: What to check if it is refused.
    """

    path: str
    document: Mapping[str, str] = field(repr=False)
    advice: str = "check the auth method, its mount and its role"


@runtime_checkable
class VaultAuth(Protocol):
    """A way to a Vault token. One of your own needs this one method; several providers may share one."""

    async def login(self) -> VaultLogin | str:
        """Return the request that logs in, or a token that somebody else takes care of.

        Called whenever another token is needed. A token that is returned a second time means that there is no other.

        Raises:
            ProviderError: What is needed for it is not there.
        """
        ...


@dataclass(frozen=True, slots=True)
class TokenAuth(Unpicklable):
    """A token. It is renewed as long as Vault renews it; when it ends, so do the leases taken with it.

    Args:
        token: The token.

    Raises:
        TypeError: It is no str.
        ValueError: It is empty, or has characters that no token has.
    """

    token: str = field(repr=False)

    def __post_init__(self) -> None:
        require_text("TokenAuth", "token", self.token)
        if not FIT_FOR_HEADER.fullmatch(self.token):
            raise ValueError("TokenAuth: token has a space, a line break or something else that no token has")

    async def login(self) -> VaultLogin | str:
        """Return the token."""
        return self.token


@dataclass(frozen=True, slots=True)
class TokenFileAuth:
    """A token in a file, as a Vault agent's sink or ``vault login`` writes it; read anew when another one is needed.

    Args:
        path: The file.
    """

    path: str | os.PathLike[str] = "~/.vault-token"

    def __post_init__(self) -> None:
        _check_path("TokenFileAuth", "path", self.path)

    @clears_frames
    async def login(self) -> VaultLogin | str:
        """Return the token that the file holds now."""
        return await _read_file(self.path)


@dataclass(frozen=True, slots=True)
class AppRoleAuth(Unpicklable):
    """The auth method ``approle``.

    Args:
        role_id: The role's id.
        secret_id: The secret id; None if the role does not bind one.
        secret_id_file: A file that holds it, instead; read at each login.
        mount: Where the auth method is mounted.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is empty, or both ways of giving the secret id are used.
    """

    role_id: str = field(repr=False)
    secret_id: str | None = field(default=None, repr=False)
    secret_id_file: str | os.PathLike[str] | None = None
    mount: str = "approle"

    def __post_init__(self) -> None:
        require_text("AppRoleAuth", "role_id", self.role_id)
        check_text("AppRoleAuth", "secret_id", self.secret_id)
        _check_path("AppRoleAuth", "secret_id_file", self.secret_id_file)
        parse_path("AppRoleAuth", "mount", self.mount)
        if self.secret_id is not None and self.secret_id_file is not None:
            raise ValueError("AppRoleAuth: pass either secret_id or secret_id_file")

    @clears_frames
    async def login(self) -> VaultLogin | str:
        """Return the login with the role's id and the secret id."""
        document = {"role_id": self.role_id}
        secret_id = self.secret_id if self.secret_id_file is None else await _read_file(self.secret_id_file)
        if secret_id is not None:
            document["secret_id"] = secret_id
        advice = "check role_id, secret_id and mount; secret ids expire, and may be good for so many logins only"
        return VaultLogin(_login_path("AppRoleAuth", self.mount), document, advice)


@dataclass(frozen=True, slots=True)
class KubernetesAuth:
    """The auth method ``kubernetes``: the token of a pod's service account.

    Args:
        role: The role of the auth method.
        token_file: The service account's token; read at each login, because Kubernetes replaces it.
        mount: Where the auth method is mounted.
    """

    role: str
    token_file: str | os.PathLike[str] = _SERVICE_ACCOUNT_TOKEN
    mount: str = "kubernetes"

    def __post_init__(self) -> None:
        require_text("KubernetesAuth", "role", self.role)
        _check_path("KubernetesAuth", "token_file", self.token_file)
        parse_path("KubernetesAuth", "mount", self.mount)

    @clears_frames
    async def login(self) -> VaultLogin | str:
        """Return the login with the token that is mounted now."""
        document = {"role": self.role, "jwt": await _read_file(self.token_file)}
        advice = "check role and mount, and that the role is bound to this service account, namespace and audience"
        return VaultLogin(_login_path("KubernetesAuth", self.mount), document, advice)


@dataclass(frozen=True, slots=True)
class JWTAuth(Unpicklable):
    """The auth method ``jwt``: a token of an issuer that Vault trusts.

    Args:
        role: The role of the auth method; None: the method's default role.
        jwt: The token, or an async function that gets a fresh one; called at each login.
        jwt_file: A file that holds it, instead; read at each login.
        mount: Where the auth method is mounted.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is empty, or not exactly one of `jwt` and `jwt_file` is given.
    """

    role: str | None
    jwt: str | Callable[[], Awaitable[str]] | None = field(default=None, repr=False)
    jwt_file: str | os.PathLike[str] | None = None
    mount: str = "jwt"

    def __post_init__(self) -> None:
        check_text("JWTAuth", "role", self.role)
        if not callable(self.jwt):
            check_text("JWTAuth", "jwt", self.jwt)
        _check_path("JWTAuth", "jwt_file", self.jwt_file)
        parse_path("JWTAuth", "mount", self.mount)
        if (self.jwt is None) == (self.jwt_file is None):
            raise ValueError("JWTAuth: pass either jwt or jwt_file")

    @clears_frames
    async def login(self) -> VaultLogin | str:
        """Return the login with the token."""
        if self.jwt_file is not None:
            token = await _read_file(self.jwt_file)
        else:
            token = await self.jwt() if callable(self.jwt) else self.jwt or ""
            if not isinstance(token, str) or not token:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ProviderError(
                    "vault: the function that JWTAuth was given returned no token; it must return one, as a str"
                )
        document = {"jwt": token} if self.role is None else {"role": self.role, "jwt": token}
        advice = "check role and mount, and that the token is not expired and meets the role's audience and claims"
        return VaultLogin(_login_path("JWTAuth", self.mount), document, advice)


def require_text(owner: str, argument: str, value: object) -> None:
    """Raise unless `value` is a str with something in it."""
    if value is None:
        raise TypeError(f"{owner}: {argument} must be a str, not None")
    check_text(owner, argument, value)


def parse_path(owner: str, argument: str, value: object) -> str:
    """Return a path as it stands in a URL."""
    require_text(owner, argument, value)
    parts = str(value).strip("/").split("/")
    if not all(part.strip(".") for part in parts):
        raise ValueError(f"{owner}: {argument} must be a path such as 'team/database', not {value!r}")
    return quote("/".join(parts))


def _login_path(owner: str, mount: str) -> str:
    return f"auth/{parse_path(owner, 'mount', mount)}/login"


def _check_path(owner: str, argument: str, value: object) -> None:
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{owner}: {argument} must be a str or a path, not {type(value).__name__}")
    if value == "":
        raise ValueError(f"{owner}: {argument} is empty; is an environment variable missing?")


async def _read_file(path: str | os.PathLike[str]) -> str:
    """Return the secret that a file holds."""

    def read() -> str:
        with Path(path).expanduser().open(encoding="utf-8") as file:
            return file.read(_LONGEST_FILE).strip()

    try:
        # A limit of its own, and given up on cancellation: a file system that hangs must not hold up a close.
        content = await anyio.to_thread.run_sync(read, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        message = f"vault: {os.fspath(path)} cannot be read ({reason}); check path and permissions"
        raise ProviderError(message) from error
    except UnicodeDecodeError:
        content = ""
    if not content:
        raise ProviderError(f"vault: {os.fspath(path)} is empty, or no text; it may just be being written")
    return content
