"""The study of the critics: agreement, and values and orders of actions against true returns."""

import csv

import jax
import numpy as np
import pytest

from host import cli, run_folder
from host.errors import UserError
from studies import critics

SMALL = (
    "--env pendulum-medium --preset smoke --synthetic none --num-seeds 2 --rounds 1 --updates 50 "
    "--hyper.hidden 16 16 --eval-episodes 2 --reward-shift 3 --reward-scale 0.5"
).split()


def test_true_values_of_a_chain_have_a_closed_form_and_stop_at_a_terminal():
    judge = lambda obs, action: (obs / 2 + action, obs[:, 0], obs[:, 0] < -5.0)
    obs, action = np.array([[1.0], [2.0], [-6.0]]), np.array([[0.0], [4.0], [9.0]])
    found = critics.true_values(judge, lambda obs: 0.0 * obs, obs, action, 0.5, 40)
    first = lambda s, a: s + 0.5 * (s / 2 + a) / (1 - 0.25)  # the state halves, and so does gamma
    np.testing.assert_allclose(found, [first(1, 0), first(2, 4), -6.0], rtol=1e-6)


def test_order_is_the_rank_correlation_within_a_state():
    truth = np.array([[1.0, 2.0, 3.0], [30.0, 20.0, 10.0]])
    assert critics.order(np.exp(truth / 10), truth) == pytest.approx(1.0)
    assert critics.order(-truth, truth) == pytest.approx(-1.0)
    assert critics.order(np.array([[1, 2, 3], [1, 2, 3]]), truth) == pytest.approx(0.0)
    assert critics.order(np.zeros((2, 3)), truth) == 0.0


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("critics") / "run"
    cli.main([*SMALL, "--out", str(out)])
    return out


def by_hand(obs, torque, act, gamma, steps):
    """Discounted rewards 0.5 * (r + 3) of the pendulum from its equations of motion, in numpy."""
    angle, speed, total = np.arctan2(obs[:, 1], obs[:, 0]), obs[:, 2], 0.0
    for t in range(steps):
        torque = np.clip(torque, -2.0, 2.0)
        turned = (angle + np.pi) % (2 * np.pi) - np.pi
        total = total + gamma**t * 0.5 * (3 - turned**2 - 0.1 * speed**2 - 0.001 * torque**2)
        speed = np.clip(speed + 0.05 * (15.0 * np.sin(angle) + 3.0 * torque), -8.0, 8.0)
        angle = angle + 0.05 * speed
        torque = act(np.stack([np.cos(angle), np.sin(angle), speed], axis=1))[:, 0]
    return total


@pytest.mark.slow
def test_values_of_a_run_are_those_of_the_simulator_under_its_own_policy(run_dir, monkeypatch):
    monkeypatch.setattr(critics, "STEPS", 20)
    run = critics.load(str(run_dir))
    rows = critics.against_truth("run", run)
    assert [row["seed"] for row in rows] == [0, 1]
    batch = run.dataset.sample(jax.random.key(0), critics.STATES)
    obs = np.asarray(batch.obs) * run.dataset.std[:3] + run.dataset.mean[:3]
    for i, row in enumerate(rows):
        act = run_folder.load_policy(str(run_dir), seed=i)
        truth = by_hand(np.asarray(obs), act(obs)[:, 0], act, 0.99, 20)
        assert row["true_value"] == pytest.approx(truth.mean(), rel=1e-3)
        own = run.session.agent.act(run.agent_state(i), batch.obs)
        twins = critics.agents.critics(run.agent_state(i).critic, batch.obs, own)
        assert row["value"] == pytest.approx(float(twins.min(axis=0).mean()), rel=1e-5)
        assert -1.0 <= row["order"] <= 1.0


@pytest.mark.slow
def test_the_program_saves_both_tables(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(critics, "STEPS", 2)
    critics.study([str(run_dir), "--out", str(tmp_path)])
    assert capsys.readouterr().out.endswith(f"saved: {tmp_path}/ (critics.csv, values.csv)\n")
    agreement = list(csv.DictReader((tmp_path / "critics.csv").open()))
    assert [row["actions"] for row in agreement] == ["log", "own", "uniform"]
    assert all(float(row["q_std"]) > 0 for row in agreement)
    assert len(list(csv.DictReader((tmp_path / "values.csv").open()))) == 2


def test_an_agent_without_critics_is_refused_in_one_line(tmp_path):
    flags = [*SMALL, "--agent", "bc", "--num-seeds", "1", "--updates", "2"]
    cli.main([*flags, "--out", str(tmp_path / "bc")])
    with pytest.raises(UserError, match="bc has no critics"):
        critics.study([str(tmp_path / "bc")])
