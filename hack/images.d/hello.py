"""Says where it runs and whether the layers below it were put together as they should."""

import os
import stat
import sys

KINDS = "/app/kinds"


def checks():
    private, link = os.stat(f"{KINDS}/private"), os.stat(f"{KINDS}/hardlink")
    yield "whiteout hides a file", not os.path.exists("/etc/issue")
    yield "whiteout hides a directory", not os.path.exists("/usr/share/lintian")
    yield "opaque directory hides what was below", os.listdir("/usr/share/base-files") == ["replacement"]
    yield "owner and mode", (private.st_uid, private.st_gid, stat.S_IMODE(private.st_mode)) == (1000, 1000, 0o600)
    yield "hardlink", private.st_ino == link.st_ino and private.st_nlink == 2
    yield "symlink", os.readlink(f"{KINDS}/symlink") == "private" and os.path.lexists(f"{KINDS}/dangling")
    yield "setuid bit", bool(os.stat(f"{KINDS}/setuid").st_mode & stat.S_ISUID)
    yield "sticky directory", stat.S_IMODE(os.stat(f"{KINDS}/sticky").st_mode) == 0o1777
    yield "fifo", stat.S_ISFIFO(os.stat(f"{KINDS}/fifo").st_mode)
    yield "extended attribute", os.getxattr(f"{KINDS}/attributes", "user.nacelle") == b"kept"
    yield "long and foreign names", {"long" * 50, "Grüße 你好"} <= set(os.listdir(KINDS))
    with open(f"{KINDS}/big", "rb") as big:
        yield "contents", big.read() == bytes(range(256)) * 8192


def main():
    system = os.uname()
    print(f"{os.environ.get('GREETING')}: python {sys.version.split()[0]}, kernel {system.release}")
    print(f"hostname {system.nodename}, directory {os.getcwd()}, pid {os.getpid()}, uid {os.getuid()}")
    failed = 0
    for what, good in checks():
        print(f"{'ok  ' if good else 'FAIL'} {what}")
        failed += not good
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
