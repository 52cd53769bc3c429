"""The campaign of faults in miniature, and that it can fail."""

import json

import pytest

from studies import faults


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return faults.Bench(tmp_path_factory.mktemp("faults"), seed=1)


@pytest.mark.slow
def test_a_miniature_of_the_campaign(bench):
    assert list(faults.kills(bench, 1, aimed=True)).count("wrong") == 0
    assert list(faults.full_disks(bench, 1)) == ["same"]
    assert set(faults.damages(bench, 1)) <= {"same", "refused"}


@pytest.mark.slow
def test_the_campaign_sees_a_number_that_differs(bench):
    out = bench.folder / "run1"  # that nothing happened to
    assert faults.content(out) == bench.wanted
    final = json.loads((out / "final.json").read_text())
    final["returns"][0] += 1e-6
    (out / "final.json").write_text(json.dumps(final))
    assert faults.content(out) != bench.wanted
    for name, damage in [("metrics.csv", b"x"), ("checkpoint/.state.npz.1.part", b"")]:
        before = faults.content(out)
        path = out / name
        path.write_bytes((path.read_bytes() if path.exists() else b"") + damage)
        assert faults.content(out) != before
    state = out / "checkpoint" / "state.npz"
    before = faults.content(out)
    with faults.np.load(state) as f:
        arrays = {name: f[name] for name in f.files}
    arrays["mean"] = arrays["mean"] + 1e-6
    faults.np.savez(state, **arrays)
    assert faults.content(out) != before
