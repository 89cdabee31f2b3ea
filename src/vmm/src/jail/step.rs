//! The measures of the jail by name, so that a test can leave one out and see what it was good for.
//!
//! A program that was built without debug assertions takes every step: there the question is a constant, and nothing of
//! this file is left in it.
#![deny(unsafe_code)]

#[cfg(debug_assertions)]
use std::sync::atomic::{AtomicU32, Ordering};

/// A measure. The numbers in the comments are those of [`crate::jail`]; 12 and 13, Landlock and seccomp, have switches of
/// their own in the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// 1: limits of resources.
    Limits,
    /// 2: inherited descriptors are closed.
    Descriptors,
    /// 3: cgroups are joined.
    Cgroups,
    /// 5: a network namespace that is not the host's.
    NetworkNamespace,
    /// 6: IPC, UTS and cgroup namespaces.
    Namespaces,
    /// 7: what is grafted has `nosuid`, `nodev` and `noexec`, and is read-only where the plan says so.
    Attributes,
    /// 7: the root is read-only.
    Seal,
    /// 8: a PID namespace.
    PidNamespace,
    /// 9: the host's root is detached.
    Detach,
    /// 10: the user namespace is joined.
    UserNamespace,
    /// 10: capabilities are dropped.
    Capabilities,
    /// 11: no new privileges.
    NoNewPrivileges,
    /// 11: a session of its own.
    Session,
    /// 11: an empty environment.
    Environment,
    /// 14: the lifeline.
    Lifeline,
}

#[cfg(debug_assertions)]
static LEFT_OUT: AtomicU32 = AtomicU32::new(0);

/// Leaves steps out, from now on and in this process. For tests: it does not exist in a release build.
#[cfg(debug_assertions)]
pub fn leave_out(steps: &[Step]) {
    LEFT_OUT.store(steps.iter().fold(0, |bits, step| bits | step.bit()), Ordering::Relaxed);
}

impl Step {
    #[cfg(debug_assertions)]
    fn bit(self) -> u32 {
        1 << self as u32
    }

    /// Whether this step is taken.
    #[cfg(debug_assertions)]
    pub(super) fn taken(self) -> bool {
        LEFT_OUT.load(Ordering::Relaxed) & self.bit() == 0
    }

    /// Whether this step is taken: always.
    #[cfg(not(debug_assertions))]
    pub(super) const fn taken(self) -> bool {
        true
    }
}
