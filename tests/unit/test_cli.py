"""The command line and the demo's parts: arguments, samples, figures, what is drawn."""

import io
import json
import logging
import random
import runpy
import signal
import statistics
import sys

import pytest
from rich.console import Console

import asyncpool_creds
from asyncpool_creds import cli
from asyncpool_creds.cli import demo
from asyncpool_creds.cli.figures import AcquireTimes, Figures, Outcome, SideFigures
from asyncpool_creds.cli.screen import Feed, LiveScreen, ProgressLines, SideState, State, open_screen
from asyncpool_creds.cli.workload import Meter, Sample

KEYS = [
    "queries",
    "failed_queries",
    "rotations",
    "token_fetches",
    "refused_connects",
    "retired",
    "acquire_ms",
    "acquires_that_waited_for_a_connect",
]


def side_figures(**changes):
    figures = {
        "queries": 1234,
        "failed_queries": 0,
        "rotations": 3,
        "token_fetches": 4,
        "refused_connects": 0,
        "retired": 30,
        "acquire_ms": AcquireTimes(p50=0.1, p99=2.5, max=10.0),
        "acquires_that_waited_for_a_connect": 0,
    }
    return SideFigures(**{**figures, **changes})


def outcome(ours=None, baseline=None, **changes):
    figures = Figures(
        ours=ours or side_figures(),
        baseline=baseline,
        duration_s=30.012,
        token_lifetime_s=5.0,
        postgres_version="18.6",
        asyncpg_version="0.32.0",
        python_version="3.11.7",
    )
    rest = {"failures": {}, "baseline_failures": {}, "money_is_conserved": True, "recycle_interval": 3.0}
    return Outcome(figures=figures, **{**rest, **changes})


def side_state(**changes):
    state = {
        "name": "asyncpool_creds",
        "call": "asyncpool_creds.create_pool(credentials=…)",
        "caption": "renews tokens, replaces connections",
        "token": 4,
        "seconds_left": 3.2,
        "connections": [4, 4, 3],
        "queries": 1000,
        "failed_queries": 0,
        "refused_connects": 0,
        "retired": 17,
        "waits": 0,
    }
    return SideState(**{**state, **changes})


def baseline_state(**changes):
    state = {
        "name": "plain asyncpg",
        "call": "asyncpg.create_pool(password=…)",
        "token": 1,
        "seconds_left": -123.0,
        "connections": [1, None, None],
        "failed_queries": 77,
        "refused_connects": 66,
    }
    return side_state(**{**state, **changes})


def state(*sides, elapsed=12.0):
    return State(
        elapsed=elapsed, duration=30.0, token_lifetime=5.0, summary="PostgreSQL refuses", sides=sides or (side_state(),)
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def console(*, file=None, width=80, height=24):
    return Console(
        file=file or Terminal(), force_terminal=True, width=width, height=height, _environ={"TERM": "xterm-256color"}
    )


def printed(outcome):
    target = Console(file=io.StringIO(), width=500)
    outcome.print_to(target)
    return target.file.getvalue()


def drawn(*states, width=80, height=24, feed=None):
    """Return what stands on the screen after the last of the states."""
    target = console(width=width, height=height)
    screen = LiveScreen(target, feed or Feed())
    with screen:
        for one in states:
            target.file.seek(0)
            target.file.truncate()
            screen.show(one)
        return target.file.getvalue()


# The command line


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--duration", "0"),
        ("--duration", "-3"),
        ("--duration", "nan"),
        ("--duration", "inf"),
        ("--duration", "soon"),
        ("--duration", "1e9"),
        ("--token-lifetime", "0.5"),
        ("--token-lifetime", "five"),
        ("--workers", "0"),
        ("--workers", "1.5"),
        ("--workers", "1001"),
        ("--pool-size", "-1"),
        ("--pool-size", "ten"),
        ("--pool-size", "101"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name_with_what_was_expected(option, value, capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main(["demo", f"{option}={value}"])

    message = capsys.readouterr().err
    assert ending.value.code == 2
    assert f"argument {option}: expected " in message
    assert repr(value) in message


def test_no_command_and_an_unknown_one_are_refused(capsys):
    for arguments in ([], ["perform"]):
        with pytest.raises(SystemExit) as ending:
            cli.main(arguments)
        assert ending.value.code == 2
        assert "command" in capsys.readouterr().err


def test_the_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main(["--version"])

    assert ending.value.code == 0
    assert capsys.readouterr().out == f"asyncpool-creds {asyncpool_creds.__version__}\n"


def test_python_m_is_the_same_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["asyncpool_creds", "--version"])

    with pytest.raises(SystemExit) as ending:
        runpy.run_module("asyncpool_creds", run_name="__main__")

    assert ending.value.code == 0
    assert capsys.readouterr().out.startswith("asyncpool-creds ")


def test_the_options_reach_the_demo_and_its_status_comes_back(monkeypatch):
    seen = []
    monkeypatch.setattr(demo, "run", lambda options: seen.append(options) or 7)

    plain = cli.main(["demo"])
    cli.main(
        "demo --duration 12.5 --token-lifetime 3 --workers 4 --pool-size 2 --no-baseline --json".split()  # noqa: SIM905
    )

    assert plain == 7
    assert seen[0] == demo.Options()
    assert seen[1] == demo.Options(duration=12.5, token_lifetime=3.0, workers=4, pool_size=2, baseline=False, json=True)


def test_an_interrupt_that_nobody_took_ends_the_command_quietly(monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)

    assert cli.main(["demo"]) == 130


@pytest.fixture
def without(monkeypatch):
    """Make a module unimportable for the demo."""

    def take_away(name):
        monkeypatch.delattr(cli, "demo", raising=False)
        monkeypatch.delitem(sys.modules, "asyncpool_creds.cli.demo", raising=False)
        monkeypatch.setitem(sys.modules, name, None)

    return take_away


def test_without_the_extra_the_command_says_what_to_install(without, capsys):
    without("rich.console")

    status = cli.main(["demo"])

    output = capsys.readouterr()
    assert status == 2
    assert "pip install 'asyncpool-creds[demo]'" in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""


def test_a_broken_installation_is_not_taken_for_a_missing_extra(without):
    without("asyncpool_creds.cli.figures")

    with pytest.raises(ImportError, match="figures"):
        cli.main(["demo"])


# Measuring


def test_percentiles_are_exact_while_everything_fits():
    values = [random.random() for _ in range(1000)]
    sample = Sample()

    for value in values:
        sample.add(value)

    hundredths = statistics.quantiles(values, n=100, method="inclusive")
    assert (sample.percentile(50), sample.percentile(99), sample.maximum) == (
        hundredths[49],
        hundredths[98],
        max(values),
    )


def test_a_sample_stays_small_and_fair_and_knows_its_exact_maximum():
    sample = Sample(size=500)

    for value in range(20_000):
        sample.add(value)

    assert sample.maximum == 19_999
    # The median of 500 out of 20,000 strays by 450 (one standard deviation).
    assert 6_000 < sample.percentile(50) < 14_000


def test_a_sample_of_none_and_of_one_has_an_answer():
    sample = Sample()
    assert (sample.percentile(99), sample.maximum) == (None, None)

    sample.add(2.5)
    assert (sample.percentile(50), sample.maximum) == (2.5, 2.5)


def test_failures_are_counted_by_name_and_sqlstate():
    class RefusedError(Exception):
        sqlstate = "28000"

    meter = Meter()

    for error in (RefusedError(), RefusedError(), OSError()):
        meter.failed(error)

    assert meter.failures == {"RefusedError (28000)": 2, "OSError": 1}


# What comes out


def test_the_json_has_the_documented_keys():
    with_baseline = json.loads(outcome(baseline=side_figures()).as_json())
    without_baseline = json.loads(outcome().as_json())

    assert list(with_baseline) == [
        "ours",
        "baseline",
        "duration_s",
        "token_lifetime_s",
        "postgres_version",
        "asyncpg_version",
        "python_version",
    ]
    assert list(with_baseline["ours"]) == list(with_baseline["baseline"]) == KEYS
    assert list(with_baseline["ours"]["acquire_ms"]) == ["p50", "p99", "max"]
    assert without_baseline["baseline"] is None


@pytest.mark.parametrize(
    ("result", "status"),
    [
        (outcome(), 0),
        (outcome(baseline=side_figures(failed_queries=99)), 0),
        (outcome(ours=side_figures(failed_queries=1)), 1),
        (outcome(money_is_conserved=False), 1),
        (outcome(signal=signal.SIGINT), 130),
        (outcome(signal=signal.SIGTERM), 143),
        (outcome(ours=side_figures(failed_queries=1), signal=signal.SIGINT), 1),
    ],
    ids=["good", "only the baseline failed", "failed", "money lost", "SIGINT", "SIGTERM", "failed and SIGINT"],
)
def test_the_exit_status_says_how_ours_fared(result, status):
    assert result.exit_status == status


def test_the_summary_says_what_the_figures_mean():
    good = printed(
        outcome(
            baseline=side_figures(failed_queries=1, refused_connects=1),
            baseline_failures={"InvalidAuthorizationSpecificationError (28000)": 1},
        )
    )
    lucky = printed(outcome(baseline=side_figures()))

    assert "3 new tokens, no failed query, no acquire that waited for a connect" in good
    assert "1 failed query (InvalidAuthorizationSpecificationError (28000): 1)" in good
    assert "recycled every 3 s" in good
    assert "got away with it" in lucky


def test_the_summary_does_not_gloss_over_what_went_wrong():
    failed = printed(outcome(ours=side_figures(failed_queries=2), failures={"OSError": 2}))
    lost = printed(outcome(money_is_conserved=False))
    waited = printed(outcome(ours=side_figures(rotations=1, acquires_that_waited_for_a_connect=1)))
    idle = printed(outcome(ours=side_figures(rotations=0)))
    nothing = printed(outcome(ours=side_figures(acquire_ms=AcquireTimes(p50=None, p99=None, max=None))))

    assert "2 failed queries (OSError: 2)" in failed
    assert "Money got lost" in lost
    assert "1 new token, no failed query, 1 acquire that waited" in waited
    assert "longer than the 5 s that a token lives" in idle
    assert " ms " not in nothing


# What is drawn


def test_the_screen_shows_tokens_connections_rates_failures_and_news():
    feed = Feed()
    feed.note("ours", "token 4 is here")
    feed.epoch = 0.0

    picture = drawn(
        state(side_state(), baseline_state(), elapsed=0.0),
        state(side_state(queries=3000), baseline_state(), elapsed=2.0),
        feed=feed,
    )

    for text in ("token 4", "3.2 s left", "expired 123 s ago", "2 with token 4", "2 closed", "1,500", "77", "is here"):
        assert text in picture


def test_cells_of_different_tokens_have_different_colours():
    picture = drawn(state(side_state(connections=[3, 4])))

    before_three, before_four = picture.partition(" 3\x1b")[0], picture.partition(" 4\x1b")[0]
    assert before_three.rpartition("\x1b[")[2] != before_four.rpartition("\x1b[")[2]


def test_a_pool_of_a_hundred_fits_on_a_small_screen():
    picture = drawn(state(side_state(connections=[4] * 100), baseline_state(connections=[None] * 100)))

    assert "100 with token 4" in picture
    assert "latest events" in picture


def test_a_wide_screen_shows_the_calls_and_a_small_one_the_names():
    sides = (side_state(), baseline_state())

    assert "asyncpg.create_pool(password=…)" in drawn(state(*sides), width=120)
    assert "create_pool" not in drawn(state(*sides))


def test_the_screen_leaves_the_terminal_as_it_was():
    target = console()

    with LiveScreen(target, Feed()) as screen:
        screen.announce("Starting ...")

    written = target.file.getvalue()
    assert written.index("\x1b[?1049h") < written.index("Starting ...") < written.index("\x1b[?1049l")


def test_equal_news_are_counted_and_not_repeated():
    feed = Feed()
    for text in ("replaced", "refused", "replaced", "replaced"):
        feed.note("ours", text)
    target = Console(file=io.StringIO(), width=80)

    target.print(feed.latest(10))

    lines = target.file.getvalue().splitlines()
    assert len(lines) == 2
    assert "3x replaced" in lines[0]


def test_no_room_for_news_is_no_error():
    feed = Feed()
    feed.note("ours", "something")

    assert feed.latest(0).row_count == feed.latest(-3).row_count == 0


def test_warnings_of_libraries_become_one_line_of_news():
    feed = Feed()
    logger = logging.getLogger("asyncpg.pool")
    logger.addHandler(feed)

    logger.info("all is well")
    logger.warning("it is not\nin detail")
    logger.removeHandler(feed)

    target = Console(file=io.StringIO(), width=80)
    target.print(feed.latest(10))
    assert [line.split()[2:] for line in target.file.getvalue().splitlines()] == [["asyncpg", "it", "is", "not"]]


def test_progress_lines_are_plain_text():
    target = Console(file=io.StringIO(), width=40)
    lines = ProgressLines(target)

    with lines:
        lines.announce("Starting [something] ...")
        lines.show(state(side_state(queries=0), baseline_state(queries=0), elapsed=0.0))
        lines.show(state(side_state(queries=4000), baseline_state(queries=0), elapsed=2.0))

    first, _, last = target.file.getvalue().splitlines()
    assert first == "Starting [something] ..."
    assert last.split(" | ") == [
        "   2.0 s",
        "asyncpool_creds: token 4 (3.2 s left), 2,000 queries/s, 0 failed",
        "plain asyncpg: token 1 (expired 123.0 s ago), 0 queries/s, 77 failed",
    ]


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        (console(), LiveScreen),
        (console(file=io.StringIO()), ProgressLines),
        (console(width=60), ProgressLines),
        (console(height=15), ProgressLines),
        (Console(file=Terminal(), _environ={"TERM": "dumb"}), ProgressLines),
    ],
    ids=["terminal", "file, with colours forced", "narrow", "low", "dumb"],
)
def test_only_a_terminal_with_room_gets_the_live_screen(target, kind):
    assert type(open_screen(target, Feed())) is kind
