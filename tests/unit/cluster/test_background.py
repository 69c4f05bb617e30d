from __future__ import annotations

import threading

from tunesmith.cluster.background import Background


def test_work_is_done_beside_the_main_thread() -> None:
    seen: list[str] = []
    background = Background("beside", lambda: seen.append(threading.current_thread().name))
    background.start()
    background.join()
    assert (seen, background.failure) == (["beside"], None)


def test_a_failure_is_kept_for_who_waits() -> None:
    background = Background("beside", lambda: 1 / 0)
    background.start()
    background.join()
    assert isinstance(background.failure, ZeroDivisionError)
