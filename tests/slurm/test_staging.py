"""slurm/staging.sh: an archive of images, unpacked on each node's own disk."""

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from disks import mount, unmount
from jobs import REPO

pytestmark = pytest.mark.short

SCRIPT = """#!/bin/bash
set -euo pipefail
LOCAL={folder}/local
. slurm/functions.sh
stage
log "data is $DATA"
[ ! -e {folder}/requeue ] || {{ rm {folder}/requeue; scontrol requeue "$SLURM_JOB_ID"; sleep 60; }}
until [ ! -e {folder}/hold ]; do sleep 0.1; done
"""
FUNCTIONS = REPO / "slurm/functions.sh"
# A user that owns root's files, but is bound by their permissions.
AS_USER = ["unshare", "--user", "--map-user=1000", "--map-group=1000"] if os.geteuid() == 0 else []
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change a file's owner")


@pytest.fixture
def stage(submit, tmp_path):
    """A function that submits a job which only stages an archive, and requeues itself if asked."""

    def start(archive, requeue=False):
        if requeue:
            (tmp_path / "requeue").touch()
        script = tmp_path / "stage.sbatch"
        script.write_text(SCRIPT.format(folder=tmp_path))
        options = ["--open-mode=append", "--requeue"]
        return submit([], script=script, sbatch=options, ARCHIVE=archive, DATA="")

    return start


@pytest.fixture
def archives(images, tmp_path):
    """A function that packs the images as tar, tar.gz or sqsh. A tar has them in one folder."""

    def pack(kind):
        path = tmp_path / f"photos.{kind}"
        if kind == "sqsh":
            make_squashfs(images, path)
        else:
            with tarfile.open(path, "w:gz" if kind.endswith("gz") else "w") as archive:
                archive.add(images, "photos")
        return path

    return pack


def make_squashfs(folder, path):
    if not shutil.which("mksquashfs"):
        pytest.skip("no mksquashfs. Run apt-get install squashfs-tools")
    subprocess.run(["mksquashfs", folder, path, "-quiet", "-no-progress"], check=True)


def on_node(function, archive="", local="", programs=None, **variables):
    """Run a function of the scripts as on a node, without SLURM. `squeue` prints job 7."""
    commands = local.parent / "commands"
    shutil.rmtree(commands, ignore_errors=True)
    commands.mkdir()
    for name, text in ({"squeue": "echo 7", "sleep": ""} | (programs or {})).items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    path = f"{commands}:{os.environ['PATH']}"
    environment = {"PATH": path, "ARCHIVE": str(archive), "LOCAL": str(local)} | variables
    command = [*AS_USER, "bash", FUNCTIONS, function]
    options = dict(cwd=local.parent, capture_output=True, text=True)
    done = subprocess.run(command, env=environment, **options)
    if "unshare failed" in done.stderr:
        pytest.skip(f"no user namespaces: {done.stderr}")
    return done


def staged(local):
    """Return the folders of the unpacked versions in LOCAL."""
    return sorted(path.parent for path in local.glob("*/data"))


def files(folder):
    return {file.relative_to(folder): file.read_bytes() for file in Path(folder).rglob("*.png")}


@pytest.fixture
def photos(tmp_path):
    """A tar archive of two classes with one tiny file each."""
    for name in "ab":
        (tmp_path / "photos/train" / name).mkdir(parents=True)
        (tmp_path / "photos/train" / name / "1.png").write_text(name)
    return pack(tmp_path / "photos", tmp_path / "photos.tar")


def pack(folder, path):
    with tarfile.open(path, "w") as archive:
        archive.add(folder, folder.name)
    return path


def test_archive_is_unpacked_once(stage, archives, images, tmp_path):
    """A requeue does not unpack it again. Both nodes are this machine and use the same files."""
    archive = archives("tar")
    path = tmp_path / "photos.tar.sha256"
    path.write_text(f"{hashlib.sha256(archive.read_bytes()).hexdigest()}  photos.tar\n")
    job = stage(archive, requeue=True)
    job.wait_for_line("data is ", times=2)
    assert job.wait_for_end() == "COMPLETED", job.text()
    assert job.text().count("verified") == 1
    assert job.text().count("is here already") == 3
    assert files(job.text().rsplit("data is ", 1)[1].strip()) == files(images)
    assert len(staged(tmp_path / "local")) == 1


def test_archive_of_a_running_job_stays(slurm, stage, photos, tmp_path):
    (tmp_path / "hold").touch()
    local, first = tmp_path / "local", stage(photos)
    first.wait_for_line("data is ")
    (old,) = staged(local)
    photos.touch()
    second = stage(photos)
    second.wait_for_line("data is ")
    assert len(staged(local)) == 2 and old in staged(local)
    (tmp_path / "hold").unlink()
    assert first.wait_for_end() == second.wait_for_end() == "COMPLETED"
    arguments = ["--nodes=2", "--ntasks-per-node=1", "bash", FUNCTIONS, "clean_local"]
    slurm("srun", *arguments, LOCAL=str(local))
    assert staged(local) == []


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "sqsh"])
def test_archive_kinds(archives, images, tmp_path, kind):
    done = on_node("stage_here", archives(kind), tmp_path / "local")
    assert done.returncode == 0, done.stderr
    (folder,) = staged(tmp_path / "local")
    assert files(folder / "data" / ("" if kind == "sqsh" else "photos")) == files(images)
    assert {path.name for path in folder.iterdir()} == {"data", "jobs"}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("missing.tar", "cannot be read"),
        ("folder.tar", "cannot be read"),
        ("noise.tar", "cannot be unpacked"),
    ],
)
def test_archive_must_be_readable(tmp_path, name, problem):
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "noise.tar").write_bytes(b"noise" * 1000)
    done = on_node("stage_here", tmp_path / name, tmp_path / "local")
    error = f"error: batch: ARCHIVE={tmp_path / name}: {problem}"
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(error)
    assert not list(tmp_path.glob("local/[!l]*"))


def test_archive_without_images_is_refused(tmp_path):
    tarfile.open(tmp_path / "empty.tar", "w").close()
    assert on_node("stage_here", tmp_path / "empty.tar", tmp_path / "local").returncode == 0
    (folder,) = staged(tmp_path / "local")
    done = on_node("data_folder", tmp_path / "empty.tar", tmp_path / "local", STAGED=str(folder))
    problem = "no files in it; expected images, such as train/CLASS/IMAGE"
    error = f"error: batch: ARCHIVE={tmp_path}/empty.tar: {problem}\n"
    assert (done.returncode, done.stderr) == (2, error)


@pytest.mark.parametrize(
    ("names", "folder"),
    [
        (["photos/1.png", "photos/2.png"], "data/photos"),
        (["photos/a/1.png", "photos/val/2.png", ".DS_Store"], "data/photos"),
        (["1.png", "2.png"], "data"),
        (["1.png"], "data"),
        (["a/1.png", "b/2.png"], "data"),
        (["a/1.png", "in/train/a/2.png"], "data/in"),
        (["0.tar", "index.npz"], "data"),
    ],
)
def test_archive_without_train_is_a_folder_of_images(tmp_path, names, folder):
    """If all files are in one folder, DATA is that folder: it would become their class."""
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    with tarfile.open(tmp_path / "flat.tar", "w") as archive:
        archive.add(tmp_path / "in", ".")
    assert on_node("stage_here", tmp_path / "flat.tar", tmp_path / "local").returncode == 0
    (staged_in,) = staged(tmp_path / "local")
    done = on_node("data_folder", tmp_path / "flat.tar", tmp_path / "local", STAGED=str(staged_in))
    assert (done.returncode, done.stdout) == (0, f"{staged_in}/{folder}\n"), done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "{sum}",
        "{sum}  photos.tar\r\n",
        "{SUM} *photos.tar\n",
        "\n# all\n{sum}  /a b/photos.tar\n",
        "{other}  photos.tar.old\r\n{other}  old-photos.tar\r\n{sum}  ./photos.tar\r\n",
        "SHA256 (photos.tar) = {sum}\n",
        "MD5 (photos.tar) = 0\nSHA256 (photos.tar)= {sum}",
    ],
)
def test_checksum_forms(photos, tmp_path, text):
    digest = hashlib.sha256(photos.read_bytes()).hexdigest()
    (tmp_path / "photos.tar.sha256").write_text(
        text.format(sum=digest, SUM=digest.upper(), other="1" * 64), newline=""
    )
    done = on_node("stage_here", photos, tmp_path / "local")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(staged(tmp_path / "local")) == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "0 SHA-256 sums of photos.tar; expected one"),
        (
            "d41d8cd98f00b204e9800998ecf8427e  photos.tar\n",
            "0 SHA-256 sums of photos.tar; expected one",
        ),
        (f"{'1' * 64}  a.tar\n{'2' * 64}  b.tar\n", "0 SHA-256 sums of photos.tar; expected one"),
        (
            f"{'1' * 64}  photos.tar\n{'2' * 64}  photos.tar\n",
            "2 SHA-256 sums of photos.tar; expected one",
        ),
        (f"{'0' * 64}  photos.tar\n", f"expected {'0' * 64}. Copy it again"),
        (None, "cannot be read; expected a file"),
    ],
)
def test_checksum_errors_are_one_line(photos, tmp_path, text, problem):
    path = tmp_path / "photos.tar.sha256"
    path.mkdir() if text is None else path.write_text(text)
    done = on_node("stage_here", photos, tmp_path / "local")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and problem in done.stderr
    assert [path.name for path in (tmp_path / "local").iterdir()] == ["lock"]


def test_local_is_private(photos, tmp_path):
    done = on_node("stage_here", photos, tmp_path / "local", LOCAL=f"{tmp_path}/new/local/")
    assert done.returncode == 0
    paths = [tmp_path / "new/local", *(tmp_path / "new/local").rglob("*")]
    assert len(paths) > 8 and not [path for path in paths if path.stat().st_mode & 0o077]


def plant_link(local):
    (local.parent / "elsewhere").mkdir(mode=0o700)
    local.symlink_to("elsewhere")


def plant_lock(local):
    local.mkdir(mode=0o700)
    (local / "lock").symlink_to("../precious")


def open_the_parent(local):
    local.mkdir(mode=0o700)
    local.parent.chmod(0o777)


def give_away(path):
    path.mkdir(mode=0o777)
    os.chown(path, 12345, 12345)


def give_away_the_parent(local):
    local.parent.chmod(0o1777)
    give_away(local.parent / "open")
    (local.parent / "local").symlink_to("open/deep")
    (local.parent / "open/deep").mkdir(mode=0o700)


@pytest.mark.parametrize(
    ("plant", "problem"),
    [
        (plant_link, "a link; expected a folder"),
        (lambda local: local.write_text("file"), "cannot be made"),
        (plant_lock, "lock there is not a file"),
        (open_the_parent, "which has no sticky bit"),
        pytest.param(give_away, "another user's; expected a folder of your own", marks=needs_root),
        pytest.param(give_away_the_parent, "/open is another user's", marks=needs_root),
    ],
)
def test_local_of_another_user_is_refused(photos, tmp_path, plant, problem):
    local = tmp_path / "shared/local"
    local.parent.mkdir()
    (local.parent / "precious").write_text("precious")
    plant(local)
    done = on_node("stage_here", photos, local, LOCAL=f"{local}/")
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert error.startswith(f"error: batch: LOCAL={local}: ") and problem in done.stderr
    assert staged(local) == [] and (local.parent / "precious").read_text() == "precious"


@pytest.mark.parametrize("mode", [0o775, 0o777], ids=oct)
def test_local_becomes_private(photos, tmp_path, mode):
    """Another user's folder is refused."""
    (tmp_path / "local").mkdir()
    (tmp_path / "local").chmod(mode)
    assert on_node("stage_here", photos, tmp_path / "local").returncode == 0
    assert (tmp_path / "local").stat().st_mode & 0o777 == 0o700
    [folder] = staged(tmp_path / "local")
    folder.rename(tmp_path / "planted")
    folder.symlink_to(tmp_path / "planted")
    (tmp_path / "local").chmod(mode)
    done = on_node("stage_here", photos, tmp_path / "local")
    error = "a link, or another user's; expected a folder of your own"
    assert done.returncode == 2 and error in done.stderr
    assert (tmp_path / "planted/data").exists()


def test_local_in_a_sticky_folder_is_accepted(photos, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch").chmod(0o1777)
    (tmp_path / "link").symlink_to("scratch")
    assert on_node("stage_here", photos, tmp_path / "link/local").returncode == 0
    assert len(staged(tmp_path / "scratch/local")) == 1


def test_archives_with_one_name_are_distinguished(photos, tmp_path):
    """Their folders, fractions of a second or link targets differ."""
    versions = [(photos, 10**18)]
    (tmp_path / "other").mkdir()
    versions.append((Path(shutil.copy(photos, tmp_path / "other")), 10**18))
    versions.append((photos, 10**18 + 1))
    link, local = tmp_path / "link.tar", tmp_path / "local"
    for number, (path, nanoseconds) in enumerate(versions, 1):
        os.utime(path, ns=(nanoseconds, nanoseconds))
        link.unlink(missing_ok=True)
        link.symlink_to(path)
        done = on_node("stage_here", link, local, SLURM_JOB_ID="7")
        assert "unpacked into" in done.stdout, done.stderr
        assert "is here already" in on_node("stage_here", path, local, SLURM_JOB_ID="7").stdout
        assert len(staged(local)) == number
    assert all(folder.name.startswith("photos.tar-") for folder in staged(local))


@pytest.mark.parametrize(
    "name", ["my photos.tar", "[a]*.tar", "a\nb\n.tar", "-a:b,c.tar", "ä" * 120 + ".tar", ".tar"]
)
def test_archive_of_any_name_has_a_plain_folder(photos, tmp_path, name):
    (tmp_path / "my [a] local").mkdir(mode=0o700)
    photos.rename(tmp_path / name)
    assert on_node("stage_here", tmp_path / name, tmp_path / "my [a] local").returncode == 0
    (folder,) = staged(tmp_path / "my [a] local")
    assert re.fullmatch(r"[a-z0-9_-][a-z0-9._-]*", folder.name)
    done = on_node("data_folder", tmp_path / name, tmp_path / "my [a] local", STAGED=str(folder))
    assert done.stdout == f"{folder}/data/photos\n"


def test_unused_version_is_replaced(photos, tmp_path):
    local = tmp_path / "local"
    kept = Path(shutil.copy(photos, tmp_path / "photos.tar-old.tar"))
    for archive, job in ((photos, "7"), (photos, "8"), (photos, "9"), (kept, "8")):
        archive.touch()
        done = on_node("stage_here", archive, local, SLURM_JOB_ID=job)
        assert done.returncode == 0, done.stderr
    numbers = [(folder / "jobs").read_text() for folder in staged(local)]
    assert sorted(numbers) == ["7\n", "8\n", "9\n"] and done.stdout.count("removing") == 0
    again = on_node("stage_here", photos, local, SLURM_JOB_ID="7")
    assert again.stdout.count("is here already") == 1
    (local / "notes").mkdir()
    failed = on_node("clean_local", local=local, programs={"squeue": "exit 1"})
    assert failed.stdout.count("squeue fails") == 1
    assert on_node("clean_local", local=local).stdout.count("removing") == 1
    assert len(staged(local)) == 2
    assert on_node("clean_local", local=local, programs={"squeue": "exit 0"}).returncode == 0
    assert {path.name for path in local.iterdir()} == {"lock", "notes"}


@pytest.mark.parametrize("kind", ["tar", "sqsh"])
def test_unreadable_files_become_readable(photos, tmp_path, kind):
    folder = tmp_path / "photos/train"
    (folder / "a/1.png").chmod(0o000)
    (folder / "a").chmod(0o555)
    (folder / "b").chmod(0o000)
    archive, local = tmp_path / f"photos.{kind}", tmp_path / "local"
    make = pack if kind == "tar" else make_squashfs
    make(tmp_path / "photos", archive)
    done = on_node("stage_here", archive, local)
    assert done.returncode == 0, done.stderr
    (first,) = staged(local)
    paths = list((first / "data").rglob("*"))
    assert len([path for path in paths if path.name == "1.png"]) == 2
    for path in paths:
        mode = path.stat().st_mode
        assert mode & 0o400 and (mode & 0o300 or not path.is_dir()), path
    (first / "data/train" if kind == "sqsh" else first / "data/photos/train").chmod(0o555)
    archive.touch()
    assert on_node("stage_here", archive, local).returncode == 0
    assert len(staged(local)) == 1 and staged(local) != [first]


def test_killed_staging_is_repeated(photos, tmp_path):
    """It is killed after unpacking. The archive has a file `.staged`, as earlier versions wrote."""
    (tmp_path / "photos/.staged").touch()
    with tarfile.open(photos, "w") as archive:
        archive.add(tmp_path / "photos", ".")
    kill = {"chmod": f'{shutil.which("chmod")} -R a-w "$3"; kill -KILL $PPID'}
    assert on_node("stage_here", photos, tmp_path / "local", kill).returncode == -9
    assert staged(tmp_path / "local") == []
    done = on_node("stage_here", photos, tmp_path / "local")
    assert "verified" in done.stdout, done.stderr
    assert len(staged(tmp_path / "local")) == 1


@pytest.mark.parametrize("kind", ["tar", "sqsh"])
def test_full_disk_keeps_no_files(tmp_path, kind):
    """It has space only for the copy."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    source, disk = tmp_path / "photos", tmp_path / "disk"
    (source / "train/a").mkdir(parents=True)
    for number in range(9):
        (source / f"train/a/{number}.png").write_bytes(os.urandom(2**20))
    archive = tmp_path / f"photos.{kind}"
    (pack if kind == "tar" else make_squashfs)(source, archive)
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=14m,mode=700", "tmpfs", disk)
    try:
        done = on_node("stage_here", archive, disk / "local")
        assert done.returncode == 2 and "cannot be unpacked" in done.stderr.splitlines()[-1]
        assert [path.name for path in (disk / "local").iterdir()] == ["lock"]
    finally:
        unmount(disk)


def test_archive_paths_stay_in_the_folder(photos, tmp_path):
    for name in ("../out.png", "photos/link/out.png"):
        with tarfile.open(photos, "w") as archive:
            link = tarfile.TarInfo("photos/link")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
            archive.addfile(link)
            archive.addfile(tarfile.TarInfo(name))
        done = on_node("stage_here", photos, tmp_path / "local")
        assert done.returncode == 2 and "cannot be unpacked" in done.stderr
    assert not (tmp_path / "out.png").exists() and not (tmp_path / "local/out.png").exists()


def test_special_modes_of_squashfs_are_dropped(photos, tmp_path):
    (tmp_path / "photos/train/a/1.png").chmod(0o6777)
    make_squashfs(tmp_path / "photos", tmp_path / "photos.sqsh")
    assert on_node("stage_here", tmp_path / "photos.sqsh", tmp_path / "local").returncode == 0
    [file] = (tmp_path / "local").rglob("a/*.png")
    assert file.stat().st_mode & 0o7777 == 0o700


def test_owner_and_special_modes_of_tar_are_dropped(photos, tmp_path):
    with tarfile.open(photos, "w") as archive:
        member = tarfile.TarInfo("train/a/1.png")
        member.uid, member.gid, member.mode = 12345, 12345, 0o6777
        archive.addfile(member)
    command = ["bash", FUNCTIONS, "stage_here"]  # as root, if the tests run as root
    environment = os.environ | {"ARCHIVE": str(photos), "LOCAL": str(tmp_path / "local")}
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    (file,) = (tmp_path / "local").rglob("*.png")
    status = file.stat()
    assert (status.st_uid, status.st_gid) == (os.geteuid(), os.getegid())
    assert status.st_mode & 0o7777 == 0o700


def test_two_jobs_unpack_an_archive_once(photos, tmp_path):
    (tmp_path / "local").mkdir(mode=0o700)
    environment = os.environ | {"ARCHIVE": str(photos), "LOCAL": str(tmp_path / "local")}
    held = subprocess.Popen(["flock", "--no-fork", tmp_path / "local/lock", "sleep", "60"])
    try:
        while not (tmp_path / "local/lock").exists():
            time.sleep(0.01)
        command = ["bash", FUNCTIONS, "stage_here"]
        options = dict(env=environment, stdout=subprocess.PIPE, text=True)
        jobs = [subprocess.Popen(command, **options) for _ in range(2)]
        assert all("waiting for another job" in job.stdout.readline() for job in jobs)
    finally:
        held.kill()
        held.wait()
    present = sorted("already" in job.communicate()[0] for job in jobs)
    assert present == [False, True]
