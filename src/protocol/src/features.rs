//! What a guest's kernel may have or lack, by name. The agent finds out by asking its kernel and reports it; what acts on
//! it, and what is shown to people, goes by these names and never by a kernel's version.

/// A feature that some guest kernels lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Its name, as in [`crate::status::Status::kernel_features`].
    pub name: &'static str,
    /// What pods have by it.
    pub gives: &'static str,
}

/// All that are worth telling people about, in the order in which they are told.
pub const ALL: &[Feature] = &[
    Feature { name: PRESSURE, gives: "cpu.pressure, memory.pressure and io.pressure, and their figures in the stats" },
    Feature { name: QUOTA, gives: "a limit for the writable side of one container" },
    Feature { name: ACL, gives: "POSIX ACLs, those of images among them" },
    Feature { name: NFTABLES, gives: "nft, and iptables through it" },
    Feature { name: IPTABLES_LEGACY, gives: "iptables of the old kind" },
    Feature { name: LANDLOCK, gives: "Landlock, for programs that confine themselves" },
    Feature { name: VERITY, gives: "layers that are checked as they are read" },
    Feature { name: SWAP, gives: "swap, for a pod that makes some" },
    Feature { name: CLOCK, gives: "the host's clock to follow" },
];

/// Pressure stall information.
pub const PRESSURE: &str = "pressure";
/// Project quotas of ext4.
pub const QUOTA: &str = "quota";
/// POSIX ACLs.
pub const ACL: &str = "acl";
/// nftables.
pub const NFTABLES: &str = "nftables";
/// The tables of iptables before nftables.
pub const IPTABLES_LEGACY: &str = "iptables-legacy";
/// Landlock.
pub const LANDLOCK: &str = "landlock";
/// dm-verity.
pub const VERITY: &str = "verity";
/// Swap.
pub const SWAP: &str = "swap";
/// PTP_KVM.
pub const CLOCK: &str = "clock";
/// The host's network through the VMM (libkrun's TSI). Only reported where it was asked for, as it is part of libkrunfw's
/// kernel only and pods are not meant to have it.
pub const HOST_NETWORK: &str = "host-network";
