from halfmoon.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvMessage(_message.Message):
    __slots__ = ("hello", "welcome", "refusal", "begin", "rendezvous", "pull", "go", "ack", "granted", "missing", "source_done", "abort", "aborted", "ping", "pong")
    class Hello(_message.Message):
        __slots__ = ("protocol", "node_id", "epoch", "source_epoch", "fingerprint", "block_bytes")
        PROTOCOL_FIELD_NUMBER: _ClassVar[int]
        NODE_ID_FIELD_NUMBER: _ClassVar[int]
        EPOCH_FIELD_NUMBER: _ClassVar[int]
        SOURCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
        FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
        BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
        protocol: int
        node_id: str
        epoch: str
        source_epoch: str
        fingerprint: _worker_pb2.Fingerprint
        block_bytes: int
        def __init__(self, protocol: _Optional[int] = ..., node_id: _Optional[str] = ..., epoch: _Optional[str] = ..., source_epoch: _Optional[str] = ..., fingerprint: _Optional[_Union[_worker_pb2.Fingerprint, _Mapping]] = ..., block_bytes: _Optional[int] = ...) -> None: ...
    class Arena(_message.Message):
        __slots__ = ("tier", "num_slots", "block_bytes", "device", "pid", "fd", "nonce")
        TIER_FIELD_NUMBER: _ClassVar[int]
        NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
        BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
        DEVICE_FIELD_NUMBER: _ClassVar[int]
        PID_FIELD_NUMBER: _ClassVar[int]
        FD_FIELD_NUMBER: _ClassVar[int]
        NONCE_FIELD_NUMBER: _ClassVar[int]
        tier: _worker_pb2.Tier
        num_slots: int
        block_bytes: int
        device: str
        pid: int
        fd: int
        nonce: bytes
        def __init__(self, tier: _Optional[_Union[_worker_pb2.Tier, str]] = ..., num_slots: _Optional[int] = ..., block_bytes: _Optional[int] = ..., device: _Optional[str] = ..., pid: _Optional[int] = ..., fd: _Optional[int] = ..., nonce: _Optional[bytes] = ...) -> None: ...
    class Welcome(_message.Message):
        __slots__ = ("protocol", "node_id", "epoch", "fingerprint", "block_bytes", "arenas")
        PROTOCOL_FIELD_NUMBER: _ClassVar[int]
        NODE_ID_FIELD_NUMBER: _ClassVar[int]
        EPOCH_FIELD_NUMBER: _ClassVar[int]
        FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
        BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
        ARENAS_FIELD_NUMBER: _ClassVar[int]
        protocol: int
        node_id: str
        epoch: str
        fingerprint: _worker_pb2.Fingerprint
        block_bytes: int
        arenas: _containers.RepeatedCompositeFieldContainer[KvMessage.Arena]
        def __init__(self, protocol: _Optional[int] = ..., node_id: _Optional[str] = ..., epoch: _Optional[str] = ..., fingerprint: _Optional[_Union[_worker_pb2.Fingerprint, _Mapping]] = ..., block_bytes: _Optional[int] = ..., arenas: _Optional[_Iterable[_Union[KvMessage.Arena, _Mapping]]] = ...) -> None: ...
    class Refusal(_message.Message):
        __slots__ = ("reason",)
        REASON_FIELD_NUMBER: _ClassVar[int]
        reason: str
        def __init__(self, reason: _Optional[str] = ...) -> None: ...
    class Begin(_message.Message):
        __slots__ = ("links",)
        LINKS_FIELD_NUMBER: _ClassVar[int]
        links: _containers.RepeatedCompositeFieldContainer[KvMessage.TierLink]
        def __init__(self, links: _Optional[_Iterable[_Union[KvMessage.TierLink, _Mapping]]] = ...) -> None: ...
    class TierLink(_message.Message):
        __slots__ = ("tier", "link")
        TIER_FIELD_NUMBER: _ClassVar[int]
        LINK_FIELD_NUMBER: _ClassVar[int]
        tier: _worker_pb2.Tier
        link: str
        def __init__(self, tier: _Optional[_Union[_worker_pb2.Tier, str]] = ..., link: _Optional[str] = ...) -> None: ...
    class Rendezvous(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    class Wanted(_message.Message):
        __slots__ = ("index", "block_hash", "num_tokens")
        INDEX_FIELD_NUMBER: _ClassVar[int]
        BLOCK_HASH_FIELD_NUMBER: _ClassVar[int]
        NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
        index: int
        block_hash: bytes
        num_tokens: int
        def __init__(self, index: _Optional[int] = ..., block_hash: _Optional[bytes] = ..., num_tokens: _Optional[int] = ...) -> None: ...
    class Pull(_message.Message):
        __slots__ = ("transfer_id", "attempt_id", "wants", "wait", "verify", "deadline_s")
        TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
        ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
        WANTS_FIELD_NUMBER: _ClassVar[int]
        WAIT_FIELD_NUMBER: _ClassVar[int]
        VERIFY_FIELD_NUMBER: _ClassVar[int]
        DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
        transfer_id: str
        attempt_id: _worker_pb2.AttemptId
        wants: _containers.RepeatedCompositeFieldContainer[KvMessage.Wanted]
        wait: bool
        verify: bool
        deadline_s: float
        def __init__(self, transfer_id: _Optional[str] = ..., attempt_id: _Optional[_Union[_worker_pb2.AttemptId, _Mapping]] = ..., wants: _Optional[_Iterable[_Union[KvMessage.Wanted, _Mapping]]] = ..., wait: _Optional[bool] = ..., verify: _Optional[bool] = ..., deadline_s: _Optional[float] = ...) -> None: ...
    class Go(_message.Message):
        __slots__ = ("transfer_id", "batch", "group", "indices")
        TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
        BATCH_FIELD_NUMBER: _ClassVar[int]
        GROUP_FIELD_NUMBER: _ClassVar[int]
        INDICES_FIELD_NUMBER: _ClassVar[int]
        transfer_id: str
        batch: int
        group: int
        indices: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, transfer_id: _Optional[str] = ..., batch: _Optional[int] = ..., group: _Optional[int] = ..., indices: _Optional[_Iterable[int]] = ...) -> None: ...
    class Ack(_message.Message):
        __slots__ = ("transfer_id", "indices")
        TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
        INDICES_FIELD_NUMBER: _ClassVar[int]
        transfer_id: str
        indices: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, transfer_id: _Optional[str] = ..., indices: _Optional[_Iterable[int]] = ...) -> None: ...
    class Grant(_message.Message):
        __slots__ = ("index", "tier", "slot", "stamp", "checksum", "num_bytes")
        INDEX_FIELD_NUMBER: _ClassVar[int]
        TIER_FIELD_NUMBER: _ClassVar[int]
        SLOT_FIELD_NUMBER: _ClassVar[int]
        STAMP_FIELD_NUMBER: _ClassVar[int]
        CHECKSUM_FIELD_NUMBER: _ClassVar[int]
        NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
        index: int
        tier: _worker_pb2.Tier
        slot: int
        stamp: int
        checksum: int
        num_bytes: int
        def __init__(self, index: _Optional[int] = ..., tier: _Optional[_Union[_worker_pb2.Tier, str]] = ..., slot: _Optional[int] = ..., stamp: _Optional[int] = ..., checksum: _Optional[int] = ..., num_bytes: _Optional[int] = ...) -> None: ...
    class Granted(_message.Message):
        __slots__ = ("transfer_id", "grants")
        TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
        GRANTS_FIELD_NUMBER: _ClassVar[int]
        transfer_id: str
        grants: _containers.RepeatedCompositeFieldContainer[KvMessage.Grant]
        def __init__(self, transfer_id: _Optional[str] = ..., grants: _Optional[_Iterable[_Union[KvMessage.Grant, _Mapping]]] = ...) -> None: ...
    class Missing(_message.Message):
        __slots__ = ("transfer_id", "indices")
        TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
        INDICES_FIELD_NUMBER: _ClassVar[int]
        transfer_id: str
        indices: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, transfer_id: _Optional[str] = ..., indices: _Optional[_Iterable[int]] = ...) -> None: ...
    class SourceDone(_message.Message):
        __slots__ = ("transfer_id",)
        TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
        transfer_id: str
        def __init__(self, transfer_id: _Optional[str] = ...) -> None: ...
    class Abort(_message.Message):
        __slots__ = ("transfer_id", "reason")
        TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
        REASON_FIELD_NUMBER: _ClassVar[int]
        transfer_id: str
        reason: str
        def __init__(self, transfer_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...
    class Aborted(_message.Message):
        __slots__ = ("transfer_id",)
        TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
        transfer_id: str
        def __init__(self, transfer_id: _Optional[str] = ...) -> None: ...
    class Ping(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    class Pong(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    RENDEZVOUS_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    GO_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    SOURCE_DONE_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    hello: KvMessage.Hello
    welcome: KvMessage.Welcome
    refusal: KvMessage.Refusal
    begin: KvMessage.Begin
    rendezvous: KvMessage.Rendezvous
    pull: KvMessage.Pull
    go: KvMessage.Go
    ack: KvMessage.Ack
    granted: KvMessage.Granted
    missing: KvMessage.Missing
    source_done: KvMessage.SourceDone
    abort: KvMessage.Abort
    aborted: KvMessage.Aborted
    ping: KvMessage.Ping
    pong: KvMessage.Pong
    def __init__(self, hello: _Optional[_Union[KvMessage.Hello, _Mapping]] = ..., welcome: _Optional[_Union[KvMessage.Welcome, _Mapping]] = ..., refusal: _Optional[_Union[KvMessage.Refusal, _Mapping]] = ..., begin: _Optional[_Union[KvMessage.Begin, _Mapping]] = ..., rendezvous: _Optional[_Union[KvMessage.Rendezvous, _Mapping]] = ..., pull: _Optional[_Union[KvMessage.Pull, _Mapping]] = ..., go: _Optional[_Union[KvMessage.Go, _Mapping]] = ..., ack: _Optional[_Union[KvMessage.Ack, _Mapping]] = ..., granted: _Optional[_Union[KvMessage.Granted, _Mapping]] = ..., missing: _Optional[_Union[KvMessage.Missing, _Mapping]] = ..., source_done: _Optional[_Union[KvMessage.SourceDone, _Mapping]] = ..., abort: _Optional[_Union[KvMessage.Abort, _Mapping]] = ..., aborted: _Optional[_Union[KvMessage.Aborted, _Mapping]] = ..., ping: _Optional[_Union[KvMessage.Ping, _Mapping]] = ..., pong: _Optional[_Union[KvMessage.Pong, _Mapping]] = ...) -> None: ...
