"""workers.py: work that is shared out. What becomes of its processes is tested in test_decoding.py."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import workers


@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_threads_keep_the_order_of_the_items(count):
    assert workers.map_threads(lambda item: 2 * item, range(count), 3) == [2 * item for item in range(count)]


def test_few_items_are_shared_by_all_threads():
    """Each of three calls waits for the other two."""
    together = threading.Barrier(3, timeout=20)
    assert sorted(workers.map_threads(lambda _: together.wait(), range(3), 3)) == [0, 1, 2]


def test_results_that_nobody_takes_hold_up_further_calls():
    begun = []
    with ThreadPoolExecutor(2) as pool:
        results = workers.as_computed(pool, lambda item: begun.append(item) or item, range(100), most=4)
        taken = [next(results)]
        assert len(begun) <= 4
        taken += results
    assert sorted(taken) == list(range(100))


def test_an_exception_follows_the_results_of_calls_that_ended_with_it():
    with ThreadPoolExecutor(1) as pool:
        hold = threading.Event()
        pool.submit(hold.wait)
        results = workers.as_computed(pool, lambda item: 6 // item, [2, 0, 3], most=3)
        threading.Timer(0.2, hold.set).start()
        taken = []
        with pytest.raises(ZeroDivisionError):
            for value in results:
                taken.append(value)
    assert 3 in taken
