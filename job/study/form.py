"""A study's form: a YAML file of sets, seeds and options, read with its base and checked."""

import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from job.errors import RunError
from job.study.data import CHOOSE, MOST, SETS, TEST

TEACHER, UNTRAINED, ALONE = "teacher", "untrained", "alone"
MGD, RANDOM, ORIGINAL = "mgd", "random", "original"
KEYS = {"about", "device", "at_once", "seeds", "train", "teacher", "student", "linear", "sets"}
OPTIONAL = {"base", "mgd", "controls", "arms", "split"}
SET_KEYS = {"most", "questions", "train", "teacher", "student", "arms"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .+-]*")  # of an arm
# The study sets these itself.
FILES = {"data", "more_data", "teacher", "pretrained", "out", "resume", "config"}


def read_form(form: str, derived: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a form's content merged with its base, checked except for the programs' options.

    derived: files of the forms that have this one as a base, directly or not.
    RunError: the form or its base is invalid, or the form is its own base.
    """
    own = own_forms()
    path = own.get(form, Path(form))
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        expected = f"expected a form, a YAML file, or one of {', '.join(sorted(own))}"
        raise RunError(f"{form}: {error.strerror}; {expected}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise RunError(f"{form}: not YAML: {' '.join(str(error).split())}") from None
    if isinstance(content, dict) and "base" in content:
        base = content.pop("base")
        if not (isinstance(base, str) and base and base.isprintable()):
            raise RunError(f"{form}: base {base!r}: expected the name of a form, or a YAML file")
        derived = (*derived, os.path.realpath(path))
        other = base if base in own else str(path.parent / base)
        if os.path.realpath(own.get(other, other)) in derived:
            raise RunError(f"{form}: base {base!r}: a circle of bases; expected another form")
        try:
            inherited = read_form(other, derived)
        except RunError as error:
            raise RunError(f"{form}: base {base!r}: {error}") from None
        if isinstance(content.get("arms"), list):
            content["arms"] = choose_arms(form, content["arms"], inherited.get("arms", {}))
        content = inherited | content
    check_form(form, content)
    return content


def choose_arms(form: str, names: list[Any], arms: dict[str, dict]) -> dict[str, dict]:
    """Return the arms of a base that a form names. RunError: a name is unknown or repeated."""
    for name in names:
        if name not in [*arms] or names.count(name) > 1:  # YAML items can be unhashable
            known = f"some of the base's arms ({', '.join(arms) or 'it has none'}), each once"
            raise RunError(f"{form}: arms: {name!r}: expected {known}, or a mapping of new arms")
    return {name: arms[name] for name in names}


def read_questions() -> dict[str, Any]:
    """Return the content of questions.yaml."""
    return yaml.safe_load(resources.files("job.study").joinpath("questions.yaml").read_text())


def own_forms() -> dict[str, Path]:
    """Return {name: file} of this package's forms."""
    folder = Path(str(resources.files("job.study")))
    files = {path.stem: path for path in folder.glob("*.yaml")}
    return {name: path for name, path in files.items() if name != "questions"}


def check_form(form: str, content: Any) -> None:
    """Check a form's keys. RunError: one is missing, unknown or invalid."""

    def expect(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise RunError(f"{form}: {key}: expected {expected}")

    keys = content.keys() if isinstance(content, dict) else set()
    allowed = f"{', '.join(sorted(KEYS))}, and if needed {', '.join(sorted(OPTIONAL))}"
    expect(KEYS <= keys <= KEYS | OPTIONAL, "keys", allowed)
    expect(content["device"] in ("cpu", "gpu"), f"device {content['device']!r}", "cpu or gpu")
    at_once = content["at_once"]
    expect(type(at_once) is int and at_once > 0, f"at_once {at_once!r}", "an integer above 0")
    seeds = content["seeds"]
    integers = isinstance(seeds, list) and all(type(seed) is int for seed in seeds)
    for key in ("train", "teacher", "student", "linear", "mgd"):
        check_options(form, key, content.get(key, {}))
    check_controls(form, content.get("controls", [RANDOM]))
    split = content.get("split", TEST)
    expect(split in (TEST, CHOOSE), f"split {split!r}", f"{TEST} or {CHOOSE}")
    # One seed shows which settings are much worse than the best. Results need a spread over seeds.
    fewest = 1 if split == CHOOSE else 2
    each_once = integers and len(set(seeds)) == len(seeds) >= fewest
    expect(each_once, f"seeds {seeds!r}", f"{fewest} or more integers, each once")
    arms = content.get("arms", {})
    check_arms(form, "arms", arms)
    expect(
        isinstance(content["sets"], dict) and bool(content["sets"]),
        "sets",
        f"one or more of {', '.join(SETS)}",
    )
    for name, own in content["sets"].items():
        expect(name in SETS, f"sets: {name!r}", f"one or more of {', '.join(SETS)}")
        expect(
            isinstance(own, dict) and own.keys() <= SET_KEYS,
            f"sets: {name}",
            f"a mapping of {', '.join(sorted(SET_KEYS))}",
        )
        most = own.get("most", MOST)
        expect(
            type(most) is int and 0 < most <= MOST,
            f"sets: {name}: most {most!r}",
            f"an integer from 1 to {MOST}",
        )
        questions = own.get("questions", [])
        valid = questions == "all" or isinstance(questions, (list, dict))
        expect(
            valid,
            f"sets: {name}: questions {questions!r}",
            "all, a list of names, or names with lists of answers",
        )
        for key in ("train", "teacher", "student"):
            check_options(form, f"sets: {name}: {key}", own.get(key, {}))
        check_arms(form, f"sets: {name}: arms", own.get("arms", {}))
        for arm in own.get("arms", {}):
            known = f"some of the form's arms ({', '.join(arms) or 'it has none'})"
            expect(arm in arms, f"sets: {name}: arms: {arm!r}", known)


def check_arms(form: str, key: str, arms: Any) -> None:
    """Check arms. RunError: they are invalid, or one has the name of a network of the study."""
    if not isinstance(arms, dict):
        raise RunError(f"{form}: {key}: expected a mapping, such as {{gram: {{distill: gram}}}}")
    taken = {TEACHER, UNTRAINED, ALONE, MGD, *read_questions()["controls"]}
    for arm, options in arms.items():
        if not (isinstance(arm, str) and NAME.fullmatch(arm)):
            expected = "a name of letters, digits, spaces and .+-"
            raise RunError(f"{form}: {key}: {arm!r}: expected {expected}")
        if slug(arm) in taken:
            reason = "the study has a network of this name; expected another name"
            raise RunError(f"{form}: {key}: {arm!r}: {reason}")
        check_options(form, f"{key}: {arm}", options)


def check_controls(form: str, controls: Any) -> None:
    """Check controls. RunError: one is unknown or repeated, or the random matching is missing."""
    known = [*read_questions()["controls"]]
    valid = isinstance(controls, list) and all(control in known for control in controls)
    if not valid or RANDOM not in controls or len(set(controls)) < len(controls):
        expected = f"{RANDOM}, and if needed others of {', '.join(known)}, each once"
        raise RunError(f"{form}: controls {controls!r}: expected a list with {expected}")


def check_options(form: str, key: str, options: Any) -> None:
    """Check options. RunError: they are invalid, set by the study, or leave nothing to measure."""
    if not isinstance(options, dict):
        raise RunError(f"{form}: {key}: expected a mapping, such as {{epochs: 4}}")
    if own := sorted((FILES | {"knn", "evaluate"}) & options.keys()):
        raise RunError(
            f"{form}: {key}: {own[0]}: the study sets it itself; expected other options. Remove it"
        )
    if options.get("knn_every", 1) == 0:
        raise RunError(
            f"{form}: {key}: knn_every 0: no k-NN accuracy to compare; expected 1 or more"
        )


def slug(arm: str) -> str:
    """Return an arm's name for its folders: "mgd + simreg" -> mgd-simreg."""
    return re.sub("[^a-z0-9.]+", "-", arm.lower())
