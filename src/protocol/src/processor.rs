//! What Linux tells of its processor's faults, as far as it decides which guest kernel fits: the shim chooses by it, and
//! the command line says what the shim will choose.

use std::path::{Path, PathBuf};

/// Directory with a file for each fault that Linux knows (Documentation/ABI/testing/sysfs-devices-system-cpu).
pub const FAULTS: &str = "/sys/devices/system/cpu/vulnerabilities";

/// The faults for which Linux lets functions return through a thunk (arch/x86/kernel/cpu/bugs.c, `X86_FEATURE_RETHUNK`).
const OF_RETURNS: [&str; 3] = ["retbleed", "spec_rstack_overflow", "indirect_target_selection"];

/// What such a file says of a processor that does not have the fault.
const NOT_AFFECTED: &str = "Not affected";

/// File name of a kernel for processors that have none of the faults of returns, beside the `vmlinux` that it was made of.
pub const PLAIN_RETURNS: &str = "vmlinux-plain-returns";

/// Whether a kernel may return plainly, by what `read` finds in the file of each fault. A fault that Linux does not know of
/// is one that the processor may have.
fn returns_plainly(mut read: impl FnMut(&str) -> Option<String>) -> bool {
    OF_RETURNS.iter().all(|fault| read(fault).is_some_and(|said| said.trim_end() == NOT_AFFECTED))
}

/// The one to boot of `kernel` and the [`PLAIN_RETURNS`] beside it: the latter where it is `there` and the processor allows it,
/// by what `read` finds in the file of each fault below [`FAULTS`].
pub fn fitting(
    kernel: PathBuf,
    there: impl FnOnce(&Path) -> bool,
    read: impl FnMut(&str) -> Option<String>,
) -> PathBuf {
    let plain = kernel.with_file_name(PLAIN_RETURNS);
    if there(&plain) && returns_plainly(read) { plain } else { kernel }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_fault_is_enough_and_so_is_not_knowing() {
        assert!(returns_plainly(|_| Some("Not affected\n".into())));
        for fault in OF_RETURNS {
            let with = |said: Option<&str>| {
                let said = said.map(str::to_owned);
                returns_plainly(move |name| if name == fault { said.clone() } else { Some("Not affected\n".into()) })
            };
            assert!(!with(None), "{fault}");
            assert!(!with(Some("Mitigation: untrained return thunk; SMT disabled\n")), "{fault}");
            assert!(!with(Some("Vulnerable\n")), "switched off on the host is not healthy: {fault}");
        }
    }
}
