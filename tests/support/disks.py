"""Real file systems for tests to mount. Mounting needs root."""

import subprocess

import pytest

# Commands that format an image and mount it: by the kernel, or by FUSE if the kernel lacks the file
# system.
LINKLESS = {
    "FAT32": ("mkfs.vfat -F 32", ("mount -t vfat -o loop",)),
    "exFAT": ("mkfs.exfat", ("mount -t exfat -o loop", "mount -t exfat-fuse -o loop")),
}


def mount(*arguments):
    """Call `mount`, or skip the test if it fails."""
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here, run as root: {done.stderr.strip()}")


def unmount(path):
    """Remove all mounts from a folder."""
    while path.is_mount():
        subprocess.run(["umount", "--lazy", path], check=True)


def mount_linkless(kind, folder, megabytes=256):
    """Mount an empty disk of a file system without links in `folder` and return its path.

    If that is impossible, skip the test.
    """
    image, path = folder / f"{kind}.img", folder / kind
    path.mkdir()
    with open(image, "wb") as file:
        file.truncate(megabytes * 10**6)  # a sparse file
    make, mounts = LINKLESS[kind]
    if not works(make, image):
        pytest.skip(f"{make} does not work here: apt-get install dosfstools exfatprogs")
    if not any(works(mount, image, path) and path.is_mount() for mount in mounts):
        pytest.skip(
            f"cannot mount {kind}: run as root, on a kernel that has it, "
            "or for exFAT apt-get install exfat-fuse"
        )
    return path


def works(command, *arguments):
    """Return whether a command ends with 0.

    Its output is dropped: processes that it leaves running would keep a pipe open.
    """
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        return subprocess.run([*command.split(), *map(str, arguments)], **quiet).returncode == 0
    except FileNotFoundError:
        return False
