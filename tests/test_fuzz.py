"""Generated bad inputs: files, flags and settings give a result or one clear line, never a
traceback, and no file is left half-written.

PGD_FUZZ=1000 tries so many of each kind; the default is 60.
"""

import json
import os
import warnings

import h5py
import numpy as np
import pytest
from conftest import toy_log
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import agents
import data
import pgd
from host import cli, flags, run_folder
from host.errors import UserError
from host.logs import Rules, read_log
from host.minari import check_minari_name
from host.ogbench import names_of

TRIES = int(os.environ.get("PGD_FUZZ", "60"))
often = settings(
    max_examples=TRIES, deadline=10_000, derandomize=TRIES == 60, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def one_line(f, *args):
    """f(*args), or None where it raises a UserError, whose text must be one printable line."""
    try:
        return f(*args)
    except UserError as e:
        assert str(e) and str(e).isprintable()
        return None


# --- Files ---

NAMES = st.sampled_from(
    "observations actions rewards terminals timeouts next_observations obs acts rews dones "
    "episode_starts indices terminal qpos infos".split()
)
NUMBERS = st.sampled_from(
    [np.float32, np.float64, np.float16, np.int64, np.uint8, np.bool_, np.complex64]
)
ROWS = st.sampled_from([0, 1, 7, 40, 41])


@st.composite
def arrays(draw):
    """{name: array} of a log that has gone wrong in up to three ways."""
    log = {k: v for k, v in toy_log(episodes=2, length=20).items()}
    for _ in range(draw(st.integers(0, 3))):
        name = draw(NAMES)
        how = draw(
            st.sampled_from(["drop", "dtype", "shape", "value", "random", "rename", "scale"])
        )
        if name not in log or how == "random":
            tail = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
            kind = draw(NUMBERS)
            log[name] = np.zeros((draw(ROWS), *tail), kind)
            if kind in (np.float32, np.int64):
                log[name] += draw(st.integers(-2, 2))
        elif how == "drop":
            del log[name]
        elif how == "dtype":
            with np.errstate(all="ignore"):
                log[name] = log[name].astype(draw(NUMBERS))
        elif how == "shape":
            x = log[name]
            log[name] = draw(st.sampled_from([x[:-1], x[:, None], x[None], x.ravel(), x[:1]]))
        elif how == "value":
            bad = draw(st.sampled_from([np.nan, np.inf, -1, 2, 0.5, 1e38, 1e300]))
            log[name] = log[name].astype(np.float64)
            log[name].flat[draw(st.integers(0, max(log[name].size - 1, 0))) :][:1] = bad
        elif how == "scale":
            log[name] = log[name].astype(np.float64) * draw(st.sampled_from([0.0, 1e-30, 1e20, -1]))
        else:
            log[draw(NAMES)] = log.pop(name)
    return log


def used(path, rules):
    """A file -> the data set that an agent would be trained on."""
    log = read_log(path, rules)
    returns, _ = data.episode_returns(log)
    assert np.isfinite(returns).all() and all(len(x) == len(log["rewards"]) for x in log.values())
    low, high = data.action_bounds(log["actions"], None, None)
    config = pgd.Config(horizon=4, validation=0.2)
    dataset = pgd.make_dataset(log, config, low, high)
    assert np.isfinite(np.asarray(dataset.steps)).all()
    return dataset


RULES = st.builds(
    Rules, st.sampled_from([None, 1, 20, 1000]), st.booleans(), st.booleans(), st.booleans()
)


@pytest.mark.filterwarnings("ignore")
@often
@given(log=arrays(), rules=RULES, kind=st.sampled_from(["npz", "hdf5"]))
def test_arrays_that_do_not_fit_are_a_log_or_one_line(tmp_path_factory, log, rules, kind):
    path = tmp_path_factory.mktemp("f") / f"log.{kind}"
    if kind == "npz":
        np.savez(path, **log)
    else:
        with h5py.File(path, "w") as f:
            for name, x in log.items():
                f[name] = x
    one_line(used, path, rules)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The bytes of sound files, npz and HDF5."""
    folder = tmp_path_factory.mktemp("sound")
    for kind in ("npz", "hdf5"):
        data.write_log(folder / f"log.{kind}", toy_log(episodes=2, length=20), {"source": "a test"})
    return [(folder / f"log.{kind}").read_bytes() for kind in ("npz", "hdf5")]


@pytest.mark.filterwarnings("ignore")
@often
@given(
    which=st.integers(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=8),
    cut=st.one_of(st.just(1.0), st.floats(0, 1)),
    insert=st.binary(max_size=20),
)
def test_a_damaged_file_is_a_log_or_one_line(tmp_path_factory, sound, which, flips, cut, insert):
    content = bytearray(sound[which][: int(cut * len(sound[which]))])
    for at, change in flips:
        if content:
            content[int(at * (len(content) - 1))] ^= change
    path = tmp_path_factory.mktemp("d") / "log"
    path.write_bytes(bytes(content) + insert)
    one_line(used, path, Rules())
    assert [p.name for p in path.parent.iterdir()] == ["log"]


# --- Flags and names ---

WORDS = st.one_of(
    st.sampled_from([f"--{f.name.replace('_', '-')}" for f in flags.all_flags()]),
    st.sampled_from([f"--hyper.{name}" for name in ("alpha", "lr", "hidden", "expectile", "x")]),
    st.sampled_from("0 1 -1 2 0.5 1e308 nan inf none diffusion hopper td3_bc iql guidance".split()),
    st.sampled_from(agents.names() if hasattr(agents, "names") else ["cql", "edac"]),
    st.text(max_size=6),
)


def started(words):
    """Flags -> the points of their sweep, as far as a run gets before it loads the log."""
    found = flags.parse(words)
    flags.check(found)
    points = flags.sweep_points(found)
    flags.check_agent(found, points)
    return points


@often
@given(words=st.lists(WORDS, max_size=6))
def test_flags_are_taken_or_one_line(words, capsys):
    if {"-h", "--help", "--help-all"} & set(words) or any(
        w and "--help-all".startswith(w) and w.startswith("--h") for w in words
    ):
        return
    points = one_line(started, words)
    assert points is None or (points and all(isinstance(p, dict) for p in points))


@often
@given(prefix=st.sampled_from(["", "d4rl:", "collect:", "minari:", "ogbench:", "x:"]),
       name=st.one_of(st.text(max_size=30), st.from_regex(r"[a-z0-9/-]{1,20}(-v\d)?")))  # fmt: skip
def test_a_name_is_known_or_one_line(prefix, name):
    entry = one_line(data.resolve, prefix + name)
    assert entry is None or bool(entry.name)
    assert one_line(check_minari_name, name) in (None, name)
    found = one_line(names_of, name)
    assert found is None or "singletask" in found.env


# --- Settings of a folder ---

VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda x: st.one_of(
        st.lists(x, max_size=3), st.dictionaries(st.text(max_size=4), x, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def config():
    """The settings of a run, as config.json has them."""
    return json.loads(json.dumps(flags.parse([]).as_dict()))


@often
@given(chosen=st.data())
def test_a_changed_config_is_taken_or_one_line(tmp_path_factory, config, chosen):
    changed = dict(config)
    for _ in range(chosen.draw(st.integers(1, 3))):
        name = chosen.draw(st.sampled_from(sorted(config)))
        changed[name] = chosen.draw(VALUES)
    folder = tmp_path_factory.mktemp("c")
    (folder / "config.json").write_text(json.dumps({"config": changed, "fingerprint": "0" * 16}))

    def reopened():
        saved, _ = run_folder.read_config(folder)
        again = cli.from_saved(saved, folder / "config.json")
        flags.check_agent(again, flags.sweep_points(again))
        return again

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = one_line(reopened)
    assert again is None or all(again.as_dict()[k] is not None for k in ("agent", "seed", "rounds"))


@often
@given(text=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_a_config_of_any_bytes_is_one_line(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("b")
    (folder / "config.json").write_bytes(text)
    assert one_line(run_folder.read_config, folder) is None


@often
@given(x=hnp.arrays(np.float32, (12, 2), elements=st.floats(width=32)))
def test_any_observations_are_standardised_or_one_line(tmp_path_factory, x):
    log = toy_log(episodes=2, length=6) | {"observations": x}
    path = tmp_path_factory.mktemp("o") / "log.npz"
    np.savez(path, **log)
    dataset = one_line(used, path, Rules())
    assert dataset is None or (dataset.obs_dim == 2 and np.all(np.asarray(dataset.std) > 0))
