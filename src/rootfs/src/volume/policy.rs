//! How the metadata of shared files could be treated. nacelle gives the guest the real one, through mounts that map ids, so of all
//! policies only the plainest is there; the others are read, so that whoever asks for one is told.

use std::fmt;
use std::str::FromStr;

use super::Fault;

/// Whether owners, modes and devices are kept beside the files instead of on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StatVirt {
    /// They are, or the volume is refused.
    Strict,
    /// They are where the file system can.
    Relaxed,
    /// They are not: the guest sees what the host has.
    Off,
}

/// Whether modes that the guest sets reach the host's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum HostPerms {
    /// They do not.
    Private,
    /// They do as well.
    Mirror,
}

/// What is asked for; what is absent is as nacelle does it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Policies {
    /// `stat-virt`.
    #[serde(rename = "stat_virtualization", skip_serializing_if = "Option::is_none")]
    pub stat_virt: Option<StatVirt>,
    /// `host-perms`.
    #[serde(rename = "host_permissions", skip_serializing_if = "Option::is_none")]
    pub host_perms: Option<HostPerms>,
}

/// A text that is no policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnknownPolicy {
    /// For `stat-virt`.
    #[error("stat-virt {0:?} is unknown: there are strict, relaxed and off")]
    StatVirt(String),
    /// For `host-perms`.
    #[error("host-perms {0:?} is unknown: there are private and mirror")]
    HostPerms(String),
}

impl StatVirt {
    /// Its text.
    pub fn name(self) -> &'static str {
        match self {
            StatVirt::Strict => "strict",
            StatVirt::Relaxed => "relaxed",
            StatVirt::Off => "off",
        }
    }
}

impl HostPerms {
    /// Its text.
    pub fn name(self) -> &'static str {
        match self {
            HostPerms::Private => "private",
            HostPerms::Mirror => "mirror",
        }
    }
}

impl fmt::Display for StatVirt {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for HostPerms {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for StatVirt {
    type Err = UnknownPolicy;

    fn from_str(text: &str) -> Result<StatVirt, UnknownPolicy> {
        let found = [StatVirt::Strict, StatVirt::Relaxed, StatVirt::Off].into_iter().find(|p| p.name() == text);
        found.ok_or_else(|| UnknownPolicy::StatVirt(text.to_owned()))
    }
}

impl FromStr for HostPerms {
    type Err = UnknownPolicy;

    fn from_str(text: &str) -> Result<HostPerms, UnknownPolicy> {
        let found = [HostPerms::Private, HostPerms::Mirror].into_iter().find(|p| p.name() == text);
        found.ok_or_else(|| UnknownPolicy::HostPerms(text.to_owned()))
    }
}

impl Policies {
    /// Why they cannot be had.
    pub(super) fn faults(self) -> Vec<Fault> {
        match self {
            Policies { stat_virt: Some(StatVirt::Off), host_perms: Some(HostPerms::Mirror) } => vec![Fault::PolicyPair],
            Policies { stat_virt, host_perms } => {
                let stat_virt = stat_virt.filter(|policy| *policy != StatVirt::Off);
                let stat_virt = stat_virt.map(|policy| Fault::StatVirt(policy.name()));
                stat_virt.into_iter().chain(host_perms.map(|policy| Fault::HostPerms(policy.name()))).collect()
            }
        }
    }
}
