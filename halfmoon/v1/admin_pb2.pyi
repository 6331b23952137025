from halfmoon.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetClusterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeStatus(_message.Message):
    __slots__ = ("info", "load", "ready", "outstanding_attempts", "indexed_blocks", "index_mode", "last_heard_s")
    INFO_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    OUTSTANDING_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    INDEXED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    INDEX_MODE_FIELD_NUMBER: _ClassVar[int]
    LAST_HEARD_S_FIELD_NUMBER: _ClassVar[int]
    info: _worker_pb2.NodeInfo
    load: _worker_pb2.LoadReport
    ready: bool
    outstanding_attempts: int
    indexed_blocks: int
    index_mode: str
    last_heard_s: float
    def __init__(self, info: _Optional[_Union[_worker_pb2.NodeInfo, _Mapping]] = ..., load: _Optional[_Union[_worker_pb2.LoadReport, _Mapping]] = ..., ready: _Optional[bool] = ..., outstanding_attempts: _Optional[int] = ..., indexed_blocks: _Optional[int] = ..., index_mode: _Optional[str] = ..., last_heard_s: _Optional[float] = ...) -> None: ...

class GetClusterResponse(_message.Message):
    __slots__ = ("conductor_id", "term", "model", "ready", "nodes", "requests_open", "counters", "registry_reachable")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    CONDUCTOR_ID_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_OPEN_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    REGISTRY_REACHABLE_FIELD_NUMBER: _ClassVar[int]
    conductor_id: str
    term: int
    model: str
    ready: bool
    nodes: _containers.RepeatedCompositeFieldContainer[NodeStatus]
    requests_open: int
    counters: _containers.ScalarMap[str, int]
    registry_reachable: bool
    def __init__(self, conductor_id: _Optional[str] = ..., term: _Optional[int] = ..., model: _Optional[str] = ..., ready: _Optional[bool] = ..., nodes: _Optional[_Iterable[_Union[NodeStatus, _Mapping]]] = ..., requests_open: _Optional[int] = ..., counters: _Optional[_Mapping[str, int]] = ..., registry_reachable: _Optional[bool] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("node_id", "undo")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    undo: bool
    def __init__(self, node_id: _Optional[str] = ..., undo: _Optional[bool] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("record_json",)
    RECORD_JSON_FIELD_NUMBER: _ClassVar[int]
    record_json: str
    def __init__(self, record_json: _Optional[str] = ...) -> None: ...
