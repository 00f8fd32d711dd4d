"""Number formats and byte layouts: FP8 dialects, UE8M0 scales, the 584-byte KV-cache entry, ragged index lists."""

from dsv4ref.formats.fp8 import Dialect
from dsv4ref.formats.kv_cache import KVCache
from dsv4ref.formats.scope import Scope

__all__ = ["Dialect", "KVCache", "Scope"]
