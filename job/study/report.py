"""A study's results as text: conditions, verdicts, a table for each question, and the commands that gave them."""

from typing import Any

from job.study.findings import AUC, MEASURES, Scores
from job.study.plan import ALONE, MGD, RANDOM, TEACHER, UNTRAINED, Plan, Question

Records = list[dict[str, Any]]


def write(plan: Plan, records: Records, pictures: dict[str, str]) -> str:
    """Return the report, in Markdown. records: one of every unit. pictures: {set: a picture's file name}."""
    hours = sum(record["seconds"] for record in records) / 3600  # of commands, of which several may go at once
    machines = "; on ".join(sorted({record["on"] for record in records}))
    seeds = ", ".join(map(str, plan.seeds))
    lines = [
        f"# Results of {plan.about}",
        "",
        f"{len(records)} networks, seeds {seeds}; {hours:.1f} hours of commands, {plan.at_once} at a time; "
        f"finished {max(record['measured'] for record in records)} on {machines}.",
        "Accuracies are top-1 in percent on held-out images, means over seeds ± their standard deviation. A lead counts where it "
        "is larger than the larger deviation of the two. There is no third split: "
        "whoever chooses settings by these figures tunes on them. AUC: the area under the cumulative "
        "singular values of the normalised features, 0.5 if all are equal, 1 at full collapse. The last column has the "
        "distillation loss over the framework's, or over its range, in the first and in the last epoch.",
    ]
    for name, questions in plan.questions.items():
        lines += ["", *describe_set(name, [record for record in records if record["set"] == name], questions)]
        lines += ["", f"![{name}: accuracies of each seed and their means]({pictures[name]})"]
    return "\n".join([*lines, "", *describe_commands(records)]) + "\n"


def describe_set(name: str, records: Records, questions: list[Question]) -> list[str]:
    """Conditions and verdicts of a set, by measure, then its tables."""
    scores = [Scores.of(measure, records) for measure in MEASURES]
    lines = [f"## {name}", ""]
    for found in scores:
        lines += [f"- **{found.verdict()}.**"]
        lines += [f"  - condition {'holds' if holds else 'FAILS'}: {text}" for text, holds in found.conditions()]
        lines += [f"  - {text}" for text, _ in found.claims()]
    lines += [f"- {text}" for text in changes(records)]
    arms = {arm: arm for arm in (UNTRAINED, ALONE, TEACHER, MGD, *controls(records, questions))}
    lines += ["", *table("network", arms, scores, records)]
    for question in questions:
        lines += ["", f"**{question.asks}**", "", *table(question.name, question.answers, scores, records)]
    return lines


def changes(records: Records) -> list[str]:
    """Whether MGD and the random matching change the AUC, if all records have it."""
    if not all(AUC in record for record in records):
        return []
    scores = Scores.of(AUC, records)
    return [scores.change(*pair) for pair in ((ALONE, UNTRAINED), (MGD, ALONE), (RANDOM, ALONE), (MGD, RANDOM))]


def controls(records: Records, questions: list[Question]) -> list[str]:
    """The arms that are no question's alone."""
    asked = {f"{question.name} {answer}" for question in questions for answer in question.answers}
    return [
        arm for arm in dict.fromkeys(record["arm"] for record in records) if arm not in asked | {UNTRAINED, ALONE, TEACHER, MGD}
    ]


def table(title: str, arms: dict[str, str], scores: list[Scores], records: Records) -> list[str]:
    """A table of arms. arms: {what a row is called: the arm}."""
    auc = Scores.of(AUC, records) if all(AUC in record for record in records) else None
    head = [
        title,
        *(found.measure for found in scores),
        *(f"{found.measure} over alone" for found in scores),
        *(["AUC"] if auc else []),
        "distillation / framework's",
    ]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for shown, arm in arms.items():
        cells = [found.shown(arm, 1) for found in scores]
        cells += ["" if arm == ALONE else f"{found.lead(arm, ALONE):+.1f}" for found in scores]
        cells += [auc.shown(arm, 3)] if auc else []
        lines.append(f"| {' | '.join([shown, *cells, pull(arm, records)])} |")
    return lines


def pull(arm: str, records: Records) -> str:
    """The distillation loss over the framework's in the first and the last epoch, of an arm that has a teacher."""
    own = [record for record in records if record["arm"] == arm and record.get("pull_first")]
    if not own:
        return ""
    first, last = (sum(record[name] for record in own) / len(own) for name in ("pull_first", "pull_last"))
    return f"{first:.2g} to {last:.2g}"


def describe_commands(records: Records) -> list[str]:
    """The exact commands of the first seed of every arm; others have another --seed."""
    lines = ["## Commands", "", "Of each network with the first seed; the others have another `--seed`.", ""]
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        first.setdefault((record["set"], record["arm"]), record)
    for (name, arm), record in first.items():
        lines += [f"{name}, {arm}:", "", *(f"    {command}" for command in record["commands"]), ""]
    return lines
