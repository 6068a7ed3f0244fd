"""Every way to log in at a real OpenBao, and what is said when it does not work."""

from __future__ import annotations

import asyncio
import pickle
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from aiohttp import web
from openbao import Line, Vault, environment, started
from support import assert_no_secret, secret

from asyncpool_creds import ProviderError
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

pytestmark = pytest.mark.anyio


@pytest.fixture
async def vault(anyio_backend: object) -> AsyncIterator[Vault]:
    vault = await started()
    await vault.bao.ask("POST", "secret/data/login", {"data": {"username": "app", "password": secret("kv")}})
    yield vault
    await vault.make_login()


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
async def make(vault: Vault, line: Line) -> AsyncIterator[Callable[..., VaultKV]]:
    """Makes providers that read a secret which the policy ``app`` opens."""
    made: list[VaultKV] = []

    def make(auth: VaultAuth | str | None, **arguments: Any) -> VaultKV:
        arguments = {"address": vault.url, "http_client": line.client, **arguments}
        made.append(VaultKV("login", auth=auth, **arguments))
        return made[-1]

    yield make
    for provider in made:
        await provider.aclose()


# Tokens


async def test_a_plain_token_will_do(vault, make):
    token = await vault.make_token()

    for auth in (token, TokenAuth(token)):
        assert (await make(auth).fetch()).user == "app"


async def test_the_environment_says_where_and_who(vault, make, monkeypatch, line):
    token = await vault.make_token()
    with environment(monkeypatch, VAULT_ADDR=vault.url + "/", VAULT_TOKEN=token):
        provider = make(None, address=None)

    assert (await provider.fetch()).user == "app"
    assert line.seen[-1].headers["X-Vault-Request"] == "true"
    assert "X-Vault-Namespace" not in line.seen[-1].headers


async def test_openbaos_own_variables_come_first(vault, make, monkeypatch):
    token = await vault.make_token()
    theirs = {"VAULT_ADDR": "https://vault.invalid", "VAULT_TOKEN": secret("other"), "VAULT_NAMESPACE": "other"}
    with environment(monkeypatch, **theirs, BAO_ADDR=vault.url, BAO_TOKEN=token, BAO_NAMESPACE="root"):
        provider = make(None, address=None)

    assert (await provider.fetch()).user == "app"


async def test_a_namespace_is_where_everything_happens(vault, make, monkeypatch):
    ask = vault.bao.ask
    await ask("POST", "sys/namespaces/team", {})
    await ask("POST", "sys/mounts/secret", {"type": "kv", "options": {"version": "2"}}, namespace="team")
    inside = {"data": {"username": "team", "password": secret("kv")}}
    await ask("POST", "secret/data/login", inside, namespace="team")
    with environment(monkeypatch, VAULT_NAMESPACE="team"):
        from_environment = make(vault.bao.root_token)

    try:
        assert (await make(vault.bao.root_token, namespace="team").fetch()).user == "team"
        assert (await from_environment.fetch()).user == "team"
        assert (await make(vault.bao.root_token).fetch()).user == "app"
        with pytest.raises(ProviderError, match=r"HTTP 404: namespace not found.*and the namespace"):
            await make(vault.bao.root_token, namespace="elsewhere").fetch()
    finally:
        await ask("DELETE", "sys/namespaces/team")


async def test_a_token_file_is_read_again_when_its_token_is_refused(vault, make, tmp_path, line):
    path = tmp_path / "token"
    first, second = await vault.make_token(), await vault.make_token()
    path.write_text(first + "\n")
    provider = make(TokenFileAuth(path))
    await provider.fetch()

    await vault.bao.ask("POST", "auth/token/revoke-self", token=first)
    path.write_text(second + "\n")

    assert (await provider.fetch()).user == "app"
    assert line.seen[-1].headers["X-Vault-Token"] == second
    await provider.aclose()
    await vault.bao.ask("GET", "auth/token/lookup-self", token=second)  # it is not ours to revoke


async def test_a_token_file_whose_token_is_refused_and_the_only_one_is_an_error_for_good(vault, make, tmp_path):
    path = tmp_path / "token"
    path.write_text(secret("unknown"))

    with pytest.raises(ProviderError, match="wrong, expired or revoked") as caught:
        await make(TokenFileAuth(path)).fetch()

    assert not caught.value.retryable


@pytest.mark.parametrize("content", [None, "", "  \n", b"\xff\xfe"])
async def test_a_file_that_is_not_there_yet_is_tried_again(make, tmp_path, content):
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(ProviderError, match=r"cannot be read|is empty, or no text") as caught:
        await make(TokenFileAuth(path)).fetch()

    assert caught.value.retryable


async def test_a_file_that_holds_no_token_is_an_error_that_does_not_quote_it(make, tmp_path):
    path = tmp_path / "token"
    path.write_text(f"{secret()}\n{secret()}")

    with pytest.raises(ProviderError, match="characters that no token has"):
        await make(TokenFileAuth(path)).fetch()


async def test_a_secret_that_needs_no_lease_needs_no_token_that_may_look_itself_up(vault, make, line):
    provider = make(await vault.make_token(no_default_policy=True))

    assert (await provider.fetch()).user == "app"
    line.answer("auth/token/lookup-self", 200, {"data": {}})
    assert (await provider.fetch()).user == "app"


async def test_a_token_for_a_number_of_requests_is_replaced_by_a_login(vault, make, line):
    await vault.make_login(token_num_uses=2)
    provider = make(AppRoleAuth(vault.role_id, vault.secret_id))

    for _ in range(5):
        assert (await provider.fetch()).user == "app"

    assert line.count("auth/approle/login") == 3


async def test_the_policy_that_is_missing_is_named(vault, make):
    provider = make(await vault.make_token(policies=["default"]))

    with pytest.raises(ProviderError, match=r'add to one of them: path "secret/data/login"') as caught:
        await provider.fetch()

    assert not caught.value.retryable


# AppRole


async def test_approle_logs_in_with_a_secret_id(vault, make, line):
    provider = make(AppRoleAuth(vault.role_id, vault.secret_id))

    await provider.fetch()
    await provider.fetch()

    assert line.take() == ["auth/approle/login", "secret/data/login", "secret/data/login"]


async def test_approle_reads_the_secret_id_at_each_login(vault, make, tmp_path):
    path = tmp_path / "secret_id"
    path.write_text(vault.secret_id)
    provider = make(AppRoleAuth(vault.role_id, secret_id_file=path))
    await provider.fetch()
    await provider.aclose()
    path.write_text(secret("old"))

    with pytest.raises(ProviderError, match=r"invalid role or secret ID\); check role_id, secret_id") as caught:
        await provider.fetch()

    assert not caught.value.retryable


async def test_approle_without_a_secret_id_says_that_there_is_none(vault, make):
    with pytest.raises(ProviderError, match="missing secret_id"):
        await make(AppRoleAuth(vault.role_id)).fetch()


async def test_an_auth_method_that_is_mounted_elsewhere_is_missed(vault, make):
    auth = AppRoleAuth(vault.role_id, vault.secret_id, mount="team/approle")

    with pytest.raises(ProviderError, match=r"auth/team/approle/login was refused .* mount;") as caught:
        await make(auth).fetch()

    assert not caught.value.retryable


# JWT


async def test_jwt_logs_in_with_a_token_a_file_or_what_a_function_gets(vault, make, tmp_path):
    path = tmp_path / "jwt"
    path.write_text(vault.make_jwt())

    async def get() -> str:
        return vault.make_jwt()

    for auth in (JWTAuth("app", vault.make_jwt()), JWTAuth("app", get), JWTAuth("app", jwt_file=path)):
        assert (await make(auth).fetch()).user == "app"


@pytest.mark.parametrize(
    ("role", "claims", "complaint"),
    [
        ("nobody", {}, 'role "nobody" could not be found'),
        ("app", {"exp": 1_000_000}, "token is expired"),
        ("app", {"aud": "others"}, "invalid audience"),
        (None, {}, "missing role"),
    ],
)
async def test_jwt_says_what_the_server_dislikes(vault, make, role, claims, complaint):
    with pytest.raises(ProviderError, match=complaint) as caught:
        await make(JWTAuth(role, vault.make_jwt(**claims))).fetch()

    assert not caught.value.retryable
    assert "check role and mount" in str(caught.value)


async def test_what_the_function_raises_is_the_cause(make):
    async def get() -> str:
        raise ConnectionError("no route")

    with pytest.raises(ProviderError, match=r"login\(\) of JWTAuth raised ConnectionError") as caught:
        await make(JWTAuth("app", get)).fetch()

    assert caught.value.retryable


@pytest.mark.parametrize("nothing", ["", None])
async def test_a_function_that_gets_no_token_is_named(make, line, nothing):
    async def get() -> Any:
        return nothing

    with pytest.raises(ProviderError, match="the function that JWTAuth was given returned no token"):
        await make(JWTAuth("app", get)).fetch()

    assert line.requests == []


# Kubernetes


@asynccontextmanager
async def kubernetes(vault: Vault, knows: str) -> AsyncIterator[None]:
    """An API server that knows one service account, and OpenBao asking it."""

    async def review(request: web.Request) -> web.Response:
        asked = (await request.json())["spec"]
        user = {"username": "system:serviceaccount:prod:app", "uid": "1", "groups": ["system:serviceaccounts"]}
        status = {"authenticated": False}
        if asked["token"] == knows:
            status = {"authenticated": True, "user": user, "audiences": asked.get("audiences", [])}
        answer = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": status}
        return web.json_response(answer, status=201)

    application = web.Application()
    application.router.add_post("/apis/authentication.k8s.io/v1/tokenreviews", review)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    settings = {
        "kubernetes_host": f"http://127.0.0.1:{runner.addresses[0][1]}",
        "kubernetes_ca_cert": trustme.CA().cert_pem.bytes().decode(),
        "disable_local_ca_jwt": True,
        "token_reviewer_jwt": vault.make_jwt(),
    }
    await vault.bao.ask("POST", "auth/kubernetes/config", settings)
    bound = {"bound_service_account_names": ["app"], "bound_service_account_namespaces": ["prod"]}
    await vault.bao.ask("POST", "auth/kubernetes/role/app", {**bound, "token_policies": ["app"], "token_ttl": "1h"})
    try:
        yield
    finally:
        await runner.cleanup()


def service_account_token(vault: Vault, **claims: object) -> str:
    account = {"namespace": "prod", "serviceaccount": {"name": "app", "uid": "1"}}
    subject = "system:serviceaccount:prod:app"
    issuer = "https://kubernetes.default.svc.cluster.local"
    return vault.make_jwt(**{"sub": subject, "iss": issuer, "aud": [issuer], "kubernetes.io": account, **claims})


async def test_kubernetes_logs_in_with_the_mounted_token_of_the_moment(vault, make, tmp_path):
    path = tmp_path / "token"
    known = service_account_token(vault)
    provider = make(KubernetesAuth("app", token_file=path))
    async with kubernetes(vault, knows=known):
        path.write_text(service_account_token(vault, exp=int(time.time()) + 60))
        with pytest.raises(ProviderError, match="bound to this service account") as caught:
            await provider.fetch()
        path.write_text(known)

        credential = await provider.fetch()

    assert credential.user == "app"
    assert not caught.value.retryable


async def test_kubernetes_names_an_unknown_role(vault, make, tmp_path):
    path = tmp_path / "token"
    path.write_text(service_account_token(vault))
    async with kubernetes(vault, knows=path.read_text()):
        with pytest.raises(ProviderError, match='invalid role name "other"') as caught:
            await make(KubernetesAuth("other", token_file=path)).fetch()

    assert not caught.value.retryable


async def test_outside_of_kubernetes_it_says_which_file_is_missing(make):
    path = "/var/run/secrets/kubernetes.io/serviceaccount/token"

    with pytest.raises(ProviderError, match=f"{path} cannot be read"):
        await make(KubernetesAuth("app")).fetch()


# Anything else


async def test_an_auth_method_of_ones_own_needs_one_method(vault, make):
    await vault.bao.ask("POST", "sys/auth/userpass", {"type": "userpass"})
    password = secret("ann")
    await vault.bao.ask("POST", "auth/userpass/users/ann", {"password": password, "token_policies": ["app"]})

    class Login:
        async def login(self) -> VaultLogin:
            return VaultLogin("auth/userpass/login/ann", {"password": password})

    try:
        assert (await make(Login()).fetch()).user == "app"
        await vault.bao.ask("POST", "auth/userpass/users/ann", {"password": secret("new")})
        with pytest.raises(ProviderError, match="check the auth method"):
            await make(Login()).fetch()
    finally:
        await vault.bao.ask("DELETE", "sys/auth/userpass")


async def test_a_login_without_a_token_in_the_answer_is_no_login(vault, make, line):
    mfa = {"auth": {"client_token": "", "mfa_requirement": {"mfa_request_id": "1"}, "lease_duration": 0}}
    line.answer("auth/approle/login", 200, mfa)

    with pytest.raises(ProviderError, match="gave no token; is a second factor asked for") as caught:
        await make(AppRoleAuth(vault.role_id, vault.secret_id)).fetch()

    assert not caught.value.retryable


async def test_what_a_server_quotes_of_a_login_is_not_repeated(vault, make, line):
    auth = AppRoleAuth(vault.role_id, secret("wrong"))
    line.answer("auth/approle/login", 400, {"errors": [f"no such secret id: {secret('wrong')}"]})

    with pytest.raises(ProviderError, match=r"no such secret id: \[redacted\]"):
        await make(auth).fetch()


async def test_what_is_empty_in_a_login_is_not_looked_for_in_what_the_server_says(make):
    class Login:
        async def login(self) -> VaultLogin:
            return VaultLogin("auth/approle/login", {"role_id": "unknown", "secret_id": ""})

    with pytest.raises(ProviderError, match=r"HTTP 400: missing secret_id\)|HTTP 400: invalid role"):
        await make(Login()).fetch()


async def test_a_private_certificate_authority_comes_with_the_client(vault, make):
    authority = trustme.CA()
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server_context)

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        url = httpx.URL(vault.url)
        onward, back = await asyncio.open_connection(url.host, url.port)
        back.write(await reader.readuntil(b"\r\n\r\n"))
        writer.write(await onward.readuntil(b"\r\n\r\n"))
        writer.write(await onward.read(1 << 16))
        writer.close()
        back.close()

    def make_client() -> httpx.AsyncClient:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        return httpx.AsyncClient(verify=context, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))

    server = await asyncio.start_server(forward, "127.0.0.1", 0, ssl=server_context)
    async with server:
        address = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        auth = await vault.make_token(no_default_policy=True)
        trusting = VaultKV("login", address=address, auth=auth, http_client=make_client)
        wary = VaultKV("login", address=address, auth=auth)
        async with aclosing(trusting), aclosing(wary):
            assert (await trusting.fetch()).user == "app"
            with pytest.raises(ProviderError, match="cannot be reached"):
                await wary.fetch()


# Arguments


@pytest.mark.parametrize(
    ("make_it", "error", "complaint"),
    [
        (lambda: VaultDatabase("app", auth="t"), ValueError, "pass address, or set VAULT_ADDR"),
        (lambda: VaultDatabase("app", address="http://127.0.0.1:1"), ValueError, "pass auth, .* or set VAULT_TOKEN"),
        (lambda: VaultDatabase("app", address="http://vault:8200", auth="t"), ValueError, "must be https"),
        (lambda: VaultDatabase("app", address="vault:8200", auth="t"), ValueError, "address must be a full URL"),
        (lambda: VaultDatabase("app", address="https://vault", auth=5), TypeError, "auth must be a VaultAuth"),
        (lambda: VaultDatabase("app", address="https://vault", auth=""), ValueError, "auth is empty"),
        (lambda: VaultDatabase("", address="https://vault", auth="t"), ValueError, "role is empty"),
        (lambda: VaultDatabase(None, address="https://vault", auth="t"), TypeError, "role must be a str"),
        (lambda: VaultDatabase("a/b", address="https://vault", auth="t"), ValueError, "role must be the name alone"),
        (lambda: VaultDatabase("a", mount="../x", address="https://vault", auth="t"), ValueError, "mount must be a"),
        (lambda: VaultDatabase("a", namespace="a b", address="https://vault", auth="t"), ValueError, "namespace has"),
        (lambda: VaultDatabase("a", timeout=0, address="https://vault", auth="t"), ValueError, "timeout must be"),
        (
            lambda: VaultDatabase("a", http_client=httpx.AsyncClient, timeout="5", address="https://vault", auth="t"),
            TypeError,
            "timeout must be",
        ),
        (lambda: VaultStaticRole("a/b", address="https://vault", auth="t"), ValueError, "role must be the name alone"),
        (lambda: VaultKV("", address="https://vault", auth="t"), ValueError, "path is empty"),
        (lambda: VaultKV("a//b", address="https://vault", auth="t"), ValueError, "path must be a path"),
        (
            lambda: VaultKV("a", kv_version=3, address="https://vault", auth="t"),
            ValueError,
            "kv_version must be 1 or 2",
        ),
        (lambda: VaultKV("a", password_field="", address="https://vault", auth="t"), ValueError, "password_field is"),
        (
            lambda: VaultKV("a", refresh_every=-1, address="https://vault", auth="t"),
            ValueError,
            "refresh_every must be",
        ),
        (lambda: TokenAuth(""), ValueError, "token is empty"),
        (lambda: TokenAuth("a\nb"), ValueError, "token has a space, a line break"),
        (lambda: TokenAuth(None), TypeError, "token must be a str, not None"),
        (lambda: TokenFileAuth(5), TypeError, "path must be a str or a path"),
        (lambda: AppRoleAuth(""), ValueError, "role_id is empty"),
        (lambda: AppRoleAuth("r", "s", secret_id_file="f"), ValueError, "either secret_id or secret_id_file"),
        (lambda: AppRoleAuth("r", "s", mount=""), ValueError, "mount is empty"),
        (lambda: KubernetesAuth(""), ValueError, "role is empty"),
        (lambda: KubernetesAuth("app", ""), ValueError, "token_file is empty"),
        (lambda: JWTAuth("app"), ValueError, "either jwt or jwt_file"),
        (lambda: JWTAuth("app", "a", jwt_file="b"), ValueError, "either jwt or jwt_file"),
        (lambda: JWTAuth("app", 5), TypeError, "jwt must be a str"),
    ],
)
def test_what_is_wrong_with_an_argument_is_said_at_once(make_it, error, complaint, monkeypatch):
    with environment(monkeypatch), pytest.raises(error, match=complaint):
        make_it()


def test_nothing_shows_how_it_logs_in():
    methods: list[VaultAuth] = [
        TokenAuth(secret("token")),
        AppRoleAuth(secret("role"), secret("id")),
        JWTAuth("app", secret("jwt")),
    ]

    for method in methods:
        provider = VaultDatabase("app", address="https://vault.example.com", auth=method)
        assert_no_secret(method, provider)
        for thing in (method, provider):
            with pytest.raises(TypeError, match="cannot be pickled"):
                pickle.dumps(thing)
    assert_no_secret(VaultLogin("auth/jwt/login", {"jwt": secret("jwt")}))


def test_a_provider_says_what_it_is_and_where():
    arguments = {"address": "https://vault.example.com/v1/", "auth": "t", "namespace": "team"}

    where = "at https://vault.example.com namespace=team"
    assert repr(VaultDatabase("app", **arguments)) == f"<VaultDatabase database/creds/app {where}>"
    assert repr(VaultStaticRole("app", mount="/pg/", **arguments)) == f"<VaultStaticRole pg/static-creds/app {where}>"
    assert repr(VaultKV("a/b c", **arguments)) == f"<VaultKV secret/data/a/b%20c {where}>"
    assert repr(VaultKV("a", kv_version=1, **arguments)) == f"<VaultKV secret/a {where}>"


def test_the_files_of_the_documents_are_the_defaults():
    assert TokenFileAuth().path == "~/.vault-token"
    assert Path(KubernetesAuth("app").token_file).parts[-2:] == ("serviceaccount", "token")
