"""Models of an earlier run: --denoiser DIR."""

import types

import numpy as np
import pytest
from conftest import toy_log
from test_cli import TINY, metrics_of

import data
from host import cli, flags
from host.errors import UserError


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """-> run(name, *flags), which trains in a folder of that name on a toy log."""
    here = tmp_path_factory.mktemp("fitted")
    data.write_log(here / "toy.hdf5", toy_log(episodes=20), {})

    def run(name, *more):
        where = ["--dataset-path", str(here / "toy.hdf5"), "--out", str(here / name)]
        cli.run_here(flags.parse([*where, *TINY, *map(str, more)]))
        return here / name

    run("first", "--num-seeds", 2, "--rounds", 1)
    return run


@pytest.mark.slow
def test_a_run_on_fitted_denoisers_is_the_run_that_fits_them_itself(ran):
    first = ran("whole", "--num-seeds", 2, "--guidance", 4).parent / "first"
    borrowed = ran("borrowed", "--num-seeds", 2, "--guidance", 4, "--denoiser", first)
    assert metrics_of(borrowed) == metrics_of(first.parent / "whole")
    one = ran("one", "--seed", 1, "--guidance", 4, "--denoiser", first)  # the model of its own seed
    rows = [row for row in metrics_of(borrowed) if row["seed"] == 1]
    for row, expected in zip(metrics_of(one), rows, strict=True):
        assert row["log_prob_synthetic"] == pytest.approx(expected["log_prob_synthetic"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more, message",
    [
        (["--horizon", 16], "fitted with --horizon 32, this run has 16"),
        (["--seed", 5], "has no model of seed 5; it has 0, 1"),
        (["--synthetic", "world-model"], "fitted with --synthetic diffusion"),
        (["--fused"], "cannot be combined with --fused"),
    ],
)
def test_models_that_do_not_fit_are_refused(ran, more, message):
    first = ran("again" + more[0], "--rounds", 1, "--num-seeds", 2)
    with pytest.raises(UserError, match=message):
        ran("refused" + more[0], "--denoiser", first, *more)


@pytest.mark.slow
def test_models_of_a_fit_that_is_not_finished_are_refused(ran, monkeypatch):
    """A run that ends after its first chunk of the fit, as one that was killed."""
    monkeypatch.setenv("PGD_SAVE_EVERY", "0")
    chunk = cli.Recorder.chunk

    def stop(self, *args):
        self.folder._save_cost = 0.0
        chunk(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(cli.Recorder, "chunk", stop)
        with pytest.raises(KeyboardInterrupt):
            ran("killed")
    killed = ran("free").parent / "killed"
    assert (killed / "checkpoint" / "state.npz").is_file()
    with pytest.raises(UserError, match="the fit in .*killed is not finished; --resume"):
        ran("on_killed", "--denoiser", killed)


def test_seeds_are_judged_from_starts_of_their_own_and_each_time_anew(monkeypatch):
    seen = []
    judge = lambda copies, act, starts: seen.append(starts) or np.zeros(4)
    monkeypatch.setattr(cli.envs, "evaluate_on_host", judge)
    monkeypatch.setattr(cli.data, "make_envs", lambda *_: None)
    space = types.SimpleNamespace
    layout = space(labels=[{"seed": 3}, {"seed": 4}], num_runs=2)
    session = space(
        layout=layout, dataset=None, agent=None, in_program=None, task=space(simulator="any"),
        flags=space(job=space(eval_episodes=2)),
    )  # fmt: skip
    evaluate = cli.make_evaluate(session)
    for index in (0, 1, 0):
        evaluate(index, None)
    assert len(set(np.concatenate(seen[:2]).tolist())) == 8  # all differ
    np.testing.assert_array_equal(seen[0], seen[2])


def test_returns_of_episodes_by_hand():
    log = {
        "rewards": np.array([1.0, 2.0, 4.0, 8.0, 16.0]),
        "terminals": np.array([0, 1, 0, 0, 0], bool),
        "timeouts": np.array([0, 0, 0, 1, 0], bool),
    }
    returns, lengths = data.episode_returns(log)
    np.testing.assert_array_equal(returns, [3.0, 12.0])
    np.testing.assert_array_equal(lengths, [2, 2])
