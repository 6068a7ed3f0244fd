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

pytestmark = pytest.mark.anyio

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


@pytest.mark.parametrize("drill", DRILLS, ids=lambda drill: drill.name)
async def test_drill_costs_no_more_than_with_the_others(server: PostgresServer, drill: Drill):
    outcomes = await drills.run(drill, TIMING, server, CONTENDERS)

    ours, patient, refusing = outcomes[OURS], outcomes[PATIENT], outcomes[REFUSING]
    assert ours.lost <= allowed(drill, OURS, outcomes), shown(outcomes)
    assert patient.lost <= allowed(drill, PATIENT, outcomes), shown(outcomes)
    assert ours.is_well, shown(outcomes)
    assert patient.is_well, shown(outcomes)
    assert refusing.is_well, shown(outcomes)
    if drill.name in WITHOUT_EXPIRY:
        assert refusing.lost <= allowed(drill, OURS, outcomes), shown(outcomes)
    if drill.name == "issuer":
        # An outage of the source is one of the database, for who wants it so.
        assert refusing.lost > 0, shown(outcomes)
        assert set(refusing.errors) == {"CredentialExpired"}, shown(outcomes)
