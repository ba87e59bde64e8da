"""Capture a step of decoding as a CUDA graph, and replay it.

A step of a model with 24 layers launches about 2,000 small kernels, and launching takes longer than computing them.
A captured graph launches all of them at once. It repeats the same operations on the same memory. So a step can be
captured only if all its tensors keep their addresses and sizes, and if nothing in it waits for the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch

from vineppo.objects import message_line
from vineppo.types import TrainingWarning

Step = Callable[[], None]
"""A step, whose whole effect is on tensors that exist before it."""


class Replayable(Protocol):
    """A captured step."""

    def replay(self) -> None:
        """Repeat the step."""
        ...


class Steps:
    """Runs steps, from the second step of the same shape on as replays of a graph.

    The first step of a shape runs normally and prepares what its operations need once. The second one is captured,
    which runs nothing, and is then replayed. If it cannot be captured, one warning says so, and all steps run normally.

    Args:
        wanted: whether steps are captured. All steps run normally otherwise.
        device: device of the steps.
    """

    def __init__(self, wanted: bool, device: torch.device):
        self.wanted = wanted
        self.captures = 0
        """Number of graphs that have been captured."""
        self._shape: int | None = None
        self._current: Replayable | None = None
        self._graphs = CudaGraphs(device)

    def run(self, step: Step, shape: int) -> None:
        """Run a step.

        Args:
            shape: a number that changes whenever the step uses tensors of other sizes or addresses than the last one
                since `forget`.
        """
        if shape != self._shape:
            self._shape, self._current = shape, None
            step()
            return
        if self._current is None and self.wanted:
            self._current = self._captured(step)
        if self._current is None:
            step()
        else:
            self._current.replay()

    def forget(self) -> None:
        """Forget the shape of the last step, because its tensors are replaced."""
        self._shape = self._current = None

    def release(self) -> None:
        """Free the memory of the graphs."""
        self.forget()
        self._graphs.release()

    def _captured(self, step: Step) -> Replayable | None:
        """Return a captured step, or None with a warning if it cannot be captured."""
        try:
            graph = self._graphs.capture(step)
        except RuntimeError as error:
            self.wanted = False
            reason = message_line(error)
            warnings.warn(
                f"sampling without CUDA graphs, which takes longer, because a step of this model cannot be captured: "
                f"{reason}; sampler.graph false turns this warning off",
                TrainingWarning,
                stacklevel=2,
            )
            return None
        self.captures += 1
        return graph


class CudaGraphs:
    """Captures CUDA graphs that share the memory for their intermediate results. At most one is replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        # PyTorch's allocator may refer to a graph whose capture could not be ended.
        self._failed: list[Any] = []

    def capture(self, step: Step) -> Replayable:
        """Capture a step, without running it.

        Raises:
            RuntimeError: if the step does what a graph does not allow.
        """
        with torch.cuda.device(self.device):
            return self._capture(step)

    def _capture(self, step: Step) -> Replayable:
        """Do the work of `capture` on the current device."""
        # The last graph is freed below, and must not be running then.
        torch.cuda.current_stream().synchronize()
        # A graph takes memory of its own. In a capture PyTorch does not free what it keeps for later tensors. After an
        # update that can be nearly all memory, and the capture would fail.
        torch.cuda.empty_cache()
        stream = self._stream = self._stream or torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        # The pool of a graph is freed with it, so the last graph is kept until the next one has joined its pool.
        pool = None if self._last is None else self._last.pool()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            try:
                # Other threads, such as those of graders, may use the GPU meanwhile.
                graph.capture_begin(pool, capture_error_mode="thread_local")
                step()
                graph.capture_end()
            except BaseException:
                try:
                    graph.capture_end()  # The stream must not stay in a capture.
                except RuntimeError:
                    self._failed.append(graph)
                raise
        torch.cuda.current_stream().wait_stream(stream)
        self._last = graph
        return graph

    def release(self) -> None:
        """Free the memory, which PyTorch otherwise uses for graphs only. Nothing else may refer to the last graph."""
        if self._last is not None:
            self._last = None
            torch.cuda.empty_cache()
