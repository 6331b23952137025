"""Pure: what a link is, and which link serves which pair.

| source's copy | sink's pool | hosts | link |
|---|---|---|---|
| host memory (DEVICE of a CPU worker, or DRAM) | host memory or GPU | same, proved | shm |
| GPU | another GPU | any | nccl |
| GPU | the same GPU | same | torch (NCCL refuses two ranks on one GPU) |
| everything else | | | torch |

shm: the sink copies out of the source's shared memory. nccl: torch.distributed, GPU memory to GPU memory. torch:
torch.distributed over gloo, host memory to host memory; an end whose memory is on a GPU stages each block in pinned
host memory. "Proved" means: the sink has mapped the source's memory and found its nonce there. Each tier of the source
has its link, so one pair may use two. A setting other than "auto" is obeyed for every tier or refused, never replaced:
"nccl" therefore wants workers without a DRAM tier.
"""

from __future__ import annotations

from typing import Protocol

from halfmoon.errors import ConfigError
from kv_store.transfer_values import Batch, LinkTraits

AUTO = "auto"
SHM = LinkTraits(name="shm", two_sided=False)
NCCL = LinkTraits(name="nccl", two_sided=True)
TORCH = LinkTraits(name="torch", two_sided=True)
MEMORY = LinkTraits(name="memory", two_sided=True)
LINKS = {traits.name: traits for traits in (SHM, NCCL, TORCH, MEMORY)}


def choose_link(*, setting: str, same_host: bool, source_device: str, sink_device: str) -> LinkTraits:
    """The link for one tier of the source to the sink's pool.

    Args:
        setting: "auto", or a link's name from the configuration.
        same_host: the sink has mapped the source's memory; never a comparison of names.
        source_device, sink_device: as in their addresses: "cpu", or the name of one GPU ("cuda/UUID").

    Raises:
        ConfigError: no link can serve this pair under this setting.
    """
    on_host, to_host = source_device == "cpu", sink_device == "cpu"
    can = {
        "memory": on_host and to_host,
        "shm": same_host and on_host,
        "nccl": not on_host and not to_host and source_device != sink_device,
        "torch": True,
    }
    names = ("shm", "nccl", "torch") if setting == AUTO else (setting,)
    for name in names:
        if can.get(name, False):
            return LINKS[name]
    where = "on one host" if same_host else "not proved to be on one host"
    raise ConfigError(
        key="link", value=setting, expected=f"a link that serves {source_device} to {sink_device}, {where}"
    )


class SinkLink(Protocol):
    """The receiving end of one directed pair. Called from one thread at a time."""

    def recv(self, batch: Batch, timeout_s: float, stall_s: float) -> None:
        """Bring every piece of the batch into its target slot, and verify it.

        On return all bytes are here and right; on a raise none of them may be used. Either way nothing writes to the
        target slots any more.

        Raises:
            TransferTimeout, PeerLost, IntegrityError: within about timeout_s, and within about stall_s of the last
                piece, or part of one, that came.
        """
        ...

    def interrupt(self) -> None:
        """From any thread: let a running `recv` raise soon, where the transport allows it; later ones raise at once."""
        ...

    def close(self) -> None:
        """Release threads, descriptors and mappings. Called when no `recv` is running. Idempotent."""
        ...


class SourceLink(Protocol):
    """The sending end of one directed pair. Called from one thread at a time; one-sided links never call `send`."""

    def send(self, batch: Batch, timeout_s: float, stall_s: float) -> None:
        """Send every piece of the batch. On return or raise nothing reads its slots any more.

        Raises:
            TransferTimeout, PeerLost: within about timeout_s, and within about stall_s of the last piece that left.
        """
        ...

    def interrupt(self) -> None: ...

    def close(self) -> None: ...
