//! What a guest kernel's file says of itself: its release, and what it was built with where it carries that.

use std::{fs, io, path::Path};

use flate2::read::GzDecoder;
use nacelle_protocol::features::{self, Feature};

/// Before the release in every kernel (init/version.c).
const BANNER: &[u8] = b"Linux version ";
/// Before the gzip of the configuration in a kernel that carries it (kernel/configs.c).
const CONFIGURATION: &[u8] = b"IKCFG_ST";
/// Longest configuration that is read, in bytes; a large one has 300 KiB.
const MAX_CONFIGURATION: u64 = 4 << 20;

/// What pods' features need of a kernel's configuration; all of a row's symbols.
const SYMBOLS: &[(&str, &[&str])] = &[
    (features::PRESSURE, &["PSI"]),
    (features::QUOTA, &["QUOTA", "QFMT_V2"]),
    (features::ACL, &["EXT4_FS_POSIX_ACL", "EROFS_FS_POSIX_ACL", "TMPFS_POSIX_ACL"]),
    (features::NFTABLES, &["NF_TABLES", "NFT_COMPAT"]),
    (features::IPTABLES_LEGACY, &["IP_NF_FILTER", "IP_NF_NAT"]),
    (features::LANDLOCK, &["SECURITY_LANDLOCK"]),
    (features::VERITY, &["DM_VERITY"]),
    (features::SWAP, &["SWAP"]),
    (features::CLOCK, &["PTP_1588_CLOCK_KVM"]),
];

/// A kernel's file.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Kernel {
    /// Its release, as `uname -r` will have it.
    pub release: Option<String>,
    /// What pods have to do without; `None` where the file does not carry its configuration.
    pub lacks: Option<Vec<&'static Feature>>,
}

impl Kernel {
    /// Reads the file. That it is an ELF file is checked, no more: whether it boots is found out by booting it.
    pub fn read(path: &Path) -> io::Result<Self> {
        let bytes = fs::read(path)?;
        if !bytes.starts_with(b"\x7fELF") {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "not an ELF file; an uncompressed vmlinux is needed",
            ));
        }
        Ok(Self { release: release(&bytes), lacks: configuration(&bytes).map(|text| lacks(&text)) })
    }
}

fn release(bytes: &[u8]) -> Option<String> {
    // A format string comes first in some kernels.
    let mut rest = bytes;
    loop {
        rest = &rest[find(rest, BANNER)? + BANNER.len()..];
        let word: String = rest.iter().take(64).map(|b| char::from(*b)).take_while(char::is_ascii_graphic).collect();
        if word.starts_with(|c: char| c.is_ascii_digit()) {
            return Some(word);
        }
    }
}

fn configuration(bytes: &[u8]) -> Option<String> {
    let packed = &bytes[find(bytes, CONFIGURATION)? + CONFIGURATION.len()..];
    let mut text = String::new();
    io::Read::read_to_string(&mut io::Read::take(GzDecoder::new(packed), MAX_CONFIGURATION), &mut text).ok()?;
    Some(text)
}

fn lacks(configuration: &str) -> Vec<&'static Feature> {
    let on =
        |symbol: &&str| configuration.lines().any(|line| line.strip_prefix("CONFIG_") == Some(&format!("{symbol}=y")));
    let lacking = SYMBOLS.iter().filter(|(_, symbols)| !symbols.iter().all(on)).map(|(name, _)| *name);
    lacking.filter_map(|name| features::ALL.iter().find(|feature| feature.name == name)).collect()
}

fn find(bytes: &[u8], word: &[u8]) -> Option<usize> {
    let (first, rest) = word.split_first()?;
    let mut from = 0;
    while let Some(at) = bytes.get(from..)?.iter().position(|byte| byte == first) {
        from += at + 1;
        if bytes.get(from..)?.starts_with(rest) {
            return Some(from - 1);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn image(configuration: &str) -> Vec<u8> {
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(configuration.as_bytes()).expect("pack");
        let packed = packed.finish().expect("pack");
        [b"\x7fELF Linux version %s\0 Linux version 6.12.1-x (a@b)\0 IKCFG_ST", &packed[..], b"IKCFG_ED"].concat()
    }

    #[test]
    fn every_feature_has_symbols() {
        let named: Vec<_> = SYMBOLS.iter().map(|(name, _)| *name).collect();
        assert_eq!(named, features::ALL.iter().map(|feature| feature.name).collect::<Vec<_>>());
    }

    #[test]
    fn says_what_it_carries() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("vmlinux");
        let all: String =
            SYMBOLS.iter().flat_map(|(_, symbols)| *symbols).map(|symbol| format!("CONFIG_{symbol}=y\n")).collect();
        fs::write(&path, image(&all)).expect("write");
        let kernel = Kernel::read(&path).expect("read");
        assert_eq!(kernel, Kernel { release: Some("6.12.1-x".into()), lacks: Some(Vec::new()) });

        fs::write(&path, image(&all.replace("CONFIG_QFMT_V2=y", "# CONFIG_QFMT_V2 is not set"))).expect("write");
        let lacks = Kernel::read(&path).expect("read").lacks.expect("carried");
        assert_eq!(lacks.iter().map(|feature| feature.name).collect::<Vec<_>>(), ["quota"]);
    }

    #[test]
    fn says_nothing_of_what_it_does_not_carry() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("vmlinux");
        fs::write(&path, b"\x7fELF IKCFG_ST and no gzip").expect("write");
        assert_eq!(Kernel::read(&path).expect("read"), Kernel::default());
        fs::write(&path, b"MZ").expect("write");
        assert!(Kernel::read(&path).is_err());
    }
}
