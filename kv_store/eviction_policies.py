"""Pure: the eviction policies that a node may be told to use, by name."""

from __future__ import annotations

from collections.abc import Callable

from kv_store.eviction import EvictionPolicy, LengthAware, Lfu, LruTailFirst
from kv_store.eviction_leases import Leased
from kv_store.eviction_s3fifo import S3Fifo

POLICIES: dict[str, Callable[[int], EvictionPolicy]] = {
    "lru": lambda num_slots: LruTailFirst(),
    "lfu": lambda num_slots: Lfu(),
    "length_aware": lambda num_slots: LengthAware(),
    "s3fifo": S3Fifo,
    "leased": Leased,
}
"""Name -> a policy for a tier of so many slots. Belady, which needs the future, is not among them."""


def make_policy(name: str, num_slots: int) -> EvictionPolicy:
    """A new policy; the name is one of POLICIES (settings are checked where they are read)."""
    return POLICIES[name](num_slots)
