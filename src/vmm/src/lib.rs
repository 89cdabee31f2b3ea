//! The VMM process of a sandbox: it jails itself and then becomes the microVM.
//!
//! ```text
//!  fd 3 VmConfig ──► plan ──┬─ what to put into the jail, and where ──► jail
//!                           └─ the machine, by names inside the jail ─► krun ──► guest
//!  fd 4 Report   ◄── report ◄── every failure, and every panic of libkrun's threads
//! ```
//!
//! The shim and the tests of the jail use nothing of this library but the process around it; it is a library so that
//! the tests can enter the real jail without a virtual machine.
//!
//! This crate knows nothing of Kubernetes, containers, images or tasks. Outside [`jail`] no path of the host is used
//! once the jail is closed, and only [`jail`] and [`krun`] contain `unsafe`.

pub mod jail;
pub mod kernel;
pub mod krun;
pub mod log;
pub mod plan;
pub mod report;
