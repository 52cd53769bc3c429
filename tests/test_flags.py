"""Flags: what --help shows, what is parsed, and mistakes, which are one line and status 2."""

import dataclasses
import re

import pytest
from conftest import ROOT, toy_log

import agents
import data
import pgd
from baselines import world_model
from host import cli, flags
from host.errors import UserError

TINY = (
    "--features 16 --blocks 1 --fit-steps 40 --fit-chunk 10 --fit-batch 16 --sample-steps 4 "
    "--rounds 3 --updates 10 --trajectories 16 --sample-batch 16 --eval-episodes 2 "
    "--model-steps 60 --model-chunk 10 --members 3 --elites 2 --model-hidden 16"
).split()


@pytest.fixture(scope="module")
def toy_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("logs") / "toy.hdf5"
    data.write_log(path, toy_log(episodes=20), {})
    return path


@pytest.fixture
def offline(monkeypatch):
    refuse = lambda *a, **k: (_ for _ in ()).throw(OSError("no network in tests"))
    monkeypatch.setattr("urllib.request.urlopen", refuse)


def mistake(capsys, args) -> str:
    """Arguments that are a mistake -> the one line on standard error, without its first word."""
    with pytest.raises(SystemExit) as e, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.Recorder, "restore", lambda *_: pytest.fail("the run began"))
        cli.main([str(x) for x in args])
    said = capsys.readouterr()
    assert e.value.code == 2, said.err
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("pgd.py: ")
    return said.err[len("pgd.py: ") :]


def parsed(*words) -> flags.Flags:
    return flags.parse([str(x) for x in words])


# --- Help ---


def help_lines(capsys, flag: str) -> list[str]:
    with pytest.raises(SystemExit) as e:
        cli.main([flag])
    assert not e.value.code
    return capsys.readouterr().out.splitlines()


def test_help_is_at_most_100_lines_of_110_columns(capsys):
    lines = help_lines(capsys, "--help")
    assert len(lines) <= 100 and max(map(len, lines)) <= 110
    for flag in (
        "--env",
        "--seed",
        "--guidance",
        "--sweep",
        "--out",
        "--hyper.alpha",
        "--num-hosts",
    ):
        assert any(line.split()[:1] == [flag] for line in lines), flag


def test_every_setting_has_its_own_help_line(capsys):
    """With its whole comment from the source, and its default."""
    lines = help_lines(capsys, "--help-all")
    assert max(map(len, lines)) <= 110
    shown = {line.split()[0]: line for line in lines if line.startswith("  --")}
    for cls in (flags.Job, pgd.Config, world_model.Config):
        source = (ROOT / f"{cls.__module__.replace('.', '/')}.py").read_text()
        for name in cls.__annotations__:
            comment = re.search(rf"^    {name}: (?:.*\(\n)?.*?  # (.*)$", source, re.M)[1]
            assert comment in shown[f"--{name.replace('_', '-')}"], name
    for name, hyper in agents.hyperparameters("td3_bc").items():
        assert hyper.help in shown[f"--hyper.{name.replace('_', '-')}"], name
    names = {f.name for cls in (flags.Job, world_model.Config) for f in dataclasses.fields(cls)}
    assert {flag.name for flag in flags.all_flags()} == names
    assert "(default 0)" in shown["--seed"] and "default auto" in shown["--precision"]


def test_help_shows_the_hyperparameters_of_the_agent_named_before_it():
    assert "--hyper.expectile" in flags.help_text("iql")
    assert "--hyper.expectile" not in flags.help_text("td3_bc")


# --- Parsing ---


def test_a_flag_takes_dashes_underscores_or_an_equals_sign():
    for words in (["--fit-steps", 7], ["--fit_steps", 7], ["--fit-steps=7"], ["--fit_steps=7"]):
        assert parsed(*words).config.fit_steps == 7
    assert parsed("--hyper.policy-noise", 0.5).hyper["policy_noise"] == 0.5
    assert parsed("--hyper.policy_noise=0.5").hyper["policy_noise"] == 0.5
    assert parsed("--fused").job.fused and not parsed("--fused", "--no-fused").job.fused


def test_numbers_may_be_negative_and_have_an_exponent():
    given = parsed("--sweep", "guidance", -1, 1, "-2e-3", "eta", 0.5)
    points = flags.sweep_points(given)
    assert [p["guidance"] for p in points] == [-1.0, 1.0, -0.002]
    assert all(p["eta"] == 0.5 for p in points)
    assert parsed("--guidance", "-1e-3").config.guidance == -0.001
    assert parsed("--p-mean=-1").config.p_mean == -1.0


def test_a_list_of_widths_is_a_tuple_of_integers():
    assert parsed("--hyper.hidden", 64, 64).hyper["hidden"] == (64, 64)
    assert parsed("--hyper.hidden=32").hyper["hidden"] == (32,)
    assert parsed().hyper["hidden"] == (256, 256)


@pytest.mark.parametrize(
    "args, features, horizon",
    [
        ([], 64, 4),
        (["--env", "swimmer-medium"], 64, 4),
        (["--env", "Pendulum-medium"], 64, 4),
        (["--env", "collect:pendulum-medium"], 64, 4),
        (["--env", "pendulum-medium", "--dataset-path", "x.hdf5"], 64, 4),
        (["--dataset-path", "x.hdf5"], 256, 32),
        (["--env", "halfcheetah-medium"], 256, 32),
        (["--env", "halfcheetah-medium", "--preset", "laptop"], 128, 32),
        (["--env", "halfcheetah-medium", "--preset", "paper"], 1024, 32),
        (["--env", "halfcheetah-medium", "--features", "32", "--horizon", "8"], 32, 8),
    ],
)
def test_the_default_preset_is_sized_by_the_task(args, features, horizon):
    config = flags.parse(args).config
    assert (config.features, config.horizon) == (features, horizon)


@pytest.mark.parametrize(
    "name", ["halfcheetah-medium", "HalfCheetah-medium-v2", " halfcheetah-MEDIUM ",
             "d4rl:HalfCheetah-medium", "collect:halfcheetah-medium"],
)  # fmt: skip
def test_a_task_however_written_gets_its_published_hyperparameters(name):
    published = agents.hyperparameters("rebrac", "halfcheetah-medium")
    given = parsed("--env", name, "--agent", "rebrac")
    assert given.hyper["actor_bc"] == published["actor_bc"].default == 0.001
    assert given.hyper["critic_bc"] == published["critic_bc"].default == 0.01
    assert given.hyper["actor_bc"] != agents.hyperparameters("rebrac")["actor_bc"].default
    assert parsed("--env", name, "--agent", "rebrac", "--hyper.actor-bc", 3).hyper["actor_bc"] == 3


def test_a_name_is_kept_in_its_canonical_form():
    assert parsed("--env", "Pendulum-Medium").job.env == "pendulum-medium"
    assert parsed("--env", "HalfCheetah-medium").job.env == "halfcheetah-medium-v2"


def test_the_log_alone_has_only_real_transitions_in_its_batches():
    assert parsed("--synthetic", "none", "--batch-size", 64).config.real_batch == 64


# --- Mistakes: one line on standard error, status 2, nothing left behind ---


@pytest.mark.parametrize(
    "args, message",
    [
        (["--env", "pendulum-medum"], "did you mean pendulum-medium"),
        (["--env", "d4rl:hopper-medium"], "cannot be fetched"),
        (["--env", "nowhere:hopper-medium"], "unknown prefix"),
        (["--dataset-path", "nowhere.hdf5"], "there is no file nowhere.hdf5"),
        (["--dataset-path", "~/no/such.hdf5"], "/no/such.hdf5"),
        (["--dataset-path", "empty.hdf5"], "empty"),
        (["--dataset-path", "text.hdf5"], "cannot be read as HDF5"),
        (["--dataset-path", "open.hdf5", "--horizon", "64"], "0 windows of 64 steps"),
        (["--dataset-path", "toy.hdf5", "--batch-size", "4096"], "larger than the log"),
        (["--dataset-path", "toy.hdf5", "--env", "hopper-medium"], "3 observations"),
        (["--dataset-path", "toy.hdf5", "--agent", "td3"], "there is no agent 'td3'"),
        (["--dataset-path", "toy.hdf5", "--kernel", "4"], "--kernel must be odd"),
        (["--dataset-path", "toy.hdf5", "--trajectories", "100"], "multiple of --sample-batch"),
        (["--resume", "nowhere"], "there is no run in nowhere"),
        (["--resume", "nowhere", "--seed", "3"], "--resume takes no --seed"),
        (["--resume", "nowhere", "--env=hopper-medium"], "--resume takes no --env"),
        (["--dataset-path", "toy.hdf5", "--env", "d4rl:hopper-medium"], "leave out the prefix"),
        (["--dataset-path", "toy.hdf5", "--num-seeds", "100000"], "would fit"),
        (["--dataset-path", "toy.hdf5", "--sweep", "horizon", "8"], "not a number to vary"),
        (["--sweep", "guidance", "0", "1", "--export", "x.npz"], "one setting at a time"),
        (["--synthetic", "none", "--sweep", "guidance", "0", "1"], "does nothing here"),
        (["--devices", "99"], "more than this machine's 1"),
        (["--sweep"], "needs a setting, without dashes, and its values"),
        (["--sweep", "guidance"], "--sweep guidance wants values"),
        (["--sweep", "guidence", "1"], "did you mean guidance?"),
        (["--num-hosts", "2"], "need --distributed"),
        (["--distributed", "--num-hosts", "3", "--num-seeds", "4"], "does not divide over 3 hosts"),
        (["--agent", "iql", "--hyper.gamma", "1.5"], "iql's gamma cannot be 1.5"),
        (["--sweep", "hyper.alpha", "1", "nan"], "td3_bc's alpha cannot be nan"),
        (["--sweep", "hyper.expectile", "0.7", "0.9"], "hyper.expectile is not a setting"),
        (["--sweep", "hyper.hidden", "8", "16"], "not a number to vary"),
        (["--sweep", "--hyper.alpha", "1"], "without dashes"),
        (["--synthetic", "none", "--condition-on-start"], "need --synthetic diffusion"),
        (["--agent", "bc", "--value-guidance", "1"], "needs an agent with a critic, not bc"),
        (["--agent", "bc", "--sweep", "value-guidance", "0", "1"], "with a critic, not bc"),
        (["--hyper.expectile", "0.3"], "td3_bc has no --hyper.expectile; it has alpha,"),
        (["--hyper.hiden", "64"], "did you mean --hyper.hidden?"),
        (["--hyper.hidden", "64", "a"], "--hyper.hidden needs integers, not 64 a"),
        (["--hyper.alpha", "a"], "--hyper.alpha needs a number, not a"),
        (["--hyper.alpha", "1", "2"], "--hyper.alpha takes one value"),
        (["--hyper.hidden", "100000"], "--hyper.hidden must be at most 65,536"),
        (["--hyper.critic-updates", "1000000000000"], "must be at most 1,000"),
        (["--envv", "pendulum-medium"], "there is no flag --envv; did you mean --env?"),
        (["--fit_step=3"], "there is no flag --fit_step; did you mean --fit_steps?"),
        (["pendulum-medium"], "every setting has a flag"),
        (["--env"], "--env needs a value"),
        (["--seed", "x"], "--seed needs an integer, not 'x'"),
        (["--guidance", "x"], "--guidance needs a number, not 'x'"),
        (["--guidance", "inf"], "--guidance must be finite"),
        (["--preset", "lapto"], "must be one of default, smoke, laptop, paper, not lapto"),
        (["--fused=1"], "--fused takes no value"),
    ],
)
def test_mistakes_are_one_clear_line(
    args, message, tmp_path, toy_file, monkeypatch, capsys, offline
):
    (tmp_path / "empty.hdf5").write_bytes(b"")
    (tmp_path / "text.hdf5").write_text("observations, actions\n1, 2\n")
    (tmp_path / "toy.hdf5").symlink_to(toy_file)
    log = toy_log(episodes=20)  # with time-outs only, past which no window runs
    log |= {"timeouts": log["timeouts"] | log["terminals"], "terminals": 0 * log["terminals"]}
    data.write_log(tmp_path / "open.hdf5", log, {})
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert message in mistake(capsys, args)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
    assert [p for p in sorted(tmp_path.iterdir()) if p.name != "runs"] == before


MAY_BE_0 = {"seed", "devices", "real_batch", "host"}
INTEGERS = [flag.name for flag in flags.all_flags() if flags.plain_type(flag.type) is int]


@pytest.mark.parametrize("value", [-1, 0, 10**12])
@pytest.mark.parametrize("name", INTEGERS)
def test_an_integer_that_cannot_work_is_one_clear_line(name, value, toy_file, tmp_path, capsys):
    args = ["--dataset-path", toy_file, *TINY, "--out", tmp_path / "r"]
    if name in ("num_hosts", "host"):
        args += ["--distributed", "--coordinator", "localhost:1", "--num-hosts", 1, "--host", 0]
    args += [f"--{name.replace('_', '-')}", value]
    if value == 0 and name in MAY_BE_0:
        return flags.check(parsed(*args))
    said = mistake(capsys, args)
    assert not (tmp_path / "r").exists()
    flag = f"--{name.replace('_', '-')}"
    assert flag in said or (name, value) == ("horizon", 10**12)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--fit-chunk", 0], "--fit-chunk must be at least 1"),
        (["--groups", 0], "--groups must lie between 1 and 65,536"),
        (["--sample-batch", 0], "--sample-batch must lie between 1 and 10,000,000"),
        (["--model-chunk", 0], "--model-chunk must be at least 1"),
        (["--levels", 10**9], "--levels must lie between 1 and 100"),
        (["--levels", 7], "--levels 7 needs a --horizon that can be halved 6 times"),
        (["--sample-steps", 1], "--sample-steps must be at least 2"),
        (["--guidance-rule", "paper", "--synthetic", "none"], "--guidance-rule needs --synthetic"),
    ],
)
def test_zero_and_huge_values_name_what_would_work(args, message, capsys):
    assert message in mistake(capsys, args)


def test_the_papers_rule_has_the_papers_weight_unless_one_is_given():
    weight = lambda *words: flags.parse(words).config.guidance
    assert weight() == pgd.Config().guidance == 64.0
    assert weight("--guidance-rule", "paper") == weight("--preset", "paper") == 1.0
    assert weight("--guidance-rule", "paper", "--guidance", "0.25") == 0.25


@pytest.mark.parametrize("agent", agents.AGENTS)
def test_agents_that_clone_by_advantage_have_a_weak_guide_unless_one_is_given(agent):
    weight = lambda *words: flags.parse(["--agent", agent, *words]).config.guidance
    assert weight() == weight("--preset", "laptop") == (4.0 if agent in ("iql", "awac") else 64.0)
    line = next(x for x in flags.help_text(agent).splitlines() if x.startswith("  --guidance "))
    assert line.endswith(f"(default {weight()})")
    assert weight("--guidance", "9") == 9.0
    assert weight("--guidance-rule", "paper") == weight("--preset", "paper") == 1.0


@pytest.mark.parametrize("agent", agents.AGENTS)
def test_integer_hyperparameters_that_cannot_work_are_one_clear_line(agent, capsys):
    for name, hyper in agents.hyperparameters(agent).items():
        for value in (-1, 0, 10**12) if hyper.type is not float else ():
            said = mistake(capsys, ["--agent", agent, f"--hyper.{name}", value])
            assert name in said


def test_more_hosts_than_seeds_are_refused_before_the_hosts_connect(capsys):
    args = ["--distributed", "--coordinator", "localhost:1", "--host", 0, "--num-hosts", 2]
    assert "does not divide over 2 hosts" in mistake(capsys, [*args, "--num-seeds", 3])


def test_a_config_of_another_version_names_the_field():
    saved = parsed().as_dict()
    assert cli.from_saved(dict(saved), ROOT / "config.json") == parsed()
    older = {k: v for k, v in saved.items() if k != "eta"}
    with pytest.raises(UserError, match="of another version of this program: it lacks eta"):
        cli.from_saved(older, ROOT / "config.json")
    with pytest.raises(UserError, match="of another version of this program: it has fix_start"):
        cli.from_saved({**saved, "fix_start": True}, ROOT / "config.json")
