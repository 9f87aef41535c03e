"""One thread that does the model's work, a job at a time, so that the event loop never waits.

A job is an iterator made and run in the thread. It yields at least once a token: an event for its
reader, or None. Events go into the reader's unbounded queue: a slow reader does not stop the
thread, and the events of a text are bounded by its tokens. A job whose reader has left ends at its
next yield.
This file knows neither models nor HTTP.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, suppress
from typing import Any

# jobs whose answers are unread, for each place in the queue
UNREAD = 4
# seconds to wait for the thread at the end of the process
LONGEST_TOKEN = 60


class QueueFullError(Exception):
    """No place is free; `seconds`: when to ask again."""

    def __init__(self, seconds: int) -> None:
        super().__init__("too many requests wait")
        self.seconds = seconds


class StoppingError(Exception):
    """The server is about to end."""


class ReaderLeftError(Exception):
    """Nobody reads the answer any more."""


class _End:
    """The last item of a job's queue."""


class Job:
    """A piece of work and its events."""

    def __init__(self, worker: "Worker", work: Callable[[], Iterator[Any]]) -> None:
        self._worker, self._work = worker, work
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        self.is_wanted = True

    async def events(self) -> AsyncIterator[Any]:
        """Yield the events; raise what the work raised, and ReaderLeftError after `leave`."""
        while (item := await self._items.get()) is not _End:
            if isinstance(item, Exception):
                raise item
            yield item

    def leave(self) -> None:
        """End the job within a token, or take it out of the queue. For the event loop's thread."""
        self.is_wanted = False
        self._worker.forget(self)
        self._items.put_nowait(ReaderLeftError())

    def run(self) -> None:
        """Do the work; for the worker's thread."""
        try:
            with closing(self._work()) as events:  # type: ignore[type-var]
                for event in events:
                    if not self.is_wanted:
                        return
                    if event is not None:
                        self.put(event)
        except Exception as error:
            # whatever it is, it belongs to the request, and the thread goes on
            self.put(error)
        else:
            self.put(_End)

    def put(self, item: Any) -> None:
        """Give an item to the reader, from any thread."""
        # the loop may be closed already
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)


class Worker:
    """The thread and its bounded queue."""

    def __init__(self, most_waiting: int) -> None:
        self._most = most_waiting
        self._waiting: deque[Job] = deque()
        self._open = 0  # jobs that wait, run or are being read
        self._seconds = 1.0  # a job's, on average
        self._is_stopping = self._is_ended = False
        self._running: Job | None = None
        self._change = threading.Condition()
        # a daemon: it must not keep a process alive that ends for another reason
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], Iterator[Any]]) -> Job:
        """Queue some work; call `done` when its answer is read or its reader has left.

        Raises QueueFullError and StoppingError. For the event loop's thread.
        """
        job = Job(self, work)
        with self._change:
            if self._is_stopping:
                raise StoppingError
            if len(self._waiting) >= self._most or self._open >= UNREAD * self._most + 1:
                raise QueueFullError(max(1, min(60, round(self._seconds * len(self._waiting)))))
            self._waiting.append(job)
            self._open += 1
            self._change.notify()
        return job

    def done(self) -> None:
        """Free the place of a job whose answer needs no memory any more."""
        with self._change:
            self._open -= 1

    def forget(self, job: Job) -> None:
        """Take a job out of the queue, if it waits there."""
        with self._change, suppress(ValueError):
            self._waiting.remove(job)

    def stop(self) -> None:
        """Refuse new jobs and those that wait; the one that runs goes on. From any thread."""
        with self._change:
            self._is_stopping = True
            waiting, self._waiting = self._waiting, deque()
        for job in waiting:
            job.put(StoppingError())

    def end(self) -> None:
        """End the running job within a token, then the thread; for the end of the process.

        A thread that is inside torch while Python ends would abort the process.
        """
        self.stop()
        with self._change:
            self._is_ended = True
            if self._running is not None:
                self._running.is_wanted = False
            self._change.notify()
        self._thread.join(LONGEST_TOKEN)

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._waiting:
                    if self._is_ended:
                        return
                    self._change.wait()
                job = self._running = self._waiting.popleft()
            begin = time.monotonic()
            job.run()
            self._running = None
            # without it the last job, and its events, would live until the next one
            del job
            self._seconds += 0.2 * (time.monotonic() - begin - self._seconds)
