"""A kernel for processors whose returns need no thunk: plain-returns.py SYSTEM_MAP VMLINUX OUTPUT

With MITIGATION_RETHUNK the compiler writes each return as a jump to __x86_return_thunk, and objtool lists them in
.return_sites. At every boot the kernel decodes and rewrites them all, tens of thousands: to the thunk that the processor's
faults ask for, or, where it has none of them, to a plain return. The output is VMLINUX as such a processor makes it:

    e9 <rel32>  jmp __x86_return_thunk    ->    c3 cc cc cc cc  ret; int3 (4)     every site
    apply_returns                         ->    c3              ret               nothing is left to do

(arch/x86/kernel/alternative.c: patch_return, apply_returns.) Who boots it answers for the processor; on another one the
guest's kernel would be open to its own containers. VMLINUX is an ELF file of 64 bits, little endian, at fixed addresses.
"""

import struct
import sys

PT_LOAD, PROGRAM = 1, struct.Struct("<IIQQQQQQ")
JMP, RET, INT3 = b"\xe9", b"\xc3", b"\xcc"


class Image:
    """The bytes of a kernel by their virtual addresses."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.data = bytearray(file.read())
        table, count = struct.unpack_from("<Q", self.data, 32)[0], struct.unpack_from("<H", self.data, 56)[0]
        self.segments = []
        for n in range(count):
            kind, _, offset, virtual, _, size, _, _ = PROGRAM.unpack_from(self.data, table + n * PROGRAM.size)
            if kind == PT_LOAD:
                self.segments.append((virtual, size, offset))

    def slice(self, address, length):
        for virtual, size, offset in self.segments:
            if virtual <= address and address + length <= virtual + size:
                return slice(offset + address - virtual, offset + address - virtual + length)
        sys.exit(f"address {address:#x} is in no segment of the image")

    def read(self, address, length):
        return bytes(self.data[self.slice(address, length)])

    def write(self, address, content):
        self.data[self.slice(address, len(content))] = content

    def relative(self, address):
        """The address that the four bytes at `address` name, counted from themselves."""
        return address + struct.unpack("<i", self.read(address, 4))[0]


def main(symbols, source, target):
    with open(symbols) as lines:
        at = {name: int(address, 16) for address, _, name in map(str.split, lines)}
    try:
        begin, end = at["__return_sites"], at["__return_sites_end"]
        thunk, rewrite = at["__x86_return_thunk"], at["apply_returns"]
    except KeyError as missing:
        sys.exit(f"{symbols}: no symbol {missing}")
    image = Image(source)
    for entry in range(begin, end, 4):
        site = image.relative(entry)
        # A jump counts from its end.
        if image.read(site, 1) != JMP or image.relative(site + 1) + 4 != thunk:
            sys.exit(f"{source}: no return at {site:#x}: {image.read(site, 5).hex()}")
        image.write(site, RET + 4 * INT3)
    image.write(rewrite, RET)
    with open(target, "wb") as file:
        file.write(image.data)
    print(f"{(end - begin) // 4} plain returns", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
