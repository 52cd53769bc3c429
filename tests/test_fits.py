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
    fits.main(["pendulum-medium", "--steps", "20", "60", "--out", str(tmp_path), "--", *SMALL])
    assert pgd.make_optimiser is before
    with open(tmp_path / "pendulum-medium.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["optimiser"], r["steps"]) for r in rows] == [
        (name, steps) for name in fits.OPTIMISERS for steps in ("20", "60")
    ]
    loss = {(r["optimiser"], r["steps"]): float(r["held_out_loss"]) for r in rows}
    assert all(loss[name, "60"] < loss[name, "20"] for name in fits.OPTIMISERS)
    assert len(set(loss.values())) == 6  # each was used
    assert all(np.isfinite(float(r["error_mean"])) for r in rows)
    assert "| muon | 60 |" in capsys.readouterr().out


def test_steps_that_are_no_chunks_are_one_line(capsys):
    with pytest.raises(SystemExit) as e:
        fits.main(["pendulum-medium", "--steps", "50", "--", *SMALL])
    assert e.value.code == 2
    assert "--steps must be multiples of --fit-chunk 20" in capsys.readouterr().err
