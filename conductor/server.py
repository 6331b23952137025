"""Shell: the conductor's process: `python -m conductor.server --config FILE`.

It says on standard output, a line each: `loading`, `standby` (waits for the lease), `serving inference=ADDRESS
admin=ADDRESS` (the ports are open), `ready inference=ADDRESS admin=ADDRESS` (a canary made the round trip). Before
that also: `waiting REASON` (no canary can be sent), `failing N REASON` (so many canaries in a row failed like this).

SIGTERM: new requests are Unavailable, running ones finish within `drain_s`, the rest is ended, then the ports close.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import secrets
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from conductor.admin import AdminService, Facts
from conductor.config import ConductorConfig
from conductor.cost_profile import with_profile, write_profile
from conductor.desk import Layout
from conductor.driver import Driver
from conductor.export import MIB, RecordExport
from conductor.frontend import FrontEnd
from conductor.frontend_metrics import Costs, Events, FrontEndMetrics, Pools
from conductor.inference import InferenceService, Tokenizer
from conductor.lease import Lease
from conductor.machine import ConductorMachine
from conductor.nodes import Nodes
from conductor.readiness import Readiness
from conductor.recording import ending_line
from conductor.settings import FrontEndConfig, NodesConfig, RecordsConfig, ServerConfig
from conductor.taped import TapedMachine
from conductor.validation import ServedModel
from engine.load import describe_model, load_tokenizer
from engine.protocol import ModelInfo
from halfmoon.errors import ConfigError
from halfmoon.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from service import logs, settings
from service.channel import CLIENT_MESSAGE_BYTES_MAX, bind, is_local, make_server
from service.lines import LineWriter
from service.metrics import Metrics
from service.registry import Registry
from service.run import Stop, run

DRAIN_POLL_S = 0.05
CLOSE_S = 2.0  # for streams to take their terminal event after the drain
DRAIN_MARGIN_S = 15.0  # beyond `drain_s`: closing ports, streams and links
INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
log = logging.getLogger("conductor.server")

ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name


@dataclass(frozen=True, kw_only=True)
class Settings:
    server: ServerConfig
    front_end: FrontEndConfig
    nodes: NodesConfig
    records: RecordsConfig
    conductor: ConductorConfig


def load_settings(path: Path | None) -> Settings:
    """Raises: ConfigError."""
    tree = settings.gather(path)
    settings.require_known(tree, ("server", "front_end", "nodes", "records", "conductor"))
    server = settings.load(ServerConfig, tree.get("server") or {}, path="server")
    conductor = settings.load(ConductorConfig, tree.get("conductor") or {}, path="conductor")
    return Settings(
        server=server,
        front_end=settings.load(FrontEndConfig, tree.get("front_end") or {}, path="front_end"),
        nodes=settings.load(NodesConfig, tree.get("nodes") or {}, path="nodes"),
        records=settings.load(RecordsConfig, tree.get("records") or {}, path="records"),
        conductor=with_profile(conductor, Path(server.cost_profile)) if server.cost_profile else conductor,
    )


class ConductorProcess:
    """The parts of one conductor, put together; `run` is their life.

    Args:
        conductor_id: unique among the living; with it workers know whose tokens they keep.
    """

    def __init__(self, config: Settings, model: ModelInfo, tokenizer: Tokenizer, *, conductor_id: str) -> None:
        server, clock = config.server, time.monotonic
        self.config = config
        self.model = model
        self.metrics = Metrics()
        self.registry = Registry(server.registry, cluster=server.cluster)
        self.lease = Lease(self.registry, conductor_id)
        self.tape = _tape(config.conductor)
        self.driver = Driver(_machine(config.conductor, model, conductor_id, self.tape), clock)
        self.export = RecordExport(config.records, self.registry)
        if self.export.wanted:
            self.driver.machine.tell_records(self.export.offer)
        front_end_id = f"{conductor_id}/{secrets.token_hex(4)}"
        self.front_end = FrontEnd(
            driver=self.driver,
            config=config.front_end,
            metrics=FrontEndMetrics(self.metrics),
            new_decoder=tokenizer.stream,
            clock=clock,
        )
        self.inference = InferenceService(
            front_end=self.front_end,
            front_end_id=front_end_id,
            tokenizer=tokenizer,
            model=_served(model, tokenizer),
            fingerprint=model.fingerprint,
            config=config.front_end,
            rng=random.Random(secrets.randbits(64)),
            admin_address=lambda: self.admin_address if is_local(self.admin_address) else "",
        )
        self.nodes = Nodes(
            driver=self.driver,
            config=config.nodes,
            conductor_id=conductor_id,
            front_end=front_end_id,
            fingerprint=model.fingerprint,
            term=lambda: self.lease.term,
            on_tokens=self.front_end.on_tokens,
            on_higher_term=self.lease.on_higher_term,
            clock=clock,
        )
        self.driver.connect(self.front_end, self.nodes)
        self.readiness = Readiness(
            why_not=lambda: self.driver.machine.status().unavailable,
            canary=partial(self.inference.canary, timeout_s=server.canary_timeout_s),
            services=(INFERENCE, ADMIN),
            interval_s=server.canary_interval_s,
            on_first=lambda: _say(f"ready {self.addresses}"),
            on_waiting=lambda why: _say(f"waiting {_one_line(why)}"),
            on_failed=lambda times, why: _say(f"failing {times} {_one_line(why)}"),
        )
        self.addresses = ""
        self.admin_address = ""
        self._servers: list[grpc.aio.Server] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._close_metrics = _nothing

    async def run(self, stop: Stop) -> None:
        """Lead, serve, drain. Raises: Conflict (a port), ConfigError."""
        stop.add_dump("conductor", self.describe)
        try:
            if not await self._lead(stop):
                return
            self._tasks.append(stop.spawn_essential(self.lease.keep(), name="lease"))
            await self._open_ports()
            self._tasks.append(stop.spawn_essential(self.nodes.run(self.registry.watch()), name="nodes"))
            self._tasks.append(stop.spawn_essential(self._tick(), name="tick"))
            self._tasks.append(stop.spawn_essential(self.readiness.run(), name="readiness"))
            self._tasks.append(stop.spawn_essential(self.export.run(), name="export"))
            _say(f"serving {self.addresses}")
            await stop.wait()
            await self._drain()
            self._keep_costs()
        finally:
            await self._close()

    def describe(self) -> str:
        """For dumps: who is there, what is open."""
        status = self.driver.machine.status()
        nodes = [f"{n.info.node_id} {n.state.value} attempts={n.outstanding_attempts}" for n in status.nodes]
        open_now = f"{self.front_end.num_open} streams, {status.requests_open} requests, {status.closing} closing"
        return "\n".join((f"term {self.lease.term}; {open_now}", *nodes))

    async def _lead(self, stop: Stop) -> bool:
        """Wait for the lease; False if the process is to stop first."""
        _say("standby")
        acquire = asyncio.ensure_future(self.lease.acquire())
        stopped = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait((acquire, stopped), return_when=asyncio.FIRST_COMPLETED)
            if acquire.done():
                acquire.result()
            return acquire.done()
        finally:
            acquire.cancel()
            stopped.cancel()

    async def _open_ports(self) -> None:
        server = self.config.server
        clients = make_server(message_bytes_max=CLIENT_MESSAGE_BYTES_MAX)
        inference_pb2_grpc.add_InferenceServicer_to_server(self.inference, clients)
        inference_address = self._open(clients, server.address, INFERENCE)
        operators = make_server()
        admin = AdminService(driver=self.driver, front_end=self.front_end, model=self.model.name, facts=self._facts)
        admin_pb2_grpc.add_AdminServicer_to_server(admin, operators)
        self.admin_address = self._open(operators, server.admin_address, ADMIN)
        if server.metrics_address:
            self.metrics.registry.register(Events(self._counters))
            self.metrics.registry.register(Costs(lambda: self.driver.machine.residuals()))
            self.metrics.registry.register(Pools(lambda: self.driver.machine.oscillation()))
            _, self._close_metrics = self.metrics.serve(server.metrics_address)
        for opened in self._servers:
            await opened.start()
        self.addresses = f"inference={inference_address} admin={self.admin_address}"

    def _open(self, server: grpc.aio.Server, address: str, service: str) -> str:
        health_pb2_grpc.add_HealthServicer_to_server(self.readiness.health, server)
        names = (service, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        self._servers.append(server)
        return bind(server, address)

    def _facts(self) -> Facts:
        return Facts(
            term=self.lease.term,
            ready=self.readiness.ready,
            registry_reachable=self.registry.reachable,
            counters={**self.front_end.metrics.counters, **self.nodes.counters, **self.export.counters},
        )

    def _counters(self) -> dict[str, int]:
        own = {**self.front_end.metrics.counters, **self.nodes.counters, **self.export.counters}
        return {**self.driver.machine.counters, **own}

    async def _tick(self) -> None:
        while True:
            self.driver.tick()
            self.front_end.tick()
            await asyncio.sleep(self.config.server.tick_s)

    async def _drain(self) -> None:
        self.front_end.refuse("this conductor is shutting down")
        await self.readiness.stop()
        deadline_s = time.monotonic() + self.config.server.drain_s
        while self.front_end.num_open and time.monotonic() < deadline_s:  # noqa: ASYNC110  (bounded, and once a life)
            await asyncio.sleep(DRAIN_POLL_S)
        self.front_end.cancel_all(
            f"the conductor shut down and it was not complete in {self.config.server.drain_s:g} s"
        )

    def _keep_costs(self) -> None:
        """While the workers are still known."""
        learned = self.driver.machine.learned_costs()
        path = self.config.server.cost_profile
        if path and learned:
            try:
                write_profile(Path(path), learned)
            except OSError as error:
                log.warning("what workers cost is not kept: %s", error, extra=logs.fields(path=path))

    async def _close(self) -> None:
        """Ports first, so that streams take their end; then the links and the lease; then what those stood on."""
        await asyncio.gather(*(server.stop(CLOSE_S) for server in self._servers))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.inference.close()
        self._close_metrics()
        self.export.close()
        self._close_tape()
        await self.registry.close()

    def _close_tape(self) -> None:
        machine = self.driver.machine
        if self.tape is not None and isinstance(machine, TapedMachine):
            machine.end_recording("the conductor stopped")
            self.tape.close()


async def serve(config: Settings, stop: Stop) -> None:
    """Load the model's description and tokenizer, then run a conductor until `stop`."""
    server = config.server
    _say("loading")
    model = await asyncio.to_thread(describe_model, server.model, dtype=server.dtype, block_size=server.block_size)
    tokenizer = await asyncio.to_thread(load_tokenizer, server.model)
    conductor_id = server.conductor_id or f"conductor-{socket.gethostname()}-{os.getpid()}"
    process = ConductorProcess(config, model, tokenizer, conductor_id=conductor_id)
    await process.run(stop)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The Halfmoon conductor.")
    parser.add_argument("--config", type=Path, help="a YAML file (conductor/settings.py says what may be in it)")
    arguments = parser.parse_args(argv)
    try:
        config = load_settings(arguments.config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
    logs.configure(config.server.conductor_id or "conductor", level=config.server.log_level)
    run(partial(serve, config), drain_s_max=config.server.drain_s + DRAIN_MARGIN_S)


def _machine(config: ConductorConfig, model: ModelInfo, conductor_id: str, tape: LineWriter | None) -> ConductorMachine:
    layout = Layout(block_size=model.layout.block_size, block_bytes=model.layout.block_bytes)
    if tape is None:
        return ConductorMachine(config=config, layout=layout, conductor_id=conductor_id, fingerprint=model.fingerprint)
    return TapedMachine(
        write=tape.offer,
        version=version("halfmoon-server"),
        config=config,
        layout=layout,
        conductor_id=conductor_id,
        fingerprint=model.fingerprint,
    )


def _tape(config: ConductorConfig) -> LineWriter | None:
    """The file of the machine's inputs, if one is wanted. Raises: ConfigError: it cannot be made."""
    if not config.record:
        return None
    tape = LineWriter(
        Path(config.record),
        bytes_max=config.record_mib_max * MIB,
        fresh=True,
        setting="conductor.record",
        farewell=lambda why, lines: ending_line(why, lines - 1),
    )
    _say(f"recording {tape.path}")
    return tape


def _served(model: ModelInfo, tokenizer: Tokenizer) -> ServedModel:
    return ServedModel(
        name=model.name,
        vocab_size=model.vocab_size,
        context_tokens_max=model.context_tokens_max,
        block_size=model.layout.block_size,
        eos_token_ids=tuple(tokenizer.eos_token_ids),
        generation_defaults=tokenizer.generation_defaults,
    )


def _say(line: str) -> None:
    print(line, flush=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _nothing() -> None:
    """Stands for closing the metrics page where there is none."""


if __name__ == "__main__":
    main()
