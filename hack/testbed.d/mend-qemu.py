"""Mends a fault of QEMU's that stops guests of guests: mend-qemu.py PROGRAM

When VMRUN injects an interrupt, helper_vmrun (target/i386/tcg/system/svm_helper.c of QEMU 10.0 and all before it) notes its
vector as a pending exception, delivers it at once, and leaves the note there. If the processor is asked to leave its loop
before the next exit of the guest, for a timer of the emulator's, cpu_handle_interrupt finds the note in the place of the
"none" that it expects, and the interrupt is delivered once more, whatever the guest's interrupt flag says: into its own
handler. A guest then waits for a lock that it holds itself; under -icount, where each millisecond ends the loop, one
machine of ten did.

Nobody reads the note, so the mending is not to write it: one store among the instructions below becomes a no-op. A
program in which they are not found, or twice, is left as it is.
"""

import re
import sys

# As Debian's compiler spells the case SVM_EVTINJ_TYPE_INTR; RBX is the CPUX86State, and what lies before it the CPUState.
INJECTION = re.compile(
    rb"(\x89\xb3..\xff\xff)"  # mov %esi, exception_index
    rb"\xc7\x83....\x00\x00\x00\x00"  # movl $0, exception_is_int
    rb"\x48\xc7\x83....\xff\xff\xff\xff"  # movq $-1, exception_next_eip
    rb"\xf6\x05.....\x0f\x85...."  # test of the log's mask, and a jump
    rb"\xba\x01\x00\x00\x00\x48\x89\xdf\xe8",  # do_interrupt_x86_hardirq(env, vector, 1)
    re.DOTALL,
)
# One instruction of the same length that does nothing (Intel SDM, NOP).
NOTHING = b"\x66\x0f\x1f\x44\x00\x00"


def main():
    with open(sys.argv[1], "r+b") as program:
        found = list(INJECTION.finditer(program.read()))
        if len(found) != 1:
            sys.exit(f"mend-qemu: {sys.argv[1]}: {len(found)} places that look like the fault, want 1; left as it is")
        program.seek(found[0].start(1))
        program.write(NOTHING)


if __name__ == "__main__":
    main()
