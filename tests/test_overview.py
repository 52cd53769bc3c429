"""The figure at the top of the README."""

import numpy as np
import pytest

from host import cli
from studies import links, overview, results
from studies.common import save_table

SMALL = (
    "--env pendulum-random --preset smoke --sample-batch 32 --trajectories 32 --features 8 "
    "--fit-steps 20 --fit-chunk 20 --rounds 2 --updates 100 --hyper.hidden 8 8 --eval-episodes 2"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("overview") / "run"
    cli.main([*SMALL, "--sweep", "guidance", "0", "64", "--out", str(out)])
    return out


def write_curves(out, arms):
    about = {"task": "pendulum-random", "agent": "td3_bc", "weight": 2.5, "seeds": 2}
    lines = [{"arm": arm, "updates": u, "mean": u, "low": u - 1, "high": u + 1}
             for arm in arms for u in (5, 10)]  # fmt: skip
    save_table(out / "curves.csv", [about | line for line in lines])


@pytest.mark.slow
def test_actions_come_closer_to_the_policys_with_the_weight(folder, tmp_path, capsys):
    write_curves(tmp_path, overview.ARMS)
    overview.main(["--run", str(folder), "--num", "256", "--out", str(tmp_path)])
    pairs, far = results.read(tmp_path / "pull.csv"), []
    for weight in overview.WEIGHTS:
        mine = [x for x in pairs if x["weight"] == weight]
        assert len(mine) == 256
        far.append(np.mean([(x["action"] - x["policy"]) ** 2 for x in mine]))
    assert far[0] > 1.2 * far[1] > 3 * far[2], far
    assert (tmp_path / "overview.png").stat().st_size > 10_000
    before = (tmp_path / "pull.csv").read_bytes()
    overview.main(["--out", str(tmp_path)])  # draws alone
    assert (tmp_path / "pull.csv").read_bytes() == before
    assert "saved:" in capsys.readouterr().out


@pytest.mark.slow
def test_the_policy_is_that_of_a_guided_run(folder):
    run = cli.load_run(folder)
    pairs = overview.pull(run, 32)
    labels = run.session.layout.labels
    guided = next(i for i, x in enumerate(labels) if x["guidance"] == 64)
    t = links.make_synthetic(run, 0, 32)  # the same trajectories, for weight 0
    expected = run.session.agent.act(run.agent_state(guided), t.obs)[:: run.config.horizon, 0]
    own = [x["policy"] for x in pairs if x["weight"] == 0.0]
    np.testing.assert_allclose(own, expected, atol=1e-5)
    other = run.session.agent.act(run.agent_state(1 - guided), t.obs)[:: run.config.horizon, 0]
    assert np.abs(other - expected).max() > 1e-3


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda out: None, "has no pull.csv; name a finished row"),
        (lambda out: write_curves(out, ["log alone", "guided"]), "lacks unguided on pendulum"),
    ],
)
def test_what_is_missing_is_one_line(tmp_path, make, message, capsys):
    make(tmp_path)
    if (tmp_path / "curves.csv").exists():
        about = {"task": "pendulum-random", "agent": "td3_bc", "weight": 0.0}
        save_table(tmp_path / "pull.csv", [about | {"policy": 0.0, "action": 0.0}])
    with pytest.raises(SystemExit):
        overview.main(["--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.slow
def test_a_run_without_guidance_is_one_line(tmp_path, capsys):
    cli.main([*SMALL, "--guidance", "0", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        overview.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path)])
    assert "of the diffusion model with guidance" in capsys.readouterr().err
