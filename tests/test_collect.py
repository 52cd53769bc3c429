"""Recipes, collected logs, behaviour policies and their training."""

import h5py
import jax
import numpy as np
import pytest
from conftest import ROOT, data_command

import data
from host import collect, envs
from host.errors import UserError


def test_recipes_lay_policies_end_to_end():
    shipped = {f"hopper-{p}" for p in ("early1", "early2", "medium", "expert")}
    shipped.add("walker2d-medium")
    recipe = lambda *a: collect.make_recipe(*a, shipped)
    assert recipe("hopper", "random").parts == (("hopper-random", 1_000_000),)
    assert recipe("hopper", "medium-expert") == collect.Recipe(
        "hopper-medium-expert",
        "hopper",
        (("hopper-medium", 1_000_000), ("hopper-expert", 1_000_000)),
    )
    assert recipe("hopper", "medium-expert").steps == 2_000_000
    replay = recipe("hopper", "medium-replay").parts
    assert [p for p, _ in replay] == [
        "hopper-random", "hopper-early1", "hopper-early2", "hopper-medium"
    ]  # fmt: skip
    assert {n for _, n in replay} == {100_000}
    assert recipe("walker2d", "medium-expert") is None  # no expert is shipped
    assert recipe("walker2d", "medium-replay") is None  # and no early snapshot
    assert recipe("hopper", "human") is None


def test_every_shipped_policy_is_read_and_serves_some_log():
    recipes = [e.recipe for e in data.registry().values() if e.recipe]
    used = {name for recipe in recipes for name, _ in recipe.parts}
    act_dim, obs = {}, {}
    for simulator in (*envs.GYMNAX, *envs.BODIES):
        copies = envs.make_envs(simulator, 2)
        act_dim[simulator], obs[simulator] = copies.low.size, copies.reset(0)
    for path in (ROOT / "policies").glob("*.npz"):
        policy = collect.Policy.load(path)
        simulator = path.stem.rsplit("-", 1)[0]
        action = policy(obs[simulator], np.random.default_rng(0))
        assert action.shape == (2, act_dim[simulator]) and np.abs(action).max() <= 1.0
        assert policy.meta["task"] == simulator and path.stem in used


def test_a_mixture_is_collected_in_its_parts_and_cached(monkeypatch):
    recipe = data.resolve("pendulum-medium-expert").recipe
    path, provenance = collect.collected(recipe, steps=2400)
    log = data.read_log(path)
    returns, lengths = data.episode_returns(log)
    assert set(lengths) == {200} and len(returns) == 12
    assert returns[:6].mean() < -400 < -300 < returns[6:].mean()  # medium first, then expert
    assert "pendulum-medium.npz" in provenance and "pendulum-expert.npz" in provenance
    monkeypatch.setattr(envs, "collect_in_program", None)  # the second call finds the file
    again = data.read_log(collect.collected(recipe, steps=2400)[0])
    np.testing.assert_array_equal(log["observations"], again["observations"])
    assert collect.collected_path(recipe, 2400) == path
    assert path.name.startswith("collect-pendulum-medium-expert-2400-0-")


def test_a_part_that_is_cut_inside_an_episode_ends_by_a_timeout():
    recipe = data.resolve("pendulum-medium-expert").recipe
    log = data.read_log(collect.collected(recipe, steps=500)[0])
    assert log["timeouts"].nonzero()[0].tolist() == [199, 249, 449, 499]


def test_a_collected_mujoco_log_replays_exactly_from_its_file():
    path, _ = collect.collected(data.resolve("halfcheetah-random").recipe, steps=3000)
    log = data.read_log(path)
    task = data.Task("t", log, None, None, "", "collect", "halfcheetah", None, path)
    error, what = data.replay_error(task)
    assert what == "infos/qpos and infos/qvel" and error.max() == 0.0 and len(error) == 1000
    blind = data.Task("t", log, None, None, "", "collect", "halfcheetah", None, None)
    error, what = data.replay_error(blind)
    assert what == "observations" and np.median(error) < 1e-9


def test_a_policy_file_holds_arrays_only_and_acts_like_the_agent(tmp_path):
    import agents

    agent = agents.sac_n(num_critics=2, hidden=(8, 8))
    state = agent.init(jax.random.key(0), 3, 2)
    policy = collect.Policy([tuple(map(np.asarray, layer)) for layer in state.actor], {"task": "t"})
    policy.save(tmp_path / "p.npz")
    loaded = collect.Policy.load(tmp_path / "p.npz")
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    np.testing.assert_allclose(loaded(obs, None), agent.act(state, obs), atol=1e-5)
    assert loaded.meta == {"task": "t"}
    draws = jax.vmap(loaded.sample, in_axes=(0, None))(
        jax.random.split(jax.random.key(0), 4000), obs[0]
    )
    theirs = loaded(np.tile(obs[0], (4000, 1)), np.random.default_rng(0))
    np.testing.assert_allclose(draws.mean(0), theirs.mean(0), atol=0.05)
    np.testing.assert_allclose(draws.std(0), theirs.std(0), atol=0.03)


@pytest.mark.slow
def test_training_a_policy_keeps_a_snapshot_for_every_evaluation(tmp_path):
    settings = collect.PolicyTraining(
        "pendulum", tmp_path, max_steps=480, num_envs=4, hidden=(8, 8), updates_per_step=0.5,
        start_steps=120, eval_every=160,
    )  # fmt: skip
    data.train_policy_command(settings)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["pendulum-160.npz", "pendulum-320.npz", "pendulum-480.npz"]
    first, last = (collect.Policy.load(tmp_path / name) for name in (names[0], names[-1]))
    assert last.meta["env_steps"] == 480 and "--hidden 8 8" in last.meta["command"]
    assert np.abs(first.layers[0][0] - last.layers[0][0]).max() > 1e-4
    with pytest.raises(UserError, match="already holds policies of pendulum"):
        data.train_policy_command(settings)
    with pytest.raises(UserError, match="there is no simulator"):
        data.train_policy_command(collect.PolicyTraining("pendulumm", tmp_path))


def test_a_collected_log_goes_out_as_a_file_with_its_states_and_as_minari(
    tmp_path, capsys, monkeypatch
):
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    ask = ["collect", "hopper-random", "--steps", 2000, "--out"]
    data_command(capsys, monkeypatch, *ask, tmp_path / "a.hdf5")
    data_command(capsys, monkeypatch, *ask, "minari:hopper/random-v0")
    log, same = data.read_log(tmp_path / "a.hdf5"), data.load("minari:hopper/random-v0").log
    for key in log:
        np.testing.assert_array_equal(log[key], same[key])
    assert log["terminals"].sum() > 20
    with h5py.File(tmp_path / "a.hdf5") as f:
        assert f["infos/qpos"].shape == (2000, 6) and f["infos/qpos"].dtype == np.float64
