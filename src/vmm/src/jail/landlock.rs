//! Step 12 of the jail: Landlock, as much of it as the kernel has.
//!
//! The root holds nothing but the plan's entries already. Landlock says once more, and by another part of the kernel, what
//! may be done to each; and it refuses what no mount can refuse: listing, TCP, and signals and abstract sockets across the
//! border; only TCP is left to a machine that lends its guest the host's network. It grants by what is opened, also through `/proc/self/fd`, and not by name.
//!
//! ```text
//!  /kernel              read                      /share/<tag>     read, list; if writable: all but devices on disk
//!  /dev/kvm             read, write, ioctl        /disk/<serial>   read; if writable: write, cut
//!  /dev/net/tun         the same, if it has NICs  /socket/<port>   connect
//!  /dev/<serial>        read, ioctl; if writable: write
//!  /dev/{,u}random      read
//!  everything else, /proc and / among it          no open but with O_PATH
//! ```
#![deny(unsafe_code)]

use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, make_bitflags,
};
use nacelle_protocol::vm::Landlock;

use super::{JailError, at};
use crate::plan::{Kind, Plan};
use crate::report;

const STAGE: &str = "landlock";

/// The newest that this build knows; an older kernel takes what it knows of it.
const NEWEST: ABI = ABI::V10;

const READ: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | ReadDir});

/// What a writable share allows. A character device is there for overlayfs' whiteouts, which a guest may keep on a
/// volume; a real one needs a capability that the VMM does not have. Nothing is ever executed.
const CHANGE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{
    WriteFile | Truncate | RemoveDir | RemoveFile | MakeChar | MakeDir | MakeReg | MakeSock | MakeFifo | MakeSym | Refer
});

const FILE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | WriteFile | Truncate});

/// Restricts the calling thread and those that it will start. Paths are those inside the jail.
pub fn restrict(plan: &Plan) -> Result<(), JailError> {
    let wanted = plan.jail.landlock;
    if wanted == Landlock::Off {
        report::degraded(STAGE, "go on without Landlock: the configuration turns it off");
        return Ok(());
    }
    let status = enforce(&rules(plan), plan.machine.host_network)
        .map_err(|e| at(STAGE, "restrict the VMM")(io::Error::other(e)))?;
    let why = match (status.ruleset, status.landlock) {
        (RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced, _) => return Ok(()),
        (_, LandlockStatus::NotEnabled) => "it is off; `landlock` belongs into lsm= of the kernel's command line",
        _ => "this kernel has none, and Linux 5.13 or newer can have it",
    };
    if wanted == Landlock::BestEffort {
        report::degraded(STAGE, &format!("go on without Landlock: {why}"));
        return Ok(());
    }
    Err(at(STAGE, "restrict the VMM (jail.landlock = \"best-effort\" would start it without)")(io::Error::other(why)))
}

/// What may be done to what, see the table above.
fn rules(plan: &Plan) -> Vec<(PathBuf, BitFlags<AccessFs>)> {
    let device = |name: &str, access| (Path::new("/dev").join(name), access);
    let controlled = make_bitflags!(AccessFs::{ReadFile | WriteFile | IoctlDev});
    let mut rules = vec![
        device("kvm", controlled),
        device("random", AccessFs::ReadFile.into()),
        device("urandom", AccessFs::ReadFile.into()),
    ];
    if !plan.machine.nics.is_empty() {
        rules.push(device("net/tun", controlled));
    }
    rules.extend(plan.entries.iter().map(|entry| {
        let allowed = if entry.read_only { READ } else { READ | CHANGE };
        let access = match entry.kind {
            Kind::Directory => allowed,
            Kind::File => allowed & FILE,
            Kind::Socket => AccessFs::ResolveUnix.into(),
            // How large it is, and its blocks are, is asked by ioctl.
            Kind::Device => allowed & FILE | AccessFs::IoctlDev,
        };
        (Path::new("/").join(&entry.inside), access)
    }));
    rules
}

/// What is not handled is allowed: the ports of a guest that has the host's network cannot be known.
fn enforce(
    rules: &[(PathBuf, BitFlags<AccessFs>)],
    host_network: bool,
) -> Result<landlock::RestrictionStatus, RulesetError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?;
    if !host_network {
        ruleset = ruleset.handle_access(AccessNet::from_all(NEWEST))?;
    }
    let mut ruleset = ruleset.create()?;
    for (path, access) in rules {
        // An entry that is gone again is an entry that nobody can open.
        let Ok(place) = PathFd::new(path) else { continue };
        ruleset = ruleset.add_rule(PathBeneath::new(place, *access))?;
    }
    ruleset.restrict_self()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_executed_and_no_disk_is_made() {
        for right in [AccessFs::Execute, AccessFs::MakeBlock, AccessFs::IoctlDev] {
            assert!(!(READ | CHANGE | FILE).contains(right), "{right:?}");
        }
        assert!(!READ.intersects(CHANGE));
    }
}
