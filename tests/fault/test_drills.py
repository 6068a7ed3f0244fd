"""A pool under load through what goes wrong in production, beside plain asyncpg and psycopg_pool: nothing more is lost.

``python -m benchmarks --only faults`` runs the same drills at their full length. In here only failures are judged,
because a machine that is busy with something else decides about times.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from asyncpool_creds.testing.postgres import PostgresServer
from benchmarks import drills
from benchmarks.drills import DRILLS, OURS, PATIENT, Drill, Outcome, Timing
from benchmarks.faults import allowed

pytestmark = [
    pytest.mark.anyio,
    # Servers go down here while clients connect: what the event loop has accepted for one that closes at that moment is
    # left to the collector. A connection of asyncpg's warns in other words, and is an error.
    pytest.mark.filterwarnings("ignore:unclosed transport:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]

TIMING = Timing(life=3.0, lead=1.0, pace=0.3, after=2.0)
REFUSING = "asyncpool_creds, expired_sessions='refuse'"
CONTENDERS = {**drills.CONTENDERS, REFUSING: drills.ours(expired_sessions="refuse")}
# What takes the database away, or what every connection ends in: nothing is past its end in there.
WITHOUT_EXPIRY = {"restart", "57p03"}


@pytest.fixture(scope="module")
def server():
    """A server of our own, because it is restarted."""
    with PostgresServer(max_connections=200) as server:
        asyncio.run(server.create_role(drills.ROLE))
        yield server


@pytest.fixture(autouse=True)
async def complaints_about_us():
    """Fail if the event loop complains about something of ours; two other pools live on it, and have their own bugs."""
    complaints = []

    def complain(_, context):
        culprit = repr(context.get("future", context.get("task", context.get("protocol"))))
        if "asyncpool_creds" in culprit:
            complaints.append(f"{context['message']}: {context.get('exception')!r} {culprit}")

    loop = asyncio.get_running_loop()
    previous = loop.get_exception_handler()
    loop.set_exception_handler(complain)
    yield
    gc.collect()
    await asyncio.sleep(0)
    loop.set_exception_handler(previous)
    assert not complaints, complaints


def shown(outcomes: Mapping[str, Outcome]) -> str:
    return "\n".join(f"{name}: {outcome}" for name, outcome in outcomes.items())


def complaint_about(drill: Drill, outcomes: Mapping[str, Outcome]) -> str | None:
    """Return what is wrong with how a drill went for ours; None: nothing."""
    ours, patient, refusing = outcomes[OURS], outcomes[PATIENT], outcomes[REFUSING]
    if ours.lost > allowed(drill, OURS, outcomes):
        return "ours has lost more than asyncpg"
    if patient.lost > allowed(drill, PATIENT, outcomes):
        return "ours with patience has lost more than psycopg_pool"
    if not (ours.is_well and patient.is_well and refusing.is_well):
        return "not all is well afterwards"
    if drill.name in WITHOUT_EXPIRY and refusing.lost > allowed(drill, OURS, outcomes):
        return "ours that refuses has lost more than asyncpg"
    # An outage of the source is one of the database, for who wants it so.
    if drill.name == "issuer" and set(refusing.errors) != {"CredentialExpired"}:
        return "ours that refuses has served on"
    return None


@pytest.mark.parametrize("drill", DRILLS, ids=lambda drill: drill.name)
async def test_drill_costs_no_more_than_with_the_others(server: PostgresServer, drill: Drill):
    told = []
    # Who happens to need a connection at the wrong moment is chance, the more so on a busy machine: best of three.
    while len(told) < 3:
        outcomes = await drills.run(drill, TIMING, server, CONTENDERS)
        complaint = complaint_about(drill, outcomes)
        if complaint is None:
            return
        told.append(f"{complaint}\n{shown(outcomes)}")
    raise AssertionError("\n\n".join(told))
