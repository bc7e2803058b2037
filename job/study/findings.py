"""A study's findings: whether a comparison is valid, and which arm beats which."""

import dataclasses
import statistics
from collections.abc import Collection, Iterable
from typing import Any

from job.study.form import ALONE, MGD, ORIGINAL, RANDOM, TEACHER, UNTRAINED

MEASURES = {"knn": "k-NN", "linear": "linear"}
AUC = "knn_auc"  # of the features' singular values: 0.5 if all are equal, 1 at full collapse
STEP = "step_seconds"  # the median over the steps of a training
LEAST = 5.0  # points: the smallest lead with which a condition holds
NAMES = {
    UNTRAINED: "the untrained student",
    ALONE: "the student alone",
    TEACHER: "the teacher",
    MGD: "MGD",
}
NAMES |= {RANDOM: "MGD with a random matching"}


@dataclasses.dataclass(frozen=True)
class Scores:
    """A set's accuracies by one measure.

    by_arm: {arm: one value per seed}, in percent. among: the form's own arms. If it has any, no
    student may reach the teacher. partial: arms of the set are missing.
    """

    measure: str
    by_arm: dict[str, list[float]]
    among: Collection[str] = ()
    partial: bool = False

    @classmethod
    def of(
        cls,
        measure: str,
        records: Iterable[dict[str, Any]],
        among: Collection[str] = (),
        partial: bool = False,
    ) -> "Scores":
        """Return the scores of a set's records."""
        by_arm: dict[str, list[float]] = {}
        for record in sorted(records, key=lambda record: record["seed"]):
            by_arm.setdefault(record["arm"], []).append(record[measure])
        name = (MEASURES | {AUC: "AUC", STEP: "seconds a step"})[measure]
        return cls(name, by_arm, among, partial)

    def mean(self, arm: str) -> float:
        """Return the mean over seeds."""
        return statistics.fmean(self.by_arm[arm])

    def spread(self, arm: str) -> float:
        """Return the sample standard deviation over seeds, or 0 if there is only one seed."""
        values = self.by_arm[arm]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def shown(self, arm: str, digits: int) -> str:
        """Format the mean, and the spread if there are several seeds: 66.7 ± 5.0."""
        spread = f" ± {self.spread(arm):.{digits}f}" if len(self.by_arm[arm]) > 1 else ""
        return f"{self.mean(arm):.{digits}f}{spread}"

    def lead(self, arm: str, other: str) -> float:
        """Return an arm's mean minus that of another, in points."""
        return self.mean(arm) - self.mean(other)

    def noise(self, arm: str, other: str) -> float:
        """Return the larger spread of two arms, which a lead must exceed."""
        return max(self.spread(arm), self.spread(other))

    def beats(self, arm: str, other: str) -> bool:
        """Return whether an arm's lead over another exceeds the larger spread of the two."""
        return self.lead(arm, other) > self.noise(arm, other)

    def margin(self, arm: str, other: str) -> str:
        """Format an arm's lead over another and their larger spread: +2.0, spread 1.0."""
        return f"{self.lead(arm, other):+.1f}, spread {self.noise(arm, other):.1f}"

    def recovered(self, arm: str) -> float | None:
        """Return an arm's lead over the student alone, in percent of the teacher's lead.

        None: the teacher's lead is below LEAST, so one point would be many percent.
        """
        _, holds = self.condition(TEACHER, ALONE)
        return 100 * self.lead(arm, ALONE) / self.lead(TEACHER, ALONE) if holds else None

    @property
    def students(self) -> list[str]:
        """Return the names of the trained students, the best first."""
        trained = (arm for arm in self.by_arm if arm not in (TEACHER, UNTRAINED))
        return sorted(trained, key=self.mean, reverse=True)

    def beaten(self, arm: str) -> list[str]:
        """Return the names of the students that an arm beats, the best first."""
        return [other for other in self.students if self.beats(arm, other)]

    def ranking(self) -> list[str]:
        """Return lines: which arms the best student beats, and which arms beat each rival."""
        leader, *others = self.students
        beaten = self.beaten(leader)
        level = [arm for arm in others if arm not in beaten]
        text = f"{leader} leads{' the arms shown' if self.partial else ''}"
        text += f" ({self.shown(leader, 1)}) and beats {', '.join(beaten) or 'no student'}"
        text += f", but not {', '.join(level)}" if level else ""
        lines = [text]
        for rival in self.rivals:
            leads = [f"{arm} (by {self.margin(arm, rival)})" for arm in self.better(rival)]
            lines += [f"{rival} is beaten by {', '.join(leads) or 'no arm'}"]
        note = "" if self.valid() else " (invalid: a condition fails)"
        return [f"{self.measure}{note}: {line}" for line in lines]

    @property
    def rivals(self) -> list[str]:
        """Return the arms with which the form's own are compared: MGD, and MGD as published."""
        return [arm for arm in (MGD, ORIGINAL) if arm in self.by_arm]

    def better(self, rival: str) -> list[str]:
        """Return the arms among the form's own and the rivals that beat a rival."""
        candidates = {*self.among, *self.rivals} - {rival}
        return [arm for arm in self.students if arm in candidates and self.beats(arm, rival)]

    def conditions(self) -> list[tuple[str, bool]]:
        """Return the conditions of a comparison: a text each, and whether it holds."""
        conditions = [self.condition(ALONE, UNTRAINED), self.condition(TEACHER, ALONE)]
        return [*conditions, self.room()] if self.among else conditions

    def room(self) -> tuple[str, bool]:
        """Return the condition that no student reaches the teacher, and whether it holds."""
        best = self.students[0]
        holds = round(self.lead(TEACHER, best), 6) > 0
        means = f"{best} has {self.mean(best):.1f}, the teacher {self.mean(TEACHER):.1f}"
        subject = "no student" if holds else "a student"
        note = " of the arms shown, which are not all," if self.partial and holds else ""
        return f"{subject}{note} reaches the teacher ({means})", holds

    def condition(self, arm: str, other: str) -> tuple[str, bool]:
        """Return the condition that an arm leads another by LEAST or more, and whether it holds."""
        lead = self.lead(arm, other)
        means = f"{self.mean(arm):.1f} against {self.mean(other):.1f}"
        return (
            f"{NAMES[arm]} above {NAMES[other]} by {lead:+.1f} points ({means}); "
            f"expected {LEAST:g} or more",
            round(lead, 6) >= LEAST,
        )

    def valid(self) -> bool:
        """Return whether all conditions hold."""
        return all(holds for _, holds in self.conditions())

    def claims(self) -> list[tuple[str, bool]]:
        """Return the parts of the claim, a text each, and whether it holds.

        MGD must help, and its solved matching must be the reason.
        """
        return [
            self.claim(MGD, ALONE, True),
            self.claim(RANDOM, ALONE, False),
            self.claim(MGD, RANDOM, True),
        ]

    def claim(self, arm: str, other: str, expected: bool) -> tuple[str, bool]:
        """Return whether an arm beats another, as a text and compared with `expected`."""
        beats = self.beats(arm, other)
        verb = "beats" if beats else "does not beat"
        lead = (
            f"{self.lead(arm, other):+.1f} points, spread over seeds {self.noise(arm, other):.1f}"
        )
        return f"{NAMES[arm]} {verb} {NAMES[other]}: {lead}", beats is expected

    def change(self, arm: str, other: str) -> str:
        """Return a text: does a value of an arm, such as its AUC, differ from another's?"""
        lead, noise = self.lead(arm, other), self.noise(arm, other)
        verb = "is level with" if abs(lead) <= noise else "is above" if lead > 0 else "is below"
        means = f"{self.mean(arm):.3f} against {self.mean(other):.3f}"
        comparison = f"{self.measure} of {NAMES[arm]} {verb} that of {NAMES[other]}"
        return f"{comparison}: {means}, spread over seeds {noise:.3f}"

    def verdict(self) -> str:
        """Return the conclusion: the comparison is invalid, or the claim is shown or not."""
        if not self.valid():
            return f"{self.measure}: no comparison is valid here, because a condition fails"
        shown = all(holds for _, holds in self.claims())
        return f"{self.measure}: the claim is {'shown' if shown else 'not shown'} here"
