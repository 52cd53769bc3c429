"""Cost against size: the exponents, and that nothing but the log grows with the log."""

import jax
import pytest
from conftest import ROOT

import pgd
from studies import results, sizes
from studies.speed import random_log, stages


def test_the_exponent_of_a_power_is_found():
    rows = [{"size": s, "ms": 3.0 * s**1.7} for s in (8, 16, 64)]
    assert sizes.exponent(rows, "ms") == pytest.approx(1.7)


def test_the_table_has_a_line_per_stage():
    row = {"axis": "features", "what": "fit", "memory_mb": 5.0, "ms_min": 1.0, "ms_max": 9.0}
    rows = [row | {"size": n, "ms": 2.0 * n, "without_log_mb": 3.0 + n} for n in (1, 4, 8)]
    line = sizes.table(rows).splitlines()[2]
    assert line == "| features of the denoiser | 1, 8 | fit | 2 | 16 | 1.00 | 4 | 11 |"


@pytest.mark.slow
def test_nothing_but_the_log_grows_with_the_log():
    def memory(num):
        config = sizes.config_of(sizes.BASE | {"features": 8})
        dataset = pgd.make_dataset(random_log(num), config)
        own = sum(x.nbytes for x in jax.tree.leaves(dataset))
        found = []
        for _, f, args in stages(config, dataset)[:3]:
            m = jax.jit(f, keep_unused=True).lower(*args).compile().memory_analysis()
            found.append(m.temp_size_in_bytes + m.argument_size_in_bytes - own)
        return found

    few, many = memory(2_000), memory(64_000)
    for small, large in zip(few, many, strict=True):
        assert abs(large - small) < 4_000  # bytes; the log itself grows by 7,000,000


@pytest.mark.slow
def test_the_study_runs(tmp_path, capsys):
    sizes.main(["--only", "steps", "--most", "8", "--repeats", "1", "--out", str(tmp_path)])
    assert (tmp_path / "sizes.png").exists()
    assert len((tmp_path / "sizes.csv").read_text().splitlines()) == 1 + 3
    assert "| steps of a trajectory | 8, 8 | guided sampling" in capsys.readouterr().out


def test_the_page_of_speed_has_the_table_of_the_run():
    rows = results.read(ROOT / "results" / "sizes" / "sizes.csv")
    for row in rows:
        row["size"] = int(row["size"])
    assert sizes.table(rows) in (ROOT / "docs" / "speed.md").read_text()
