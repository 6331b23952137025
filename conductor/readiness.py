"""Shell: readiness that proves itself: SERVING only after a canary request made the whole round trip."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Sequence

from grpc_health.v1 import health, health_pb2

from halfmoon.errors import HalfmoonError

log = logging.getLogger("conductor.readiness")

Canary = Callable[[int], Awaitable[None]]
CANARY_ID = re.compile(r"canary-\d+-[0-9a-f]{8}(#\d+)?")  # as conductor.inference names them, and their attempts
SAID_AFTER_S = 5.0  # a start passes through reasons that last a moment; one that lasts is worth a line


class Readiness:
    """Follows whether a usable prefill and decode path exists; sends a canary through whenever one (re)appears.

    Args:
        why_not: why nothing can be served now; empty when a usable path exists.
        services: the names for which health is answered, beside the empty one.
        canary: raises HalfmoonError when the round trip fails; its argument is a serial number.
        on_first: called once, at the first success.
        on_waiting: called until then with a reason that has lasted SAID_AFTER_S, once for each.
        on_failed: called until then for each canary that failed, with how many failed in a row for this reason.
    """

    def __init__(
        self,
        *,
        why_not: Callable[[], str],
        canary: Canary,
        services: Sequence[str],
        interval_s: float,
        on_first: Callable[[], None],
        on_waiting: Callable[[str], None],
        on_failed: Callable[[int, str], None],
    ) -> None:
        self.health = health.aio.HealthServicer()
        self.ready = False
        self._why_not = why_not
        self._canary = canary
        self._services = ("", *services)
        self._interval_s = interval_s
        self._on_first = on_first
        self._on_waiting = on_waiting
        self._on_failed = on_failed
        self._canaries = 0
        self._failed = (0, "")  # canaries in a row, and why
        self._waiting = (0.0, "", False)  # since when, why, and whether that was said
        self._succeeded = False
        self._stopped = False

    async def run(self) -> None:
        """Until cancelled or stopped."""
        await self._set(ready=False)
        while not self._stopped:
            why = self._why_not()
            if why:
                await self._set(ready=False, why=why)
                self._wait(why, asyncio.get_running_loop().time())
            elif not self.ready:
                await self._try()
            await asyncio.sleep(self._interval_s)

    async def stop(self) -> None:
        """NOT_SERVING for good: the process drains."""
        self._stopped = True
        self.ready = False
        await self.health.enter_graceful_shutdown()

    async def _try(self) -> None:
        self._canaries += 1
        try:
            await self._canary(self._canaries)
        except HalfmoonError as error:
            log.warning("canary %d failed: %s", self._canaries, error)
            self._count_failure(str(error))
            return
        await self._set(ready=True)
        if not self._succeeded:
            self._succeeded = True
            self._on_first()

    def _wait(self, why: str, now_s: float) -> None:
        since_s, before, said = self._waiting
        if why != before:
            self._waiting = (now_s, why, False)
        elif not said and not self._succeeded and now_s - since_s >= SAID_AFTER_S:
            self._waiting = (since_s, why, True)
            self._on_waiting(why)

    def _count_failure(self, why: str) -> None:
        why = CANARY_ID.sub("the canary", why)  # each has its own id, and the same reason is meant
        times, before = self._failed
        self._failed = (times + 1 if why == before else 1, why)
        if not self._succeeded:
            self._on_failed(*self._failed)

    async def _set(self, *, ready: bool, why: str = "") -> None:
        if ready != self.ready:
            log.info("serving" if ready else "not serving: %s", *([] if ready else [why]))
        self.ready = ready and not self._stopped
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self.health.set(service, status)
