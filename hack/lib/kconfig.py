"""What a kernel's configuration lacks of what fragments ask for: kconfig.py CONFIG FRAGMENT…

CONFIG is a .config, plain or gzip, or a kernel image that carries one (IKCONFIG). In a fragment `## name: reason` begins
a feature; the symbols up to the next one belong to it. Prints a line for each feature:

    ok       verity
    missing  quota            CONFIG_QFMT_V2=y

Exit code 0 when nothing is missing, 1 when something is, 2 when CONFIG has no configuration.
"""

import gzip
import re
import sys
import zlib

# kernel/configs.c
BEGIN = b"IKCFG_ST"
SYMBOL = re.compile(r"^(?:# )?(CONFIG_\w+)(?:=(.*)| is not set)$")


def assignments(text):
    """(symbol, value) in order; the value of what is not set is "n"."""
    for line in text.splitlines():
        found = SYMBOL.match(line)
        if found:
            yield found[1], found[2] or "n"


def configuration(path):
    """Symbol → value, of what is set."""
    with open(path, "rb") as file:
        data = file.read()
    if data.startswith(b"\x1f\x8b"):
        data = gzip.decompress(data)
    elif BEGIN in data:
        # The stream says itself where it ends.
        data = zlib.decompressobj(wbits=31).decompress(data[data.index(BEGIN) + len(BEGIN) :])
    config = dict(assignments(data.decode(errors="replace")))
    if not config:
        print(f"{path}: there is no kernel configuration in it", file=sys.stderr)
        sys.exit(2)
    return config


def features(paths):
    """Feature → its assignments, in the order of the fragments."""
    found = {}
    for path in paths:
        name = None
        with open(path) as file:
            for line in file:
                head = re.match(r"## ([\w -]+):", line)
                if head:
                    name = head[1]
                for assignment in assignments(line.rstrip("\n")):
                    if name is None:
                        sys.exit(f"{path}: {assignment[0]} belongs to no feature")
                    found.setdefault(name, []).append(assignment)
    return found


def main():
    config = configuration(sys.argv[1])
    code = 0
    for name, wanted in features(sys.argv[2:]).items():
        missing = [f"{symbol}={value}" for symbol, value in wanted if config.get(symbol, "n") != value]
        print(f"{'missing' if missing else 'ok':<8} {name:<20} {' '.join(missing)}".rstrip())
        code = 1 if missing else code
    sys.exit(code)


if __name__ == "__main__":
    main()
