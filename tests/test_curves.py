"""The comparison of learning curves."""

import csv

import pytest

from host.errors import UserError
from studies import curves


def write(folder, scores: dict[int, dict[int, float]]):
    """{updates: {seed: score}} -> a run's folder with such metrics."""
    folder.mkdir()
    lines = [f"{u},{seed},{x}" for u, of in scores.items() for seed, x in of.items()]
    (folder / "metrics.csv").write_text("\n".join(["updates,seed,score", *lines]) + "\n")
    return folder


def test_the_table_has_the_second_half_and_pairs_the_seeds(tmp_path, capsys):
    one = write(tmp_path / "a", {100: {0: 50, 1: 50}, 200: {0: 10, 1: 30}, 300: {0: 20, 1: 40}})
    of_two = {100: {0: 0, 1: 0}, 200: {0: 15, 1: 35}, 300: {1: 45, 0: 25}, 400: {0: 9, 1: 9}}
    two = write(tmp_path / "b", of_two)
    out = tmp_path / "out"
    curves.study([f"log alone={one}", f"guided={two}", "--out", str(out)])
    with (out / "curves.csv").open() as f:
        first, second = csv.DictReader(f)
    # 100, 200 and 300 are common, the last two late: means 15 and 35 of the seeds, then 20 and 40
    assert first["score"].startswith("25.0 (") and first["above the first"] == ""
    assert second["score"].startswith("30.0 (") and second["updates"] == "300"
    assert second["above the first"] == "+5.0 (+5.0 to +5.0)"  # the same in both seeds
    assert (out / "curves.png").stat().st_size > 5_000
    assert "| guided | 2 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "scores, message",
    [
        ({300: {0: 1.0}}, "b has other seeds than the first run"),
        ({100: {0: 1.0, 1: 2.0}}, "no number of updates in common"),
        ({300: {0: 1.0, 1: ""}}, "has rounds without a score"),
    ],
)
def test_runs_that_cannot_be_compared_are_one_line(scores, message, tmp_path):
    one, two = write(tmp_path / "a", {300: {0: 1, 1: 2}}), write(tmp_path / "b", scores)
    with pytest.raises(UserError, match=message):
        curves.study([f"a={one}", f"b={two}", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_wrong_words_are_one_line(tmp_path):
    run = write(tmp_path / "a", {300: {0: 1, 1: 2}})
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / "metrics.csv").write_text("updates,seed,guidance,score\n1,0,0,1\n1,0,4,1\n")
    for words, message in [
        ([str(run)], "each run needs a label of its own"),
        ([f"a={run}", f"a={run}"], "each run needs a label of its own"),
        ([f"a={tmp_path}/none"], "has no metrics.csv"),
        ([f"a={sweep}"], "is a sweep"),
    ]:
        with pytest.raises(UserError, match=message):
            curves.study([*words, "--out", str(tmp_path / "out")])
