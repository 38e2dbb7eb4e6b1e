"""The engines of a bundle: which are needed, where they are, what each depends on; building and loading them."""

from engines.store.places import KERNELS, engine_directories, roots, user_cache, writable_root
from engines.store.plan import in_parts, plan, used
from engines.store.record import Record, backend_of, directory_name, key, stale
from engines.store.store import build, build_all, find, load, verify_files
from engines.store.words import rebuild_command, rows

__all__ = ["KERNELS", "Record", "backend_of", "build", "build_all", "directory_name", "engine_directories", "find",
           "in_parts", "key", "load", "plan", "rebuild_command", "roots", "rows", "stale", "used", "user_cache",
           "verify_files", "writable_root"]
