"""A form and the questions become units."""

import functools
import operator
import re
from importlib import resources

import pytest
import yaml

from job.distill import DISTILLERS
from job.errors import RunError
from job.study.form import own_forms
from job.study.plan import read_plan, words
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


def plan(tmp_path, **changed):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | changed))
    return read_plan(str(path))


def test_every_set_has_what_a_verdict_needs_and_its_questions_answers(tmp_path):
    found = plan(tmp_path)
    arms = {
        name: [unit.arm for unit in found.units if unit.set == name]
        for name in ("mnist", "clipart")
    }
    basis = [
        "teacher",
        *(
            arm
            for arm in ("untrained", "alone", "mgd", "random", "original")
            for _ in TINY["seeds"]
        ),
    ]
    assert arms["clipart"] == basis
    asked = [f"reducer {answer}" for answer in ("amp", "rd", "sp", "sm") for _ in TINY["seeds"]]
    assert arms["mnist"] == basis + asked
    [question] = found.questions["mnist"]
    assert question.answers == {
        "amp": "reducer amp",
        "rd": "reducer rd",
        "sp": "reducer sp",
        "sm": "reducer sm",
    }
    same = plan(tmp_path, sets={"mnist": {"questions": ["factor", "reducer"]}}).questions["mnist"]
    assert (
        same[1].answers["amp"] == same[0].answers["share 10"] == "factor share 10"
    )  # what is trained already is not again
    assert [unit.seed for unit in found.units[:3]] == [0, 0, 7]


def test_a_question_may_be_asked_with_some_of_its_answers(tmp_path):
    found = plan(
        tmp_path,
        sets={
            "mnist": {"questions": {"reducer": ["amp", "sm"], "refresh": ["once", "log schedule"]}}
        },
    )
    reducer, refresh = found.questions["mnist"]
    assert reducer.answers == {"amp": "reducer amp", "sm": "reducer sm"}
    assert refresh.answers == {"once": "refresh once", "log schedule": "mgd"}
    assert {unit.arm for unit in found.units if unit.arm.startswith("re")} == {
        "reducer amp",
        "reducer sm",
        "refresh once",
    }


def test_a_set_s_images_are_in_a_folder_of_their_own_number(tmp_path):
    found = plan(tmp_path, sets={"mnist": {"most": 50}, "clipart": {}})
    assert [found.images(name) for name in ("mnist", "clipart")] == [
        "data/mnist-50",
        "data/clipart-700",
    ]


def test_the_nearest_options_win(tmp_path):
    units = {unit.name: unit for unit in plan(tmp_path).units}
    assert (
        units["mnist/teacher-0"].train["epochs"] == 3 and units["mnist/mgd-7"].train["epochs"] == 1
    )
    assert units["mnist/mgd-7"].train["lr"] == 0.02 and units["clipart/mgd-7"].train["lr"] == 0.01
    assert units["mnist/reducer-rd-7"].train["reducer"] == "rd"
    assert [
        units[f"mnist/{name}-7"].train["loss_share"] for name in ("mgd", "reducer-rd", "original")
    ] == [0.1, 10, 0]  # a base
    assert units["mnist/random-0"].train["matching"] == "random"
    assert units["mnist/alone-0"].resolved()["job.train"]["epochs"] == 1
    assert units["mnist/untrained-7"].train == units["mnist/alone-7"].train | {
        "lr": 0.0,
        "epochs": 1,
        "warmup_epochs": 0,
    }


def test_a_record_from_before_the_option_of_k_stays_valid(tmp_path):
    """What a record is compared with names the option where it is given only."""
    unit = plan(tmp_path).units[0]
    assert all("knn_k" not in options for options in unit.resolved().values())
    unit.train["knn_k"] = 20
    assert unit.resolved()["job.train"]["knn_k"] == 20


def test_the_control_has_no_refreshes_whatever_the_form_says(tmp_path):
    units = {
        unit.arm: unit
        for unit in plan(tmp_path, student={"arch": "resnet18", "refresh_epochs": "every:2"}).units
    }
    assert (
        units["mgd"].train["refresh_epochs"]
        == units["original"].train["refresh_epochs"]
        == "every:2"
    )
    assert (
        units["random"].resolved()["job.train"]["matching"] == "random"
        and "refresh_epochs" not in units["random"].train
    )


def test_an_arm_without_a_framework_has_no_options_of_any_whatever_the_form_says(tmp_path):
    student = {"arch": "resnet18", "framework": "none", "moco_k": 64, "seed": 0}
    units = {unit.arm: unit for unit in plan(tmp_path, student=student).units}
    train = units["mgd"].train
    assert (
        train["framework"] == "none"
        and not {"moco_k", "mlp"} & train.keys()
        and units["mgd"].resolved()
    )
    assert units["teacher"].train["mlp"]


def test_a_form_can_change_the_setting_compared_with_and_leave_out_controls(tmp_path):
    tried = ["solved, share 0.1", "random, share 0.1", "random, share 10"]
    sets = {"mnist": {"questions": {"matching": tried}}}
    found = plan(
        tmp_path, mgd={"loss_share": 10.0, "reducer": "sm"}, controls=["random"], sets=sets
    )
    arms = {unit.arm: unit.train for unit in found.units}
    asked = [f"matching {answer}" for answer in tried[:2]]
    assert [*arms] == ["teacher", "untrained", "alone", "mgd", "random", *asked]
    shares = {arm: arms[arm]["loss_share"] for arm in ("mgd", "random", *asked)}
    assert shares == {"mgd": 10.0, "random": 10.0} | dict.fromkeys(asked, 0.1)
    assert all(arms[arm]["reducer"] == "sm" for arm in shares)
    assert found.questions["mnist"][0].answers["random, share 10"] == "random"


def test_simsiam_s_students_have_none_of_moco_s_options_and_its_teacher_only_those():
    found = read_plan("simsiam")
    assert found.questions.keys() == {"mnist", "characters"} and len(found.seeds) == 3
    expected = {"teacher", "untrained", "alone", "mgd", "random"}
    for unit in found.units:
        assert unit.arm in expected
        ours = unit.resolved()["job.train"]
        assert ours["framework"] == ("moco" if unit.arm == "teacher" else "simsiam")
        of_moco = {name for name in unit.train if name.startswith("moco_") or name == "mlp"}
        assert bool(of_moco) == (unit.arm == "teacher")


ARMS = {
    "Gram + 1": {"distill": "gram", "loss_share": 3.0},
    "bare": {"distill": ["mgd", "simreg"], "framework": "none"},
    "SimSiam": {"distill": [], "framework": "simsiam", "head_width": 32},
}
HEADS = {"arch": "resnet18", "head_width": 64, "reducer": "sm"}


def test_arms_have_the_student_s_options_and_not_those_of_mgd(tmp_path):
    found = plan(
        tmp_path,
        arms=ARMS,
        student=HEADS,
        sets={"mnist": {}},
        mgd={"loss_share": 7.0, "matching": "solved"},
    )
    units = {unit.name: unit for unit in found.units if unit.seed == 7}
    assert found.arms == ["Gram + 1", "SimSiam", "bare"]  # as the file has them
    assert [*units][-3:] == ["mnist/gram-1-7", "mnist/simsiam-7", "mnist/bare-7"]
    gram, simsiam, bare = (units[name] for name in [*units][-3:])
    common = {"image_size": 32, "epochs": 1, "lr": 0.01, "arch": "resnet18", "seed": 7}
    assert gram.train == common | {
        "mlp": True,
        "head_width": 64,
        "distill": "gram",
        "loss_share": 3.0,
    }
    assert bare.train == common | {"head_width": 64, "reducer": "sm", **ARMS["bare"]}
    assert simsiam.train == common | {"framework": "simsiam", "head_width": 32}
    assert [unit.guided for unit in (gram, bare, simsiam)] == [True, True, False]
    assert "distill" not in simsiam.resolved()["job.train"]


def test_a_set_can_change_options_of_arms(tmp_path):
    own = {"Gram + 1": {"loss_share": 5.0}}
    found = plan(tmp_path, arms=ARMS, sets={"mnist": {"arms": own}, "clipart": {}})
    units = {unit.name: unit.train for unit in found.units}
    assert [units[f"{name}/gram-1-0"]["loss_share"] for name in ("mnist", "clipart")] == [5.0, 3.0]
    assert (
        units["mnist/gram-1-0"]["distill"] == "gram"
        and units["mnist/bare-0"] == units["clipart/bare-0"]
    )


def test_a_head_s_width_is_left_out_if_no_head_has_a_hidden_layer(tmp_path):
    arms = {"bare": {"distill": "similarity", "framework": "none"}, "linear": {"mlp": False}}
    arms["hidden"] = {"distill": "similarity", "framework": "none", "similarity": "seed"}
    units = {
        unit.arm: unit.train
        for unit in plan(tmp_path, arms=arms, student=HEADS, sets={"mnist": {}}).units
    }
    assert {arm: "head_width" in train for arm, train in units.items() if arm in arms} == {
        "bare": False,
        "linear": False,
        "hidden": True,
    }
    assert units["mgd"]["head_width"] == 64 and "head_width" not in units["teacher"]


def test_a_form_s_split_chooses_the_images(tmp_path):
    assert plan(tmp_path).split == plan(tmp_path, split="test").split == "test"
    found = plan(tmp_path, split="choose")
    assert found.split == "choose" and found.images("mnist") == "data/mnist-700-choose"
    assert plan(tmp_path, split="test").images("mnist") == "data/mnist-700"


@pytest.mark.parametrize("value", [5, None, True, [1], "mdg"])
@pytest.mark.parametrize("option", ["framework", "distill"])
def test_a_wrong_framework_or_distiller_is_told_in_a_line(tmp_path, option, value):
    with pytest.raises(RunError, match=rf"^\S+: job.train: --{option} [^\n]*expected[^\n]*$"):
        plan(tmp_path, student={"arch": "resnet18", "seed": 0, option: value})


@pytest.mark.parametrize("form", ["small", "full"])
def test_the_forms_are_whole(form):
    found = read_plan(form)
    names = [unit.name for unit in found.units]
    assert (
        len(names) == len(set(names))
        and len(found.seeds) == 3
        and set(found.questions) == {"mnist", "clipart"}
    )
    for name in found.questions:
        alike = [(str(unit.resolved()), unit.guided) for unit in found.units if unit.set == name]
        assert len(alike) == len(set(alike))
    asked = {question.name for questions in found.questions.values() for question in questions}
    assert asked == {"factor", "margins", "reducer", "refresh", "matching", "stages"}


@pytest.mark.parametrize("form", ["small", "longer", "full", "simsiam"])
def test_guided_and_lone_students_do_the_same_steps(form):
    done, found = {}, read_plan(form)
    for unit in found.units:
        if unit.arm not in ("teacher", "untrained"):
            ours = unit.resolved()["job.train"]
            steps = [
                ours[name]
                for name in ("epochs", "batch_size", "accumulate", "lr", "image_size", "seed")
            ]
            assert done.setdefault((unit.set, unit.seed), steps) == steps
    assert len(done) == len(found.questions) * 3  # seeds


own_plan = functools.cache(read_plan)
FORMS_OF_DISTILLERS = [
    ("distillers", 24, "test", 256),
    ("distillers-trial", 21, "choose", 256),
    ("distillers-full", 24, "test", 1024),
]


@pytest.mark.parametrize(("form", "arms", "split", "head_width"), FORMS_OF_DISTILLERS)
def test_the_forms_of_distillers_train_every_one_at_equal_heads_and_steps(
    form,
    arms,
    split,
    head_width,
):
    found = own_plan(form)
    assert (len(found.arms), found.split) == (arms, split)
    assert [*found.questions] == ["characters", "writing"]
    trained = [unit.resolved()["job.train"] for unit in found.units]
    assert {name for options in trained for name in options.get("distill", [])} == {*DISTILLERS}
    for name in found.questions:
        students = []
        for unit, options in zip(found.units, trained, strict=True):
            if unit.set == name and unit.arm not in ("teacher", "untrained"):
                students.append((unit.train, options))
        same = ("epochs", "batch_size", "image_size", "width")
        assert len({tuple(options[key] for key in same) for _, options in students}) == 1
        heads = [train.get("head_width") for train, _ in students]
        assert {*heads} - {None} == {head_width}
        bare = [options["framework"] == "none" for _, options in students]
        assert all(map(operator.or_, bare, map(bool, heads)))


def test_the_program_names_all_forms(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(re.search(rf"[ ,]{form}[,:]", " ".join(said.split())) for form in own_forms())


def test_the_form_of_distillers_has_mgd_as_published_and_its_teachers_40_epochs():
    found = own_plan("distillers")
    for unit in found.units:
        if unit.arm == "original":
            train = unit.train
            assert (train["loss_share"], train["loss_factor"]) == (0, 1e4)
            assert train["margins"] == "init" and unit.resolved()
        assert unit.arm != "teacher" or unit.train["epochs"] == 40


def test_the_longer_form_of_distillers_has_some_of_their_arms_and_four_times_the_epochs():
    short = {unit.name: unit for unit in own_plan("distillers").units}
    for unit in own_plan("distillers-long").units:
        other = short[unit.name]
        epochs = other.train["epochs"]
        epochs *= 1 if unit.arm in ("teacher", "untrained") else 4
        assert unit.train == other.train | {"epochs": epochs} and unit.linear == other.linear


def test_the_full_form_of_distillers_has_the_networks_of_the_full_form():
    found, full = own_plan("distillers-full"), own_plan("full")
    assert (found.device, found.at_once) == (full.device, full.at_once)
    digits = {unit.arm: unit for unit in full.units if unit.set == "mnist"}
    same = ("arch", "width", "image_size", "precision", "augment_on", "batch_size", "epochs")
    for unit in found.units:
        if unit.arm in digits:
            ours, theirs = (each.resolved()["job.train"] for each in (unit, digits[unit.arm]))
            assert [ours[name] for name in same] == [theirs[name] for name in same]
    assert found.arms == own_plan("distillers").arms


def test_a_trial_has_the_networks_of_the_form_that_it_is_for_and_other_seeds():
    form, trial = (own_plan(name) for name in ("distillers", "distillers-trial"))
    assert not {*form.seeds} & {*trial.seeds}
    for name in form.questions:
        for arm in ("teacher", "untrained", "alone", "gram"):
            ours, theirs = (
                next(u.resolved() for u in p.units if u.set == name and u.arm.split(" 1")[0] == arm)
                for p in (form, trial)
            )
            del ours["job.train"]["seed"], theirs["job.train"]["seed"]
            ours["job.train"].pop("loss_share", 0), theirs["job.train"].pop("loss_share", 0)
            assert ours["job.train"] == theirs["job.train"]


def test_the_longer_form_is_the_small_one_but_for_its_students_epochs():
    small = {unit.name: unit for unit in read_plan("small").units}
    for unit in read_plan("longer").units:
        train, linear = small[unit.name].train, small[unit.name].linear
        epochs = train["epochs"] * (1 if unit.arm in ("teacher", "untrained") else 2)
        assert (unit.train, unit.linear) == (train | {"epochs": epochs}, linear), unit.name


def test_words():
    options = {"moco_k": 256, "mlp": True, "cos": False, "mgd_stages": [3, 4], "lr": 0.5}
    assert words(options) == [
        "--moco-k",
        "256",
        "--mlp",
        "--no-cos",
        "--mgd-stages",
        "3",
        "4",
        "--lr",
        "0.5",
    ]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"about": None, "more": 1}, ["keys", "expected about"]),
        ({"device": "tpu"}, ["device 'tpu'", "cpu or gpu"]),
        ({"at_once": 0}, ["at_once 0", "from 1 on"]),
        ({"at_once": True}, ["at_once True", "from 1 on"]),
        ({"seeds": []}, ["seeds []", "2 or more whole numbers"]),
        ({"seeds": [3]}, ["seeds [3]", "2 or more whole numbers"]),
        ({"seeds": [1, 1]}, ["seeds [1, 1]", "each once"]),
        ({"seeds": [], "split": "choose"}, ["seeds []", "1 or more whole numbers"]),
        ({"seeds": 3}, ["seeds 3", "2 or more whole numbers"]),
        ({"train": [1]}, ["train", "a mapping"]),
        ({"student": {"teacher": "t.pth"}}, ["student: teacher", "leave it out"]),
        ({"linear": {"pretrained": "t.pth"}}, ["linear: pretrained", "leave it out"]),
        ({"linear": {"knn": True}}, ["linear: knn", "leave it out"]),
        (
            {"sets": {"mnist": {"train": {"knn_every": 0}}}},
            ["mnist: train: knn_every 0", "1 or more"],
        ),
        ({"sets": {"mnist": {"questions": "reducer"}}}, ["questions 'reducer'", "a list of names"]),
        ({"mgd": 0.1}, ["mgd", "a mapping"]),
        ({"mgd": {"teacher": "t.pth"}}, ["mgd: teacher", "leave it out"]),
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
            ["arms: 'reducer rd'", "by a question; expected another name"],
        ),
        (
            {"arms": {"reducer-rd": {}}},
            ["'reducer-rd' and 'reducer rd' have the same folder mnist/reducer-rd-0: rename"],
        ),
        ({"arms": {"gram": {"teacher": "t.pth"}}}, ["arms: gram: teacher", "leave it out"]),
        ({"arms": {"gram": {"distil": "gram"}}}, ["clipart/gram-0: job.train", "--distil"]),
        (
            {"arms": {"gram": {"distill": "gram", "reducer": "sm"}}},
            ["clipart/gram-0: reducer: no effect", "leave it out"],
        ),
        (
            {"arms": {"a": {"distill": "gram"}, "b": {"distill": ["gram"]}}},
            ["'b' and 'a' are the same network: leave out"],
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
            ["clipart/a-0: framework none, distill []", "expected one"],
        ),
        (
            {"sets": {"mnist": {"arms": {"gram": {}}}}},
            ["mnist: arms: 'gram'", "some of the form's arms"],
        ),
        ({"sets": {"mnist": {"arms": 1}}}, ["sets: mnist: arms", "a mapping"]),
    ],
)
def test_a_wrong_form_is_told_in_a_line(tmp_path, changed, expected):
    with pytest.raises(RunError) as caught:
        plan(tmp_path, **changed)
    assert all(word in str(caught.value) for word in expected) and caught.value.code == 2


def test_a_form_has_the_keys_of_its_base_except_the_ones_that_it_names(tmp_path):
    (tmp_path / "below").mkdir()
    base = TINY | {"arms": {"a": {"lr": 0.03}, "b": {"lr": 0.04}}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(base))
    second = {"base": "../tiny.yaml", "seeds": [3, 4], "arms": {"c": {"lr": 0.05}}}
    (tmp_path / "below" / "second.yaml").write_text(yaml.safe_dump(second))
    third = {"base": "second.yaml", "about": "a third form", "student": {"arch": "resnet34"}}
    (tmp_path / "below" / "third.yaml").write_text(yaml.safe_dump(third))
    found = read_plan(str(tmp_path / "below" / "third.yaml"))
    assert (found.form, found.about, found.seeds) == ("third", "a third form", [3, 4])
    assert found.arms == ["c"] and [*found.questions] == ["clipart", "mnist"]
    units = {unit.name: unit.train for unit in found.units}
    assert units["clipart/c-3"]["arch"] == "resnet34" and units["clipart/c-3"]["lr"] == 0.05
    assert units["clipart/teacher-3"]["arch"] == "resnet50"


def test_a_form_of_the_package_can_be_a_base(tmp_path):
    found = plan_of(tmp_path, {"base": "longer", "seeds": [5, 6]})
    expected = {unit.name: unit.train for unit in read_plan("longer").units}
    for unit in found.units:
        name = f"{unit.set}/{unit.name.split('/')[1].rsplit('-', 1)[0]}-0"
        assert unit.train == expected[name] | {"seed": unit.seed} and unit.seed in (5, 6)


def test_a_form_can_name_some_of_its_base_s_arms(tmp_path):
    arms = {"a": {"lr": 0.03}, "b": {"lr": 0.04}, "c": {"lr": 0.05}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"arms": arms}))
    found = plan_of(tmp_path, {"base": "tiny.yaml", "arms": ["c", "a"]})
    assert found.arms == ["c", "a"]
    rates = {unit.arm: unit.train["lr"] for unit in found.units if unit.arm in arms}
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
def test_a_wrong_base_is_told_in_a_line(tmp_path, content, expected):
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
def test_what_is_no_form_is_told_in_a_line(tmp_path, content, expected):
    path = tmp_path / "form.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=expected):
        read_plan(str(path))


def test_two_units_alike_are_refused(tmp_path, monkeypatch):
    asked = yaml.safe_load(resources.files("job.study").joinpath("questions.yaml").read_text())
    asked["questions"]["reducer"]["answers"]["another amp"] = {
        "reducer": "amp"
    }  # as it is by default
    monkeypatch.setattr("job.study.plan.read_questions", lambda: asked)
    with pytest.raises(
        RunError, match="'reducer another amp' and 'reducer amp' are the same network"
    ):
        plan(tmp_path)
