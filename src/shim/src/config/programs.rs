//! The files that a VM is made of: where they are looked for, which of two kernels it is, and what is checked of them.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use nacelle_protocol::install::{self, HOST_NETWORK_KERNEL, KERNEL, LIBEXEC};
use nacelle_protocol::processor;
use nacelle_protocol::vm::Network;

use super::{Config, ConfigError};

/// The files that a VM is made of, all present and of the right kind.
#[derive(Clone, Debug)]
pub struct Programs {
    /// `nacelle-vmm`.
    pub vmm: PathBuf,
    /// `nacelle-agent`.
    pub agent: PathBuf,
    /// The guest kernel.
    pub kernel: PathBuf,
}

/// What a node has for its machines.
#[derive(Clone, Copy, Debug)]
pub struct Node<'a> {
    /// The shim's own path: what belongs to it is looked for beside it first.
    pub exe: &'a Path,
    /// The device of virtual machines.
    pub kvm: &'a Path,
    /// The directory in which Linux tells of the processor's faults ([`processor::FAULTS`]).
    pub faults: &'a Path,
}

impl Config {
    /// Finds the files that a VM with this network is made of, and checks that this host can run one.
    ///
    /// The host's network comes to a guest by libkrun's TSI, which is part of libkrunfw's kernel only. Where nobody has named
    /// a kernel, one that leaves out what this node's processor does not need goes before the one for all.
    ///
    /// # Errors
    /// [`ConfigError`] says what is missing, where it was looked for, and what to do about it.
    pub fn programs(&self, node: Node<'_>, network: &Network) -> Result<Programs, ConfigError> {
        let find = |what, key, configured: &Option<PathBuf>, below: &str| match configured {
            Some(path) => first(what, key, vec![path.clone()]),
            None => first(what, key, install::places(node.exe, below)),
        };
        let kernel = match network {
            Network::Host => {
                let what = "guest kernel with TSI (libkrunfw's), which a container on the host's network needs";
                find(what, "host_network_kernel", &self.host_network_kernel, HOST_NETWORK_KERNEL)?
            }
            Network::New | Network::Join(_) => {
                let found = find("guest kernel", "kernel", &self.kernel, KERNEL)?;
                let read = |fault: &str| std::fs::read_to_string(node.faults.join(fault)).ok();
                if self.kernel.is_some() { found } else { processor::fitting(found, Path::is_file, read) }
            }
        };
        let programs = Programs {
            kernel,
            vmm: find("VMM", "vmm", &self.vmm, &format!("{LIBEXEC}/nacelle-vmm"))?,
            agent: find("agent", "agent", &self.agent, &format!("{LIBEXEC}/nacelle-agent"))?,
        };
        check_elf("guest kernel", &programs.kernel, "; an uncompressed vmlinux is needed, not a bzImage")?;
        check_elf("agent", &programs.agent, "")?;
        File::options().read(true).write(true).open(node.kvm).map_err(ConfigError::Kvm)?;
        Ok(programs)
    }
}

/// The first of the candidates that is a file.
fn first(what: &'static str, key: &'static str, candidates: Vec<PathBuf>) -> Result<PathBuf, ConfigError> {
    candidates.iter().find(|path| path.is_file()).cloned().ok_or_else(|| {
        let tried: Vec<_> = candidates.iter().map(|path| path.display().to_string()).collect();
        ConfigError::Missing { what, key, tried: tried.join(" or ") }
    })
}

fn check_elf(what: &'static str, path: &Path, hint: &'static str) -> Result<(), ConfigError> {
    let mut magic = [0; 4];
    match File::open(path).and_then(|mut file| file.read_exact(&mut magic)) {
        Ok(()) if magic == *b"\x7fELF" => Ok(()),
        Ok(()) => Err(ConfigError::NotElf { what, path: path.to_owned(), hint }),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
            Err(ConfigError::NotElf { what, path: path.to_owned(), hint })
        }
        Err(source) => Err(ConfigError::Read { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use nacelle_protocol::processor::PLAIN_RETURNS;

    use super::super::parse;
    use super::*;

    #[test]
    fn programs_say_what_is_missing_and_where() {
        let dir = tempfile::tempdir().expect("tempdir");
        let exe = dir.path().join("bin/shim");
        let kernel = dir.path().join("vmlinux");
        let kvm = dir.path().join("kvm");
        let node = Node { exe: &exe, kvm: &kvm, faults: dir.path() };
        let programs = |config: &Config| config.programs(node, &Network::New);
        let mut config = parse("", "").expect("defaults");
        config.kernel = Some(kernel.clone());
        let text = programs(&config).expect_err("missing").to_string();
        assert!(text.contains("guest kernel") && text.contains("vmlinux") && text.contains("vm.kernel"), "{text}");
        std::fs::write(&kernel, b"MZ..").expect("write");
        let vmm = dir.path().join("vmm");
        config.vmm = Some(vmm.clone());
        assert!(matches!(programs(&config), Err(ConfigError::Missing { what: "VMM", .. })));
        std::fs::write(&vmm, b"").expect("write");
        config.agent = Some(kernel.clone());
        assert!(matches!(programs(&config), Err(ConfigError::NotElf { what: "guest kernel", .. })));
        std::fs::write(&kernel, b"\x7fELF").expect("write");
        assert!(matches!(programs(&config), Err(ConfigError::Kvm(_))));
        std::fs::write(&kvm, b"").expect("write");
        assert_eq!(programs(&config).expect("complete").vmm, vmm);
        let tsi = dir.path().join("vmlinux-libkrunfw");
        config.host_network_kernel = Some(tsi.clone());
        let text = config.programs(node, &Network::Host).expect_err("missing").to_string();
        assert!(text.contains("TSI") && text.contains("vm.host_network_kernel"), "{text}");
        std::fs::copy(&kernel, &tsi).expect("copy");
        assert_eq!(config.programs(node, &Network::Host).expect("complete").kernel, tsi);
    }

    #[test]
    fn plain_returns_are_for_processors_without_their_faults() {
        let dir = tempfile::tempdir().expect("tempdir");
        let at = |name: &str| dir.path().join(name);
        let says = |name: &str, text: &str| std::fs::write(at(name), text).expect("write");
        for name in ["bin", "libexec/nacelle", "share/nacelle", "faults"] {
            std::fs::create_dir_all(at(name)).expect("mkdir");
        }
        for name in ["libexec/nacelle/nacelle-vmm", "libexec/nacelle/nacelle-agent", "share/nacelle/vmlinux", "kvm"] {
            says(name, "\x7fELF");
        }
        let (exe, kvm, faults) = (at("bin/shim"), at("kvm"), at("faults"));
        let node = Node { exe: &exe, kvm: &kvm, faults: &faults };
        let mut config = parse("", "").expect("defaults");
        let kernel = |config: &Config| {
            let found = config.programs(node, &Network::New).expect("complete").kernel;
            found.file_name().expect("a name").to_str().expect("text").to_owned()
        };
        for fault in ["retbleed", "spec_rstack_overflow", "indirect_target_selection"] {
            says(&format!("faults/{fault}"), "Not affected\n");
        }
        assert_eq!(kernel(&config), "vmlinux", "there is no other");
        says(&format!("share/nacelle/{PLAIN_RETURNS}"), "\x7fELF");
        assert_eq!(kernel(&config), PLAIN_RETURNS);
        says("faults/retbleed", "Vulnerable\n");
        assert_eq!(kernel(&config), "vmlinux");
        says("faults/retbleed", "Not affected\n");
        config.kernel = Some(at("share/nacelle/vmlinux"));
        assert_eq!(kernel(&config), "vmlinux", "what is named is what runs");
    }
}
