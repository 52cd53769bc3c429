"""The measures of studies/claims.py on trajectories with a known truth, and its command line."""

import csv
import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, toy_log

import agents
import pgd
from host import collect, run_folder
from studies import claims, results

LINEAR = claims.Judge(lambda obs, action: 0.5 * obs + action, "a line")
STD = np.array([1.0, 2.0])


def true_sample(n=6, length=10, seed=0):
    """Trajectories of x' = x / 2 + a."""
    rng = np.random.default_rng(seed)
    x, action, obs = rng.normal(size=(n, 2)), rng.normal(size=(n, length, 2)), []
    for t in range(length):
        obs.append(x)
        x = 0.5 * x + action[:, t]
    obs = np.stack([*obs, x], axis=1)
    zero = np.zeros((n, length))
    return claims.Sample(
        obs[:, :-1], action, zero, obs[:, 1:], *np.ones((2, n, length), bool), zero, zero
    )


def test_the_simulators_own_trajectories_have_no_error():
    s = true_sample()
    assert claims.dynamics_error(s, LINEAR, STD).max() < 1e-20
    assert claims.drift(s, LINEAR, STD).max() < 1e-20


def test_error_and_drift_of_a_known_mistake_in_variances_of_each_observation():
    s = true_sample()
    next_obs = s.next_obs.copy()
    next_obs[:, 3] += [1.0, 4.0]  # one wrong step: the next one sets out from the true state again
    wrong = s._replace(next_obs=next_obs)
    error, drift = (f(wrong, LINEAR, STD) for f in (claims.dynamics_error, claims.drift))
    expected = np.zeros((6, 10))
    expected[:, 3] = (1.0**2 + 2.0**2) / 2
    np.testing.assert_allclose(error, expected, atol=1e-12)
    np.testing.assert_allclose(drift, expected, atol=1e-12)
    # a model that adds 1 to the first observation in every step: its drift goes to (1 / 0.5)^2
    x, obs = s.obs[:, 0], []
    for t in range(10):
        obs.append(x)
        x = 0.5 * x + s.action[:, t] + [1.0, 0.0]
    obs = np.stack([*obs, x], axis=1)
    biased = s._replace(obs=obs[:, :-1], next_obs=obs[:, 1:])
    np.testing.assert_allclose(claims.dynamics_error(biased, LINEAR, STD), 0.5, atol=1e-12)
    gap = 2.0 * (1.0 - 0.5 ** np.arange(1, 11))
    np.testing.assert_allclose(
        claims.drift(biased, LINEAR, STD), np.tile(gap**2 / 2, (6, 1)), atol=1e-12
    )


def test_noise_in_a_log_is_an_error_of_known_size(dataset):
    """x' = x / 2 + a turns noise of variance v into v / 4, and next_obs has its own v."""
    judge = claims.Judge(lambda obs, action: 0.5 * obs + action.sum(-1, keepdims=True), "a line")
    for row in claims.amplification(dataset, judge):
        assert row["error"] == pytest.approx(1.25 * row["noise"] ** 2, rel=0.05)


def test_nothing_is_judged_after_a_terminal():
    s = true_sample()
    valid = s.valid.copy()
    valid[2, 4:] = False
    broken = s._replace(valid=valid, next_obs=s.next_obs + 9.0 * ~valid[..., None])
    for f in (claims.dynamics_error, claims.drift):
        error = f(broken, LINEAR, STD)
        assert np.isnan(error[2, 4:]).all() and np.nanmax(error) < 1e-20


@pytest.fixture(scope="module")
def dataset():
    return pgd.make_dataset(toy_log(), pgd.Config(horizon=8, fit_batch=8, batch_size=8))


def test_the_log_itself_is_possible_near_and_of_its_own_distribution(dataset):
    ref, s = claims.make_reference(dataset), claims.real_sample(dataset, 200, 7)
    log = claims.coverage(s, ref, dataset)
    assert log["impossible"] == 0.0 and log["marginal"] < 0.2 and log["nearest"] < 0.5
    wide = ref.high - ref.low
    edge = lambda share: np.broadcast_to(
        (ref.high + share * claims.MARGIN * wide) * ref.std + ref.mean, s.obs.shape
    )
    for share, impossible in ((0.95, 0.0), (1.05, 1.0)):
        there = claims.coverage(s._replace(obs=edge(share)), ref, dataset)
        assert there["impossible"] == impossible
    far = claims.coverage(s._replace(obs=s.obs + 1.5 * wide * ref.std), ref, dataset)
    assert far["nearest"] > 3 * log["nearest"]
    np.testing.assert_allclose(far["marginal"], 1.5 * wide.mean(), rtol=0.1)


def test_distance_to_the_nearest_leaves_the_row_itself_out():
    log = np.array([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0]])
    near = claims.nearest(np.array([[0.0, 0.0], [3.0, 5.0]]), log)
    np.testing.assert_allclose(near, [5.0, 1.0], rtol=1e-5)


def test_every_seed_has_its_own_model_and_policy():
    states = {"w": jnp.arange(3.0)}
    assert claims.Model("diffusion", None, states, False).of(2) == {"w": 2.0}
    assert claims.Model("diffusion", None, states, True).of(2) is states
    assert claims.Target("t", None, states).of(1) == {"w": 1.0}


def gaussian_target(name, mean, std):
    """The same Gaussian in every state, two seeds."""
    agent = agents.bc(hidden=(4,))
    state = agent.init(jax.random.key(0), 3, 2)
    layers = [(0 * w, 0 * b) for w, b in state.actor["mean"]]
    layers[-1] = (layers[-1][0], jnp.full(2, np.arctanh(mean)))
    state = state._replace(actor={"mean": layers, "log_std": jnp.full(2, np.log(std))})
    return claims.Target(name, agent, jax.tree.map(lambda x: jnp.stack([x, x]), state))


def test_distance_of_policies_is_that_of_their_gaussians(dataset):
    clone = gaussian_target("clone", 0.1, 0.1)
    other = gaussian_target("other", 0.4, 0.2)
    assert claims.distance(clone, clone, 0, dataset) == 0.0
    expected = np.hypot(0.4 - 0.1, 0.2 - 0.1)
    np.testing.assert_allclose(claims.distance(other, clone, 1, dataset), expected, rtol=0.1)


def test_shipped_policies_act_alike_on_standardised_observations():
    policy = collect.Policy.load(collect.POLICIES / "pendulum-medium.npz")
    dataset = pgd.make_dataset(toy_log(obs_dim=3, act_dim=1), pgd.Config(horizon=8))
    obs = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    mean, std = (np.asarray(x[:3]) for x in (dataset.mean, dataset.std))
    actor = claims.standardise_inputs(policy.layers, dataset)
    state = agents.SACState(actor, *[None] * 6)
    made = agents.sac_n().act(state, (obs - mean) / std)
    np.testing.assert_allclose(made, policy(obs, None), atol=1e-5)


@pytest.mark.slow
def test_stages_of_an_agent_are_those_of_one_training(dataset):
    agent = agents.bc(hidden=(8,))
    early, late = claims.train("bc", agent, dataset, 2, [250, 500])
    (alone,) = claims.train("bc", agent, dataset, 1, [250])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x[0], y[0], atol=1e-4), early.actor, alone.actor
    )
    t = dataset.sample(jax.random.key(0), 500)
    likelihood = [float(agent.log_prob(jax.tree.map(lambda x: x[1], s), t.obs, t.action).mean())
                  for s in (early, late)]  # fmt: skip
    assert likelihood[0] < likelihood[1]


TOY = (
    "--fit-steps 200 --fit-chunk 100 --features 16 --blocks 1 --sample-steps 6 --horizon 8 "
    "--model-steps 200 --model-chunk 100 --model-hidden 16 --model-layers 2"
).split()
FEW = "--num-seeds 2 --num 16 --updates 250 --weights 0 4 64 --paper-weights 0.05".split()


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    out = tmp_path_factory.mktemp("analysis")
    command = [sys.executable, "-m", "studies.claims", "pendulum-medium", *FEW]
    done = subprocess.run(
        [*command, "--out", str(out), "--", *TOY], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.slow
def test_what_was_fitted_is_kept_for_the_same_command(analysed, monkeypatch):
    monkeypatch.setattr(claims.cli, "run_here", lambda given: pytest.fail("fitted again"))
    folders = claims.make_runs("pendulum-medium", analysed[0], 2, TOY)
    assert folders == [str(analysed[0] / "diffusion"), str(analysed[0] / "world-model")]


def rows_of(path):
    with open(path) as f:
        return list(csv.DictReader(f))


@pytest.mark.slow
def test_a_task_name_gives_every_table_and_figure(analysed):
    out, said = analysed
    names = {p.name for p in out.iterdir() if p.is_file()}
    both = ("likelihood", "dynamics", "coverage", "trajectories")
    assert names == {f"{n}.{kind}" for n in both for kind in ("csv", "png")} | {
        "tradeoff.png", "amplification.csv", "world_model.csv"
    }  # fmt: skip
    targets = {"clone", "clone + noise 0.2", "clone + noise 0.5", "td3_bc 250", "iql 250",
               "shipped early1", "shipped expert"}  # fmt: skip
    rows = rows_of(out / "likelihood.csv")
    assert {r["target"] for r in rows} == targets | {""} and len(rows) == 1 + 7 * 2 * (3 + 1 + 1)
    assert all(name in said for name in targets) and "saved:" in said
    assert len(rows_of(out / "dynamics.csv")) == 7 * (len(rows) - 1)
    assert {r["model"] for r in rows_of(out / "coverage.csv")} == {
        "log",
        "diffusion",
        "paper",
        "world-model",
    }
    assert {r["seed"] for r in rows if r["target"]} == {"0", "1"}
    for r in rows:
        same = r["log_prob_target"] == r["log_prob_behaviour"]
        assert same == (r["target"] in ("clone", "")), r
    away = [next(float(r["distance"]) for r in rows if r["target"] == name)
            for name in ("clone", "clone + noise 0.2", "clone + noise 0.5")]  # fmt: skip
    assert away[0] == 0.0 < away[1] < away[2]
    assert float(next(r["error"] for r in rows if r["model"] == "log")) < 1e-8
    held_out = rows_of(out / "world_model.csv")
    assert len(held_out) == 2 * 3 and all(float(r["error"]) < 0.5 for r in held_out)


@pytest.mark.slow
def test_guidance_makes_actions_likelier_under_the_target(analysed):
    """The first claim, at toy size and with the strongest weight: for every policy and seed."""
    rows = rows_of(analysed[0] / "likelihood.csv")
    pick = lambda r, w: [
        float(x["log_prob_target"]) for x in rows
        if x["model"] == "diffusion" and float(x["weight"]) == w
        and (x["target"], x["seed"]) == (r["target"], r["seed"])
    ][0]  # fmt: skip
    for r in rows[1:]:
        assert min(pick(r, 4.0), pick(r, 64.0)) > pick(r, 0.0)
        assert pick(r, 64.0) > pick(r, 4.0) - 0.02  # the models are of toy size
        by_paper = [float(x["log_prob_target"]) for x in rows if x["model"] == "paper"
                    and (x["target"], x["seed"]) == (r["target"], r["seed"])]  # fmt: skip
        assert by_paper[0] > pick(r, 4.0)  # 0.05 would hardly move them as an exponent


@pytest.mark.slow
def test_finished_runs_are_judged_again_with_another_sampler(analysed, tmp_path, capsys):
    out, _ = analysed
    run = str(out / "diffusion")
    claims.main([run, "--out", str(tmp_path), *FEW, "--", "--sample-steps", "3"])
    said = capsys.readouterr().out
    assert "clone" in said and not (tmp_path / "config.json").exists()
    errors = [
        [r["error"] for r in rows_of(folder / "likelihood.csv") if r["model"] == "diffusion"]
        for folder in (out, tmp_path)
    ]
    assert len(errors[0]) == len(errors[1]) and errors[0] != errors[1]


def measured(model, weight, likelihood, error, seed=0):
    """A row of the table of likelihoods."""
    about = {"target": "t", "distance": 1.0, "model": model, "weight": weight, "seed": seed}
    about |= {"log_prob_target": likelihood, "log_prob_behaviour": 0.0 - likelihood}
    return about | {"error": error, "error_median": error}


def test_the_papers_rule_is_compared_at_the_same_likelihood():
    """The guide's error is 10^likelihood between its weights."""
    levels = (0.0, -2.0), (4.0, 0.0), (64.0, 1.0)
    guide = [measured("diffusion", w, x, 10.0**x) for w, x in levels]
    guide += [measured("diffusion", w, x, 1.0, seed=1) for w, x in levels]
    paper = [measured("paper", 0.25, -1.0, 0.3), measured("paper", 1.0, 0.5, 2 * 10.0**0.5)]
    beyond = [measured("paper", 2.0, 1.5, 1.0), measured("paper", 1.0, -1.0, 9.0, seed=1)]
    found = claims.against_paper([*guide, *paper, *beyond])
    assert found["t", 0.25] == pytest.approx([3.0]) and found["t", 1.0] == pytest.approx([2.0, 9.0])
    assert found["t", 2.0] == []


def test_the_tables_have_a_line_per_target_and_every_weight():
    rows = [measured("diffusion", w, x, 10.0**x, seed) for w, x in ((0.0, -2.0), (4.0, 0.0))
            for seed in (0, 1)]  # fmt: skip
    rows += [measured("paper", 0.25, -1.0, 0.3, seed) for seed in (0, 1)]
    rows += [measured("world-model", 0.0, 0.0, 0.5, seed) for seed in (0, 1)]
    head, _, line = claims.likelihood_table(rows).splitlines()
    assert head.count("λ") == 4 and line == "| t | 1.00 | -2.00 | 0.00 | 2.00 | 0.00 |"
    head, _, line = claims.error_table(rows).splitlines()
    assert "paper's rule at 0.25" in head and line == "| t | 0.01 | 1 | 0.5 | 3 |"
    changed = claims.changes(rows, "log_prob_behaviour", "t", 4.0)
    assert [r["log_prob_behaviour"] for r in changed] == [-2.0, -2.0]


def mistake(capsys, *args) -> str:
    """Run the program with a mistake -> its only line."""
    with pytest.raises(SystemExit) as e:
        claims.main(args)
    said = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and said[-1].startswith("studies.claims: ")
    assert "Traceback" not in "".join(said)
    return said[-1]


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "required"),
        (["pendulum-medum"], "pendulum-medium"),
        ([""], "no name"),
        (["nowhere", "elsewhere"], "there is no run in nowhere"),
        (["nowhere", "--seeds", "2"], "--seeds"),
        (["nowhere", "--weights", "1", "nan"], "--weights"),
        (["nowhere", "--weights", "0"], "--weights"),
        (["nowhere", "--paper-weights", "0"], "--paper-weights"),
        (["nowhere", "--updates", "300"], "multiples of 250"),
        (["nowhere", "--num", "0"], "at least 1"),
        (["pendulum-medium", "--", "--guidance-sine", "1"], "no flag --guidance-sine"),
    ],
)
def test_mistakes_end_in_one_line(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in mistake(capsys, *args) and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "args, message",
    [
        (["nowhere", "{run}"], "there is no run in nowhere"),
        (["{run}", "{run}"], "one run of each kind"),
        (["{out}"], "did you mean"),
        (["{run}", "--", "--features", "32"], "--features cannot be changed"),
        (["{run}", "--", "--guidance", "3"], "--guidance cannot be changed"),
        (["{run}", "--", "--sample-steps", "1"], "--sample-steps must be at least 2"),
        (["{world}", "--", "--s-churn", "0"], "no sampler"),
        (["pendulum-medium", "--out", "{out}", "--num-seeds", "3"], "another --num-seeds"),
        (["reacher-medium", "--out", "{out}", "--num-seeds", "2"], "another --env"),
        (["{run}", "--weights", "1", "nan"], "--weights"),
        (["{run}", "--weights", "0"], "--weights"),
        (["{run}", "--updates", "300"], "multiples of 250"),
        (["{run}", "--num", "0"], "at least 1"),
    ],
)
def test_mistakes_about_runs_end_in_one_line(
    analysed, args, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = analysed[0]
    paths = {"run": folder / "diffusion", "world": folder / "world-model", "out": folder}
    assert message in mistake(capsys, *(a.format(**paths) for a in args))
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_with_status_130(capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(claims, "make_runs", interrupt)
    with pytest.raises(SystemExit) as e:
        claims.main(["pendulum-medium"])
    assert e.value.code == 130 and "interrupted" in capsys.readouterr().err


@pytest.mark.slow
def test_where_no_simulator_can_judge_a_model_does_and_says_so(capsys, monkeypatch):
    config = claims.world_model.Config(model_steps=200, model_chunk=100, patience=1)
    monkeypatch.setattr(
        claims.world_model, "Config", lambda **settings: dataclasses.replace(config, **settings)
    )
    task = type("Task", (), {"simulator": None, "name": "toy"})
    dataset = pgd.make_dataset(toy_log(episodes=40), pgd.Config(horizon=8))
    judge = claims.make_judge(claims.cli.Session(None, task, dataset, *[None] * 7))
    assert "warning" in capsys.readouterr().err and judge.name == "an independent model"
    s = claims.real_sample(dataset, 32, 7)
    std = np.asarray(dataset.std[:3])
    assert np.nanmedian(claims.dynamics_error(s, judge, std)) < 0.1
    off = s._replace(next_obs=s.next_obs + 3 * std)
    assert np.nanmedian(claims.dynamics_error(off, judge, std)) > 5.0


RENDER = (
    "from host import envs; "
    "frames = envs.render('hopper', envs.make_envs('hopper', 3).reset(0), size=32); "
    "assert frames.shape == (3, 32, 32, 3) and frames.std() > 5.0, frames.std()"
)


@pytest.mark.slow
def test_a_body_is_rendered_where_it_can_be():
    environment = {"MUJOCO_GL": "egl"} | {k: v for k, v in os.environ.items() if k != "DISPLAY"}
    ask = [sys.executable, "-c", RENDER]
    done = subprocess.run(ask, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode and "AssertionError" not in done.stderr:
        pytest.skip("this machine cannot render without a display")
    assert done.returncode == 0, done.stderr


def test_intervals_of_errors_are_of_ratios():
    rows = [{"error": e, "distance": e} for e in (0.01, 1.0)]
    assert claims.band(rows, "error")[0] == pytest.approx(0.1)
    assert claims.band(rows, "distance")[0] == pytest.approx(0.505)
    low, high = run_folder.interval([np.log(0.01), np.log(1.0)])[1]
    assert claims.band(rows, "error")[1:] == pytest.approx((np.exp(low), np.exp(high)))


@pytest.mark.parametrize("task", ["halfcheetah-medium", "pendulum-medium", "reacher-medium"])
def test_the_page_of_claims_has_the_tables_of_the_runs(task):
    rows = results.read(ROOT / "results" / "analysis" / task / "likelihood.csv")
    page = (ROOT / "docs" / "claims.md").read_text()
    assert claims.likelihood_table(rows) in page
    assert claims.error_table(rows) in page
