"""Off-policy evaluation of studies/ope.py: returns that can be worked out by hand."""

import csv
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, toy_log
from test_cli import TINY

import agents
import data
import pgd
from baselines import world_model
from host import cli, collect, envs, flags
from host.errors import UserError
from studies import claims, ope

SETTINGS = ope.Settings(gamma=0.5, limit=10, guidance=4.0, num=3, updates=1_500)


def dataset_of(log: dict) -> pgd.Dataset:
    return pgd.make_dataset(log, pgd.Config(horizon=8), -np.ones(2), np.ones(2))


def still(dataset) -> ope.Standardised:
    """A policy that never acts."""
    return ope.Standardised(ope.Policy("", lambda _, obs: jnp.zeros((*obs.shape[:-1], 2))), dataset)


def test_quality_of_estimates_by_hand():
    true = np.array([0.0, 4.0, 10.0, 8.0])
    best = ope.quality(true, 2 * true + 1)
    assert best["rank_correlation"] == pytest.approx(1) and best["regret"] == 0
    assert best["error"] == pytest.approx(np.mean([1, 5, 11, 9]) / 10)
    worst = ope.quality(true, -true)
    assert worst["rank_correlation"] == pytest.approx(-1) and worst["regret"] == 1
    third = ope.quality(true, np.array([0.0, 9.0, 8.0, 1.0]))  # ranks 1 4 3 2 of 1 2 4 3
    assert third["rank_correlation"] == pytest.approx(0.4)
    assert third["regret"] == pytest.approx(0.6)
    assert ope.quality(true, np.ones(4))["rank_correlation"] == 0  # says nothing


def test_first_rows_are_the_rows_after_an_end_and_not_the_end_of_the_log():
    log = {"terminals": np.array([0, 1, 0, 0, 0, 0], bool), "rewards": np.zeros(6)}
    log["timeouts"] = np.array([0, 0, 0, 1, 0, 1], bool)
    assert ope.first_rows(log).tolist() == [0, 2, 4]


@pytest.mark.parametrize("ends", [False, True])
def test_fitted_q_evaluation_of_a_constant_reward(ends):
    """Reward 3 in every step: 3 / (1 - gamma) if no episode ends in a terminal, 3 if each step is
    one."""
    log = toy_log()
    log["rewards"][:] = 3.0
    log["terminals"][:] = ends
    if not ends:
        log["timeouts"][39::40] = True
    dataset = dataset_of(log)
    policy = still(dataset).policy
    found = ope.fqe([policy], dataset, dataset.steps[:5, :3], 2, SETTINGS)
    assert found.shape == (1, 2)
    np.testing.assert_allclose(found, 3.0 if ends else 6.0, rtol=0.03)


def test_fitted_q_evaluation_tells_policies_apart():
    """Reward -|a|^2, without noise or effect: zero is worth 0, and (1, 1) is worth -2 a step."""
    log = toy_log()
    log["rewards"] = -(log["actions"] ** 2).sum(-1)
    dataset = dataset_of(log)
    full = ope.Policy("", lambda _, obs: jnp.ones((*obs.shape[:-1], 2)))
    found = ope.fqe([still(dataset).policy, full], dataset, dataset.steps[:5, :3], 1, SETTINGS)
    assert found[0, 0] > -0.7 and found[1, 0] < -2.5


def test_fitted_q_evaluation_looks_as_far_ahead_as_gamma_asks():
    """Reward 1 in every step, gamma 0.9: nearly 10 after 1,000 updates, and not the first part."""
    log = toy_log()
    log["rewards"][:] = 1.0
    log["terminals"][:], log["timeouts"][39::40] = False, True
    dataset, s = dataset_of(log), SETTINGS._replace(gamma=0.9, updates=1_000)
    found = ope.fqe([still(dataset).policy], dataset, dataset.steps[:5, :3], 1, s)
    np.testing.assert_allclose(found, 10.0, rtol=0.1)


@pytest.mark.parametrize("far", [1e6, -1e6])
def test_fitted_q_evaluation_stays_within_what_rewards_can_sum_up_to(far):
    """A bootstrap of a million is worth no more than the log's largest reward in every step, and
    one of minus a million no less than its smallest."""
    log = toy_log()
    log["rewards"] = np.random.default_rng(0).uniform(-1, 2, len(log["rewards"]))
    dataset, key = dataset_of(log), jax.random.key(0)
    state = ope.init_fqe(key, dataset)
    layers = [*state.critic[:-1], (state.critic[-1][0], state.critic[-1][1] + far)]
    state = state._replace(target=layers)
    after = ope.fqe_chunk(key, state, still(dataset), dataset, 0, SETTINGS)
    q = agents.critics(after.critic, dataset.steps[:50, :3], jnp.zeros((50, 2)))
    q *= ope.value_scale(dataset, SETTINGS)
    assert -2.5 < float(jnp.min(q)) and float(jnp.max(q)) < 4.5  # -1 / (1 - 0.5), 2 / (1 - 0.5)


def test_windows_are_laid_end_to_end_until_the_limit_or_a_terminal(monkeypatch):
    """A stand-in for the denoiser: the first observation counts steps, and is the reward too."""
    log = toy_log()
    dataset = dataset_of(log)._replace(mean=jnp.zeros(7).at[-1].set(0.1), std=jnp.ones(7))

    def counting(key, model, dataset, config, terms, start, rule):
        ((weight, score),) = terms
        assert weight == 4.0
        count = start[:, :1] + jnp.arange(config.horizon)  # (B, T)
        x = jnp.zeros((*count.shape, 7)).at[..., 0].set(count).at[..., -2].set(count)
        return x.at[..., -1].set((count >= model).astype(jnp.float32))  # a terminal from there on

    monkeypatch.setattr(pgd, "sample", counting)
    starts = jnp.array([[0.0, 0, 0], [2.0, 0, 0]])
    args = jax.random.key(0), still(dataset)
    config = types.SimpleNamespace(horizon=4)  # three transitions: 10 steps are no multiple
    for end, last in [(1e9, (9, 11)), (5.0, (5, 5)), (6.0, (6, 6))]:
        found = ope.with_diffusion(*args, end, dataset, starts, config, None, SETTINGS)
        expected = [sum(c * 0.5 ** (c - b) for c in range(b, e + 1)) for b, e in zip((0, 2), last)]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_score_that_guides_is_highest_at_the_policys_action():
    dataset = dataset_of(toy_log())
    policy = ope.Standardised(
        ope.Policy("", lambda w, obs: jnp.tanh(obs @ w), jnp.full((3, 2), 0.3)), dataset
    )
    obs = jnp.array([[0.5, -1.0, 2.0]])
    action = jnp.tanh((obs * dataset.std[:3] + dataset.mean[:3]) @ policy.policy.params)
    np.testing.assert_allclose(policy.act(obs), action, rtol=1e-4)
    gradient = jax.grad(lambda a: policy.log_prob(obs, a).sum())
    np.testing.assert_allclose(gradient(action), 0.0, atol=1e-5)
    np.testing.assert_allclose(gradient(action + 0.25), -0.25, rtol=1e-4)  # of unit variance


def test_world_model_rollouts_count_discount_and_terminals(monkeypatch):
    def counting(elites, obs, action, dataset, scale):
        zero = jnp.zeros((2, len(obs)))
        done = zero + (obs[:, 0] >= elites)
        next_obs = jnp.broadcast_to(obs.at[:, 0].add(1.0), (2, *obs.shape))
        return world_model.Prediction(next_obs, zero + obs[:, 0], 0 * next_obs, zero, done)

    monkeypatch.setattr(world_model, "elites_of", lambda model, config: model)
    monkeypatch.setattr(world_model, "target_scale", lambda dataset: None)
    monkeypatch.setattr(world_model, "predict_with", counting)
    dataset = dataset_of(toy_log())
    dataset = dataset._replace(steps=dataset.steps.at[0].set(100.0))  # the log's range
    config = types.SimpleNamespace(elites=2)
    starts = jnp.array([[0.0, 0, 0], [2.0, 0, 0]])
    for end, last in [(1e9, (9, 11)), (5.0, (5, 5))]:
        args = jax.random.key(0), still(dataset), end, dataset, starts, config, None, SETTINGS
        expected = [sum(c * 0.5 ** (c - b) for c in range(b, e + 1)) for b, e in zip((0, 2), last)]
        np.testing.assert_allclose(ope.with_world_model(*args), expected, rtol=1e-5)


def test_true_returns_are_those_of_an_evaluation():
    act = lambda _, obs: -0.5 * obs[..., 2:]
    s = SETTINGS._replace(gamma=1.0, limit=10_000)
    found = ope.true_returns("pendulum", ope.Policy("", act), s)
    expected = envs.evaluate_on_host(envs.make_envs("pendulum", 3), lambda o: act(None, o), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    short = ope.true_returns("pendulum", ope.Policy("", act), s._replace(limit=1))
    assert (short > found + 1).all() and (short < 0).all()


@pytest.mark.slow
def test_the_command_ranks_run_folders_and_saves_every_estimate(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.write_log("toy.hdf5", toy_log(episodes=20), {})
    where = ["--dataset-path", "toy.hdf5", *TINY]
    for name in "ab":
        few = ["--synthetic", "none", "--seed", str(ord(name)), "--updates", "4"]
        cli.run_here(flags.parse([*where, *few, "--out", name]))
    words = "--num-seeds 2 --num 4 --updates 500 --limit 9 --out ope --policies a b".split()
    fit = "--fit-steps 20 --fit-chunk 20 --features 8 --groups 4".split()
    fit += "--model-steps 50 --model-chunk 50 --model-hidden 8".split()
    ope.study(["toy.hdf5", *words, "--", *fit])
    assert "saved: ope/ (ope.csv)" in capsys.readouterr().out  # nobody knows the true returns
    rows = list(csv.DictReader(open("ope/ope.csv")))
    assert {(r["policy"], r["method"], r["seed"]) for r in rows} == {
        (p, m, s)
        for p in ("a, seed 97", "b, seed 98")
        for m in ("diffusion", "world-model", "fqe")
        for s in "01"
    }
    assert np.isfinite([float(r["estimate"]) for r in rows]).all()
    session = claims.load_run("ope/diffusion")[0]
    for method in ("diffusion", "world-model", "fqe"):
        assert len({r["estimate"] for r in rows if r["method"] == method}) == 4
    for bad, message in [
        (["a", str(collect.POLICIES / "pendulum-expert.npz")], "other observations or actions"),
        (["a", str(collect.POLICIES / "hopper-expert.npz")], "other observations or actions"),
        (["a", "nothing.npz"], "there is no policy nothing.npz"),
        (["a", "toy.hdf5"], "toy.hdf5"),
        (["a", "ope"], "ope has no checkpoint"),
        (["a"], "fewer than two policies"),
    ]:
        with pytest.raises(UserError, match=message):
            ope.load_policies(bad, session)


@pytest.mark.parametrize(
    "words, message",
    [
        ("pendulum-medium --gamma 1", "--gamma"),
        ("pendulum-medium --guidance -1", "--guidance"),
        ("pendulum-medium --updates 7", "multiple of 500"),
        ("pendulum-medium --num 0", "--num"),
        ("pendulum-medium hopper-medium", "one task"),
    ],
)
def test_flags_that_cannot_work_are_refused_in_one_line(words, message):
    with pytest.raises(UserError, match=message):
        ope.study(words.split())


@pytest.mark.parametrize("task", ["pendulum", "hopper", "halfcheetah"])
def test_the_page_has_the_estimates_and_the_qualities_of_the_csv(task):
    page = (ROOT / "docs" / "ope.md").read_text().replace("**", "")
    rows = list(csv.DictReader(open(ROOT / "results" / "ope" / f"{task}.csv")))
    names = list(dict.fromkeys(r["policy"] for r in rows))
    true = {r["policy"]: float(r["true_return"]) for r in rows}
    cells = {name: [f"{true[name]:.1f}"] for name in names}
    for method in ("diffusion", "world-model", "fqe"):
        of = [r for r in rows if r["method"] == method]
        x = np.array([[float(r["estimate"]) for r in of if r["policy"] == n] for n in names])
        for name, estimates in zip(names, x):
            cells[name].append(ope.spread_of(estimates))
        truth = np.array([true[n] for n in names])
        q = [ope.quality(truth, estimates) for estimates in x.T]
        rank, regret, error = (ope.spread_of([row[k] for row in q], 2) for k in q[0])
        regret = "0" if regret.startswith("0.00 (0.00") else regret
        assert f"| {rank} | {regret} | {error} |" in page
    for name in names:
        assert f"| {' | '.join(cells[name])} |" in page


def test_the_page_has_the_qualities_without_the_policies_that_the_log_has_not():
    page = " ".join((ROOT / "docs" / "ope.md").read_text().split())

    def qualities(rows, method):
        q = []
        for seed in sorted({r["seed"] for r in rows}):
            of = [r for r in rows if r["seed"] == seed and r["method"] == method]
            numbers = ([float(r[k]) for r in of] for k in ("true_return", "estimate"))
            q.append(ope.quality(*map(np.array, numbers)))
        return ([row[key] for row in q] for key in ("rank_correlation", "error"))

    read = lambda task: list(csv.DictReader(open(ROOT / "results" / "ope" / f"{task}.csv")))
    hopper = [r for r in read("hopper") if r["policy"].startswith("hopper")]
    rows = read("halfcheetah")
    far = ("halfcheetah-expert", "td3bc-halfcheetah, seed 0")
    near = [r for r in rows if r["policy"] not in far]
    for method, name in (
        ("diffusion", "diffusion"),
        ("world-model", "world model"),
        ("fqe", "FQE"),
    ):
        for values in qualities(hopper, method):
            assert ope.spread_of(values, 2) in page
        rank, error = map(np.mean, qualities(near, method))
        assert rank == pytest.approx(1) and f"{error:.2f} ({name})" in page
    for policy, text in zip(far, ("0.34, 0.61 and 0.40", "0.08, 2.0 and 2.6")):
        for method, share in zip(
            ("diffusion", "world-model", "fqe"), text.replace(" and", ",").split(", ")
        ):
            of = [r for r in rows if (r["policy"], r["method"]) == (policy, method)]
            found = np.mean([float(r["estimate"]) for r in of]) / float(of[0]["true_return"])
            assert found == pytest.approx(float(share), abs=0.051 if found > 1 else 0.0051)
        assert text in page
