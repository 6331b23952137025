from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    DEVICE: _ClassVar[Tier]
    DRAM: _ClassVar[Tier]
    SSD: _ClassVar[Tier]
TIER_UNSPECIFIED: Tier
DEVICE: Tier
DRAM: Tier
SSD: Tier

class AttemptId(_message.Message):
    __slots__ = ("request_id", "number")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    number: int
    def __init__(self, request_id: _Optional[str] = ..., number: _Optional[int] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "seed", "max_tokens", "stop_token_ids", "stop", "ignore_eos", "logprobs")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    seed: int
    max_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    stop: _containers.RepeatedScalarFieldContainer[str]
    ignore_eos: bool
    logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., stop: _Optional[_Iterable[str]] = ..., ignore_eos: _Optional[bool] = ..., logprobs: _Optional[int] = ...) -> None: ...

class Fingerprint(_message.Message):
    __slots__ = ("weights", "num_layers", "num_kv_heads", "head_dim", "rope", "adapter", "compute_dtype", "block_size")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    ROPE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    weights: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope: str
    adapter: str
    compute_dtype: str
    block_size: int
    def __init__(self, weights: _Optional[str] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., rope: _Optional[str] = ..., adapter: _Optional[str] = ..., compute_dtype: _Optional[str] = ..., block_size: _Optional[int] = ...) -> None: ...

class NodeInfo(_message.Message):
    __slots__ = ("node_id", "epoch", "role", "address", "fingerprint", "num_device_blocks", "num_dram_blocks", "block_bytes", "tokens_per_pass_max", "sequences_max", "pid")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_DEVICE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_PASS_MAX_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_MAX_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    epoch: str
    role: str
    address: str
    fingerprint: Fingerprint
    num_device_blocks: int
    num_dram_blocks: int
    block_bytes: int
    tokens_per_pass_max: int
    sequences_max: int
    pid: int
    def __init__(self, node_id: _Optional[str] = ..., epoch: _Optional[str] = ..., role: _Optional[str] = ..., address: _Optional[str] = ..., fingerprint: _Optional[_Union[Fingerprint, _Mapping]] = ..., num_device_blocks: _Optional[int] = ..., num_dram_blocks: _Optional[int] = ..., block_bytes: _Optional[int] = ..., tokens_per_pass_max: _Optional[int] = ..., sequences_max: _Optional[int] = ..., pid: _Optional[int] = ...) -> None: ...

class Attach(_message.Message):
    __slots__ = ("conductor_id", "term")
    CONDUCTOR_ID_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    conductor_id: str
    term: int
    def __init__(self, conductor_id: _Optional[str] = ..., term: _Optional[int] = ...) -> None: ...

class Fetch(_message.Message):
    __slots__ = ("source", "source_epoch", "source_address", "first_block", "num_blocks")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    source: str
    source_epoch: str
    source_address: str
    first_block: int
    num_blocks: int
    def __init__(self, source: _Optional[str] = ..., source_epoch: _Optional[str] = ..., source_address: _Optional[str] = ..., first_block: _Optional[int] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class PrefillCommand(_message.Message):
    __slots__ = ("attempt_id", "token_ids", "num_prompt_tokens", "sampling", "front_end", "deadline_s", "fetches", "decode_here", "cache_salt", "public_tokens", "priority")
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    FRONT_END_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    FETCHES_FIELD_NUMBER: _ClassVar[int]
    DECODE_HERE_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    attempt_id: AttemptId
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    front_end: str
    deadline_s: float
    fetches: _containers.RepeatedCompositeFieldContainer[Fetch]
    decode_here: bool
    cache_salt: bytes
    public_tokens: int
    priority: int
    def __init__(self, attempt_id: _Optional[_Union[AttemptId, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ..., num_prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., front_end: _Optional[str] = ..., deadline_s: _Optional[float] = ..., fetches: _Optional[_Iterable[_Union[Fetch, _Mapping]]] = ..., decode_here: _Optional[bool] = ..., cache_salt: _Optional[bytes] = ..., public_tokens: _Optional[int] = ..., priority: _Optional[int] = ...) -> None: ...

class ReserveCommand(_message.Message):
    __slots__ = ("attempt_id", "token_ids", "num_prompt_tokens", "sampling", "front_end", "source", "source_epoch", "source_address", "deadline_s", "cache_salt", "public_tokens", "priority")
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    FRONT_END_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    attempt_id: AttemptId
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    front_end: str
    source: str
    source_epoch: str
    source_address: str
    deadline_s: float
    cache_salt: bytes
    public_tokens: int
    priority: int
    def __init__(self, attempt_id: _Optional[_Union[AttemptId, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ..., num_prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., front_end: _Optional[str] = ..., source: _Optional[str] = ..., source_epoch: _Optional[str] = ..., source_address: _Optional[str] = ..., deadline_s: _Optional[float] = ..., cache_salt: _Optional[bytes] = ..., public_tokens: _Optional[int] = ..., priority: _Optional[int] = ...) -> None: ...

class StartCommand(_message.Message):
    __slots__ = ("attempt_id", "first_token_id")
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    attempt_id: AttemptId
    first_token_id: int
    def __init__(self, attempt_id: _Optional[_Union[AttemptId, _Mapping]] = ..., first_token_id: _Optional[int] = ...) -> None: ...

class CancelCommand(_message.Message):
    __slots__ = ("attempt_id", "reason")
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    attempt_id: AttemptId
    reason: str
    def __init__(self, attempt_id: _Optional[_Union[AttemptId, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class SnapshotCommand(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainCommand(_message.Message):
    __slots__ = ("undo",)
    UNDO_FIELD_NUMBER: _ClassVar[int]
    undo: bool
    def __init__(self, undo: _Optional[bool] = ...) -> None: ...

class WorkerCommand(_message.Message):
    __slots__ = ("attach", "prefill_command", "reserve_command", "start_command", "cancel_command", "snapshot_command", "drain_command")
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    PREFILL_COMMAND_FIELD_NUMBER: _ClassVar[int]
    RESERVE_COMMAND_FIELD_NUMBER: _ClassVar[int]
    START_COMMAND_FIELD_NUMBER: _ClassVar[int]
    CANCEL_COMMAND_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_COMMAND_FIELD_NUMBER: _ClassVar[int]
    DRAIN_COMMAND_FIELD_NUMBER: _ClassVar[int]
    attach: Attach
    prefill_command: PrefillCommand
    reserve_command: ReserveCommand
    start_command: StartCommand
    cancel_command: CancelCommand
    snapshot_command: SnapshotCommand
    drain_command: DrainCommand
    def __init__(self, attach: _Optional[_Union[Attach, _Mapping]] = ..., prefill_command: _Optional[_Union[PrefillCommand, _Mapping]] = ..., reserve_command: _Optional[_Union[ReserveCommand, _Mapping]] = ..., start_command: _Optional[_Union[StartCommand, _Mapping]] = ..., cancel_command: _Optional[_Union[CancelCommand, _Mapping]] = ..., snapshot_command: _Optional[_Union[SnapshotCommand, _Mapping]] = ..., drain_command: _Optional[_Union[DrainCommand, _Mapping]] = ...) -> None: ...

class AttemptStats(_message.Message):
    __slots__ = ("node_id", "queue_s", "fetch_s", "compute_s", "pull_s", "computed_tokens", "hit_tokens_device", "hit_tokens_dram", "hit_tokens_remote", "pulled_blocks", "pulled_bytes", "link", "overlap", "preemptions", "decode_prefilled_tokens")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    FETCH_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    PULL_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HIT_TOKENS_DEVICE_FIELD_NUMBER: _ClassVar[int]
    HIT_TOKENS_DRAM_FIELD_NUMBER: _ClassVar[int]
    HIT_TOKENS_REMOTE_FIELD_NUMBER: _ClassVar[int]
    PULLED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PULLED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    DECODE_PREFILLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    queue_s: float
    fetch_s: float
    compute_s: float
    pull_s: float
    computed_tokens: int
    hit_tokens_device: int
    hit_tokens_dram: int
    hit_tokens_remote: int
    pulled_blocks: int
    pulled_bytes: int
    link: str
    overlap: float
    preemptions: int
    decode_prefilled_tokens: int
    def __init__(self, node_id: _Optional[str] = ..., queue_s: _Optional[float] = ..., fetch_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., pull_s: _Optional[float] = ..., computed_tokens: _Optional[int] = ..., hit_tokens_device: _Optional[int] = ..., hit_tokens_dram: _Optional[int] = ..., hit_tokens_remote: _Optional[int] = ..., pulled_blocks: _Optional[int] = ..., pulled_bytes: _Optional[int] = ..., link: _Optional[str] = ..., overlap: _Optional[float] = ..., preemptions: _Optional[int] = ..., decode_prefilled_tokens: _Optional[int] = ...) -> None: ...

class BlockCopy(_message.Message):
    __slots__ = ("block_hash", "tier")
    BLOCK_HASH_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    block_hash: bytes
    tier: Tier
    def __init__(self, block_hash: _Optional[bytes] = ..., tier: _Optional[_Union[Tier, str]] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("info", "last_event_id", "blocks", "attempts")
    INFO_FIELD_NUMBER: _ClassVar[int]
    LAST_EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    info: NodeInfo
    last_event_id: int
    blocks: _containers.RepeatedCompositeFieldContainer[BlockCopy]
    attempts: _containers.RepeatedCompositeFieldContainer[AttemptId]
    def __init__(self, info: _Optional[_Union[NodeInfo, _Mapping]] = ..., last_event_id: _Optional[int] = ..., blocks: _Optional[_Iterable[_Union[BlockCopy, _Mapping]]] = ..., attempts: _Optional[_Iterable[_Union[AttemptId, _Mapping]]] = ...) -> None: ...

class KvEvents(_message.Message):
    __slots__ = ("event_id", "stored", "removed")
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    event_id: int
    stored: _containers.RepeatedCompositeFieldContainer[BlockCopy]
    removed: _containers.RepeatedCompositeFieldContainer[BlockCopy]
    def __init__(self, event_id: _Optional[int] = ..., stored: _Optional[_Iterable[_Union[BlockCopy, _Mapping]]] = ..., removed: _Optional[_Iterable[_Union[BlockCopy, _Mapping]]] = ...) -> None: ...

class PassSample(_message.Message):
    __slots__ = ("new_tokens", "context_tokens", "batch", "kv_tokens", "seconds", "pairs")
    NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    new_tokens: int
    context_tokens: int
    batch: int
    kv_tokens: int
    seconds: float
    pairs: int
    def __init__(self, new_tokens: _Optional[int] = ..., context_tokens: _Optional[int] = ..., batch: _Optional[int] = ..., kv_tokens: _Optional[int] = ..., seconds: _Optional[float] = ..., pairs: _Optional[int] = ...) -> None: ...

class TransferSample(_message.Message):
    __slots__ = ("source", "link", "num_bytes", "seconds")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    source: str
    link: str
    num_bytes: int
    seconds: float
    def __init__(self, source: _Optional[str] = ..., link: _Optional[str] = ..., num_bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class LoadReport(_message.Message):
    __slots__ = ("queued_attempts", "queued_tokens", "running_sequences", "kv_tokens", "free_device_blocks", "evictable_device_blocks", "free_dram_blocks", "draining", "passes", "transfers", "held_blocks", "quarantined_blocks", "invariant_checks")
    QUEUED_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FREE_DEVICE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EVICTABLE_DEVICE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_DRAM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    PASSES_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    INVARIANT_CHECKS_FIELD_NUMBER: _ClassVar[int]
    queued_attempts: int
    queued_tokens: int
    running_sequences: int
    kv_tokens: int
    free_device_blocks: int
    evictable_device_blocks: int
    free_dram_blocks: int
    draining: bool
    passes: _containers.RepeatedCompositeFieldContainer[PassSample]
    transfers: _containers.RepeatedCompositeFieldContainer[TransferSample]
    held_blocks: int
    quarantined_blocks: int
    invariant_checks: int
    def __init__(self, queued_attempts: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., running_sequences: _Optional[int] = ..., kv_tokens: _Optional[int] = ..., free_device_blocks: _Optional[int] = ..., evictable_device_blocks: _Optional[int] = ..., free_dram_blocks: _Optional[int] = ..., draining: _Optional[bool] = ..., passes: _Optional[_Iterable[_Union[PassSample, _Mapping]]] = ..., transfers: _Optional[_Iterable[_Union[TransferSample, _Mapping]]] = ..., held_blocks: _Optional[int] = ..., quarantined_blocks: _Optional[int] = ..., invariant_checks: _Optional[int] = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("attempt_id", "hit_tokens")
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    attempt_id: AttemptId
    hit_tokens: int
    def __init__(self, attempt_id: _Optional[_Union[AttemptId, _Mapping]] = ..., hit_tokens: _Optional[int] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("attempt_id", "reason", "free_blocks")
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    attempt_id: AttemptId
    reason: str
    free_blocks: int
    def __init__(self, attempt_id: _Optional[_Union[AttemptId, _Mapping]] = ..., reason: _Optional[str] = ..., free_blocks: _Optional[int] = ...) -> None: ...

class PrefillDone(_message.Message):
    __slots__ = ("attempt_id", "first_token_id", "stats", "finish_reason")
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    attempt_id: AttemptId
    first_token_id: int
    stats: AttemptStats
    finish_reason: str
    def __init__(self, attempt_id: _Optional[_Union[AttemptId, _Mapping]] = ..., first_token_id: _Optional[int] = ..., stats: _Optional[_Union[AttemptStats, _Mapping]] = ..., finish_reason: _Optional[str] = ...) -> None: ...

class DecodeJoined(_message.Message):
    __slots__ = ("attempt_id", "stats")
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    attempt_id: AttemptId
    stats: AttemptStats
    def __init__(self, attempt_id: _Optional[_Union[AttemptId, _Mapping]] = ..., stats: _Optional[_Union[AttemptStats, _Mapping]] = ...) -> None: ...

class AttemptFinished(_message.Message):
    __slots__ = ("attempt_id", "finish_reason", "num_output_tokens", "stats")
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    attempt_id: AttemptId
    finish_reason: str
    num_output_tokens: int
    stats: AttemptStats
    def __init__(self, attempt_id: _Optional[_Union[AttemptId, _Mapping]] = ..., finish_reason: _Optional[str] = ..., num_output_tokens: _Optional[int] = ..., stats: _Optional[_Union[AttemptStats, _Mapping]] = ...) -> None: ...

class AttemptFailed(_message.Message):
    __slots__ = ("attempt_id", "kind", "message")
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    attempt_id: AttemptId
    kind: str
    message: str
    def __init__(self, attempt_id: _Optional[_Union[AttemptId, _Mapping]] = ..., kind: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Closed(_message.Message):
    __slots__ = ("attempt_id",)
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    attempt_id: AttemptId
    def __init__(self, attempt_id: _Optional[_Union[AttemptId, _Mapping]] = ...) -> None: ...

class WorkerEvent(_message.Message):
    __slots__ = ("snapshot", "kv_events", "load_report", "reserved", "refused", "prefill_done", "decode_joined", "attempt_finished", "attempt_failed", "closed")
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    KV_EVENTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_REPORT_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    PREFILL_DONE_FIELD_NUMBER: _ClassVar[int]
    DECODE_JOINED_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FINISHED_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FAILED_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    snapshot: Snapshot
    kv_events: KvEvents
    load_report: LoadReport
    reserved: Reserved
    refused: Refused
    prefill_done: PrefillDone
    decode_joined: DecodeJoined
    attempt_finished: AttemptFinished
    attempt_failed: AttemptFailed
    closed: Closed
    def __init__(self, snapshot: _Optional[_Union[Snapshot, _Mapping]] = ..., kv_events: _Optional[_Union[KvEvents, _Mapping]] = ..., load_report: _Optional[_Union[LoadReport, _Mapping]] = ..., reserved: _Optional[_Union[Reserved, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., prefill_done: _Optional[_Union[PrefillDone, _Mapping]] = ..., decode_joined: _Optional[_Union[DecodeJoined, _Mapping]] = ..., attempt_finished: _Optional[_Union[AttemptFinished, _Mapping]] = ..., attempt_failed: _Optional[_Union[AttemptFailed, _Mapping]] = ..., closed: _Optional[_Union[Closed, _Mapping]] = ...) -> None: ...

class TokensRequest(_message.Message):
    __slots__ = ("front_end", "term")
    FRONT_END_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    front_end: str
    term: int
    def __init__(self, front_end: _Optional[str] = ..., term: _Optional[int] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("attempt_id", "index", "token_id", "logprob", "top_logprobs", "finish_reason", "stats")
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    attempt_id: AttemptId
    index: int
    token_id: int
    logprob: float
    top_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    finish_reason: str
    stats: AttemptStats
    def __init__(self, attempt_id: _Optional[_Union[AttemptId, _Mapping]] = ..., index: _Optional[int] = ..., token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top_logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ..., finish_reason: _Optional[str] = ..., stats: _Optional[_Union[AttemptStats, _Mapping]] = ...) -> None: ...

class StepTokens(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    def __init__(self, tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ...) -> None: ...
