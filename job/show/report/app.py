"""Compare runs in one self-contained HTML file, and save its pictures as PNG files.

mgd-report RUN... [--out FILE]
    RUN: a run's folder, a folder that holds runs, or a SLURM job's log
"""

import argparse
import base64
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup
from matplotlib import rc_context

from job.cli import Parser
from job.declare import expand
from job.errors import RunError
from job.files import write_whole
from job.show.read.ends import reported
from job.show.read.runs import ReportRun, find_runs
from job.show.report import curves, matching, tables, timing
from job.show.report.style import STYLE, Picture
from job.text import printable

CURVES = {
    "training": [curves.loss, curves.terms, curves.accuracy, curves.neighbours, curves.rate],
    "matching": [matching.stability, matching.cost],
    "collapse": [curves.collapse],
    "time": [timing.breakdown, timing.speed],
}


def main(argv: list[str] | None = None) -> None:
    """Run `mgd-report` on the command line's options."""
    with reported():
        parser = Parser(
            prog="mgd-report",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument(
            "runs",
            metavar="RUN",
            nargs="+",
            type=expand,
            help="a run's folder, a folder that holds runs (such as an array's), or a job's log",
        )
        parser.add_argument(
            "--out",
            metavar="FILE",
            type=expand,
            default="report.html",
            help="the HTML file (default: report.html); its pictures are saved next to it",
        )
        parser.add_argument(
            "--data",
            metavar="DIR",
            type=expand,
            action="append",
            default=[],
            help="path of the runs' images on this machine; can be repeated",
        )
        parser.add_argument(
            "--teacher",
            metavar="FILE",
            type=expand,
            default="",
            help="path of the runs' teacher on this machine",
        )
        parser.add_argument(
            "--no-features",
            action="store_true",
            help="omit the pictures of features, which need networks, images and time",
        )
        arguments = parser.parse_args(argv)
        out = Path(arguments.out)
        if out.is_dir() or out.suffix not in (".html", ".htm"):
            example = out / "report.html" if out.is_dir() else "report.html"
            problem = "is a folder" if out.is_dir() else "not a name of an HTML file"
            raise RunError(f"--out {out}: {problem}; expected a file such as {example}")
        runs = find_runs(arguments.runs)
        html, pictures = render(
            runs, out, None if arguments.no_features else (arguments.data, arguments.teacher)
        )
        save(out, html, pictures)
        number = f"{len(runs)} run{'s' * (len(runs) > 1)}"
        print(
            f"wrote {out}: {len(html) / 1e6:.1f} MB, {number}; "
            f"{len(pictures)} pictures in {pictures_folder(out)}"
        )


def render(
    runs: Sequence[ReportRun], out: Path, elsewhere: tuple[list[str], str] | None
) -> tuple[bytes, list[Picture]]:
    """Return the report's HTML and its pictures.

    elsewhere: data and teacher; if empty, as in the runs' options. None: omit the features.
    """
    now = time.time()
    trained, classified = (
        [run for run in runs if run.history.kind == kind] for kind in ("train", "linear")
    )
    sections, notes = draw_sections(trained, classified, elsewhere)
    template = jinja2.Environment(
        autoescape=True,
        finalize=cleaned,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    template.filters["data_uri"] = lambda picture: (
        "data:image/png;base64," + base64.b64encode(picture.png).decode()
    )
    html = template.from_string(
        (resources.files("job.show.report") / "report.html").read_text()
    ).render(
        runs=runs,
        made=time.strftime("%Y-%m-%d %H:%M", time.localtime(now)),
        overview=tables.overview(runs),
        sections=sections,
        notes=notes,
        features=bool(elsewhere and trained),
        results=tables.linear_results(runs),
        differing=tables_of_options(trained, classified, differing=True),
        options=tables_of_options(trained, classified, differing=False),
        checkpoints=tables.checkpoints(runs, out.parent, now),
        warnings=tables.warnings(runs),
    )
    return html.encode(errors="backslashreplace"), [
        picture for section in sections.values() for picture in section
    ]


def draw_sections(
    trained: Sequence[ReportRun],
    classified: Sequence[ReportRun],
    elsewhere: tuple[list[str], str] | None,
) -> tuple[dict[str, list[Picture]], list[str]]:
    """Return the pictures of each section, and notes on those of features."""
    with rc_context(STYLE):
        sections = {
            name: [picture for draw in drawings if (picture := draw(trained))]
            for name, drawings in CURVES.items()
        }
        sections["linear"] = [picture] if (picture := curves.linear(classified)) else []
        if not (elsewhere and trained):
            return sections, []
        from job.show.report.images import draw_features  # takes seconds to import

        features = draw_features(trained, *elsewhere)
    sections |= {
        "maps": features.maps,
        "neighbours": features.neighbours,
        "embedding": features.embeddings,
    }
    return sections, features.notes


def tables_of_options(*groups: Sequence[ReportRun], differing: bool) -> list[tables.Table]:
    """Return a table of options for each group of runs that has some."""
    found = [tables.options_of(group, differing=differing) for group in groups]
    return [table for table in found if table]


def cleaned(value: object) -> object:
    """Return a printable value. Markup comes from the page's macros, whose values are printable."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def pictures_folder(out: Path) -> Path:
    """Return the folder of a report's pictures."""
    return out.with_name(f"{out.stem}-pictures")


def save(out: Path, html: bytes, pictures: Sequence[Picture]) -> None:
    """Write a report, its pictures first.

    RunError: a file cannot be written.
    """
    try:
        folder = pictures_folder(out)
        folder.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            write_whole(str(folder / f"{picture.name}.png"), picture.png)
        write_whole(str(out), html)
    except OSError as error:
        raise RunError(
            f"cannot write {error.filename or out}: {error.strerror or error}. "
            "Choose another --out",
            code=1,
        ) from None
