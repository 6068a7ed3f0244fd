from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from support import MARKER, assert_no_secret, find_secret

from asyncpool_creds import Credential, Event
from asyncpool_creds._events import Observers
from asyncpool_creds.testing import RecordingObserver, VirtualClock


@pytest.fixture(scope="session")
def anyio_backend(request: pytest.FixtureRequest) -> object:
    return "asyncio", {"use_uvloop": request.config.getoption("event_loop") == "uvloop"}


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def observer() -> Iterator[RecordingObserver]:
    observer = RecordingObserver()
    yield observer
    assert_no_secret(*observer.events)


@pytest.fixture
def leak_detector(request: pytest.FixtureRequest) -> object:
    """What watches the whole suite, for the tests of the watchman himself."""
    return request.config.pluginmanager.get_plugin("planted-secret")


class _LeakDetector(logging.Handler):
    """Searches what the suite produces for the planted secret, and fails the test that let it out."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self._leaks: list[str] = []
        self._patch = pytest.MonkeyPatch()

    def search(self, thing: object) -> None:
        leak = find_secret(thing)
        if leak is not None:
            self._leaks.append(leak)

    def take_leaks(self) -> list[str]:
        """Return where the secret was found since the last call."""
        leaks, self._leaks = self._leaks, []
        return leaks

    def emit(self, record: logging.LogRecord) -> None:
        self.search(record)

    @pytest.hookimpl
    def pytest_sessionstart(self) -> None:
        root = logging.getLogger()
        root.addHandler(self)
        root.setLevel(logging.DEBUG)
        logging.getLogger("asyncio").setLevel(logging.INFO)  # it greets every new loop
        self._watch_credentials()
        self._watch_events()
        self._watch_caught_exceptions()

    @pytest.hookimpl
    def pytest_sessionfinish(self) -> None:
        logging.getLogger().removeHandler(self)
        self._patch.undo()

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        result = yield
        self._fail_if_leaked()
        return result

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_teardown(self) -> Generator[None, object, object]:
        result = yield
        self._fail_if_leaked()
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.passed:
            # Log records are searched as they are made.
            streams = {f"Captured {stream} {report.when}" for stream in ("stdout", "stderr")}
            leaks = [title for title, text in report.sections if title in streams and find_secret(text) is not None]
            if leaks:
                report.outcome = "failed"
                report.longrepr = f"the planted secret is in: {', '.join(leaks)}"
        return report

    def _fail_if_leaked(self) -> None:
        if leaks := self.take_leaks():
            pytest.fail(f"the planted secret is in: {'; '.join(sorted(set(leaks)))}", pytrace=False)

    def _watch_credentials(self) -> None:
        check_arguments = Credential.__post_init__

        def post_init(credential: Credential) -> None:
            check_arguments(credential)
            if MARKER in credential.password:
                self.search(credential)

        self._patch.setattr(Credential, "__post_init__", post_init)

    def _watch_events(self) -> None:
        notify = Observers.__call__

        def call(observers: Observers, event: Event) -> None:
            self.search(event)
            notify(observers, event)

        self._patch.setattr(Observers, "__call__", call)

    def _watch_caught_exceptions(self) -> None:
        leave = pytest.RaisesExc.__exit__

        def exit_(
            raises: pytest.RaisesExc, kind: type[BaseException] | None, error: BaseException | None, tb: object
        ) -> bool:
            expected = leave(raises, kind, error, tb)
            if error is not None:
                self.search(error)
            return expected

        self._patch.setattr(pytest.RaisesExc, "__exit__", exit_)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--event-loop", choices=["asyncio", "uvloop"], default="asyncio", help="what to run on (default: asyncio)"
    )


def pytest_collection_finish() -> None:
    """Spare the garbage collector what the SDKs of all clouds bring, and collections their time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # what was left behind is collected at the end, and complains then


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_LeakDetector(), "planted-secret")
