"""How studies/speed.py times: in turn, and with ratios the right way round."""

import time

from studies import speed


def test_calls_are_timed_in_turn_after_one_call_of_each():
    called = []
    fs = [lambda: called.append("a"), lambda: called.append("b")]
    times = speed.alternately(fs, repeats=3)
    assert called == ["a", "b"] + ["a", "b"] * 3
    assert [len(t.seconds) for t in times] == [3, 3]


def test_a_ratio_above_1_means_that_ours_is_faster():
    fast, slow = lambda: time.sleep(0.001), lambda: time.sleep(0.05)
    row = speed.compared("a nap", fast, "a longer one", slow, repeats=3, per=2)
    assert row["ratio"] > 5
    assert row["plain_ms"] >= 25  # half of 50 ms, since each call makes two pieces
    assert row["ms_min"] <= row["ms"] <= row["ms_max"]
