"""The comparison of optimisers of the denoiser, in miniature."""

import csv

import numpy as np
import pytest

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
    assert "| muon | 60 | 8 |" in capsys.readouterr().out


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
