"""The study of which part of synthetic data costs the agent its score."""

import csv
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgd
from host import cli
from studies import links

SMALL = (
    "--env pendulum-medium --preset smoke --num-seeds 2 --horizon 8 --features 8 --fit-steps 20 "
    "--fit-chunk 20 --rounds 2 --updates 5 --hyper.hidden 8 8 --eval-episodes 2"
).split()


def transitions(done, next_obs, reward, obs=0.0):
    """Transitions of one observation and one action."""
    done, next_obs, reward = (jnp.float32(x) for x in (done, next_obs, reward))
    zero = jnp.zeros((done.size, 1))
    return pgd.Transition(zero + obs, zero, reward, done, next_obs[:, None], zero)


MADE = transitions([0, 0, 1, 1], [1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0])
TRUTH = transitions([0, 1, 1, 0], [1.0, 9.0, 9.0, 6.0], [1.0, -1.0, 1.0, -1.0], obs=0.5)


@pytest.mark.parametrize(
    "label, obs, next_obs, reward, done",
    [
        ("synthetic", 0, [1, 2, 3, 4], [0, 0, 0, 0], [0, 0, 1, 1]),
        ("true rewards", 0, [1, 2, 3, 4], [1, -1, 1, -1], [0, 0, 1, 1]),
        ("true next observations", 0, [1, 9, 9, 6], [0, 0, 0, 0], [0, 0, 1, 1]),
        ("true terminals", 0, [1, 2, 3, 6], [0, 0, 0, 0], [0, 1, 1, 0]),  # the last goes on
        ("all three true", 0, [1, 9, 9, 6], [1, -1, 1, -1], [0, 1, 1, 0]),
        ("true observations too", 0.5, [1, 9, 9, 6], [1, -1, 1, -1], [0, 1, 1, 0]),
    ],
)
def test_each_part_is_replaced_and_nothing_else(label, obs, next_obs, reward, done):
    t = links.with_truth(MADE, TRUTH, links.PARTS[label])
    assert t.obs[:, 0].tolist() == [obs] * 4
    assert t.next_obs[:, 0].tolist() == next_obs
    assert t.reward.tolist() == reward and t.done.tolist() == done


def test_errors_of_known_mistakes():
    e = links.errors_of(MADE, TRUTH)
    assert e["obs"] == pytest.approx(0.25)
    assert e["next_obs_mean"] == pytest.approx((0 + 49) / 2)  # of the two that go on
    assert e["reward"] == pytest.approx(1.0)  # as wrong as the mean
    assert (e["terminals"], e["true_terminals"]) == (2, 2)
    assert (e["missed"], e["false"]) == (0.5, 0.5)
    none = transitions([0, 0], [1.0, 2.0], [0.0, 1.0])
    assert links.errors_of(none, none)["missed"] == links.errors_of(none, none)["false"] == 0.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("links") / "run"
    cli.main([*SMALL, "--out", str(out)])
    return out


@pytest.mark.slow
def test_logged_transitions_are_their_own_truth(folder):
    run = cli.load_run(folder)
    t = links.from_log(run, 0, 64)
    e = links.errors_of(t, links.truth_of(run, t))
    assert e["obs"] < 1e-9 and e["next_obs_mean"] < 1e-6
    assert e["reward"] < 1e-6 and e["terminals"] == 0
    shifted = run.session.flags.job
    shifted = dataclasses.replace(shifted, reward_shift=2.0, reward_scale=3.0)
    flags = run.session.flags._replace(job=shifted)
    other = run._replace(session=run.session._replace(flags=flags))
    truth = links.truth_of(other, t)
    np.testing.assert_allclose(truth.reward, (t.reward + 2.0) * 3.0, atol=1e-3)


@pytest.mark.slow
def test_agents_learn_from_the_given_transitions_alone(folder):
    run = cli.load_run(folder)
    data = [links.from_log(run, i, 64) for i in range(2)]
    program = pgd.make_program(
        dataclasses.replace(run.config, real_batch=0, buffer_rounds=1),
        run.session.agent,
        lambda _: links.fixed(data[0]),
    )
    key = pgd.Run(jax.random.key(0))
    state = program.init(key, run.dataset)._replace(model=data[1])
    # rewards of the log that no longer count: the state after a round is the same
    other = run.dataset._replace(steps=run.dataset.steps.at[:, -2].set(7.0))
    one, two = (jax.jit(program.round)(key, state, d)[0] for d in (run.dataset, other))
    jax.tree.map(np.testing.assert_array_equal, one.agent, two.agent)
    jax.tree.map(lambda b, x: np.testing.assert_array_equal(b[0], x), one.buffer, data[1])


@pytest.mark.slow
def test_a_miniature_has_a_row_per_source(folder, tmp_path, capsys, monkeypatch):
    used, train = {}, links.train
    spy = lambda run, data, name: used.update({name: data}) or train(run, data, name)
    monkeypatch.setattr(links, "train", spy)
    links.study([str(folder), "--num", "64", "--updates", "4", "--out", str(tmp_path / "out")])
    with (tmp_path / "out" / "scores.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert [r["trained on"] for r in rows] == [links.LOG, *links.PARTS]
    rewards = {label: np.asarray(data[1].reward) for label, data in used.items()}
    after = {label: np.asarray(data[1].next_obs) for label, data in used.items()}
    same = lambda of, label: np.array_equal(of["synthetic"], of[label])
    assert not same(rewards, "true rewards") and same(after, "true rewards")
    assert same(rewards, "true next observations") and not same(after, "true next observations")
    seen = {label: np.asarray(data[1].obs) for label, data in used.items()}
    assert same(seen, "all three true") and not same(seen, "true observations too")
    assert not same(rewards, "all three true") and not same(after, links.LOG)
    assert [r["updates"] for r in rows] == ["8"] * 7
    with (tmp_path / "out" / "errors.csv").open() as f:
        assert [r["seed"] for r in csv.DictReader(f)] == ["0", "1"]
    assert (tmp_path / "out" / "curves.png").stat().st_size > 5_000
    assert "saved:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, message",
    [
        (["--num", "100"], "--num must be a multiple of 64"),
        (["--updates", "-1"], "--updates positive"),
    ],
)
@pytest.mark.slow
def test_wrong_numbers_are_one_line(folder, tmp_path, more, message, capsys):
    with pytest.raises(SystemExit) as e:
        links.main([str(folder), "--out", str(tmp_path / "out"), *more])
    said = capsys.readouterr().err
    assert e.value.code == 2 and message in said and said.count("\n") == 1


@pytest.mark.slow
def test_runs_that_cannot_be_studied_are_one_line(tmp_path, capsys):
    words = [*SMALL, "--rounds", "1"]
    cli.main([*words, "--synthetic", "none", "--out", str(tmp_path / "none")])
    cli.main([*words, "--sweep", "guidance", "0", "1", "--out", str(tmp_path / "sweep")])
    for name, message in [("none", "has no diffusion model"), ("sweep", "is a sweep")]:
        with pytest.raises(SystemExit):
            links.main([str(tmp_path / name), "--out", str(tmp_path / "out")])
        assert message in capsys.readouterr().err
