"""Forms, and the plans that follow from them."""

import functools
import operator
import re
from importlib import resources

import pytest
import yaml

from job.distill import DISTILLERS
from job.errors import RunError
from job.study.form import own_forms
from job.study.plan import arguments, read_plan
from job.study.study import main

TINY = {
    "about": "a tiny form",
    "device": "cpu",
    "at_once": 2,
    "seeds": [0, 7],
    "train": {"image_size": 32, "epochs": 1, "lr": 0.01, "mlp": True},
    "teacher": {"arch": "resnet50", "epochs": 3},
    "student": {"arch": "resnet18"},
    "linear": {"epochs": 1},
    "sets": {"mnist": {"questions": ["reducer"], "student": {"lr": 0.02}}, "clipart": {}},
}


own_plan = functools.cache(read_plan)  # of a form of the package


def plan(tmp_path, **changed):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | changed))
    return read_plan(str(path))


def test_sets_have_basic_arms_and_arms_of_questions(tmp_path):
    tiny = plan(tmp_path)
    mnist, clipart = (
        [unit.arm for unit in tiny.units if unit.set == name] for name in ("mnist", "clipart")
    )
    students = ("untrained", "alone", "mgd", "random", "original")
    basis = ["teacher", *(arm for arm in students for _ in TINY["seeds"])]
    assert clipart == basis
    answers = {answer: f"reducer {answer}" for answer in ("amp", "rd", "sp", "sm")}
    assert mnist == basis + [arm for arm in answers.values() for _ in TINY["seeds"]]
    [question] = tiny.questions["mnist"]
    assert question.answers == answers
    assert [unit.seed for unit in tiny.units[:3]] == [0, 0, 7]


def test_questions_share_arms_with_the_same_options(tmp_path):
    sets = {"mnist": {"questions": ["factor", "reducer"]}}
    factor, reducer = plan(tmp_path, sets=sets).questions["mnist"]
    assert reducer.answers["amp"] == factor.answers["share 10"] == "factor share 10"


def test_questions_can_have_some_of_their_answers(tmp_path):
    questions = {"reducer": ["amp", "sm"], "refresh": ["once", "log schedule"]}
    own = plan(tmp_path, sets={"mnist": {"questions": questions}})
    reducer, refresh = own.questions["mnist"]
    assert reducer.answers == {"amp": "reducer amp", "sm": "reducer sm"}
    assert refresh.answers == {"once": "refresh once", "log schedule": "mgd"}
    arms = {unit.arm for unit in own.units if unit.arm.startswith("re")}
    assert arms == {"reducer amp", "reducer sm", "refresh once"}


def test_images_names_the_folder_after_most(tmp_path):
    own = plan(tmp_path, sets={"mnist": {"most": 50}, "clipart": {}})
    assert own.images("mnist") == "data/mnist-50"
    assert own.images("clipart") == "data/clipart-700"


def test_more_specific_options_win(tmp_path):
    units = {unit.name: unit for unit in plan(tmp_path).units}
    train = {name: unit.train for name, unit in units.items()}
    assert train["mnist/teacher-0"]["epochs"] == 3 and train["mnist/mgd-7"]["epochs"] == 1
    assert train["mnist/mgd-7"]["lr"] == 0.02 and train["clipart/mgd-7"]["lr"] == 0.01
    assert train["mnist/reducer-rd-7"]["reducer"] == "rd"
    arms = ("mgd", "reducer-rd", "original")  # the second question has a base
    assert [train[f"mnist/{arm}-7"]["loss_share"] for arm in arms] == [0.1, 10, 0]
    assert train["mnist/random-0"]["matching"] == "random"
    assert units["mnist/alone-0"].resolved()["job.train"]["epochs"] == 1
    still = {"lr": 0.0, "epochs": 1, "warmup_epochs": 0}
    assert train["mnist/untrained-7"] == train["mnist/alone-7"] | still


def test_resolved_has_newer_options_only_if_set(tmp_path):
    """A record that is older than the option must remain valid."""
    unit = plan(tmp_path).units[0]
    assert all("knn_k" not in options for options in unit.resolved().values())
    unit.train["knn_k"] = 20
    assert unit.resolved()["job.train"]["knn_k"] == 20


def test_random_matching_is_never_refreshed(tmp_path):
    student = {"arch": "resnet18", "refresh_epochs": "every:2"}
    units = {unit.arm: unit for unit in plan(tmp_path, student=student).units}
    assert all(units[arm].train["refresh_epochs"] == "every:2" for arm in ("mgd", "original"))
    assert units["random"].resolved()["job.train"]["matching"] == "random"
    assert "refresh_epochs" not in units["random"].train


def test_framework_none_drops_options_of_frameworks(tmp_path):
    student = {"arch": "resnet18", "framework": "none", "moco_k": 64, "seed": 0}
    units = {unit.arm: unit for unit in plan(tmp_path, student=student).units}
    train = units["mgd"].train
    assert train["framework"] == "none" and not {"moco_k", "mlp"} & train.keys()
    assert units["mgd"].resolved() and units["teacher"].train["mlp"]


def test_forms_can_change_mgd_and_omit_controls(tmp_path):
    answers = ["solved, share 0.1", "random, share 0.1", "random, share 10"]
    own = plan(
        tmp_path,
        mgd={"loss_share": 10.0, "reducer": "sm"},
        controls=["random"],
        sets={"mnist": {"questions": {"matching": answers}}},
    )
    arms = {unit.arm: unit.train for unit in own.units}
    new = [f"matching {answer}" for answer in answers[:2]]
    assert [*arms] == ["teacher", "untrained", "alone", "mgd", "random", *new]
    shares = {arm: arms[arm]["loss_share"] for arm in ("mgd", "random", *new)}
    assert shares == {"mgd": 10.0, "random": 10.0} | dict.fromkeys(new, 0.1)
    assert all(arms[arm]["reducer"] == "sm" for arm in shares)
    assert own.questions["mnist"][0].answers["random, share 10"] == "random"


def test_simsiam_has_moco_for_teachers_only():
    simsiam = own_plan("simsiam")
    assert simsiam.questions.keys() == {"mnist", "characters"} and len(simsiam.seeds) == 3
    expected = {"teacher", "untrained", "alone", "mgd", "random"}
    for unit in simsiam.units:
        assert unit.arm in expected
        framework = unit.resolved()["job.train"]["framework"]
        assert framework == ("moco" if unit.arm == "teacher" else "simsiam")
        of_moco = {name for name in unit.train if name.startswith("moco_") or name == "mlp"}
        assert bool(of_moco) == (unit.arm == "teacher")


ARMS = {
    "Gram + 1": {"distill": "gram", "loss_share": 3.0},
    "bare": {"distill": ["mgd", "simreg"], "framework": "none"},
    "SimSiam": {"distill": [], "framework": "simsiam", "head_width": 32},
}
HEADS = {"arch": "resnet18", "head_width": 64, "reducer": "sm"}
SPLITS = [{"split": "test"}, {"split": "choose"}]


def test_arms_have_options_of_student_not_of_mgd(tmp_path):
    own = plan(
        tmp_path,
        arms=ARMS,
        student=HEADS,
        sets={"mnist": {}},
        mgd={"loss_share": 7.0, "matching": "solved"},
    )
    units = {unit.name: unit for unit in own.units if unit.seed == 7}
    assert own.arms == ["Gram + 1", "SimSiam", "bare"]  # the order of the file
    assert [*units][-3:] == ["mnist/gram-1-7", "mnist/simsiam-7", "mnist/bare-7"]
    gram, simsiam, bare = (units[name] for name in [*units][-3:])
    common = {"image_size": 32, "epochs": 1, "lr": 0.01, "arch": "resnet18", "seed": 7}
    assert gram.train == common | {"mlp": True, "head_width": 64, **ARMS["Gram + 1"]}
    assert bare.train == common | {"head_width": 64, "reducer": "sm", **ARMS["bare"]}
    assert simsiam.train == common | {"framework": "simsiam", "head_width": 32}
    assert [unit.guided for unit in (gram, bare, simsiam)] == [True, True, False]
    assert "distill" not in simsiam.resolved()["job.train"]


def test_sets_can_change_options_of_arms(tmp_path):
    changes = {"Gram + 1": {"loss_share": 5.0}}
    own = plan(tmp_path, arms=ARMS, sets={"mnist": {"arms": changes}, "clipart": {}})
    units = {unit.name: unit.train for unit in own.units}
    assert [units[f"{name}/gram-1-0"]["loss_share"] for name in ("mnist", "clipart")] == [5.0, 3.0]
    assert units["mnist/gram-1-0"]["distill"] == "gram"
    assert units["mnist/bare-0"] == units["clipart/bare-0"]


def test_head_width_is_dropped_without_a_hidden_layer(tmp_path):
    arms = {"bare": {"distill": "similarity", "framework": "none"}, "linear": {"mlp": False}}
    arms["hidden"] = {"distill": "similarity", "framework": "none", "similarity": "seed"}
    own = plan(tmp_path, arms=arms, student=HEADS, sets={"mnist": {}})
    width = {unit.arm: unit.train.get("head_width") for unit in own.units}
    assert [width[arm] for arm in ("bare", "linear", "hidden")] == [None, None, 64]
    assert width["mgd"] == 64 and width["teacher"] is None


def test_split_chooses_the_images(tmp_path):
    default, test, choose = (plan(tmp_path, **own) for own in ({}, *SPLITS))
    assert [own.split for own in (default, test, choose)] == ["test", "test", "choose"]
    assert test.images("mnist") == "data/mnist-700"
    assert choose.images("mnist") == "data/mnist-700-choose"


@pytest.mark.parametrize("value", [5, None, True, [1], "mdg"])
@pytest.mark.parametrize("option", ["framework", "distill"])
def test_invalid_framework_or_distiller_is_one_line(tmp_path, option, value):
    """With more than 6 distillers, the error of a misspelt one suggests the nearest name."""
    problem = rf"--{option} [^\n]*(expected|did you mean)[^\n]*"
    with pytest.raises(RunError, match=rf"^\S+: job.train: {problem}$"):
        plan(tmp_path, student={"arch": "resnet18", "seed": 0, option: value})


@pytest.mark.parametrize("form", ["small", "full"])
def test_forms_ask_all_questions_with_three_seeds(form):
    own = own_plan(form)
    assert len(own.seeds) == 3 and own.questions.keys() == {"mnist", "clipart"}
    questions = {question.name for each in own.questions.values() for question in each}
    assert questions == {"factor", "margins", "reducer", "refresh", "matching", "stages"}


@pytest.mark.parametrize("form", ["small", "longer", "full", "simsiam"])
def test_students_of_a_set_have_the_same_steps(form):
    own = own_plan(form)
    by_seed = {}
    names = ("epochs", "batch_size", "accumulate", "lr", "image_size", "seed")
    for unit in own.units:
        if unit.arm not in ("teacher", "untrained"):
            options = unit.resolved()["job.train"]
            steps = [options[name] for name in names]
            assert by_seed.setdefault((unit.set, unit.seed), steps) == steps
    assert len(by_seed) == len(own.questions) * 3  # seeds


FORMS_OF_DISTILLERS = [
    ("distillers", 24, "test", 256),
    ("distillers-trial", 21, "choose", 256),
    ("distillers-full", 24, "test", 1024),
]


@pytest.mark.parametrize(("form", "arms", "split", "head_width"), FORMS_OF_DISTILLERS)
def test_distillers_have_equal_heads_and_steps(form, arms, split, head_width):
    own = own_plan(form)
    assert (len(own.arms), own.split) == (arms, split)
    assert [*own.questions] == ["characters", "writing"]
    units = [unit for unit in own.units if unit.seed == own.seeds[0]]
    trains = {(unit.set, unit.arm): unit.train for unit in units}
    for unit in own.units:  # seeds have no other difference, and resolving options is slow
        assert unit.train == trains[unit.set, unit.arm] | {"seed": unit.seed}
    trained = [unit.resolved()["job.train"] for unit in units]
    assert {name for options in trained for name in options.get("distill", [])} == {*DISTILLERS}
    for name in own.questions:
        students = []
        for unit, options in zip(units, trained, strict=True):
            if unit.set == name and unit.arm not in ("teacher", "untrained"):
                students.append((unit.train, options))
        same = ("epochs", "batch_size", "image_size", "width")
        assert len({tuple(options[key] for key in same) for _, options in students}) == 1
        heads = [train.get("head_width") for train, _ in students]
        assert {*heads} - {None} == {head_width}
        without_framework = [options["framework"] == "none" for _, options in students]
        assert all(map(operator.or_, without_framework, map(bool, heads)))


def test_help_names_all_forms(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(re.search(rf"[ ,]{form}[,:]", text) for form in own_forms())


def test_distillers_has_published_mgd():
    for unit in own_plan("distillers").units:
        assert unit.arm != "teacher" or unit.train["epochs"] == 40
        if unit.arm == "original":
            train = unit.train
            assert (train["loss_share"], train["loss_factor"]) == (0, 1e4)
            assert train["margins"] == "init" and unit.resolved()


def test_distillers_full_has_the_networks_of_full():
    own, full = own_plan("distillers-full"), own_plan("full")
    assert (own.device, own.at_once) == (full.device, full.at_once)
    digits = {unit.arm: unit for unit in full.units if unit.set == "mnist"}
    same = ("arch", "width", "image_size", "precision", "augment_on", "batch_size", "epochs")
    for unit in own.units:
        if unit.arm in digits:
            options, expected = (each.resolved()["job.train"] for each in (unit, digits[unit.arm]))
            assert [options[name] for name in same] == [expected[name] for name in same]
    assert own.arms == own_plan("distillers").arms


def test_distillers_trial_has_other_seeds_only():
    form, trial = (own_plan(name) for name in ("distillers", "distillers-trial"))
    assert not {*form.seeds} & {*trial.seeds}
    for name in form.questions:
        for arm in ("teacher", "untrained", "alone", "gram"):
            options, expected = (
                next(u.resolved() for u in p.units if u.set == name and u.arm.split(" 1")[0] == arm)
                for p in (trial, form)
            )
            for each in (options, expected):
                del each["job.train"]["seed"]
                each["job.train"].pop("loss_share", None)
            assert options["job.train"] == expected["job.train"]


@pytest.mark.parametrize(
    ("form", "base", "factor"), [("longer", "small", 2), ("distillers-long", "distillers", 4)]
)
def test_longer_forms_differ_in_epochs_of_students(form, base, factor):
    units = {unit.name: unit for unit in own_plan(base).units}
    for unit in own_plan(form).units:
        train, linear = units[unit.name].train, units[unit.name].linear
        epochs = train["epochs"] * (1 if unit.arm in ("teacher", "untrained") else factor)
        assert (unit.train, unit.linear) == (train | {"epochs": epochs}, linear), unit.name


def test_arguments():
    options = {"moco_k": 256, "mlp": True, "cos": False, "mgd_stages": [3, 4], "lr": 0.5}
    assert arguments(options) == "--moco-k 256 --mlp --no-cos --mgd-stages 3 4 --lr 0.5".split()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"about": None, "more": 1}, ["keys", "expected about"]),
        ({"device": "tpu"}, ["device 'tpu'", "cpu or gpu"]),
        ({"at_once": 0}, ["at_once 0", "an integer above 0"]),
        ({"at_once": True}, ["at_once True", "an integer above 0"]),
        ({"seeds": []}, ["seeds []", "2 or more integers"]),
        ({"seeds": [3]}, ["seeds [3]", "2 or more integers"]),
        ({"seeds": [1, 1]}, ["seeds [1, 1]", "each once"]),
        ({"seeds": [], "split": "choose"}, ["seeds []", "1 or more integers"]),
        ({"seeds": 3}, ["seeds 3", "2 or more integers"]),
        ({"train": [1]}, ["train", "a mapping"]),
        ({"student": {"teacher": "t.pth"}}, ["student: teacher", "Remove it"]),
        ({"linear": {"pretrained": "t.pth"}}, ["linear: pretrained", "Remove it"]),
        ({"linear": {"knn": True}}, ["linear: knn", "Remove it"]),
        (
            {"sets": {"mnist": {"train": {"knn_every": 0}}}},
            ["mnist: train: knn_every 0", "1 or more"],
        ),
        ({"sets": {"mnist": {"questions": "reducer"}}}, ["questions 'reducer'", "a list of names"]),
        ({"mgd": 0.1}, ["mgd", "a mapping"]),
        ({"mgd": {"teacher": "t.pth"}}, ["mgd: teacher", "Remove it"]),
        ({"mgd": {"loss_shares": 1}}, ["mgd-0: job.train", "--loss-shares"]),
        ({"controls": "random"}, ["controls 'random'", "a list with random"]),
        ({"controls": ["original"]}, ["controls ['original']", "random, and if needed others"]),
        ({"controls": ["random", "random"]}, ["controls", "each once"]),
        ({"controls": ["random", "none"]}, ["controls", "others of random, original"]),
        ({"sets": {}}, ["sets", "mnist, clipart, characters, writing"]),
        ({"sets": {"imagenet": {}}}, ["'imagenet'", "mnist, clipart, characters, writing"]),
        ({"sets": {"mnist": {"question": "all"}}}, ["mnist", "questions"]),
        ({"sets": {"mnist": {"most": 0}}}, ["mnist: most 0", "from 1 to 700"]),
        ({"sets": {"mnist": {"most": 701}}}, ["most 701", "from 1 to 700"]),
        ({"sets": {"mnist": {"questions": ["why"]}}}, ["'why'", "factor"]),
        (
            {"sets": {"mnist": {"questions": [{"reducer": ["amp"]}]}}},
            ["{'reducer': ['amp']}", "factor"],
        ),
        (
            {"sets": {"mnist": {"questions": {"reducer": ["amp"]}}}},
            ["reducer ['amp']", "two or more of amp, rd, sp, sm"],
        ),
        (
            {"sets": {"mnist": {"questions": {"reducer": ["amp", ["rd"]]}}}},
            ["reducer ['amp', ['rd']]", "two or more of amp"],
        ),
        (
            {"sets": {"mnist": {"questions": {"reducer": "amp rd"}}}},
            ["reducer 'amp rd'", "two or more of amp"],
        ),
        (
            {"sets": {"mnist": {"questions": {"reducer": ["rd", "rd"]}}}},
            ["reducer ['rd', 'rd']", "each once"],
        ),
        ({"train": {"epochs": 1, "lrr": 1}}, ["clipart/teacher-0: job.train", "--lrr"]),
        ({"linear": {"epochs": "many"}}, ["job.linear", "--epochs", "many"]),
        ({"split": "val"}, ["split 'val'", "test or choose"]),
        ({"split": ["test"]}, ["split ['test']", "test or choose"]),
        ({"arms": ["gram"]}, ["arms", "a mapping, such as {gram: {distill: gram}}"]),
        ({"arms": {"gram": "gram"}}, ["arms: gram", "a mapping"]),
        ({"arms": {10: {}}}, ["arms: 10", "a name of letters"]),
        ({"arms": {"a|b": {}}}, ["arms: 'a|b'", "a name of letters"]),
        ({"arms": {"MGD": {}}}, ["arms: 'MGD'", "expected another name"]),
        ({"arms": {"original": {}}}, ["arms: 'original'", "expected another name"]),
        (
            {"arms": {"reducer rd": {}}},
            ["arms: 'reducer rd'", "of this name; expected another name"],
        ),
        (
            {"arms": {"reducer-rd": {}}},
            ["'reducer-rd' and 'reducer rd' have the same folder mnist/reducer-rd-0; expected"],
        ),
        ({"arms": {"gram": {"teacher": "t.pth"}}}, ["arms: gram: teacher", "Remove it"]),
        ({"arms": {"gram": {"distil": "gram"}}}, ["clipart/gram-0: job.train", "--distil"]),
        (
            {"arms": {"gram": {"distill": "gram", "reducer": "sm"}}},
            ["clipart/gram-0: reducer: no effect", "Remove it"],
        ),
        (
            {"arms": {"a": {"distill": "gram"}, "b": {"distill": ["gram"]}}},
            ["'b' and 'a' are the same network; expected different ones. Remove"],
        ),
        ({"arms": {"a": {"loss_share": 0.1}}}, ["'a' and 'mgd' are the same network"]),
        ({"arms": {"a": {"distill": [], "loss_share": 3}}}, ["clipart/a-0: loss_share: no effect"]),
        (
            {"arms": {"a": {"distill": [], "lr": 0.01}}},
            ["clipart: 'a' and 'alone' are the same network"],
        ),
        (
            {"arms": {"a": {"framework": "none", "head_width": 32}}},
            ["clipart/a-0: head_width: no effect"],
        ),
        (
            {"arms": {"a": {"distill": [], "framework": "none"}}},
            ["clipart/a-0: framework none, distill []", "expected a framework or"],
        ),
        (
            {"sets": {"mnist": {"arms": {"gram": {}}}}},
            ["mnist: arms: 'gram'", "some of the form's arms"],
        ),
        ({"sets": {"mnist": {"arms": 1}}}, ["sets: mnist: arms", "a mapping"]),
    ],
)
def test_invalid_form_is_an_error(tmp_path, changed, expected):
    with pytest.raises(RunError) as caught:
        plan(tmp_path, **changed)
    assert all(text in str(caught.value) for text in expected) and caught.value.code == 2


def test_base_keys_are_inherited_or_replaced(tmp_path):
    (tmp_path / "below").mkdir()
    base = TINY | {"arms": {"a": {"lr": 0.03}, "b": {"lr": 0.04}}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(base))
    second = {"base": "../tiny.yaml", "seeds": [3, 4], "arms": {"c": {"lr": 0.05}}}
    (tmp_path / "below" / "second.yaml").write_text(yaml.safe_dump(second))
    third = {"base": "second.yaml", "about": "a third form", "student": {"arch": "resnet34"}}
    (tmp_path / "below" / "third.yaml").write_text(yaml.safe_dump(third))
    own = read_plan(str(tmp_path / "below" / "third.yaml"))
    assert (own.form, own.about, own.seeds) == ("third", "a third form", [3, 4])
    assert own.arms == ["c"] and [*own.questions] == ["clipart", "mnist"]
    units = {unit.name: unit.train for unit in own.units}
    assert units["clipart/c-3"]["arch"] == "resnet34" and units["clipart/c-3"]["lr"] == 0.05
    assert units["clipart/teacher-3"]["arch"] == "resnet50"


def test_base_can_be_a_form_of_the_package(tmp_path):
    own = plan_of(tmp_path, {"base": "longer", "seeds": [5, 6]})
    expected = {unit.name: unit.train for unit in own_plan("longer").units}
    for unit in own.units:
        name = f"{unit.set}/{unit.name.split('/')[1].rsplit('-', 1)[0]}-0"
        assert unit.train == expected[name] | {"seed": unit.seed} and unit.seed in (5, 6)


def test_arms_can_name_some_of_the_base(tmp_path):
    arms = {"a": {"lr": 0.03}, "b": {"lr": 0.04}, "c": {"lr": 0.05}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"arms": arms}))
    own = plan_of(tmp_path, {"base": "tiny.yaml", "arms": ["c", "a"]})
    assert own.arms == ["c", "a"]
    rates = {unit.arm: unit.train["lr"] for unit in own.units if unit.arm in arms}
    assert rates == {"c": 0.05, "a": 0.03}


def plan_of(tmp_path, content):
    path = tmp_path / "form.yaml"
    path.write_text(yaml.safe_dump(content))
    return read_plan(str(path))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"base": "none.yaml"}, r"form.yaml: base 'none.yaml': \S+none.yaml: No such file"),
        ({"base": 5}, "form.yaml: base 5: expected the name of a form, or a YAML file"),
        ({"base": None}, "base None: expected the name"),
        ({"base": ""}, "base '': expected the name"),
        ({"base": "a\0b"}, r"base 'a\\x00b': expected the name"),
        ({"base": "form.yaml"}, "base 'form.yaml': a circle of bases"),
        ({"base": "other.yaml"}, "other.yaml: base '../NAME/form.yaml': a circle of bases"),
        ({"base": "wrong.yaml"}, r"base 'wrong.yaml': \S+wrong.yaml: keys: expected about, at_"),
        ({"base": "small", "more": 1}, "form.yaml: keys: expected about, .* if needed arms, base"),
        ({"base": "small", "seeds": [1]}, r"form.yaml: seeds \[1\]: expected 2 or more"),
        ({"base": "small", "train": [1]}, "form.yaml: train: expected a mapping"),
        ({"base": "small", "arms": ["a"]}, "form.yaml: arms: 'a': expected some of the base's"),
        ({"base": "distillers", "arms": ["gram", "grams"]}, "arms: 'grams': expected .*gram"),
        ({"base": "distillers", "arms": ["gram"] * 2}, "arms: 'gram': expected .* each once"),
        ({"base": "distillers", "arms": [["gram"]]}, r"arms: \['gram'\]: expected some"),
    ],
)
def test_invalid_base_is_one_line(tmp_path, content, expected):
    circle = {"base": f"../{tmp_path.name}/form.yaml"}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(circle))
    (tmp_path / "wrong.yaml").write_text("about: a wrong form\n")
    expected = expected.replace("NAME", tmp_path.name)
    with pytest.raises(RunError, match=rf"^[^\n]*{expected}[^\n]*$"):
        plan_of(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"about: [", "not YAML"),
        (b"\xff\xfe\x00", "not YAML"),
        (b"- 1\n", "keys"),
        (None, "No such file"),
    ],
)
def test_invalid_file_is_an_error(tmp_path, content, expected):
    path = tmp_path / "form.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=expected):
        read_plan(str(path))


def test_identical_units_are_an_error(tmp_path, monkeypatch):
    content = yaml.safe_load(resources.files("job.study").joinpath("questions.yaml").read_text())
    answers = content["questions"]["reducer"]["answers"]
    answers["another amp"] = {"reducer": "amp"}  # the default
    monkeypatch.setattr("job.study.plan.read_questions", lambda: content)
    expected = "'reducer another amp' and 'reducer amp' are the same network"
    with pytest.raises(RunError, match=expected):
        plan(tmp_path)
