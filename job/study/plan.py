"""What a study trains: a form's sets, seeds and options, and the questions, as a list of units."""

import dataclasses
import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from job.config import (
    WITHOUT_EFFECT,
    LinearConfig,
    MethodOptions,
    read_config,
    without_part,
)
from job.declare import convert, flag
from job.errors import RunError
from job.study.data import MOST, SETS

TEACHER, UNTRAINED, ALONE, MGD, RANDOM = "teacher", "untrained", "alone", "mgd", "random"
KEYS = {"about", "device", "at_once", "seeds", "train", "teacher", "student", "linear", "sets"}
OPTIONAL = {"mgd", "controls"}
SET_KEYS = {"most", "questions", "train", "teacher", "student"}
# An epoch that changes no weight: without the images' statistics in its batch norms a network is worse than it is.
STILL = {"lr": 0.0, "epochs": 1, "warmup_epochs": 0}
FILES = {"data", "teacher", "pretrained", "out", "resume", "config"}  # the study's own affair
PLACES = WITHOUT_EFFECT | FILES | {"keep", "save_every", "knn_every", "max_bad_images"}  # what no result depends on

METHOD = [f for f in dataclasses.fields(MethodOptions) if f.name in ("framework", "distill")]


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """One network of a study, from its first weights to its accuracies.

    train: options of job.train; linear: of job.linear. Neither names files.
    """

    set: str
    arm: str
    seed: int
    train: dict[str, Any]
    linear: dict[str, Any]

    @property
    def name(self) -> str:
        """Its name, and that of its folder: clipart/mgd-0."""
        return f"{self.set}/{re.sub('[^a-z0-9.]+', '-', self.arm.lower())}-{self.seed}"

    @property
    def guided(self) -> bool:
        """Whether it has a teacher."""
        return self.arm not in (TEACHER, UNTRAINED, ALONE)

    def resolved(self) -> dict[str, dict[str, Any]]:
        """All options that its results follow from, those included that have their defaults. RunError: some are wrong."""
        found = {}
        for program, options, kind in (("job.train", self.train, None), ("job.linear", self.linear, LinearConfig)):
            try:
                config = read_config(["DATA", *words(options)], program, *([kind] if kind else []))
            except RunError as error:
                raise RunError(f"{self.name}: {program}: {error}") from None
            found[program] = {name: value for name, value in dataclasses.asdict(config).items() if name not in PLACES}
            if not found[program]["knn_k"]:
                del found[program]["knn_k"]  # a record of a study from before there was the option remains valid
        return found


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a set's students. answers: {answer: the arm that gives it}."""

    name: str
    asks: str
    answers: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A form, and the questions it asks of its sets: {set: its questions}. units: in the order in which they are trained.

    most: {set: images of a class to train on}.
    """

    form: str
    about: str
    device: str
    at_once: int
    seeds: list[int]
    questions: dict[str, list[Question]]
    most: dict[str, int]
    units: list[Unit]

    def images(self, name: str) -> str:
        """The folder of a set's images, below the study's: data/clipart-700."""
        return f"data/{name}-{self.most[name]}"


def read_plan(form: str) -> Plan:
    """Return the plan of a form, a YAML file or the name of one of this package's. RunError: it is wrong somewhere."""
    content = read_form(form)
    asked = read_questions()
    reference = asked["mgd"] | content.get("mgd", {})
    controls = {arm: asked["controls"][arm] for arm in content.get("controls", asked["controls"])}
    questions, units = {}, []
    for name, options in content["sets"].items():
        wanted = choose(form, name, options.get("questions", []), asked["questions"])
        arms = {MGD: reference} | {arm: reference | changes for arm, changes in controls.items()}
        questions[name] = [ask(key, question, reference, arms) for key, question in wanted.items()]
        units += list_units(name, content, {UNTRAINED: STILL, ALONE: {}, **arms})
    most = {name: options.get("most", MOST) for name, options in content["sets"].items()}
    head = (Path(form).stem, content["about"], content["device"], content["at_once"], content["seeds"])
    plan = Plan(*head, questions, most, units)
    check_unlike(plan)
    return plan


def choose(form: str, name: str, wanted: str | list[str] | dict[str, list[str]], questions: dict[str, dict]) -> dict[str, dict]:
    """Return those of the questions that a set asks, each with the answers it tries. RunError: there is no such one."""
    if wanted == "all":
        return questions
    chosen = {}
    for key in wanted:
        if key not in [*questions]:  # which takes a key of any type
            raise RunError(f"{form}: {name}: no question {key!r}; expected all, or some of {', '.join(questions)}")
        answers = questions[key]["answers"]
        tried = wanted[key] if isinstance(wanted, dict) else list(answers)
        known = isinstance(tried, list) and all(answer in [*answers] for answer in tried)
        if not known or len(set(tried)) < max(2, len(tried)):
            raise RunError(f"{form}: {name}: {key} {tried!r}: expected two or more of {', '.join(answers)}, each once")
        chosen[key] = questions[key] | {"answers": {answer: answers[answer] for answer in tried}}
    return chosen


def ask(name: str, question: dict, base: dict, arms: dict[str, dict]) -> Question:
    """Return a question. arms: {arm: its options}, to which are added those that its answers need beside them."""
    answers = {}
    for answer, changes in question["answers"].items():
        options = base | question.get("base", {}) | changes
        same = [arm for arm, others in arms.items() if others == options]
        answers[answer] = same[0] if same else f"{name} {answer}"
        arms[answers[answer]] = options
    return Question(name, question["asks"], answers)


def list_units(name: str, content: dict, arms: dict[str, dict]) -> list[Unit]:
    """The units of a set: its teacher first, then arm by arm what a verdict needs, then the rest."""
    own, seeds = content["sets"][name], content["seeds"]

    def unit(arm: str, seed: int, options: dict) -> Unit:
        role = TEACHER if arm == TEACHER else "student"
        train = content["train"] | own.get("train", {}) | content[role] | own.get(role, {}) | options | {"seed": seed}
        if train.get("matching") == "random":
            train.pop("refresh_epochs", None)  # which is of those that solve theirs
        return without_unused(Unit(name, arm, seed, train, content["linear"] | {"seed": seed}))

    return [unit(TEACHER, seeds[0], {})] + [unit(arm, seed, options) for arm, options in arms.items() for seed in seeds]


def without_unused(unit: Unit) -> Unit:
    """Return a unit without the options of frameworks and distillers that it does not choose.

    RunError: its framework or distillers are invalid.
    """
    try:
        chosen = {f.name: convert(f, unit.train[f.name], flag(f.name)) for f in METHOD if f.name in unit.train}
    except RunError as error:
        raise RunError(f"{unit.name}: job.train: {error}") from None
    unused = without_part(MethodOptions(**chosen))
    train = {name: value for name, value in unit.train.items() if name not in unused}
    return dataclasses.replace(unit, train=train)


def check_unlike(plan: Plan) -> None:
    """RunError: two units of a set and seed are the same network, so that comparing them tells nothing; or have one name."""
    seen: dict[str, str] = {}
    for unit in plan.units:
        for mark in (f"{unit.set} {unit.seed} {unit.guided} {unit.resolved()}", unit.name):
            if mark in seen:
                raise RunError(f"{unit.set}: {unit.arm!r} and {seen[mark]!r} are the same network: leave out one of them")
            seen[mark] = unit.arm


def words(options: dict[str, Any]) -> list[str]:
    """A command line's words for options: {"moco_k": 256, "mlp": True} -> --moco-k 256 --mlp."""
    found = []
    for name, value in options.items():
        if isinstance(value, bool):
            found.append(flag(name) if value else flag(name).replace("--", "--no-", 1))
        else:
            found += [flag(name), *map(str, value if isinstance(value, list) else [value])]
    return found


def read_questions() -> dict[str, Any]:
    """The content of questions.yaml."""
    return yaml.safe_load(resources.files("job.study").joinpath("questions.yaml").read_text())


def read_form(form: str) -> dict[str, Any]:
    """Return a form's content, checked but for the programs' options. RunError: it is none."""
    own = {
        path.name.removesuffix(".yaml"): path for path in resources.files("job.study").iterdir() if path.name.endswith(".yaml")
    }
    own.pop("questions")
    try:
        text = own[form].read_text() if form in own else Path(form).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except OSError as error:
        raise RunError(f"{form}: {error.strerror}; expected a form, a YAML file, or one of {', '.join(sorted(own))}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise RunError(f"{form}: not YAML: {' '.join(str(error).split())}") from None
    check_form(form, content)
    return content


def check_form(form: str, content: Any) -> None:
    """RunError: a form lacks something, or has what no form has."""

    def expect(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise RunError(f"{form}: {key}: expected {expected}")

    keys = content.keys() if isinstance(content, dict) else set()
    allowed = f"{', '.join(sorted(KEYS))}, and if needed {', '.join(sorted(OPTIONAL))}"
    expect(KEYS <= keys <= KEYS | OPTIONAL, "keys", allowed)
    expect(content["device"] in ("cpu", "gpu"), f"device {content['device']!r}", "cpu or gpu")
    at_once = content["at_once"]
    expect(type(at_once) is int and at_once > 0, f"at_once {at_once!r}", "a whole number from 1 on")
    seeds = content["seeds"]
    whole = isinstance(seeds, list) and all(type(seed) is int for seed in seeds)
    expect(whole and len(seeds) > 1 and len(set(seeds)) == len(seeds), f"seeds {seeds!r}", "two whole numbers or more, each once")
    for key in ("train", "teacher", "student", "linear", "mgd"):
        check_options(form, key, content.get(key, {}))
    check_controls(form, content.get("controls", [RANDOM]))
    expect(isinstance(content["sets"], dict) and bool(content["sets"]), "sets", f"one or more of {', '.join(SETS)}")
    for name, own in content["sets"].items():
        expect(name in SETS, f"sets: {name!r}", f"one or more of {', '.join(SETS)}")
        expect(isinstance(own, dict) and own.keys() <= SET_KEYS, f"sets: {name}", f"a mapping of {', '.join(sorted(SET_KEYS))}")
        most = own.get("most", MOST)
        expect(type(most) is int and 0 < most <= MOST, f"sets: {name}: most {most!r}", f"a whole number from 1 to {MOST}")
        asked = own.get("questions", [])
        named = asked == "all" or isinstance(asked, (list, dict))
        expect(named, f"sets: {name}: questions {asked!r}", "all, a list of names, or names with lists of answers")
        for key in ("train", "teacher", "student"):
            check_options(form, f"sets: {name}: {key}", own.get(key, {}))


def check_controls(form: str, controls: Any) -> None:
    """RunError: a control is unknown or listed twice, or the random matching is missing."""
    known = [*read_questions()["controls"]]
    valid = isinstance(controls, list) and all(control in known for control in controls)
    if not valid or RANDOM not in controls or len(set(controls)) < len(controls):
        expected = f"{RANDOM}, and if needed others of {', '.join(known)}, each once"
        raise RunError(f"{form}: controls {controls!r}: expected a list with {expected}")


def check_options(form: str, key: str, options: Any) -> None:
    """RunError: these are no options, or some that the study gives itself, or with which it has nothing to measure."""
    if not isinstance(options, dict):
        raise RunError(f"{form}: {key}: expected a mapping, such as {{epochs: 4}}")
    if own := sorted((FILES | {"knn", "evaluate"}) & options.keys()):
        raise RunError(f"{form}: {key}: {own[0]}: leave it out; the study gives it where it is needed")
    if options.get("knn_every", 1) == 0:
        raise RunError(f"{form}: {key}: knn_every 0: expected 1 or more, as a network's k-NN accuracy is what is compared")
