"""Shell: the main function of every role's server: settings, logs, threads and cores, then the process's life."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import click

from halfmoon.errors import ConfigError
from halfmoon.types import Role
from node.config import NodeConfig
from node.process import MachineFactory, WorkerProcess
from service import logs, settings
from service.run import EXIT_REFUSED, REFUSALS, run

log = logging.getLogger("node.main")

NCCL = {
    "TORCH_NCCL_BLOCKING_WAIT": "1",  # a transfer that times out is its pair's error; the default ends the process
    "TORCH_NCCL_ENABLE_MONITORING": "0",  # ends the process too; and it polls a store that others' groups have
    "TORCH_NCCL_USE_COMM_NONBLOCKING": "1",  # a peer that dies while a communicator is made must not hang us ...
    "TORCH_NCCL_NONBLOCKING_TIMEOUT": "30",  # ... for longer than this (seconds)
}
"""For torch's NCCL groups, which read the environment when they are made. Not yet run on a GPU."""

RUN_SLACK_S = 10.0  # over the drain's own bound, before the process is ended by force


def serve(role: Role, make_machine: MachineFactory) -> NoReturn:
    """The main function of a role's server: `--config FILE`, `--set node.key=value`, HALFMOON_NODE__KEY.

    The file has two sections: `node` (NodeConfig) and the role's name.
    """

    @click.command(help=f"Run one {role} worker.")
    @click.option("--config", "path", type=click.Path(dir_okay=False), help="YAML file with the settings.")
    @click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override one setting, e.g. node.threads=2")
    def command(path: str | None, sets: tuple[str, ...]) -> None:
        _serve(role, make_machine, path, sets)

    command()
    raise AssertionError("run ends the process")


def _serve(role: Role, make_machine: MachineFactory, path: str | None, sets: tuple[str, ...]) -> NoReturn:
    logs.configure(str(role))
    try:
        config, section = _settings(role, path, sets)
        logs.configure(config.node_id, level=config.log_level)
        prepare_host(config)
    except REFUSALS as error:
        log.critical("%s", error)
        sys.exit(EXIT_REFUSED)
    log.info("effective settings: %s", settings.effective(config))
    process = WorkerProcess(role, config, section, make_machine)
    run(process.main, drain_s_max=config.drain_s + RUN_SLACK_S)


def _settings(role: Role, path: str | None, sets: tuple[str, ...]) -> tuple[NodeConfig, Mapping[str, Any]]:
    tree = settings.gather(path, overrides=settings.parse_overrides(sets))
    settings.require_known(tree, ("node", role.value))
    return settings.load(NodeConfig, tree.get("node") or {}, path="node"), tree.get(role.value) or {}


def prepare_host(config: NodeConfig) -> None:
    """Threads and cores, before torch (or any OpenMP library) is loaded: it reads them once.

    Raises:
        ConfigError: a core that this process may not use.
    """
    if config.cores:
        allowed = sorted(os.sched_getaffinity(0))
        if not set(config.cores) <= set(allowed):
            raise ConfigError(key="node.cores", value=config.cores, expected=f"some of {allowed}")
        os.sched_setaffinity(0, config.cores)
    if config.device != "cpu":
        settings.export(**NCCL)
    # Spinning between two products steals the core from the loop that shares it.
    settings.export(
        OMP_NUM_THREADS=str(config.threads), KMP_BLOCKTIME="0", OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0"
    )
