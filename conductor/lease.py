"""Shell: the lease by which exactly one conductor leads, and its rising term."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from halfmoon.errors import Conflict, Unavailable
from service.logs import fields
from service.registry import LEASE_TTL_S, Registry

log = logging.getLogger("conductor.lease")

LEASE_NAME = "conductor"
STANDBY_INTERVAL_S = 0.5  # a standby takes over this much, at most, after the lease has run out


class Lease:
    """This process's claim to lead. `term` is 0 until `acquire` has returned.

    While the registry is away the holder leads on: nobody else can have taken the lease either, and workers refuse
    whoever has a lower term than they have seen.
    """

    def __init__(self, registry: Registry, owner: str) -> None:
        self.term = 0
        self._registry = registry
        self._owner = owner
        self._term_seen = 0  # the highest that a worker has told of
        self._raise = asyncio.Event()

    async def acquire(self) -> None:
        """Wait, as a standby, until this process leads."""
        said = ""
        while self.term == 0:
            try:
                self.term = await self._registry.acquire_lease(LEASE_NAME, self._owner)
            except (Conflict, Unavailable) as error:
                if str(error) != said:
                    said = str(error)
                    log.info("standing by: %s", said)
                await asyncio.sleep(STANDBY_INTERVAL_S)
        log.info("leading", extra=fields(owner=self._owner, term=self.term))

    async def keep(self) -> None:
        """Renew until cancelled, then release.

        Raises:
            Conflict: another conductor leads. Nothing else.
        """
        try:
            while True:
                await self._wait(LEASE_TTL_S / 3)
                await self._renew()
        finally:
            await self._release()

    def on_higher_term(self, term: int) -> None:
        """A worker has seen a higher term (the registry may have lost its memory): outbid it, if the lease is ours.

        Args:
            term: 0: it did not say which.
        """
        term = term or self.term
        if term >= self.term:
            self._term_seen = max(self._term_seen, term)
            self._raise.set()

    async def _wait(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._raise.wait()
        except TimeoutError:
            pass
        self._raise.clear()

    async def _renew(self) -> None:
        try:
            outbid = self._term_seen >= self.term
            if outbid or not await self._registry.renew_lease(LEASE_NAME, self._owner, self.term):
                term_min = max(self.term, self._term_seen)
                self.term = await self._registry.acquire_lease(LEASE_NAME, self._owner, term_min=term_min)
                log.info("leading with a new term", extra=fields(owner=self._owner, term=self.term))
        except Unavailable:
            pass  # the registry says so in the log; tried again in a second

    async def _release(self) -> None:
        with contextlib.suppress(Unavailable):  # then it runs out by itself
            await self._registry.release_lease(LEASE_NAME, self._owner, self.term)
