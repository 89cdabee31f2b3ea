//! libkrun, and nothing else: the calls of its C interface behind a safe [`Vm`].
//!
//! What a machine has, in the order of libkrun's devices:
//!
//! ```text
//!  balloon, rng       libkrun's own, always there
//!  hvc0               console, out to descriptor 6
//!  virtiofs …         the shares
//!  virtio-blk         /dev/vda, read-only: the agent's image, which is the guest's root
//!  virtio-blk …       the disks
//!  vsock              the guest dials, libkrun connects to a UNIX socket; no TSI
//!  virtio-net …       the taps
//! ```
//!
//! Sources of what is said here about libkrun: crate `libkrun` 1.19.7, src/lib.rs, and `krun-vmm`, src/builder.rs. It
//! ends the process by itself when the guest does; status 0 says nothing, because a panic of the guest's is a reset.
#![expect(unsafe_code, reason = "libkrun's interface takes C strings and pointers")]

use std::convert::Infallible;
use std::ffi::{CString, NulError};
use std::io;
use std::ptr;

use krun as sys;
use nacelle_protocol::vm::{CONSOLE_FD, DiskFormat, Nic};
use rustix::fs::{Access, AtFlags, CWD, accessat};
use thiserror::Error;

use crate::log;
use crate::plan::{Disk, Machine, Share};

/// File attributes stay valid in the guest for five seconds ("LinuxComplete").
const KEEPS_ATTRIBUTES: u32 = 0;
/// File attributes are asked for each time ("LinuxSimplified"; on Linux the two differ in nothing else that is used here).
const ASKS_FOR_ATTRIBUTES: u32 = 1;
/// `krun_set_kernel`: an ELF image.
const KERNEL_FORMAT_ELF: u32 = 1;
/// `krun_add_vsock`: the guest's IPv4 and IPv6 sockets are made by the VMM.
const TSI_HIJACK_INET: u32 = 1;
/// `krun_add_net_tap`: bits of virtio-net that the guest is offered (`linux/virtio_net.h`): checksums left to the device,
/// CSUM 0 and GUEST_CSUM 1, and TCP segments of up to 64 KiB in both directions, GUEST_TSO4 7, GUEST_TSO6 8, HOST_TSO4 11
/// and HOST_TSO6 12. A frame between two pods of a node is then never cut, and its checksum never computed.
const NET_FEATURES: u32 = 1 | 1 << 1 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12;
/// `krun_add_disk3`: what an image is (`libkrun.h`, KRUN_DISK_FORMAT_*).
const fn disk_format(format: DiskFormat) -> u32 {
    match format {
        DiskFormat::Raw => 0,
        DiskFormat::Qcow2 => 1,
        DiskFormat::Vmdk => 2,
    }
}
/// `krun_add_disk3`: the guest is offered no flush.
const SYNC_NONE: u32 = 0;
/// `krun_add_disk3`: a flush is an fsync of the image.
const SYNC_FULL: u32 = 2;

/// Why the machine did not start.
#[derive(Debug, Error)]
pub enum KrunError {
    /// The sandbox's ids do not allow what the machine needs.
    #[error("reach {0} as the sandbox's user")]
    Reach(String, #[source] io::Error),
    /// A path or the command line holds a zero byte.
    #[error("pass text to libkrun")]
    Text(#[from] NulError),
    /// A call failed.
    #[error("call {call}: {}", why(.reason))]
    Call {
        /// The function.
        call: &'static str,
        /// The error that libkrun logged last.
        reason: Option<String>,
        #[source]
        /// What it returned.
        source: io::Error,
    },
}

fn why(reason: &Option<String>) -> &str {
    reason.as_deref().unwrap_or("libkrun gives no reason")
}

/// A machine that has not started yet.
#[derive(Debug)]
pub struct Vm {
    machine: Machine,
}

impl Vm {
    /// A machine. Paths are looked up when it starts, inside the jail.
    pub fn new(machine: Machine) -> Self {
        Self { machine }
    }

    /// Becomes the machine: libkrun takes this thread, starts more, and ends the process when the guest ends.
    ///
    /// # Errors
    /// [`KrunError`], before the guest has run.
    pub fn start(self) -> Result<Infallible, KrunError> {
        let Self { machine } = self;
        reach(&machine)?;
        let ctx = done("krun_create_ctx", sys::krun_create_ctx())?.unsigned_abs();
        done("krun_set_vm_config", sys::krun_set_vm_config(ctx, machine.vcpus, machine.memory_mib))?;
        set_kernel(ctx, &machine)?;
        set_console(ctx)?;
        machine.shares.iter().try_for_each(|share| add_share(ctx, share))?;
        // The first disk is /dev/vda, where the kernel's command line looks for the root.
        add_disk(ctx, &machine.root)?;
        machine.disks.iter().try_for_each(|disk| add_disk(ctx, disk))?;
        machine.nics.iter().try_for_each(|nic| add_nic(ctx, nic))?;
        add_sockets(ctx, &machine)?;
        let status = sys::krun_start_enter(ctx);
        // It does not return but with an error; a zero would be one, too.
        Err(failed("krun_start_enter", if status < 0 { status } else { -libc::EPROTO }))
    }
}

/// libkrun opens what follows only when the machine is half built, or when the guest asks. Tell now, and by name.
fn reach(machine: &Machine) -> Result<(), KrunError> {
    let change = |read_only| if read_only { Access::READ_OK } else { Access::READ_OK | Access::WRITE_OK };
    let kernel = [(machine.kernel.as_str(), Access::READ_OK), ("/dev/kvm", change(false))];
    let disks =
        std::iter::once(&machine.root).chain(&machine.disks).map(|disk| (disk.path.as_str(), change(disk.read_only)));
    let shares = machine.shares.iter().map(|share| (share.path.as_str(), Access::EXEC_OK));
    let sockets = machine.sockets.iter().map(|(_, path)| (path.as_str(), Access::WRITE_OK));
    let tun = (!machine.nics.is_empty()).then_some(("/dev/net/tun", change(false)));
    for (path, access) in kernel.into_iter().chain(disks).chain(shares).chain(sockets).chain(tun) {
        accessat(CWD, path, access, AtFlags::empty()).map_err(|e| KrunError::Reach(path.to_owned(), e.into()))?;
    }
    Ok(())
}

fn set_kernel(ctx: u32, machine: &Machine) -> Result<(), KrunError> {
    let kernel = CString::new(machine.kernel.as_str())?;
    let line = CString::new(machine.command_line.as_str())?;
    // SAFETY: both strings outlive the call, which copies them; a null initrd means that there is none.
    let status = unsafe { sys::krun_set_kernel(ctx, kernel.as_ptr(), KERNEL_FORMAT_ELF, ptr::null(), line.as_ptr()) };
    done("krun_set_kernel", status).map(drop)
}

/// The implicit console is the one whose output libkrun takes from a file byte by byte; of a console made explicitly,
/// hvc0 goes to the log unless it is a terminal. The path is opened when the machine is built.
fn set_console(ctx: u32) -> Result<(), KrunError> {
    let path = CString::new(format!("/proc/self/fd/{CONSOLE_FD}"))?;
    // SAFETY: the string outlives the call, which copies it.
    done("krun_set_console_output", unsafe { sys::krun_set_console_output(ctx, path.as_ptr()) }).map(drop)
}

/// No DAX window, ever: libkrun checks its bounds with an addition that a guest can make overflow.
fn add_share(ctx: u32, share: &Share) -> Result<(), KrunError> {
    let (tag, path) = (CString::new(share.tag.as_str())?, CString::new(share.path.as_str())?);
    // Layers never change. What others write to a volume has to be seen at once: its attributes are not kept.
    let semantics = if share.read_only { KEEPS_ATTRIBUTES } else { ASKS_FOR_ATTRIBUTES };
    // SAFETY: both strings outlive the call, which copies them.
    done("krun_add_virtiofs4", unsafe {
        sys::krun_add_virtiofs4(ctx, tag.as_ptr(), path.as_ptr(), 0, share.read_only, semantics)
    })
    .map(drop)
}

/// Through the host's page cache, which is where a freshly made upper is already. A flush costs an fsync of the host's:
/// it is offered for what outlives the sandbox only. Without it the guest sees a disk that has no volatile cache, and
/// what it wrote is as safe as any file of the host's page cache against the death of this process.
fn add_disk(ctx: u32, disk: &Disk) -> Result<(), KrunError> {
    let (serial, path) = (CString::new(disk.serial.as_str())?, CString::new(disk.path.as_str())?);
    let sync = if disk.ephemeral || disk.read_only { SYNC_NONE } else { SYNC_FULL };
    // SAFETY: both strings outlive the call, which copies them.
    done("krun_add_disk3", unsafe {
        sys::krun_add_disk3(ctx, serial.as_ptr(), path.as_ptr(), disk_format(disk.format), disk.read_only, false, sync)
    })
    .map(drop)
}

/// The tap is opened by its name, in the VMM's network namespace, when the guest's driver comes up.
fn add_nic(ctx: u32, nic: &Nic) -> Result<(), KrunError> {
    let tap = CString::new(nic.tap.as_str())?;
    // SAFETY: the string and the six bytes outlive the call, which copies them; the plan has checked the name's length,
    // which libkrun does not.
    done("krun_add_net_tap", unsafe { sys::krun_add_net_tap(ctx, tap.as_ptr(), nic.mac.as_ptr(), NET_FEATURES, 0) })
        .map(drop)
}

/// libkrun's implicit vsock would carry the guest's network, and tell the kernel so; ours does only when it is asked to.
fn add_sockets(ctx: u32, machine: &Machine) -> Result<(), KrunError> {
    done("krun_disable_implicit_vsock", sys::krun_disable_implicit_vsock(ctx))?;
    let features = if machine.host_network { TSI_HIJACK_INET } else { 0 };
    done("krun_add_vsock", sys::krun_add_vsock(ctx, features))?;
    for (port, path) in &machine.sockets {
        let path = CString::new(path.as_str())?;
        // SAFETY: the string outlives the call, which copies it.
        done("krun_add_vsock_port2", unsafe { sys::krun_add_vsock_port2(ctx, *port, path.as_ptr(), false) })?;
    }
    Ok(())
}

fn done(call: &'static str, status: i32) -> Result<i32, KrunError> {
    if status < 0 { Err(failed(call, status)) } else { Ok(status) }
}

fn failed(call: &'static str, status: i32) -> KrunError {
    let source = io::Error::from_raw_os_error(status.saturating_neg());
    KrunError::Call { call, reason: log::last_error(), source }
}
