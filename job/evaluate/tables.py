"""Files of features with the paths of their images: NumPy's array with JSON, or Parquet."""

import itertools
import json
import os
from typing import Any

import numpy as np

from job.errors import RunError
from job.evaluate.rows import Rows
from job.files import whole_file, write_whole

GROUPS = 64  # groups of images in a row group of Parquet


def write_npy(out: str, rows: Rows, paths: list[str], about: dict[str, Any]) -> str:
    """Write the array (n, C) float32 to `out`, and its paths to a JSON file next to it.

    Return the statements that read both. OSError: they cannot be written.
    """
    json_path = companion(out)
    if os.path.lexists(out):  # never next to paths of other features
        os.remove(out)
    with whole_file(out) as file:
        shape = (rows.count, rows.width)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for group in rows.groups():
            file.write(group.tobytes())
        file.flush()
        os.fsync(file.fileno())  # if the disk is full, neither file appears
        write_whole(json_path, json.dumps({**about, "paths": paths}, indent=0).encode())
    return f"numpy.load({out!r}); paths: json.load(open({json_path!r}))['paths']"


def write_parquet(out: str, rows: Rows, paths: list[str], about: dict[str, Any]) -> str:
    """Write the columns path and features, a list of C float32, to `out`; `about` is metadata.

    Bytes of a path that are not UTF-8 are written as in \\xff. Return the statement that reads it.
    OSError: it cannot be written.
    """
    import pyarrow
    import pyarrow.parquet

    features = pyarrow.list_(pyarrow.float32(), rows.width)
    schema = pyarrow.schema(
        {"path": pyarrow.string(), "features": features},
        metadata={name: as_text(value) for name, value in about.items()},
    )
    groups, first = rows.groups(), 0
    options = {"compression": "zstd", "use_dictionary": False}
    with (
        whole_file(out) as file,
        pyarrow.parquet.ParquetWriter(file, schema, **options) as writer,
    ):
        while block := list(itertools.islice(groups, GROUPS)):
            values = np.concatenate(block)  # (n, C)
            names = [utf8(path) for path in paths[first : first + len(values)]]
            first += len(values)
            flat = pyarrow.array(values.ravel())
            column = pyarrow.FixedSizeListArray.from_arrays(flat, rows.width)
            writer.write_table(pyarrow.table([pyarrow.array(names), column], schema=schema))
    return f"pandas.read_parquet({out!r})"


FORMATS = {".npy": write_npy, ".parquet": write_parquet}


def as_text(value: Any) -> str:
    """Return a value as text: itself, or JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def utf8(path: str) -> str:
    r"""Return a path with its bytes that are not UTF-8 written as in \xff."""
    return os.fsencode(path).decode(errors="backslashreplace")


def companion(out: str) -> str:
    """Return the path of an array's JSON file."""
    return f"{os.path.splitext(out)[0]}.json"


def ending(out: str) -> str:
    """Return the ending of a file's name, in lower case."""
    return os.path.splitext(out)[1].lower()


def check_place(out: str, force: bool) -> None:
    """RunError: `out` has an unknown ending, cannot be written, or exists."""
    if ending(out) not in FORMATS:
        raise RunError(f"--out {out}: expected a file ending in {' or '.join(FORMATS)}")
    folder = os.path.dirname(out) or "."
    if not os.path.isdir(folder):
        raise RunError(f"--out {out}: no folder {folder}; expected an existing one. Make it first")
    for path in [out, *([companion(out)] if ending(out) == ".npy" else [])]:
        if os.path.isdir(path):
            raise RunError(f"--out {out}: {path} is a folder; expected a file. Choose another")
        if os.path.lexists(path) and not force:
            fix = "Choose another, or add --force"
            raise RunError(f"--out {out}: {path} exists; expected a new file. {fix}")
    if ending(out) == ".parquet":
        require_pyarrow(out)


def require_pyarrow(out: str) -> None:
    """RunError: the package for Parquet is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        problem = f"--out {out}: Parquet needs pyarrow, which is not installed"
        raise RunError(f"{problem}. pip install '.[parquet]', or write a .npy file") from None
