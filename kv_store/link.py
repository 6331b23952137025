"""Pure: what a link is, and which link serves which pair.

| source's copy | sink's pool | hosts | link |
|---|---|---|---|
| host memory (DEVICE of a CPU worker, or DRAM) | host memory or GPU | same, proved | shm |
| host memory | host memory | not proved the same | torch (gloo) |
| GPU | GPU | any | torch (NCCL) |
| GPU | host memory, or host memory to a GPU elsewhere | any | none: refused by name |

"Proved" means: the sink has mapped the source's memory and found its nonce there. A setting other than "auto" is
obeyed or refused, never replaced.
"""

from __future__ import annotations

from typing import Protocol

from halfmoon.errors import ConfigError
from kv_store.transfer_values import Batch, LinkTraits

AUTO = "auto"
SHM = LinkTraits(name="shm", two_sided=False)
TORCH = LinkTraits(name="torch", two_sided=True)
MEMORY = LinkTraits(name="memory", two_sided=True)
LINKS = {traits.name: traits for traits in (SHM, TORCH, MEMORY)}


def choose_link(*, setting: str, same_host: bool, source_device: str, sink_device: str) -> LinkTraits:
    """The link for one tier of the source to the sink's pool.

    Args:
        setting: "auto", or a link's name from the configuration.
        same_host: the sink has mapped the source's memory; never a comparison of names.
        source_device, sink_device: "cpu" or a GPU's name ("cuda:0").

    Raises:
        ConfigError: no link can serve this pair under this setting.
    """
    on_host = source_device == "cpu"
    same_kind = on_host == (sink_device == "cpu")
    can = {"memory": True, "shm": same_host and on_host, "torch": same_kind}
    names = ("shm", "torch") if setting == AUTO else (setting,)
    for name in names:
        if can.get(name, False):
            return LINKS[name]
    where = "on one host" if same_host else "not proved to be on one host"
    raise ConfigError(
        key="link", value=setting, expected=f"a link that serves {source_device} to {sink_device}, {where}"
    )


class SinkLink(Protocol):
    """The receiving end of one directed pair. Called from one thread at a time."""

    def recv(self, batch: Batch, timeout_s: float) -> None:
        """Bring every piece of the batch into its target slot, and verify it.

        On return all bytes are here and right; on a raise none of them may be used. Either way nothing writes to the
        target slots any more.

        Raises:
            TransferTimeout, PeerLost, IntegrityError: within about timeout_s.
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

    def send(self, batch: Batch, timeout_s: float) -> None:
        """Send every piece of the batch. On return or raise nothing reads its slots any more.

        Raises:
            TransferTimeout, PeerLost: within about timeout_s.
        """
        ...

    def interrupt(self) -> None: ...

    def close(self) -> None: ...
