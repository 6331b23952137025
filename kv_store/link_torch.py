"""Shell: the link over torch.distributed: one two-rank process group per directed pair, made on demand.

gloo moves host memory (link "torch": an end on a GPU stages each block in pinned memory), NCCL moves GPU memory to
another GPU (link "nccl", not yet run). What is compared with a checksum is always a host copy: staged, or made of the
GPU's bytes after they arrived. As measured with gloo: a partly received large message hangs until the
group's timeout and nothing wakes it, so messages are at most 1 MiB and every wait is short; after any error the group
is destroyed, and the next batch names a higher group number. The rank-0 end is the source.

The two ends meet in a store whose entries travel over the pair's own gRPC stream: there is no port to listen at, and
nothing outlives the pair. The groups' data connections are outside TLS: fence them by network policy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from halfmoon.errors import IntegrityError, PeerLost, TransferError, TransferTimeout
from halfmoon.types import Tier
from kv_store.arena import Arena
from kv_store.arena_shared import SharedArena
from kv_store.arena_tensor import TensorArena
from kv_store.checksum import checksum
from kv_store.deadline import Deadline
from kv_store.transfer_values import Batch, Piece
from kv_store.wire import Rendezvous

MESSAGE_BYTES_MAX = 1 << 20
SOURCE_RANK, SINK_RANK = 0, 1
ENTRIES_MAX = 64
"""Entries of a pair's rendezvous: a group has two (NCCL: a few more), and older groups' are dropped."""


class Mailbox:
    """What the peer's end has published: filled by the event loop, awaited by the link's thread.

    Args:
        publish: sends an entry to the peer; safe to call from any thread.
    """

    def __init__(self, publish: Callable[[Rendezvous], None]) -> None:
        self._publish = publish
        self._entries: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._closed = False

    def publish(self, key: str, value: bytes) -> None:
        self.deliver(Rendezvous(key=key, value=value))
        self._publish(Rendezvous(key=key, value=value))

    def deliver(self, entry: Rendezvous) -> None:
        """From the event loop: an entry of the peer's."""
        with self._changed:
            self._entries[entry.key] = entry.value
            while len(self._entries) > ENTRIES_MAX:
                del self._entries[next(iter(self._entries))]
            self._changed.notify_all()

    def get(self, key: str, deadline: Deadline) -> bytes:
        """Raises RuntimeError, as torch's own stores do."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or key in self._entries, deadline.left_s):
                raise RuntimeError(f"Timed out waiting for {key}")
            if self._closed:
                raise RuntimeError("the pair's stream is gone")
            return self._entries[key]

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class ExchangeStore(dist.Store):
    """torch's rendezvous interface over a mailbox, for one group."""

    def __init__(self, mailbox: Mailbox, prefix: str, deadline: Deadline) -> None:
        super().__init__()
        self._mailbox = mailbox
        self._prefix = prefix
        self._deadline = deadline

    def set(self, key: str, value: bytes | str) -> None:
        self._mailbox.publish(self._prefix + key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        return self._mailbox.get(self._prefix + key, self._deadline)

    def wait(self, keys: Iterable[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)


class _End:
    """One end of a directed pair. The group exists between the first batch and the first error.

    Args:
        gpu: whose memory NCCL moves; None: gloo moves host memory.
    """

    def __init__(self, *, rank: int, mailbox: Mailbox, host: str, gpu: str | None) -> None:
        self._rank = rank
        self._mailbox = mailbox
        self._host = host
        self._gpu = gpu
        self._group: Any = None
        self._stream: Any = None
        self._store: ExchangeStore | None = None  # torch's side does not keep the Python object alive
        self._number = 0
        self._interrupted = False

    def interrupt(self) -> None:
        self._interrupted = True
        self._mailbox.close()

    def close(self) -> None:
        self.interrupt()
        self._drop()

    def _drop(self) -> None:
        if self._gpu is not None and self._group is not None:
            self._group.abort()  # ends its kernels: after this nothing writes to a slot
        self._group = self._store = self._stream = None

    def _run(self, batch: Batch, tensors: Sequence[torch.Tensor], deadline: Deadline) -> TransferError | None:
        """Post every message of the batch, then wait for them in order; each that came is progress.

        Errors are returned as new values: a raised one would keep the frames, and with them the group, its sockets and
        the slots' memory, for as long as somebody looks at it.
        """
        works: list[Any] = []
        try:
            group = self._join(batch, deadline)
            deadline.moved()
            with self._own_stream():
                works.extend(self._post(group, message) for t in tensors for message in self._messages(t))
                for work in works:
                    work.wait(timedelta(seconds=max(0.001, deadline.left_s)))
                    deadline.moved()
                    if self._interrupted:
                        raise PeerLost(f"{batch.transfer_id}: the stream beside the link is gone")
            return None
        except RuntimeError as error:
            failure = _typed(batch, error)
        except PeerLost as error:
            failure = PeerLost(str(error))
        works.clear()
        self._drop()
        return failure

    def _join(self, batch: Batch, deadline: Deadline) -> Any:
        """The group that the batch names; makes it if need be."""
        if self._interrupted or batch.group < self._number:
            raise PeerLost(f"{batch.transfer_id}: group {batch.group} of this pair has failed")
        if batch.group > self._number:
            self._drop()
            self._number = batch.group
            self._store = ExchangeStore(self._mailbox, f"{self._backend}/{batch.group}/", deadline)
            self._group = self._make(self._store, deadline)
        if self._group is None:
            raise PeerLost(f"{batch.transfer_id}: group {batch.group} of this pair has failed")
        return self._group

    def _make(self, store: ExchangeStore, deadline: Deadline) -> Any:
        timeout = timedelta(seconds=max(0.001, deadline.left_s))
        if self._gpu is not None:
            return self._make_nccl(store, timeout, self._gpu)
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._host)]
        options._timeout = timeout
        options._threads = 1
        return dist.ProcessGroupGloo(store, self._rank, 2, options)

    def _make_nccl(self, store: ExchangeStore, timeout: timedelta, gpu: str) -> Any:
        """Not yet run on a GPU. The eager connect keeps P2P operations from making a communicator each.

        A work's `wait` makes the current stream wait too: one of our own, lest a slow peer hold up the engine.
        """
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        group = dist.ProcessGroupNCCL(store, self._rank, 2, options)
        group._set_sequence_number_for_group()
        group.eager_connect_single_device(torch.device(gpu))
        self._stream = torch.cuda.Stream(gpu)
        return group

    @property
    def _backend(self) -> str:
        return "gloo" if self._gpu is None else "nccl"

    def _own_stream(self) -> AbstractContextManager[None]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _messages(self, block: torch.Tensor) -> Sequence[torch.Tensor]:
        """NCCL aborts what hangs and pays for every operation: whole blocks. (`split` costs 10 us, even into one.)"""
        whole = self._gpu is not None or block.numel() <= MESSAGE_BYTES_MAX
        return (block,) if whole else block.split(MESSAGE_BYTES_MAX)

    def _post(self, group: Any, message: torch.Tensor) -> Any:
        if self._rank == SOURCE_RANK:
            return group.send([message], SINK_RANK, 0)
        return group.recv([message], SOURCE_RANK, 0)


class TorchSink(_End):
    """Receives into this node's DEVICE arena."""

    def __init__(self, *, mailbox: Mailbox, host: str, target: Arena, nccl: bool = False) -> None:
        super().__init__(rank=SINK_RANK, mailbox=mailbox, host=host, gpu=target.device if nccl else None)
        self._target = target

    def recv(self, batch: Batch, timeout_s: float, stall_s: float) -> None:
        landings = [self._landing(piece.target) for piece in batch.pieces]
        if (failure := self._run(batch, landings, Deadline(timeout_s, stall_s))) is not None:
            raise failure
        for piece, landing in zip(batch.pieces, landings, strict=True):
            self._take(batch, piece, landing)

    def _landing(self, slot: int) -> torch.Tensor:
        """Where a block arrives, uint8 [block_bytes]: in its slot if the group can write there, else beside it."""
        if isinstance(self._target, SharedArena):
            return torch.from_numpy(self._target.slot(slot))
        assert isinstance(self._target, TensorArena)
        return self._target.staging() if self._gpu is None else self._target.tensor[slot]

    def _take(self, batch: Batch, piece: Piece, landing: torch.Tensor) -> None:
        """Verify what landed; bring it to its slot if it landed beside it."""
        if piece.checksum is not None:
            arrived = landing.numpy() if self._gpu is None else self._target.bytes_of(piece.target)
            if checksum(arrived) != piece.checksum:
                raise IntegrityError(f"{batch.transfer_id}: block {piece.index} differs from its checksum")
        if self._gpu is None and isinstance(self._target, TensorArena):
            self._target.copy_in(piece.target, landing.numpy())


class TorchSource(_End):
    """Sends from any arena of this node."""

    def __init__(self, *, mailbox: Mailbox, host: str, arenas: Mapping[Tier, Arena], nccl: bool = False) -> None:
        gpu = arenas[Tier.DEVICE].device if nccl else None
        super().__init__(rank=SOURCE_RANK, mailbox=mailbox, host=host, gpu=gpu)
        self._arenas = dict(arenas)

    def send(self, batch: Batch, timeout_s: float, stall_s: float) -> None:
        blocks = [self._block(self._arenas[batch.tier], piece.slot) for piece in batch.pieces]
        if (failure := self._run(batch, blocks, Deadline(timeout_s, stall_s))) is not None:
            raise failure

    def _block(self, arena: Arena, slot: int) -> torch.Tensor:
        """One slot, uint8 [block_bytes]: itself if the group can read it, else a copy in host memory."""
        if self._gpu is None:
            return torch.from_numpy(arena.bytes_of(slot))
        assert isinstance(arena, TensorArena), "pairing gives NCCL the DEVICE tier of GPU workers only"
        return arena.tensor[slot]


def _typed(batch: Batch, error: RuntimeError) -> TransferError:
    text = str(error).strip().splitlines()[0] if str(error).strip() else "no text"
    kind = TransferTimeout if "timed out" in text.lower() or "timeout" in text.lower() else PeerLost
    return kind(f"{batch.transfer_id}: {text[:200]}")
