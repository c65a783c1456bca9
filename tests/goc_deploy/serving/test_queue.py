from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from goc_deploy.errors import NotReadyError, OverloadedError
from goc_deploy.serving.alarms import Alarms
from goc_deploy.serving.queue import BatchQueue, Ticket


def ticket(key: str, images: int = 1, most: int = 4) -> Ticket:
    """A ticket whose plan is only looked at for the size of batches."""
    plan: Any = SimpleNamespace(batch_images=most)
    request: Any = None
    return Ticket(request, "id", plan, images, key, None, None)


def test_batches_are_compatible_in_order_and_no_larger_than_allowed() -> None:
    queue = BatchQueue(100, 0.0)
    tickets = [ticket("ab"[i % 2], images) for i, images in enumerate([1, 1, 2, 1, 2, 9, 1])]
    for one in tickets:
        queue.put(one, 1.0)
    assert queue.images == 17
    taken = [queue.take() for _ in range(4)]
    assert [[tickets.index(one) for one in batch] for batch in taken] == [
        [0, 2],
        [1, 3],
        [4, 6],
        [5],
    ]
    assert queue.images == 0


def test_a_full_batch_does_not_wait_and_another_waits_for_the_delay() -> None:
    queue = BatchQueue(100, 0.3)
    for _ in range(4):
        queue.put(ticket("a"), 1.0)
    started = time.monotonic()
    assert len(queue.take()) == 4
    assert time.monotonic() - started < 0.2
    queue.put(ticket("a"), 1.0)
    assert len(queue.take()) == 1
    assert time.monotonic() - started > 0.25
    queue.hurry()
    queue.put(ticket("a"), 1.0)
    started = time.monotonic()
    assert len(queue.take()) == 1
    assert time.monotonic() - started < 0.2


def test_two_workers_take_two_batches_that_become_due_together() -> None:
    queue, taken = BatchQueue(100, 0.1), []
    workers = [threading.Thread(target=lambda: taken.append(queue.take())) for _ in range(2)]
    for worker in workers:
        worker.start()
    queue.put(ticket("a"), 1.0)
    queue.put(ticket("b"), 1.0)
    for worker in workers:
        worker.join(10)
    assert sorted(batch[0].compatible for batch in taken) == ["a", "b"]


def test_the_queue_is_bounded_and_a_ticket_that_ended_makes_room() -> None:
    queue, first = BatchQueue(3, 0.0), ticket("a", 2)
    queue.put(first, 1.0)
    with pytest.raises(OverloadedError, match="2 images wait already and the queue takes 3") as no:
        queue.put(ticket("a", 2), 7.0)
    assert no.value.retry_after == 7.0
    queue.discard(first)
    queue.discard(first)
    queue.put(ticket("a", 3), 1.0)
    assert queue.images == 3


def test_closing_wakes_workers_and_returns_what_waits() -> None:
    queue, taken = BatchQueue(3, 60.0), []
    worker = threading.Thread(target=lambda: taken.append(queue.take()))
    worker.start()
    waiting = ticket("a")
    queue.put(waiting, 1.0)
    assert queue.close() == [waiting]
    worker.join(10)
    assert taken == [[]]
    with pytest.raises(NotReadyError, match="closed"):
        queue.put(ticket("a"), 1.0)


def test_alarms_ring_in_the_order_of_their_times_unless_they_are_forgotten() -> None:
    alarms, rung, done = Alarms(), [], threading.Event()
    now = time.monotonic()
    alarms.at(now + 0.2, done.set)
    alarms.at(now + 0.1, lambda: rung.append("second"))
    alarms.at(now + 0.05, lambda: rung.append("first"))
    forget = alarms.at(now + 0.15, lambda: rung.append("forgotten"))
    forget()
    forget()
    assert done.wait(10)
    alarms.at(time.monotonic() + 60, lambda: rung.append("never"))
    alarms.close()
    assert rung == ["first", "second"]
