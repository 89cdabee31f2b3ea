"""Wraps the kernel inside libkrunfw into an ELF file with one loadable segment: krunfw-elf.py LIBRARY OUTPUT

libkrunfw carries a kernel that is already unpacked, as it has to lie in guest memory:

    file offset 0      ELF header, 64 bytes; e_entry = the kernel's 64-bit entry point
                64     one program header, 56 bytes
                4096   the kernel's bytes, to be loaded at p_paddr (page-aligned, so that a loader may map them)

The library is loaded to be asked (krunfw_get_kernel), so it must be for this machine's architecture.
"""

import ctypes
import struct
import sys

EM_X86_64, ET_EXEC, PT_LOAD, RWX = 62, 2, 1, 7
HEADER, PAGE = 64, 4096


def kernel(library):
    """The kernel's load address, entry address and bytes."""
    get = ctypes.CDLL(library).krunfw_get_kernel
    get.restype = ctypes.c_void_p
    load, entry, size = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_size_t()
    data = get(ctypes.byref(load), ctypes.byref(entry), ctypes.byref(size))
    return load.value, entry.value, ctypes.string_at(data, size.value)


def elf(load, entry, data):
    """The headers and the padding that go before the kernel's bytes."""
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = ident + struct.pack(
        "<HHIQQQIHHHHHH", ET_EXEC, EM_X86_64, 1, entry, HEADER, 0, 0, HEADER, 56, 1, 0, 0, 0
    )
    program = struct.pack("<IIQQQQQQ", PT_LOAD, RWX, PAGE, load, load, len(data), len(data), PAGE)
    return (header + program).ljust(PAGE, b"\0")


if __name__ == "__main__":
    load, entry, data = kernel(sys.argv[1])
    with open(sys.argv[2], "wb") as out:
        out.write(elf(load, entry, data) + data)
    print(f"kernel: load {load:#x} entry {entry:#x} size {len(data)}", file=sys.stderr)
