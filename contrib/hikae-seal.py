#!/usr/bin/env python3
"""Makes a hikae repository append-only for the user who backs up.

    hikae-seal.py /srv/hikae/repository GROUP

takes what is finished out of that user's hands; GROUP is a group of that user.
Run it as root on the machine that holds the files: often (a timer, every few
minutes) and after each hikae prune. Directories become root's and sticky: the
group makes files in them and removes only its own. Finished files become root's,
and the group reads them. What is being written (tmp, sessions) stays as it is, and
so do the contents of all files. Locks may be opened by the group; they hold nothing.

Needs Linux with fs.protected_hardlinks = 1, which is the default.
"""
import grp
import os
import stat
import sys

LOCKS = {"lock", "init", "upkeep"}


def seal(fd, gid, mode):
    """Through an open file, so that nobody can put another one in its place."""
    st = os.fstat(fd)
    if (st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)) == (0, gid, mode):
        return
    os.fchown(fd, 0, gid)
    os.fchmod(fd, mode)


def main():
    if len(sys.argv) != 3 or not os.path.isfile(os.path.join(sys.argv[1], "config")):
        sys.exit("usage: hikae-seal.py REPOSITORY GROUP")
    gid = grp.getgrnam(sys.argv[2]).gr_gid
    device = os.stat(sys.argv[1]).st_dev
    # Links are not followed. From the top, so that what is in a directory stays put
    # once that has been sealed.
    for path, _, files, dirfd in os.fwalk(sys.argv[1], follow_symlinks=False):
        if os.fstat(dirfd).st_dev != device:
            continue
        seal(dirfd, gid, 0o1770)
        unfinished = os.path.relpath(path, sys.argv[1]).split(os.sep)[0] in ("tmp", "sessions")
        for name in files:
            if unfinished and name not in LOCKS:
                continue
            try:
                fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=dirfd)
            except OSError:
                continue  # gone meanwhile, or a link
            try:
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    seal(fd, gid, 0o660 if name in LOCKS else 0o440)
            finally:
                os.close(fd)


if __name__ == "__main__":
    main()
