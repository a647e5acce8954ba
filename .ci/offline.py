"""Run a command where there is no network but the loopback: python3 .ci/offline.py COMMAND …

Linux only, by a network namespace of its own. Whoever is not root gets one inside a user
namespace and keeps their own user id, where the system allows it. Exits with the status of the
command, or with 125 and a line where such a place cannot be made."""

import os
import socket
import struct
import subprocess
import sys

SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1


def raise_loopback():
    "As `ip link set lo up`, which not every machine has"
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        asked = struct.pack('16sh14x', b'lo', 0)
        (flags,) = struct.unpack_from('h', fcntl.ioctl(s, SIOCGIFFLAGS, asked), 16)
        fcntl.ioctl(s, SIOCSIFFLAGS, struct.pack('16sh14x', b'lo', flags | IFF_UP))


def ways():
    "Commands that open the namespace, the plain one first"
    here = [sys.executable, os.path.abspath(__file__)]
    ids = f'{os.getuid()}:{os.getgid()}'
    yield ['unshare', '--net', *here, '--inside']
    yield ['unshare', '--user', '--map-root-user', '--net', *here, '--inside', '--as', ids]


def inside(args):
    "In the namespace: raise loopback, become who we were, and run the command"
    raise_loopback()
    if args[0] == '--as':
        uid, gid = args[1].split(':')
        back = ['unshare', '--user', f'--map-user={uid}', f'--map-group={gid}']
        args = [*back, *args[2:]]
    os.execvp(args[0], args)


def main(args):
    if args[:1] == ['--inside']:
        return inside(args[1:])
    if not args:
        sys.exit(__doc__)
    for way in ways() if hasattr(os, 'getuid') else ():
        try:
            possible = subprocess.run([*way, 'true'], stderr=subprocess.DEVNULL).returncode == 0
        except OSError:
            break  # no `unshare` here
        if possible:
            os.execvp(way[0], [*way, *args])
    print('offline: no network namespace can be made here', file=sys.stderr)
    return 125


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
