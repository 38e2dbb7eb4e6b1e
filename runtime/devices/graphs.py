"""CUDA graphs: work that is enqueued again and again on the same buffers, captured once and launched as one."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from engines import EngineError


class Graphs:
    """The graphs of one stream.

    A graph holds addresses, so its key has the names, shapes, dtypes and addresses of all that is bound, and nothing
    that changes from step to step (`runtime.devices.device.signature`). `limit` graphs are kept, those used last.

    stream: of cuda.core. eager: never capture.
    """

    def __init__(self, stream: Any, eager: bool = False, limit: int = 16) -> None:
        self.eager = eager
        self._stream = stream
        self._limit = limit
        self._graphs: OrderedDict[Hashable, Any] = OrderedDict()  # None: has run once, and is captured next

    def run(self, key: Hashable, enqueue: Callable[[Any], None]) -> None:
        """Enqueue the work of `key`: `enqueue(stream)` at first, which lets libraries set themselves up; captured and
        launched the second time, and launched from then on.

        Raises EngineError where the work cannot be captured.
        """
        if self.eager or key not in self._graphs:
            enqueue(self._stream)
            graph = None
        else:
            graph = self._graphs[key] or self._capture(enqueue)
            graph.launch(self._stream)
        if not self.eager:
            self._graphs[key] = graph
            self._graphs.move_to_end(key)
            if len(self._graphs) > self._limit:
                self._graphs.popitem(last=False)

    def clear(self) -> None:
        """Forget every graph: something that they hold has moved or changed."""
        self._graphs.clear()

    def _capture(self, enqueue: Callable[[Any], None]) -> Any:
        builder = self._stream.create_graph_builder()
        try:
            builder.begin_building("relaxed")  # torch and TensorRT may allocate or ask about events meanwhile
            enqueue(self._stream)
            return builder.end_building().complete()
        except EngineError:
            raise
        except Exception as e:
            raise EngineError(f"a step cannot be captured in a CUDA graph ({e}); use eager=True (--eager)") from e
        finally:
            with contextlib.suppress(Exception):  # a capture that failed is ended, which fails once more
                builder.close()
