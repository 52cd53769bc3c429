"""How studies/speed.py times: in turn, and with ratios the right way round."""

from studies import speed


def test_calls_are_timed_in_turn_after_one_call_of_each():
    called = []
    fs = [lambda: called.append("a"), lambda: called.append("b")]
    times = speed.alternately(fs, repeats=3)
    assert called == ["a", "b"] + ["a", "b"] * 3
    assert [len(t.seconds) for t in times] == [3, 3]


def test_a_ratio_above_1_means_that_ours_is_faster(monkeypatch):
    times = [speed.Times([0.1, 0.2, 0.3]), speed.Times([0.8, 0.6, 1.0])]
    monkeypatch.setattr(speed, "alternately", lambda fs, repeats: times)
    row = speed.compared("ours", None, "another way", None, repeats=3, per=2)
    assert row == {
        "what": "ours", "ms": 100.0, "ms_min": 50.0, "ms_max": 150.0, "plain": "another way",
        "plain_ms": 400.0, "plain_ms_min": 300.0, "plain_ms_max": 500.0, "ratio": 4.0,
    }  # fmt: skip
