"""The comparison of optimisers of the denoiser, in miniature."""

import csv

import numpy as np
import pytest
from conftest import toy_log

import pgd
from studies import fits

SMALL = "--preset smoke --fit-chunk 20 --horizon 8 --sample-steps 4".split()


@pytest.mark.slow
def test_a_miniature_has_a_row_per_optimiser_and_number_of_steps(tmp_path, capsys):
    before = pgd.make_optimiser
    fits.main(["pendulum-medium", "--steps", "20", "60x8", "--out", str(tmp_path), "--", *SMALL])
    assert pgd.make_optimiser is before
    with open(tmp_path / "pendulum-medium.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["optimiser"], r["steps"], r["batch"]) for r in rows] == [
        (name, *length) for name in fits.OPTIMISERS for length in (("20", "16"), ("60", "8"))
    ]
    loss = {(r["optimiser"], r["steps"]): float(r["held_out_loss"]) for r in rows}
    assert all(loss[name, "60"] < loss[name, "20"] for name in fits.OPTIMISERS)
    assert len(set(loss.values())) == 6  # each was used
    assert all(np.isfinite(float(r["error_mean"])) for r in rows)
    assert all(0.0 < float(r["obs_error"]) < 1.0 for r in rows)
    assert all(0.2 < float(r["spread"]) < 2.0 for r in rows)
    slopes = {r["action_slope"] for r in rows}
    assert all(-2.0 < float(x) < 2.0 for x in slopes)
    assert len(slopes) == 6 and all(np.isfinite(float(x)) for x in slopes)
    assert "| muon | 60 | 8 |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_clone_and_the_slope_say_how_much_actions_depend_on_states():
    """A policy 0.5 s with noise: its clone has a slope of 1, actions half as steep one of 0.5, and
    actions of other states one of 0."""
    log, rng = toy_log(episodes=200), np.random.default_rng(0)
    noise = 0.2 * rng.normal(size=log["actions"].shape)
    log["actions"] = 0.5 * np.tanh(log["observations"][:, :2]) + noise
    dataset = pgd.make_dataset(log, pgd.Config(horizon=4))
    t = dataset.transitions(dataset.val_rows)
    act = fits.make_clone(dataset, 1_000)
    assert fits.slope(act, t.obs, t.action) == pytest.approx(1.0, abs=0.1)
    assert fits.slope(act, t.obs, 3.0 + act(t.obs) / 2) == pytest.approx(0.5, abs=1e-3)
    assert fits.slope(act, t.obs, rng.permutation(t.action)) == pytest.approx(0.0, abs=0.1)


@pytest.mark.parametrize(
    "word, message",
    [("50", "--steps must be multiples of --fit-chunk 20"),
     ("20x0", "--steps needs words such as 5000 or 5000x16, not 20x0")],
)  # fmt: skip
def test_wrong_steps_are_one_line(word, message, capsys):
    with pytest.raises(SystemExit) as e:
        fits.main(["pendulum-medium", "--steps", word, "--", *SMALL])
    said = capsys.readouterr().err
    assert e.value.code == 2 and message in said and said.count("\n") == 1
