//! What this guest's kernel has, found out by asking it. Names and meanings: [`nacelle_protocol::features`].
//!
//! A probe is one question that changes nothing. Whatever does not answer as expected counts as not there.

use std::fs;
use std::io;
use std::path::Path;

use nacelle_protocol::agent::UPPER_DIR;
use nacelle_protocol::features;
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

use crate::verity;

/// The word on the command line by which libkrun asks the kernel to let the VMM make its sockets.
const HIJACK: &str = "tsi_hijack";

/// Names of all that this kernel has. `clock` is whether the host's clock answers. The upper's disk is mounted.
pub fn found(clock: bool) -> Vec<String> {
    let there = |path: &str| Path::new(path).exists();
    let found = [
        (features::PRESSURE, there("/proc/pressure/memory")),
        (features::QUOTA, there("/proc/sys/fs/quota")),
        (features::ACL, keeps_acls(Path::new(UPPER_DIR))),
        (features::NFTABLES, nftables()),
        (features::IPTABLES_LEGACY, there("/proc/net/ip_tables_names")),
        (features::LANDLOCK, security_modules().is_ok_and(|list| has_word(&list, ',', "landlock"))),
        (features::VERITY, verity::supported()),
        (features::SWAP, there("/proc/swaps")),
        (features::CLOCK, clock),
        (features::HOST_NETWORK, lends_host_network()),
    ];
    found.into_iter().filter(|(_, there)| *there).map(|(name, _)| name.to_owned()).collect()
}

fn has_word(list: &str, separator: char, word: &str) -> bool {
    list.trim().split(separator).any(|name| name == word)
}

/// A file without an ACL says so; a file system that has none says that.
fn keeps_acls(path: &Path) -> bool {
    let mut nothing = [0u8; 0];
    matches!(rustix::fs::getxattr(path, "system.posix_acl_access", &mut nothing), Ok(_) | Err(Errno::NODATA))
}

/// The list of security modules, from a securityfs that is never attached anywhere.
fn security_modules() -> io::Result<String> {
    let context = fsopen("securityfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let root = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let list = openat(&root, "lsm", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    io::read_to_string(fs::File::from(list))
}

/// Asks nftables for its generation (NFT_MSG_GETGEN, linux/netfilter/nf_tables.h); without nftables an error comes back.
fn nftables() -> bool {
    const LENGTH: u32 = 20;
    const NFT_MSG_GETGEN: u16 = (10 << 8) | 16;
    const NLMSG_ERROR: u16 = 2;
    const NLM_F_REQUEST: u16 = 1;
    let ask = || -> io::Result<bool> {
        let mut message = Vec::with_capacity(LENGTH as usize);
        // struct nlmsghdr: length, type, flags, sequence, port
        message.extend(LENGTH.to_ne_bytes());
        message.extend(NFT_MSG_GETGEN.to_ne_bytes());
        message.extend(NLM_F_REQUEST.to_ne_bytes());
        message.extend(1u32.to_ne_bytes());
        message.extend(0u32.to_ne_bytes());
        // struct nfgenmsg: family, version, resource
        message.extend([0; 4]);
        let flags = SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::NETFILTER))?;
        rustix::net::sendto(&socket, &message, SendFlags::empty(), &netlink::SocketAddrNetlink::new(0, 0))?;
        let mut answer = [0; 256];
        let (received, _) = rustix::net::recv(&socket, &mut answer, RecvFlags::DONTWAIT)?;
        let kind = answer.get(4..6).filter(|_| received >= 16).and_then(|bytes| bytes.try_into().ok());
        Ok(kind.map(u16::from_ne_bytes).is_some_and(|kind| kind != NLMSG_ERROR))
    };
    ask().unwrap_or(false)
}

/// A kernel that knows the word takes it; one that does not gives it to its first process as an argument.
fn lends_host_network() -> bool {
    let asked = fs::read_to_string("/proc/cmdline").is_ok_and(|line| has_word(&line, ' ', HIJACK));
    asked && !std::env::args_os().any(|argument| argument == HIJACK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_whole() {
        assert!(has_word("landlock,lockdown\n", ',', "landlock"));
        assert!(!has_word("lockdown,landlocked", ',', "landlock"));
    }

    #[test]
    fn what_is_found_has_a_name() {
        for name in found(true) {
            assert!(features::ALL.iter().any(|feature| feature.name == name), "{name}");
        }
    }
}
