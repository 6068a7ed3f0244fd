"""The command provider runs real commands, and leaves none of them behind."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import pytest
from support import assert_no_secret, secret, tasks_of_ours

from asyncpool_creds import CredentialProvider, ProviderError, ProviderTimeout, TokenManager
from asyncpool_creds.providers.command import Command

pytestmark = pytest.mark.anyio

NOW = datetime(2027, 1, 15, 8, tzinfo=UTC)


class StoppedClock:
    def time(self):
        return NOW.timestamp()

    def monotonic(self):
        return 0.0


def sh(script, **options):
    """Return a provider whose command is a script of the shell; ``$TOKEN`` is a secret."""
    options["env"] = {"TOKEN": secret(), **options.get("env", {})}
    return Command(["sh", "-c", script], clock=StoppedClock(), **options)


def printing(document, **options):
    """Return a provider whose command prints a document, or a text."""
    text = document if isinstance(document, str) else json.dumps(document)
    return sh('printf %s "$OUTPUT"', env={"OUTPUT": text}, **options)


def jwt(**claims):
    payload = base64.urlsafe_b64encode(json.dumps({"name": secret(), **claims}).encode()).rstrip(b"=").decode()
    return f"eyJhbGciOiJub25lIn0.{payload}.x"


async def failure(provider, kind=ProviderError):
    with pytest.raises(ProviderError) as caught:
        await provider.fetch()
    assert type(caught.value) is kind
    return caught.value


async def content(path):
    """Return what another process has written to a file, once it has."""
    while not path.exists() or not path.read_text().endswith("\n"):  # noqa: ASYNC110 - another process writes it
        await asyncio.sleep(0.005)
    return path.read_text().strip()


def is_running(pid):
    try:
        return re.search(r"\) (\w)", Path(f"/proc/{pid}/stat").read_text())[1] != "Z"
    except FileNotFoundError:
        return False


# What it prints


def test_it_is_a_credential_provider():
    assert isinstance(sh(""), CredentialProvider)


async def test_a_line_of_text_is_the_token():
    credential = await sh('echo "$TOKEN"', user="ada").fetch()

    assert credential.password == secret()
    assert credential.user == "ada"
    assert credential.expires_at is None


async def test_a_json_web_token_says_itself_when_it_ends():
    credential = await printing(jwt(exp=NOW.timestamp() + 600)).fetch()

    assert credential.expires_at == NOW + timedelta(minutes=10)


@pytest.mark.parametrize("member", ["password", "token"])
async def test_json_has_the_secret_and_the_user(member):
    credential = await printing({member: secret(), "user": "ada"}).fetch()

    assert credential.password == secret()
    assert credential.user == "ada"
    assert credential.expires_at is None


async def test_the_user_that_was_asked_for_comes_before_the_one_that_is_printed():
    assert (await printing({"token": secret(), "user": "ada"}, user="bob").fetch()).user == "bob"


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("expires_at", "2027-01-15T08:10:00Z"),
        ("expires_at", "2027-01-15T09:10:00.000000001+01:00"),
        ("expires_at", NOW.timestamp() + 600),
        ("expires_at", str(int(NOW.timestamp()) + 600)),
        ("expires_in", 600),
        ("expires_in", "600"),
    ],
)
async def test_json_says_when_the_secret_ends(member, value):
    credential = await printing({"token": secret(), member: value, "user": None}).fetch()

    assert credential.expires_at == NOW + timedelta(minutes=10)


async def test_the_earliest_end_counts():
    token = jwt(exp=NOW.timestamp() + 600)

    later = await printing({"token": token, "expires_in": 900, "expires_at": None}).fetch()
    earlier = await printing({"token": token, "expires_in": 900, "expires_at": "2027-01-15T08:01:00Z"}).fetch()

    assert later.expires_at == NOW + timedelta(minutes=10)
    assert earlier.expires_at == NOW + timedelta(minutes=1)


async def test_an_exec_credential_is_understood():
    credential = await printing(
        {
            "apiVersion": "client.authentication.k8s.io/v1",
            "kind": "ExecCredential",
            "status": {"expirationTimestamp": "2027-01-15T08:10:00Z", "token": secret()},
        }
    ).fetch()

    assert credential.password == secret()
    assert credential.expires_at == NOW + timedelta(minutes=10)


# What it gets


async def test_it_has_our_environment_and_the_additions(monkeypatch):
    monkeypatch.setenv("INHERITED", "inherited")

    credential = await sh('echo "$INHERITED/$ADDED"', env={"ADDED": "added"}).fetch()

    assert credential.password == "inherited/added"


async def test_what_came_with_env_is_in_no_argument_that_others_can_see():
    arguments = (await sh("tr '\\0' ' ' < /proc/$$/cmdline").fetch()).password

    assert arguments.startswith("sh -c tr ")
    assert_no_secret(arguments)


async def test_it_is_found_on_the_path_that_it_is_given(tmp_path):
    tool = tmp_path / "tool-of-mine"
    tool.write_text("#!/bin/sh\necho found\n")
    tool.chmod(0o755)

    credential = await Command(["tool-of-mine"], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}).fetch()

    assert credential.password == "found"


async def test_arguments_are_not_taken_apart(tmp_path):
    (tmp_path / "a file").write_text("in a file\n")

    assert (await Command(["cat", tmp_path / "a file"]).fetch()).password == "in a file"


async def test_a_plugin_of_kubectl_learns_that_nobody_is_there():
    told = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "spec": {"interactive": False}}
    script = 'printf %s "$KUBERNETES_EXEC_INFO" | base64 -w 0'

    ours = await sh(script).fetch()
    theirs = await sh(script, env={"KUBERNETES_EXEC_INFO": "mine"}).fetch()

    assert json.loads(base64.b64decode(ours.password)) == told
    assert base64.b64decode(theirs.password) == b"mine"


async def test_its_standard_input_is_at_its_end():
    assert (await sh('cat; echo "$TOKEN"').fetch()).password == secret()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ("vault read", TypeError, "must be a list, such as"),
        (b"vault", TypeError, "must be a list"),
        (7, TypeError, "must be a list"),
        (["vault", 7], TypeError, "str or paths, not int"),
        ([], ValueError, "is empty"),
        ([""], ValueError, "is empty"),
        (["vault", "a\0b"], ValueError, "NUL"),
    ],
)
def test_arguments_are_checked_when_the_provider_is_made(arguments, error, message):
    with pytest.raises(error, match=message):
        Command(arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"env": "A=1"}, TypeError, "env must map"),
        ({"env": {"A": 1}}, TypeError, "env must map"),
        ({"env": {"A=": "1"}}, ValueError, "name in env"),
        ({"env": {"A": "\0"}}, ValueError, "NUL"),
        ({"timeout": 0}, ValueError, "timeout must be more than zero"),
        ({"timeout": float("inf")}, ValueError, "timeout must be more than zero"),
        ({"timeout": "1"}, TypeError, "timeout must be a number"),
        ({"user": ""}, ValueError, "user is empty"),
        ({"user": 1}, TypeError, "user must be a str"),
    ],
)
def test_options_are_checked_when_the_provider_is_made(options, error, message):
    with pytest.raises(error, match=message):
        Command(["true"], **options)


def test_neither_arguments_nor_variables_are_shown():
    shown = repr(Command(["tool", secret()], env={"TOKEN": secret()}, timeout=timedelta(seconds=5)))

    assert shown == "<Command tool timeout=5>"


# What goes wrong


async def test_a_failure_has_the_status_and_the_last_words():
    error = await failure(sh("printf 'one\\ntwo\\nthree\\n\\n\\033[31mfour\\033[0m\\n' >&2; exit 3"))

    assert str(error) == "command: 'sh' exited with status 3; it said: two | three | four"
    assert error.retryable
    assert isinstance(error.__cause__, subprocess.CalledProcessError)


async def test_a_failure_without_words_is_told_too():
    assert str(await failure(sh("exit 1"))) == "command: 'sh' exited with status 1"


async def test_a_failure_shows_nothing_of_what_the_command_was_given_or_printed():
    token = jwt()
    provider = sh(
        'echo "$OTHER" >&2; echo "got $PRINTED and \\"$TOKEN\\"" >&2; echo "{\\"password\\": \\"$PRINTED\\""; exit 1',
        env={"PRINTED": secret("printed"), "OTHER": token},
    )

    error = await failure(provider)

    assert str(error).endswith('it said: [redacted] | got [redacted] and "[redacted]"')


async def test_a_json_web_token_among_the_last_words_is_not_shown():
    script = f"echo 'token is eyJ{'h' * 10}.eyJ{'p' * 10}.ssss!' >&2; exit 1"

    assert str(await failure(sh(script))).endswith("it said: token is [redacted]!")


async def test_what_was_cut_off_at_its_beginning_is_not_shown():
    long_line = 'i=0; while [ $i -lt 600 ]; do printf "%s" "$TOKEN" >&2; i=$((i+1)); done'

    assert str(await failure(sh(f"{long_line}; exit 1"))).endswith("exited with status 1")
    assert str(await failure(sh(f"{long_line}; echo >&2; echo end >&2; exit 1"))).endswith("it said: end")


async def test_a_long_line_is_shortened():
    said = str(await failure(sh("printf 'start%0500dend' 0 >&2; exit 1"))).partition("it said: ")[2]

    assert said == "..." + "0" * 397 + "end"


async def test_nothing_is_shown_if_there_is_too_much_to_leave_out():
    error = await failure(sh("seq 1000000 1001000; echo 1000500 >&2; exit 1"))

    assert str(error) == "command: 'sh' exited with status 1"


async def test_any_amount_of_last_words_is_read():
    assert (await sh('yes "complaint" | head -c 300000 >&2; echo "$TOKEN"').fetch()).password == secret()


async def test_the_signal_that_ended_it_is_named():
    assert "'sh' was ended by SIGSEGV" in str(await failure(sh("kill -SEGV $$")))


async def test_a_real_time_signal_has_a_number():
    assert f"'sh' was ended by signal {signal.SIGRTMIN + 1}" in str(
        await failure(sh(f"kill -{signal.SIGRTMIN + 1} $$"))
    )


@pytest.mark.parametrize("program", ["no-such-tool", "/no/such/tool", "/etc/passwd/tool"])
async def test_a_program_that_is_not_there_is_no_passing_trouble(program):
    error = await failure(Command([program]))

    assert "was not found" in str(error)
    assert not error.retryable
    assert isinstance(error.__cause__, OSError)


async def test_a_script_whose_interpreter_is_not_there_is_not_found(tmp_path):
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)

    assert "its first line names" in str(await failure(Command([script])))


@pytest.mark.parametrize("mode", [0o644, 0o755])
async def test_what_is_no_program_cannot_be_executed(tmp_path, mode):
    file = tmp_path / "file"
    file.write_bytes(b"\x7fnothing that runs")
    file.chmod(mode)

    error = await failure(Command([file]))

    assert "cannot be executed" in str(error)
    assert not error.retryable


async def test_too_long_a_list_of_arguments_is_an_error():
    assert "could not be started (Argument list too long)" in str(await failure(Command(["true", "x" * 2_500_000])))


@pytest.mark.parametrize(
    ("script", "message", "retryable"),
    [
        ("echo why >&2", "its standard output is empty; it said: why", True),
        ('echo \'{"token": "abc\'', "broken or cut short", True),
        ("printf 'Welcome!\\n%s\\n' \"$TOKEN\"", "printed several lines", False),
        ("printf '\\377\\376'", "not UTF-8", False),
        ("printf 'a\\000b'", "characters that no server accepts", False),
        ("yes | tr -d '\\n'", "printed more than 131072 bytes", False),
        ("head -c 200000 /dev/zero", "printed more than 131072 bytes", False),
    ],
)
async def test_output_that_is_no_secret_is_told_apart(script, message, retryable):
    error = await failure(sh(script))

    assert message in str(error)
    assert error.retryable is retryable


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"user": "ada"}, "without 'password' or 'token'"),
        ({"password": ""}, "without 'password' or 'token'"),
        ({"password": 7}, "without 'password' or 'token'"),
        ({"token": "x", "user": 7}, "'user' that is no text"),
        ({"token": "x", "user": ""}, "'user' that is no text"),
        ({"token": "x", "expires_at": "tomorrow"}, "'expires_at' that is neither"),
        ({"token": "x", "expires_at": "2027-01-15T08:10:00"}, "'expires_at' that is neither"),
        ({"token": "x", "expires_at": True}, "'expires_at' that is neither"),
        ({"token": "x", "expires_at": NOW.timestamp() * 1000}, "'expires_at' that is neither"),
        ({"token": "x", "expires_in": "soon"}, "'expires_in' that is no number"),
        ({"token": "x", "expires_in": True}, "'expires_in' that is no number"),
        ({"token": "x", "expires_in": []}, "'expires_in' that is no number"),
        ({"token": "x", "expires_in": 1e300}, "'expires_in' that is no number"),
        ({"kind": "ExecCredential", "status": {"clientCertificateData": "x"}}, "without 'status.token'"),
        ({"kind": "ExecCredential"}, "without 'status.token'"),
        ({"kind": "ExecCredential", "status": {"token": "x", "expirationTimestamp": 1e400}}, "expirationTimestamp"),
    ],
)
async def test_json_with_the_wrong_members_is_no_passing_trouble(document, message):
    error = await failure(printing(document))

    assert message in str(error)
    assert not error.retryable


# Its end

FAMILY = """
    sh -c 'trap "" $IGNORED; echo $$ > "$DIRECTORY/stubborn"; while :; do sleep 1; done' &
    sleep 30 & echo $! > "$DIRECTORY/willing"
    trap 'echo told > "$DIRECTORY/told"; exit 1' TERM
    echo waiting >&2
    echo $$ > "$DIRECTORY/leader"
    wait
"""


class Family:
    """A command with two children, of which one may not listen when it is told to end."""

    def __init__(self, directory):
        self.directory = directory
        self.pids = []

    def command(self, *, ignored="USR1", **options):
        return sh(FAMILY, env={"DIRECTORY": str(self.directory), "IGNORED": ignored}, **options)

    async def is_there(self):
        self.pids = [int(await content(self.directory / name)) for name in ("stubborn", "willing", "leader")]

    async def has_gone(self):
        with anyio.fail_after(5):
            while any(is_running(pid) for pid in self.pids):  # noqa: ASYNC110 - other processes end
                await asyncio.sleep(0.005)
        assert (self.directory / "told").read_text() == "told\n"


@pytest.fixture
def family(tmp_path):
    return Family(tmp_path)


@pytest.fixture
def short_grace(monkeypatch):
    """SIGKILL comes sooner after SIGTERM than in a second, which is waited for by one test."""
    monkeypatch.setattr("asyncpool_creds.providers.command._GRACE", 0.2)


async def test_when_time_is_up_the_whole_family_is_ended(family):
    error = await failure(family.command(timeout=0.8, ignored="TERM"), ProviderTimeout)

    assert str(error) == "command: 'sh' did not end within 0.8 s and was stopped; it said: waiting"
    assert error.retryable
    await family.is_there()
    await family.has_gone()


async def test_a_cancelled_fetch_ends_the_whole_family(family, short_grace):
    fetch = asyncio.create_task(family.command(ignored="TERM").fetch())
    await family.is_there()

    fetch.cancel()
    await asyncio.wait((fetch,))

    assert fetch.cancelled()
    assert not is_running(family.pids[-1])
    await family.has_gone()
    assert not tasks_of_ours()


async def test_however_often_a_fetch_is_cancelled_the_family_is_ended_first(family, short_grace):
    fetch = asyncio.create_task(family.command(ignored="TERM").fetch())
    await family.is_there()

    while not fetch.done():
        fetch.cancel()
        await asyncio.sleep(0.005)

    assert fetch.cancelled()
    assert not is_running(family.pids[-1])
    await family.has_gone()
    assert not tasks_of_ours()


async def test_the_time_limit_of_a_caller_ends_the_whole_family(family):
    async def run_out():
        await family.is_there()
        limit.deadline = anyio.current_time()

    async with anyio.create_task_group() as others:
        with anyio.move_on_after(30) as limit:
            others.start_soon(run_out)
            await family.command().fetch()

    assert limit.cancelled_caught
    await family.has_gone()


async def test_a_fetch_that_is_cancelled_at_once_starts_nothing_or_ends_it(tmp_path):
    for steps in range(6):
        mark = tmp_path / f"{steps}"
        fetch = asyncio.create_task(sh(f"echo $$ > {mark}; exec sleep 30").fetch())
        for _ in range(steps):
            await asyncio.sleep(0.001 if steps > 3 else 0)

        fetch.cancel()
        await asyncio.wait((fetch,))

        assert fetch.cancelled()
        assert not mark.exists() or not mark.read_text() or not is_running(int(mark.read_text()))
    assert not tasks_of_ours()


async def test_closing_the_manager_ends_the_whole_family(family):
    manager = TokenManager(family.command(), on_event=())
    getting = asyncio.create_task(manager.get())
    await family.is_there()

    await manager.aclose()

    await asyncio.wait((getting,))
    assert getting.exception() is not None
    await family.has_gone()


def test_the_end_of_the_loop_ends_the_whole_family(tmp_path):
    family = Family(tmp_path)

    async def leave():
        fetch = asyncio.create_task(family.command().fetch())
        await family.is_there()
        return fetch

    # The loop cancels whatever still runs when it ends.
    assert asyncio.run(leave()).cancelled()
    asyncio.run(family.has_gone())


async def test_a_command_that_cannot_be_killed_does_not_hold_up_anybody(tmp_path):
    program = """
import asyncio, os, sys
from asyncpool_creds.providers import command
from asyncpool_creds.providers.command import Command

def refuse(process, number):
    raise PermissionError

os.kill = os.killpg = refuse
command._GRACE = 0.2
try:
    asyncio.run(Command(["sh", "-c", "echo $$ > $1; exec sleep 30", "sh", sys.argv[1]], timeout=0.3).fetch())
except TimeoutError as error:
    print(error)
"""
    with anyio.fail_after(10):
        done = await anyio.run_process([sys.executable, "-c", program, tmp_path / "pid"])

    assert done.stdout.decode() == (
        "command: 'sh' did not end within 0.3 s and cannot be killed; does it run as another user?\n"
    )
    os.kill(int(await content(tmp_path / "pid")), signal.SIGKILL)


async def test_what_a_command_leaves_in_the_background_does_not_hold_it_up(tmp_path):
    with anyio.fail_after(3):
        credential = await sh(f'sleep 30 & echo $! > {tmp_path}/pid; echo "$TOKEN"').fetch()

    pid = int(await content(tmp_path / "pid"))
    assert credential.password == secret()
    assert is_running(pid)
    os.kill(pid, signal.SIGKILL)


async def test_it_works_in_one_event_loop_after_another():
    provider = sh('echo "$TOKEN"')

    first = await asyncio.to_thread(asyncio.run, provider.fetch())
    second = await provider.fetch()

    assert first.is_same_secret(second)


async def test_it_works_in_a_forked_child():
    program = """
import asyncio, os
from asyncpool_creds.providers.command import Command
provider = Command(["echo", "x"])
asyncio.run(provider.fetch())
if (child := os.fork()) == 0:
    os._exit(0 if asyncio.run(provider.fetch()).password == "x" else 1)
raise SystemExit(os.waitpid(child, 0)[1])
"""
    done = await anyio.run_process([sys.executable, "-W", "error", "-c", program], check=False)

    assert (done.returncode, done.stderr) == (0, b"")
