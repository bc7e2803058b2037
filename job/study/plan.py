"""What a study trains: a form and the questions as a list of units."""

import dataclasses
from pathlib import Path
from typing import Any

from job.config import (
    OF_TEACHER,
    WITHOUT_EFFECT,
    Config,
    LinearConfig,
    MethodOptions,
    read_config,
    without_head,
    without_part,
)
from job.declare import convert, flag, words_of
from job.errors import RunError
from job.study.data import CHOOSE, MOST, TEST
from job.study.form import (
    ALONE,
    FILES,
    MGD,
    TEACHER,
    UNTRAINED,
    read_form,
    read_questions,
    slug,
)

# An epoch that changes no weight: without the images' statistics in its batch norms a network is worse than it is.
STILL = {"lr": 0.0, "epochs": 1, "warmup_epochs": 0}
PLACES = (
    WITHOUT_EFFECT | FILES | {"keep", "save_every", "knn_every", "max_bad_images"}
)  # what no result depends on

LATER = ("knn_k", "deterministic")  # options that were added, off by default

METHOD = [f for f in dataclasses.fields(MethodOptions) if f.name in ("framework", "distill")]


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """One network of a study, from its first weights to its accuracies.

    train: options of job.train; linear: of job.linear. Neither names files.
    guided: it has a teacher.
    """

    set: str
    arm: str
    seed: int
    train: dict[str, Any]
    linear: dict[str, Any]
    guided: bool

    @property
    def name(self) -> str:
        """Its name, and that of its folder: clipart/mgd-0."""
        return f"{self.set}/{slug(self.arm)}-{self.seed}"

    def resolved(self) -> dict[str, dict[str, Any]]:
        """All options that its results follow from, those included that have their defaults. RunError: some are wrong."""
        found = {}
        unused = PLACES if self.guided else PLACES | OF_TEACHER
        configs = {"job.train": self.config(self.train), "job.linear": self.classifier()}
        for program, config in configs.items():
            values = dataclasses.asdict(config).items()
            found[program] = {name: value for name, value in values if name not in unused}
            for name in LATER:
                if not found[program][name]:
                    del found[program][name]  # records from before the option remain valid
        return found

    def config(self, train: dict[str, Any]) -> Config:
        """Return `train`, resolved. RunError: some are invalid."""
        teacher = ["--teacher", "TEACHER"] if self.guided else []
        knn = words({"knn_every": 1})  # of all units, unless `train` has another
        try:
            return read_config(["DATA", *knn, *words(train), *teacher])
        except RunError as error:
            raise RunError(f"{self.name}: job.train: {error}") from None

    def classifier(self) -> LinearConfig:
        """Return `linear`, resolved. RunError: some are invalid."""
        try:
            return read_config(["DATA", *words(self.linear)], "job.linear", LinearConfig)
        except RunError as error:
            raise RunError(f"{self.name}: job.linear: {error}") from None


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a set's students. answers: {answer: the arm that gives it}."""

    name: str
    asks: str
    answers: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A form, and the questions it asks of its sets: {set: its questions}. units: in the order in which they are trained.

    most: {set: images of a class to train on}. split: test or choose (job/study/data.py).
    arms: names of the form's own students.
    """

    form: str
    about: str
    device: str
    at_once: int
    seeds: list[int]
    questions: dict[str, list[Question]]
    most: dict[str, int]
    split: str
    arms: list[str]
    units: list[Unit]

    def images(self, name: str) -> str:
        """Return the folder of a set's images, below the study's: data/clipart-700[-choose]."""
        end = f"-{CHOOSE}" if self.split == CHOOSE else ""
        return f"data/{name}-{self.most[name]}{end}"


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
        own, changed = content.get("arms", {}), options.get("arms", {})
        own = {arm: changes | changed.get(arm, {}) for arm, changes in own.items()}
        if both := sorted(own.keys() & arms.keys()):
            reason = f"{name} has this network by a question"
            raise RunError(f"{form}: arms: {both[0]!r}: {reason}; expected another name")
        units += list_units(name, content, {UNTRAINED: STILL, ALONE: {}, **arms} | own)
    most = {name: options.get("most", MOST) for name, options in content["sets"].items()}
    head = (
        Path(form).stem,
        content["about"],
        content["device"],
        content["at_once"],
        content["seeds"],
    )
    split, names = content.get("split", TEST), [*content.get("arms", {})]
    plan = Plan(*head, questions, most, split, names, units)
    check_unlike(plan)
    return plan


def choose(
    form: str, name: str, wanted: str | list[str] | dict[str, list[str]], questions: dict[str, dict]
) -> dict[str, dict]:
    """Return those of the questions that a set asks, each with the answers it tries. RunError: there is no such one."""
    if wanted == "all":
        return questions
    chosen = {}
    for key in wanted:
        if key not in [*questions]:  # which takes a key of any type
            raise RunError(
                f"{form}: {name}: no question {key!r}; expected all, or some of {', '.join(questions)}"
            )
        answers = questions[key]["answers"]
        tried = wanted[key] if isinstance(wanted, dict) else list(answers)
        known = isinstance(tried, list) and all(answer in [*answers] for answer in tried)
        if not known or len(set(tried)) < max(2, len(tried)):
            raise RunError(
                f"{form}: {name}: {key} {tried!r}: expected two or more of {', '.join(answers)}, each once"
            )
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
        train = (
            content["train"]
            | own.get("train", {})
            | content[role]
            | own.get(role, {})
            | options
            | {"seed": seed}
        )
        undistilled = options.get("distill") == []
        guided = arm not in (TEACHER, UNTRAINED, ALONE) and not undistilled
        if undistilled:
            del train["distill"]
        if train.get("matching") == "random":
            train.pop("refresh_epochs", None)  # which is of those that solve theirs
        linear = content["linear"] | {"seed": seed}
        found = without_unused(Unit(name, arm, seed, train, linear, guided))
        if undistilled and train.get("framework") == "none":
            reason = "nothing trains it; expected one of the two"
            raise RunError(f"{found.name}: framework none, distill []: {reason}")
        if arm in content.get("arms", {}):
            unused = options.keys() - found.train.keys() | (OF_TEACHER if undistilled else set())
            if lost := sorted(options.keys() & unused - {"distill"}):
                reason = "no effect on this network; leave it out of the arm"
                raise RunError(f"{found.name}: {lost[0]}: {reason}")
        return found

    return [unit(TEACHER, seeds[0], {})] + [
        unit(arm, seed, options) for arm, options in arms.items() for seed in seeds
    ]


def without_unused(unit: Unit) -> Unit:
    """Return a unit without the options of frameworks, distillers, heads or teachers it lacks.

    RunError: its framework or distillers are invalid.
    """
    try:
        chosen = {
            f.name: convert(f, unit.train[f.name], flag(f.name))
            for f in METHOD
            if f.name in unit.train
        }
    except RunError as error:
        raise RunError(f"{unit.name}: job.train: {error}") from None
    unused = {*without_part(MethodOptions(**chosen))}
    unused |= set() if unit.guided else OF_TEACHER
    train = {name: value for name, value in unit.train.items() if name not in unused}
    rest = {name: value for name, value in train.items() if name != "head_width"}
    if rest != train and without_head(unit.config(rest)):
        train = rest
    return dataclasses.replace(unit, train=train)


def check_unlike(plan: Plan) -> None:
    """RunError: two units have one name, or two of a set and seed are the same network."""
    seen: dict[str, str] = {}
    for unit in plan.units:
        kind = f"{unit.set} {unit.seed} {unit.guided} {unit.resolved()}"
        marks = {unit.name: f"have the same folder {unit.name}: rename"}
        marks[kind] = "are the same network: leave out"
        for mark, problem in marks.items():
            if mark in seen:
                both = f"{unit.arm!r} and {seen[mark]!r}"
                raise RunError(f"{unit.set}: {both} {problem} one of them")
            seen[mark] = unit.arm


def words(options: dict[str, Any]) -> list[str]:
    """A command line's words for options: {"moco_k": 256, "mlp": True} -> --moco-k 256 --mlp."""
    return [word for name, value in options.items() for word in words_of(name, value)]
