"""Every source of credentials and every storage as their users write them: read by the type checkers, never run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import assert_type

import google.auth.credentials
import httpx
import redis.asyncio
from azure.identity.aio import DefaultAzureCredential

from asyncpool_creds import BindableProvider, Credential, CredentialProvider, TokenManager, TokenManagers, create_pool
from asyncpool_creds.providers.aws import RDSIAM, AuroraDSQL, Redshift, SecretsManager
from asyncpool_creds.providers.azure import DATABASE_SCOPE, Entra
from asyncpool_creds.providers.chain import Chain
from asyncpool_creds.providers.command import Command
from asyncpool_creds.providers.env import Environment, Static
from asyncpool_creds.providers.file import File
from asyncpool_creds.providers.gcp import LOGIN_SCOPE, CloudSQLIAM
from asyncpool_creds.providers.globus import Globus, GlobusResource
from asyncpool_creds.providers.vault import (
    AppRoleAuth,
    JWTAuth,
    KubernetesAuth,
    TokenAuth,
    TokenFileAuth,
    VaultAuth,
    VaultDatabase,
    VaultKV,
    VaultLogin,
    VaultStaticRole,
)
from asyncpool_creds.storage import TokenStorage
from asyncpool_creds.storage.file import FileStorage
from asyncpool_creds.storage.keyring import KeyringStorage
from asyncpool_creds.storage.redis import RedisStorage
from asyncpool_creds.testing.sigv4 import SigV4Verifier, TokenService


async def token() -> str:
    return "token"


def client() -> httpx.AsyncClient:
    return httpx.AsyncClient()


# AWS

bindable: Sequence[BindableProvider] = [RDSIAM(), AuroraDSQL(), AuroraDSQL(token_lifetime=timedelta(minutes=15))]
aws: Sequence[CredentialProvider] = [
    RDSIAM("db.example.com", 5432, "app", region="eu-central-1", profile="production"),
    AuroraDSQL("db.example.com", admin=True),
    SecretsManager("db", user_key="user", password_key=None, user="app", refresh_every=60),
    Redshift("sales", user="app", database="dev", auto_create=True, groups=["readers"], token_lifetime=3600),
    Redshift(workgroup="sales"),
]

# Azure and Google

azure: CredentialProvider = Entra(
    DefaultAzureCredential(), user="app", scope=DATABASE_SCOPE, close_credential=True, timeout=timedelta(seconds=5)
)


def gcp(login: google.auth.credentials.Credentials) -> CredentialProvider:
    return CloudSQLIAM(login, user="app@project.iam", scope=LOGIN_SCOPE, timeout=5)


# Vault


class OwnAuth:
    async def login(self) -> VaultLogin:
        return VaultLogin("auth/userpass/login/app", {"password": "secret"})


ways: Sequence[VaultAuth | str] = [
    "token",
    TokenAuth("token"),
    TokenFileAuth(Path("token")),
    AppRoleAuth("role", secret_id_file="secret"),
    KubernetesAuth("app"),
    JWTAuth("app", jwt=token),
]
vault: Sequence[CredentialProvider] = [
    VaultDatabase("app", address="https://vault.example.com", auth=ways[0], namespace="team", http_client=client),
    VaultStaticRole("app", auth=AppRoleAuth("role", "secret")),
    VaultKV("app/db", kv_version=1, username_field=None, refresh_every=timedelta(minutes=1)),
]

# Files, commands, variables, and the first of several

local: Sequence[CredentialProvider] = [
    File("/run/secrets/db", format="json", user_path=Path("user"), check_every=None),
    Command(["token", Path("config")], user="app", env={"A": "b"}, timeout=5),
    Environment("TOKEN", user_variable="USER"),
    Static("secret", user="app", expires_at=datetime.now(UTC)),
]
chain: BindableProvider = Chain(RDSIAM(), Environment(), token, timeout=timedelta(seconds=5))

# Globus, and a manager for each resource


async def globus() -> None:
    auth = Globus(
        "client", client_secret="secret", scopes={"db": ["read"], "api": "all"}, storage=FileStorage("tokens")
    )
    resource: CredentialProvider = auth.resource("db")
    assert isinstance(resource, GlobusResource)
    async with TokenManagers(auth.resource, refresh_threshold=60, background=False) as managers:
        await managers.start("db", "api")
        assert_type(managers.manager("db"), TokenManager)
        assert_type(await managers.get("db"), Credential)
        assert_type(managers.names(), tuple[str, ...])
        await managers.discard("api")
        async with create_pool(credentials=managers.manager("db")) as pool:
            await pool.fetchval("SELECT 1")


# Storage


async def storages() -> None:
    async with AsyncExitStack() as stack:
        found: list[TokenStorage] = [
            FileStorage(Path("tokens")),
            KeyringStorage("app", lock_directory="locks", entry_limit=1000),
            await stack.enter_async_context(RedisStorage("redis://localhost", prefix="app:", lock_lifetime=30)),
            RedisStorage(redis.asyncio.Redis(), timeout=timedelta(seconds=1)),
        ]
        for storage in found:
            assert_type(await storage.keys(), list[str])


# Testing

service: TokenService = "dsql"
verify: Callable[[str, str], str | None] = SigV4Verifier(service, region="eu-central-1", host="db", port=5432).verify
