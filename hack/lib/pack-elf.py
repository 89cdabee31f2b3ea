"""Leaves out of a kernel what need not be loaded: pack-elf.py VMLINUX OUTPUT

A vmlinux is laid out for huge pages: between its parts lie megabytes that hold nothing, zeros or the filler of x86's
linker script (int3), and a loader copies all of them into the guest. The output has the same segments without such pages,
one loadable segment for each run that holds something:

    file offset 0      ELF header; e_entry as it was
                64     program headers, PT_LOAD only
                4096   the runs, each at the physical address it had; p_memsz of the last one of a segment reaches to the
                       segment's end

The guest's memory is zero before it is loaded, so what is left out reads as zeros. ELF 64 bits, little endian; elf.h.
"""

import struct
import sys

PT_LOAD, PAGE, HEADER, PROGRAM = 1, 4096, 64, struct.Struct("<IIQQQQQQ")
FILLER = b"\xcc"
# A gap of this many bytes is worth a segment of its own.
SHORT = 16 * PAGE


def empty(page):
    return page.count(0) == len(page) or page.count(FILLER) == len(page)


def runs(data):
    """(begin, end) of each run of pages that hold something, with the short gaps in it."""
    found = []
    for at in range(0, len(data), PAGE):
        page = data[at : at + PAGE]
        if empty(page):
            continue
        if found and at - found[-1][1] < SHORT:
            found[-1][1] = at + len(page)
        else:
            found.append([at, at + len(page)])
    return found or [[0, 0]]


def main(source, target):
    with open(source, "rb") as file:
        image = file.read()
    table, count = struct.unpack_from("<Q", image, 32)[0], struct.unpack_from("<H", image, 56)[0]
    segments, bodies, at = [], [], PAGE
    for n in range(count):
        kind, flags, offset, virtual, physical, size, memory, _ = PROGRAM.unpack_from(image, table + n * PROGRAM.size)
        if kind != PT_LOAD or not memory:
            continue
        data = image[offset : offset + size]
        found = runs(data)
        for begin, end in found:
            # What a segment has in memory only, it has behind its last run.
            length = memory - begin if [begin, end] == found[-1] else end - begin
            segments.append((PT_LOAD, flags, at, virtual + begin, physical + begin, end - begin, length, PAGE))
            body = data[begin:end]
            bodies.append(body.ljust(-(-len(body) // PAGE) * PAGE, b"\0"))
            at += len(bodies[-1])
    header = bytearray(image[:HEADER])
    struct.pack_into("<Q", header, 32, HEADER)
    struct.pack_into("<Q", header, 40, 0)
    struct.pack_into("<HHHH", header, 56, len(segments), 0, 0, 0)
    head = bytes(header) + b"".join(PROGRAM.pack(*segment) for segment in segments)
    if len(head) > PAGE:
        sys.exit(f"{source}: {len(segments)} segments do not fit")
    with open(target, "wb") as file:
        file.write(head.ljust(PAGE, b"\0"))
        file.writelines(bodies)


if __name__ == "__main__":
    main(*sys.argv[1:])
