//! Is this file a guest kernel that libkrun can load? Asked before the jail, while the path still has a name.
//!
//! libkrun copies the loadable segments of an ELF file to their physical addresses; a wrong file ends as `-EINVAL`, and
//! one that does not fit into the guest's memory likewise. Layouts are those of `elf.h` (64 bits, little endian).

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use thiserror::Error;

/// ELF machine number that this build's guests run (`e_machine`).
#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = 62;
/// ELF machine number that this build's guests run (`e_machine`).
#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = 183;

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const PT_LOAD: u32 = 1;

/// Program headers that are looked at; a kernel has about five.
const MAX_PROGRAM_HEADERS: u16 = 64;

/// Why a file is no guest kernel.
#[derive(Debug, Error)]
pub enum KernelError {
    /// The file cannot be read.
    #[error("read guest kernel {0}")]
    Read(String, #[source] io::Error),
    /// It is something else.
    #[error("read guest kernel {0}: {1}")]
    Format(String, &'static str),
    /// It does not fit.
    #[error("load guest kernel {path}: it ends at {end_mib} MiB and the guest has {memory_mib} MiB")]
    Memory {
        /// The kernel.
        path: String,
        /// Where its last segment ends, in MiB.
        end_mib: u64,
        /// The guest's memory, in MiB.
        memory_mib: u32,
    },
}

/// Checks that `path` is an uncompressed ELF kernel for this machine that fits into `memory_mib`.
///
/// # Errors
/// [`KernelError`], with the path.
pub fn check(path: &Path, memory_mib: u32) -> Result<(), KernelError> {
    let name = path.display().to_string();
    let read = |e| KernelError::Read(name.clone(), e);
    let file = File::open(path).map_err(read)?;
    if !file.metadata().map_err(read)?.is_file() {
        return Err(KernelError::Format(name, "it is not a regular file"));
    }
    let mut head = Vec::new();
    // Every linker puts the program headers right behind the header.
    let most = HEADER + PROGRAM_HEADER * usize::from(MAX_PROGRAM_HEADERS);
    file.take(most as u64).read_to_end(&mut head).map_err(read)?;
    let end = end_address(&head).map_err(|why| KernelError::Format(name.clone(), why))?;
    let end_mib = end.div_ceil(1 << 20);
    if end_mib > u64::from(memory_mib) {
        return Err(KernelError::Memory { path: name, end_mib, memory_mib });
    }
    Ok(())
}

/// Physical address behind the last byte of the last loadable segment.
fn end_address(head: &[u8]) -> Result<u64, &'static str> {
    if head.is_empty() {
        return Err("it is empty");
    }
    if !head.starts_with(b"\x7fELF") {
        return Err("it is not an ELF file (an uncompressed vmlinux is wanted)");
    }
    if head.len() < HEADER || head[4] != 2 || head[5] != 1 {
        return Err("it is not a 64-bit little-endian ELF file");
    }
    if u16_at(head, 18) != Some(MACHINE) {
        return Err("it is for another processor");
    }
    let table = u64_at(head, 32).and_then(|at| usize::try_from(at).ok());
    let (Some(table), Some(size), Some(count)) = (table, u16_at(head, 54), u16_at(head, 56)) else {
        return Err("its header is cut off");
    };
    if usize::from(size) != PROGRAM_HEADER || count > MAX_PROGRAM_HEADERS {
        return Err("its program headers are odd");
    }
    let mut end = 0;
    for index in 0..usize::from(count) {
        let at = table.saturating_add(index * PROGRAM_HEADER);
        let Some(header) = head.get(at..at.saturating_add(PROGRAM_HEADER)) else {
            return Err("its program headers are cut off");
        };
        if u32_at(header, 0) != Some(PT_LOAD) {
            continue;
        }
        let segment = u64_at(header, 24).zip(u64_at(header, 40)).and_then(|(at, len)| at.checked_add(len));
        end = end.max(segment.ok_or("a segment of it wraps around")?);
    }
    if end == 0 { Err("it has nothing to load") } else { Ok(end) }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One loadable segment of `len` bytes at 16 MiB.
    fn elf(len: u64) -> Vec<u8> {
        let mut out = vec![0; HEADER + PROGRAM_HEADER];
        out[..6].copy_from_slice(b"\x7fELF\x02\x01");
        out[18..20].copy_from_slice(&MACHINE.to_le_bytes());
        out[32..40].copy_from_slice(&(HEADER as u64).to_le_bytes());
        out[54..56].copy_from_slice(&(PROGRAM_HEADER as u16).to_le_bytes());
        out[56..58].copy_from_slice(&1u16.to_le_bytes());
        out[64..68].copy_from_slice(&PT_LOAD.to_le_bytes());
        out[64 + 24..64 + 32].copy_from_slice(&(16u64 << 20).to_le_bytes());
        out[64 + 40..64 + 48].copy_from_slice(&len.to_le_bytes());
        out
    }

    #[test]
    fn finds_the_end() {
        assert_eq!(end_address(&elf(4096)), Ok((16 << 20) + 4096));
    }

    #[test]
    fn says_what_is_wrong() {
        assert_eq!(end_address(b""), Err("it is empty"));
        assert!(end_address(b"\x1f\x8b\x08").is_err_and(|why| why.contains("not an ELF")));
        assert!(end_address(&elf(1)[..40]).is_err());
        assert!(end_address(&elf(1)[..HEADER]).is_err_and(|why| why.contains("cut off")));
        assert!(end_address(&elf(u64::MAX)).is_err_and(|why| why.contains("wraps")));
        let mut other = elf(1);
        other[18] ^= 1;
        assert!(end_address(&other).is_err_and(|why| why.contains("processor")));
        let mut far = elf(1);
        far[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(end_address(&far).is_err());
    }

    #[test]
    fn names_the_file() {
        let missing = check(Path::new("/nonexistent/vmlinux"), 128).expect_err("missing");
        assert_eq!(missing.to_string(), "read guest kernel /nonexistent/vmlinux");
        let dir = tempfile::tempdir().expect("directory");
        assert!(check(dir.path(), 128).is_err_and(|e| e.to_string().ends_with("not a regular file")));
        let big = dir.path().join("vmlinux");
        std::fs::write(&big, elf(200 << 20)).expect("write");
        assert!(check(&big, 256).is_ok());
        let error = check(&big, 128).expect_err("too big").to_string();
        assert!(error.ends_with("it ends at 216 MiB and the guest has 128 MiB"), "{error}");
    }
}
