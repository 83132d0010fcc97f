"""The thread that steps the engine for asyncio callers.

Callers never wait for a step: what they ask for goes into an inbox that the thread empties between steps, and what a step
wrote goes to each caller's event loop in one call.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from pipo.engine.core import Engine
from pipo.engine.request import StreamEvent
from pipo.engine.sequence import Sequence, StepText

LINGER_S = 5.0
"""How long the thread waits for more work: a new one costs its first request a new pool of compute threads."""
IDLE_POLL_S = 0.005
Letter = tuple[int, StreamEvent]
"""The number of the request among its caller's, and what happened."""


@dataclass(eq=False)
class Subscription:
    """One caller's requests, and where their events go, or the error that ended all."""

    requests: list[list[Sequence]]
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Letter | BaseException] = field(default_factory=asyncio.Queue)


class Stepper:
    """Steps `engine` in a thread of its own while there is work. `lock` keeps other users of the engine out meanwhile."""

    def __init__(self, engine: Engine, lock: threading.RLock) -> None:
        self._engine = engine
        self._lock = lock
        self._inbox: deque[Callable[[], None]] = deque()
        self._guard = threading.Condition()  # of _inbox and _thread: a thread that ends and a caller that starts one
        self._thread: threading.Thread | None = None
        self._subscriptions: dict[int, Subscription] = {}
        self._mail: dict[asyncio.AbstractEventLoop, list[tuple[Subscription, Letter]]] = {}

    def submit(self, subscription: Subscription) -> None:
        """Queue the requests, which `Engine.check` must have passed."""
        self._ask(lambda: self._add(subscription))

    def cancel(self, subscription: Subscription) -> None:
        """End what still runs of the requests, before the next step."""
        self._ask(lambda: self._remove(subscription))

    def wait_until_idle(self) -> None:
        """Wait until all that was submitted has ended or was cancelled: a program that exits amid a step crashes."""
        while True:
            with self._lock:
                if not self._inbox and not self._engine.has_work:
                    return
            time.sleep(IDLE_POLL_S)

    def _ask(self, command: Callable[[], None]) -> None:
        with self._guard:
            self._inbox.append(command)
            self._guard.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="pipo-engine", daemon=True)
                self._thread.start()

    def _add(self, subscription: Subscription) -> None:
        self._subscriptions[id(subscription)] = subscription
        running = sum(map(len, subscription.requests))

        def listen(number: int, sequence: Sequence, step: StepText) -> None:
            nonlocal running
            running -= sequence.finished
            if not running:
                self._subscriptions.pop(id(subscription), None)
            self._mail.setdefault(subscription.loop, []).append((subscription, (number, sequence.event(step))))

        for number, samples in enumerate(subscription.requests):
            self._engine.add(samples, partial(listen, number))

    def _remove(self, subscription: Subscription) -> None:
        for samples in subscription.requests:
            self._engine.abort(samples[0].request_id)
        self._subscriptions.pop(id(subscription), None)

    def _work(self) -> None:
        """Until there is nothing to do for a while; a later request starts a new thread."""
        while True:
            with self._lock:
                self._turn()
            self._deliver()
            with self._guard:
                if not self._engine.has_work and not self._guard.wait_for(lambda: self._inbox, LINGER_S):
                    self._thread = None
                    return
            time.sleep(0)  # let others that wait for the lock in

    def _turn(self) -> None:
        try:
            while self._inbox:
                self._inbox.popleft()()
            if self._engine.has_work:
                self._engine.step()
        except Exception as error:  # noqa: BLE001 (handed to every caller that waits)
            failed = list(self._subscriptions.values())
            for subscription in failed:
                self._remove(subscription)
            self._mail.clear()
            for subscription in failed:
                _call(subscription.loop, partial(subscription.queue.put_nowait, error))

    def _deliver(self) -> None:
        mail, self._mail = self._mail, {}
        for loop, letters in mail.items():
            _call(loop, partial(_hand_out, letters))


def _hand_out(letters: list[tuple[Subscription, Letter]]) -> None:
    for subscription, letter in letters:
        subscription.queue.put_nowait(letter)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    """Run `function` on `loop`, unless it is closed: then its callers are gone."""
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:
        if not loop.is_closed():
            raise
