"""What tests need: a clock that obeys, a source that follows a script, an observer that remembers.

These three need nothing but the package itself. The parts that need the extra ``testing``
are imported from their own modules: the token issuer from `asyncpool_creds.testing.issuer`, and
a PostgreSQL that refuses expired tokens from `asyncpool_creds.testing.postgres` and
`asyncpool_creds.testing.door`. What such a door asks of a token of Amazon's is in
`asyncpool_creds.testing.sigv4`, which needs no extra either.
"""

from asyncpool_creds.testing.clock import VirtualClock
from asyncpool_creds.testing.observers import RecordingObserver
from asyncpool_creds.testing.providers import ScriptedProvider

__all__ = ["RecordingObserver", "ScriptedProvider", "VirtualClock"]
