"""Options in YAML files: types, groups, errors."""

import dataclasses
import re
from importlib import resources

import pytest

import errors
from job.config import LinearConfig, read_config

FILES = (resources.files("job") / "presets").iterdir()
PRESETS = sorted(file.name.removesuffix(".yaml") for file in FILES if file.name.endswith(".yaml"))


def refused(*argv):
    """Return the error of a command line of job.train."""
    return errors.refused(read_config, [str(argument) for argument in argv])


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("lr: 3e-2", "lr", 0.03),
        ("lr: 1", "lr", 1.0),
        ("loss_factor: 1.0e+4", "loss_factor", 1e4),
        ("epochs: '7'", "epochs", 7),
        ("batch-size: 0x10", "batch_size", 16),
        ("moco_k: 1024", "moco_k", 1024),
        ("mlp: yes", "mlp", True),
        ("cos: off", "cos", False),
        ("schedule: 30", "schedule", [30]),
        ("schedule: [30, '40']", "schedule", [30, 40]),
        ("schedule: []", "schedule", []),
        ("mgd_stages: [4, 3]", "mgd_stages", [3, 4]),
        ("stage_weights: [1, 2.5, '3', 1e2]", "stage_weights", [1.0, 2.5, 3.0, 100.0]),
        ("mgd_stages: 4\nstage_weights: 2", "stage_weights", [2.0]),
        ("refresh_epochs: [0, 5, 10]", "refresh_epochs", "0,5,10"),
        ("refresh_epochs: 5", "refresh_epochs", "5"),
        ("refresh_epochs: every:2", "refresh_epochs", "every:2"),
        ("save_every: 2", "save_every", "2"),
        ("save_every: 50steps", "save_every", "50steps"),
        ("teacher: ''", "teacher", ""),
        ("data: 2020", "data", "2020"),
        ("out: Läufe/é", "out", "Läufe/é"),
    ],
)
def test_value_gets_the_type_of_its_option(write_yaml, text, name, value):
    folder = [] if name == "data" else ["DIR"]
    result = getattr(read_config([*folder, "--config", write_yaml(text)]), name)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize("text", ["", "# lr: 0.1\n", "---\n", "{}"])
def test_file_without_options_changes_no_option(write_yaml, text):
    path = write_yaml(text)
    assert read_config(["DIR", "--config", path]) == dataclasses.replace(
        read_config(["DIR"]), config=[path]
    )


@pytest.mark.parametrize(
    ("text", "key", "value", "expected"),
    [
        ("lr: fast", "lr", "fast", "a number"),
        ("lr: true", "lr", "True", "a number"),
        ("lr: [0.1]", "lr", "0.1", "a number"),
        ("lr: {a: 1}", "lr", "", "one value"),
        ("lr:", "lr", "None", "a number"),
        ("lr: 2020-01-01", "lr", "2020", "a number"),
        ("lr: -0.1", "lr", "-0.1", "at least 0"),
        ("lr: .nan", "lr", "nan", "finite"),
        ("lr: .inf", "lr", "inf", "finite"),
        ("lr: nan", "lr", "nan", "finite"),
        ("lr: 1e999", "lr", "1e999", "finite"),
        ("epochs: 1.5", "epochs", "1.5", "an integer"),
        ("epochs: 1e2", "epochs", "1e2", "an integer"),
        ("epochs: true", "epochs", "True", "an integer"),
        ("epochs: 0", "epochs", "0", "at least 1"),
        ("epochs: [1]", "epochs", "[1]", "an integer"),
        ("mlp: 1", "mlp", "1", "true or false"),
        ("mlp: 'true'", "mlp", "'true'", "true or false"),
        ("mlp: [true]", "mlp", "True", "true or false"),
        ("momentum: 1.0", "momentum", "1.0", "below 1"),
        ("moco_t: 0", "moco_t", "0", "above 0"),
        ("seed: 9223372036854775808", "seed", "9223372036854775808", "below"),
        ("schedule: [1, x]", "schedule", "'x'", "an integer"),
        ("schedule: [1, -2]", "schedule", "-2", "at least 0"),
        ("schedule: true", "schedule", "True", "an integer"),
        ("mgd_stages: [0]", "mgd_stages", "0", "at least 1"),
        ("mgd: {pooled: -1}", "mgd.pooled", "-1", "at least 0"),
        ("mgd: {correction: 2}", "mgd.correction", "2", "true or false"),
        ("mgd_stages: [5]", "mgd_stages", "5", "below 5"),
        ("stage_weights: [1, x, 1, 1]", "stage_weights", "'x'", "a number"),
        ("stage_weights: [1, -1, 1, 1]", "stage_weights", "-1", "at least 0"),
        ("stage_weights: [1, 1, 1, true]", "stage_weights", "True", "a number"),
        ("matching: solve", "matching", "solve", "solved, random"),
        ("arch: resnet51", "arch", "resnet51", "resnet5"),
        ("arch: 50", "arch", "50", "resnet34"),
        ('arch: "res\\nnet"', "arch", "res\\nnet", "resnet"),
        ("arch: [resnet18]", "arch", "resnet18", "text"),
        ("reducer: mean", "reducer", "mean", "amp, rd, sp, sm"),
        ("teacher:", "teacher", "None", "text"),
        ("refresh_epochs: often", "refresh_epochs", "often", "every:N"),
        ("refresh_epochs: every:0", "refresh_epochs", "every:0", "every:N"),
        ("refresh_epochs: [1, x]", "refresh_epochs", "1,x", "0,5,10"),
        ("refresh_epochs: []", "refresh_epochs", "''", "never"),
        ("refresh_epochs: true", "refresh_epochs", "True", "text"),
        ("save_every: 0", "save_every", "'0'", "500steps"),
        ("save_every: 5 steps", "save_every", "5 steps", "500steps"),
    ],
)
def test_wrong_value_is_named_with_the_expected_one(write_yaml, text, key, value, expected):
    path = write_yaml(text)
    message = refused("DIR", "--config", path)
    for part in (path, key, value, expected):
        assert part in message


@pytest.mark.parametrize(
    "text",
    ["lr: 1" + "0" * 400, "lr: " + "9" * 5000, "lr: 2020-13-45", "epochs: " + "9" * 5000],
    ids=[
        "an integer beyond floats",
        "an integer of too many digits",
        "a day that does not exist",
        "many digits",
    ],
)
def test_value_that_python_rejects_is_refused(write_yaml, text):
    path = write_yaml(text)
    assert path in refused("DIR", "--config", path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- lr: 0.1", "a mapping"),
        ("0.03", "a mapping"),
        ("lr", "a mapping"),
        ("\tlr: 0.1", "not YAML"),
        ("lr:\t[", "not YAML"),
        ("lr: [", "not YAML: line 1, column 6: expected the node content, but found"),
        ("epochs: 1\nlr: [0.1\n", "not YAML: line 3, column 1: expected ',' or ']', but got"),
        ("lr: 1\n---\nlr: 2", "not YAML"),
        ("[1]: 2", "one value"),
        ("lr: !!python/object/apply:os.getcwd []", "not YAML"),
        ("cos: !!bool 5", "Leave out the tag"),
        ("lr: !!timestamp x", "Leave out the tag"),
        ('epochs: !!int ""', "Leave out the tag"),
        ("lr: 1\x07", "not YAML"),
        (b"out: caf\xe9", "not YAML"),
        (b"\xff\xfel\x00r\x00:\x00", "not YAML"),
        (b"\x80\x81\x82" * 100, "not YAML"),
    ],
)
def test_file_that_is_no_mapping_is_refused(write_yaml, text, expected):
    path = write_yaml(text)
    message = refused("DIR", "--config", path)
    assert path in message
    assert expected in message


@pytest.mark.parametrize("path", ["no-such-file.yaml", "imagent", "", "."])
def test_missing_file_is_named_with_the_presets(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused("DIR", "--config", path)
    assert f"--config {path}" in message
    assert ", ".join(PRESETS) in message


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lrr", "lr"),
        ("batchsize", "batch_size"),
        ("moco-kk", "moco_k"),
        ("teachr", "teacher"),
        ("no_mlp", "mlp"),
    ],
)
def test_unknown_key_is_refused_with_a_suggestion(write_yaml, key, meant):
    path = write_yaml(f"lr: 0.1\n{key}: 1\n")
    message = refused("DIR", "--config", path)
    assert path in message
    assert repr(key) in message
    assert f"did you mean {meant}?" in message


@pytest.mark.parametrize("key", ["zzzzzz", "1", "null", '"a\\nb"'])
def test_unknown_key_of_any_kind_is_refused(write_yaml, key):
    path = write_yaml(f"{key}: 1\n")
    assert path in refused("DIR", "--config", path)


def test_file_cannot_name_other_files(write_yaml):
    """The error does not suggest the key either."""
    message = refused("DIR", "--config", write_yaml("config: other.yaml\n"))
    assert "'config'" in message
    assert "did you mean config" not in message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("lr: 0.1\nlr: 0.2", ["lr"]),
        ("lr: 0.1\n'lr': 0.1", ["lr"]),
        ("batch-size: 4\nbatch_size: 8", ["batch-size", "batch_size"]),
        ("moco_k: 4\nmoco: {k: 4}", ["moco_k", "moco.k"]),
        ("moco: {k: 4}\nmoco-k: 4", ["moco.k", "moco-k"]),
        ("moco: {k: 4, moco_k: 4}", ["moco.k", "moco.moco_k"]),
        ("moco: {k: 4, k: 4}", ["moco.k", "leave out"]),
        ("moco: {k: 4}\nmoco: {t: 1}", ["moco", "into one group"]),
        ("data: x\ndata: {image_size: 64}", ["data", "into one group"]),
        ("data: {image_size: 64}\ndata: x", ["data", "into one group"]),
    ],
)
def test_option_given_twice_is_named_by_both_keys(write_yaml, text, named):
    message = refused("DIR", "--config", write_yaml(text))
    assert "twice" in message
    assert all(re.search(rf"(?<!\w){re.escape(part)}(?!\w)", message) for part in named), message


@pytest.mark.parametrize(
    ("text", "flat"),
    [
        ("moco: {k: 4096, t: 0.2}", "moco_k: 4096\nmoco_t: 0.2"),
        (
            "mgd: {reducer: rd, stages: [4, 3], images: 9}",
            "reducer: rd\nmgd_stages: [4, 3]\nmgd_images: 9",
        ),
        ("moco: {moco-k: 9, mlp: true}\nlr: 1", "moco_k: 9\nmlp: true\nlr: 1"),
        ("data: {data: x, image_size: 64}", "data: x\nimage_size: 64"),
        ("data: x\nrun: {keep: 5, save-every: 2steps}", "data: x\nkeep: 5\nsave_every: 2steps"),
        (
            "teacher: {teacher: t, arch: resnet50, loss_factor: 7}",
            "teacher: t\nteacher_arch: resnet50\nloss_factor: 7",
        ),
        ("rate: &a {epochs: 3}\nmoco: {}\nseed: 2", "epochs: 3\nseed: 2"),
    ],
)
def test_groups_equal_flat_options(write_yaml, text, flat):
    grouped, ungrouped = (
        read_config(["DIR", "--config", write_yaml(each)]) for each in (text, flat)
    )
    assert grouped == ungrouped


def test_later_files_win_with_and_without_groups(write_yaml):
    files = [
        write_yaml("lr: 1\nmoco: {k: 1, t: 1}", "1"),
        write_yaml("moco_k: 2\nrate: {lr: 2}", "2"),
        write_yaml("moco: {k: 3}", "3"),
    ]
    config = read_config(["DIR", *[f"--config={file}" for file in files], "--moco-t", "4"])
    assert (config.lr, config.moco_k, config.moco_t) == (2, 3, 4)


def test_key_of_group_and_option_needs_a_mapping(write_yaml):
    """`knn` is both: with a mapping it is the group."""
    read = [
        read_config(["DIR", "--config", write_yaml(text)], kind=LinearConfig)
        for text in ("knn: true", "knn: {k: 3, knn: true}")
    ]
    assert [(config.knn, config.knn_k) for config in read] == [(True, 0), (True, 3)]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("mocco: {k: 1}", ["unknown group 'mocco'", "did you mean moco?"]),
        ("zzz: {k: 1}", ["unknown group 'zzz'", "expected one of data, run, rate"]),
        ("<<: {lr: 1}", ["unknown group '<<'"]),
        ("moco: {kk: 1}", ["unknown key 'moco.kk'", "did you mean moco.k?"]),
        ("mgd: {stage: [1]}", ["unknown key 'mgd.stage'", "did you mean mgd.stages?"]),
        ("moco: {lr: 1}", ["unknown key 'moco.lr'", "did you mean rate.lr?"]),
        ("rate: {k: 1}", ["unknown key 'rate.k'", "did you mean knn.k or similarity.k or moco.k?"]),
        ("MoCo: {k: 1}", ["unknown group 'MoCo'", "did you mean moco?"]),
        ("moco: {K: 1}", ["unknown key 'moco.K'", "did you mean moco.k?"]),
        ("moco: !!set {k: 1}", ["moco", "a mapping without a tag"]),
        ("!!set {lr: 1}", ["a mapping without a tag"]),
        ("moco.k: 5", ["unknown key 'moco.k'", "did you mean moco_k?"]),
        ("run: {config: x.yaml}", ["unknown key 'run.config'"]),
        ("moco: 5", ["moco", "expected a mapping, as in `moco: {dim: ...}`"]),
        ("moco:", ["moco", "expected a mapping", "the group is empty"]),
        ("run: [1]", ["run", "expected a mapping"]),
        ("moco: {k: {a: 1}}", ["moco.k", "expected one value"]),
        ("moco: &a {k: *a}", ["moco.k", "expected one value"]),
        ("moco: {[1]: 2}", ["expected one value"]),
        ("mgd: {stages: [[1]]}", ["mgd.stages", "expected one value"]),
        ("moco: {k: 0}", ["moco.k 0: expected at least 1"]),
        ("moco: {moco_k: fast}", ["moco.moco_k 'fast': expected an integer"]),
        ("run: {save-every: 0}", ["run.save-every '0': expected", "500steps"]),
        ("moco: {k: !!bool 5}", ["Leave out the tag"]),
    ],
)
def test_wrong_group_is_named_by_file_and_dotted_key(write_yaml, text, parts):
    path = write_yaml(text)
    message = refused("DIR", "--config", path)
    assert all(part in message for part in (path, *parts)), message


def test_anchors_replace_values_and_lists(write_yaml):
    path = write_yaml("lr: &x 2\nepochs: *x\nschedule: &y [*x, 3]\nmgd_stages: *y\n")
    config = read_config(["DIR", "--config", path])
    assert (config.lr, config.epochs) == (2.0, 2)
    assert config.schedule == config.mgd_stages == [2, 3]


@pytest.mark.parametrize(
    "text",
    [
        "schedule: [[1]]",
        "schedule: &a [*a]",
        "lr: &a {<<: *a}",
        "mgd_stages: &a [1]\nschedule: [*a, *a]",
    ],
)
def test_nested_lists_are_refused(write_yaml, text):
    """Aliases of aliases could need more memory than any machine has."""
    assert "expected one value, or a list of values" in refused("DIR", "--config", write_yaml(text))


@pytest.mark.parametrize(
    "text",
    ["lr: " + "[" * 60_000, "lr: " + "x" * 60_000, "# " + "x" * 2**16],
    ids=["deep", "wide", "long"],
)
def test_error_of_a_long_file_is_short(write_yaml, text):
    assert len(refused("DIR", "--config", write_yaml(text))) <= 1010
