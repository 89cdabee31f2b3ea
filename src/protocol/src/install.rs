//! Where nacelle's files are on a node: the shim looks for them there, and the command line says what the shim will find.
//!
//! ```text
//!  <prefix>/bin/              containerd-shim-nacelle-v2, nacelle
//!  <prefix>/libexec/nacelle/  nacelle-vmm, nacelle-agent
//!  <prefix>/share/nacelle/    vmlinux, vmlinux-plain-returns, vmlinux-libkrunfw
//! ```

use std::path::{Path, PathBuf};

/// Directory of the shim's helpers, below a prefix.
pub const LIBEXEC: &str = "libexec/nacelle";
/// The guest kernel, below a prefix. [`crate::processor::PLAIN_RETURNS`] may lie beside it.
pub const KERNEL: &str = "share/nacelle/vmlinux";
/// The kernel that lends the host's network, below a prefix.
pub const HOST_NETWORK_KERNEL: &str = "share/nacelle/vmlinux-libkrunfw";

/// Where the program `exe` looks for what is `below` a prefix, in its order: its own prefix first, then where packages put it.
pub fn places(exe: &Path, below: &str) -> Vec<PathBuf> {
    let own = exe.parent().and_then(Path::parent);
    let mut places = Vec::with_capacity(3);
    for prefix in own.into_iter().chain([Path::new("/usr/local"), Path::new("/usr")]) {
        let place = prefix.join(below);
        if !places.contains(&place) {
            places.push(place);
        }
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_own_prefix_comes_first_and_none_comes_twice() {
        let list =
            |exe: &str| places(Path::new(exe), "share/x").iter().map(|p| p.display().to_string()).collect::<Vec<_>>();
        assert_eq!(list("/opt/n/bin/shim"), ["/opt/n/share/x", "/usr/local/share/x", "/usr/share/x"]);
        assert_eq!(list("/usr/local/bin/shim"), ["/usr/local/share/x", "/usr/share/x"]);
        assert_eq!(list("shim"), ["/usr/local/share/x", "/usr/share/x"]);
    }
}
