//! `nacelle upper`: writable disks, as the shim makes them for containers.

use std::io;
use std::path::{Path, PathBuf};

use nacelle_rootfs::upper;

use crate::units;

/// What to do with upper disks.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Make a sparse ext4 disk that is ready to be a container's upper
    Create {
        /// The disk to make; it must not exist
        disk: PathBuf,
        /// Its size in bytes; K, M, G and T are binary multiples
        #[arg(long, value_parser = units::parse_bytes)]
        size: u64,
    },
}

/// Does it.
pub fn run(command: &Command, data_dir: &Path, out: &mut impl io::Write) -> anyhow::Result<()> {
    let Command::Create { disk, size } = command;
    upper::create(data_dir, disk, *size)?;
    writeln!(out, "{}: ext4, {}", disk.display(), units::bytes(*size))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let command = Command::Create { disk: dir.path().join("disk"), size: 1 << 30 };
        let mut out = Vec::new();
        run(&command, dir.path(), &mut out).unwrap();
        assert!(String::from_utf8(out).unwrap().ends_with("disk: ext4, 1.0 GiB\n"));
        let error = run(&command, dir.path(), &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("create upper disk"), "{error}");
    }
}
