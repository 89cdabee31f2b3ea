//! From a [`VmConfig`] to two plans: what goes into the jail, and the machine that libkrun builds from it.
//!
//! libkrun answers almost every mistake with `-EINVAL`, panics on a few, and ignores the rest. So everything it could
//! dislike is refused here, with a name; what a [`Plan`] contains has been checked. Pure: no file is touched.
//!
//! ```text
//!  inside the jail          from
//!  /kernel                  VmConfig::kernel
//!  /root                    VmConfig::agent
//!  /share/<tag>             VmConfig::shares
//!  /disk/<serial>           VmConfig::disks
//!  /dev/<serial>            one that is a block device: a node of its own
//!  /disk/<serial>/<path>    one that has parts, at its own path below there; and its parts that it names relative to itself
//!  /<path>                  its parts that it names absolutely, but for the names that stand here
//!  /socket/<port>           VmConfig::sockets; the VMM's working directory
//!  /files                   empty: the shim may make another root there, see below
//!  /dev, /proc              made by the jail
//! ```
//!
//! What libkrun opens once the guest runs, it opens by a name relative to `/socket`: by then the VMM may have been given another
//! root, the files of its guest, for those who look into it from the host.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::path::{Component, Path, PathBuf};

use nacelle_protocol::GENERATION;
use nacelle_protocol::agent::UPPER_SERIAL;
use nacelle_protocol::vm::{
    Disk as DiskConfig, DiskFormat, FIXED_DEVICES, Jail, MAX_DEVICES, Network, Nic, Nics, VmConfig,
};
use thiserror::Error;

/// Where the VMM is in its jail: below the root, so that it stays there when the root is exchanged (pivot_root(2)).
pub const WORKING_DIRECTORY: &str = "socket";

/// The place for another root.
pub const FILES: &str = "files";

/// Names at the jail's root that nothing else can have.
const RESERVED: [&str; 8] = ["kernel", "root", "share", "disk", WORKING_DIRECTORY, FILES, "dev", "proc"];

/// Names in the jail's /dev that nothing else can have.
const JAIL_DEVICES: [&str; 4] = ["kvm", "random", "urandom", "net"];

/// Serial number of the root's disk. No other disk has it.
const ROOT_SERIAL: &str = "agent";

/// Bytes that Linux keeps of its command line (`COMMAND_LINE_SIZE`), the terminating zero included.
const COMMAND_LINE_SIZE: usize = 2048;

/// What libkrun adds to the command line for a device: ` virtio_mmio.device=4K@0xd0000000:15`.
const DEVICE_WORD: usize = 36;

/// What libkrun adds around our command line: five spaces in front of the devices and ` -- ` behind them.
const COMMAND_LINE_FRAME: usize = 16;

/// The kernel's command line, but for `kernel_args` and what libkrun appends.
///
/// Every word has a reason: the console is hvc0 and there is no other, so nothing is probed for; `quiet` keeps boot
/// messages off a slow console and lets errors through; `reboot=k` and `panic=-1` make both a reboot and a panic pulse
/// the keyboard controller, which is the one way out of the machine that libkrun watches on x86_64; `no-kvmapf` because
/// libkrun takes no asynchronous page faults; `dummy.numdummies=0` because a pod has the interfaces that it was given
/// and no `dummy0` besides; `maxcpus=1`, as each further CPU costs a good part of a boot, so the agent brings
/// them up when it has called home; `swiotlb=noforce`, as no device here needs the bounce buffers (64 MiB) that a large guest
/// would set aside; the root is the first disk, which [`crate::krun`] adds before all others.
const COMMAND_LINE: &str = "console=hvc0 quiet reboot=k panic=-1 no-kvmapf dummy.numdummies=0 maxcpus=1 swiotlb=noforce \
                            root=/dev/vda rootfstype=erofs ro init=/agent";

/// Smallest guest that is worth starting, in MiB: the kernel alone takes some 40.
pub const MIN_MEMORY_MIB: u32 = 64;

/// What is wrong with a [`VmConfig`].
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PlanError {
    /// It was written for another build.
    #[error("read configuration: generation {0}, expected {GENERATION}")]
    Generation(u32),
    /// No virtual CPU, or too little memory.
    #[error("plan machine: {0}")]
    Machine(String),
    /// More devices than libkrun has interrupt lines.
    #[error("plan devices: {shares} shares, {disks} disks and {nics} network devices need {} devices, and there are {MAX_DEVICES}",
            shares + disks + nics + FIXED_DEVICES)]
    Devices {
        /// Shares asked for.
        shares: usize,
        /// Disks asked for.
        disks: usize,
        /// Network devices asked for.
        nics: usize,
    },
    /// A tag, a serial number or a tap's name has the wrong length or characters.
    #[error("plan {kind} {name:?}: a name is 1 to {max} of a-z, 0-9 and -")]
    Name {
        /// `share`, `disk` or `tap`.
        kind: &'static str,
        /// The name.
        name: String,
        /// Longest name that the device can carry, in bytes.
        max: usize,
    },
    /// Two devices or sockets of the same name.
    #[error("plan {kind} {name}: it is there twice")]
    Twice {
        /// `share`, `disk`, `socket` or `tap`.
        kind: &'static str,
        /// The name or the port.
        name: String,
    },
    /// A word for the kernel that would be read as something else.
    #[error("plan kernel argument {0:?}: a word is printable ASCII without spaces and quotes, and not --")]
    KernelArgument(String),
    /// The command line is longer than the kernel reads.
    #[error("plan kernel arguments: {0} bytes too many for the kernel's command line")]
    CommandLine(usize),
    /// A disk refers to a file by a name that the jail has something else for.
    #[error("plan disk: file {path} cannot be {named} in the jail", path = .path.display(), named = .named.display())]
    Part {
        /// The file.
        path: PathBuf,
        /// Where it would have to be.
        named: PathBuf,
    },
    /// A path of the host is not absolute.
    #[error("plan {kind}: path {path} is not absolute", path = .path.display())]
    Relative {
        /// What the path is for.
        kind: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// The guest's own root, or too high for the range.
    #[error("plan jail: id {0} cannot be root of a pod's user namespace")]
    PodRoot(u32),
    /// The range of ids is empty, holds root, or does not fit.
    #[error("plan jail: {count} ids from {base} on are no range of a sandbox")]
    Ids {
        /// First id.
        base: u32,
        /// How many.
        count: u32,
    },
}

/// What something inside the jail is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory with every mount below it, also later ones.
    Directory,
    /// One regular file. Its siblings stay outside.
    File,
    /// One listening UNIX socket.
    Socket,
    /// One block device.
    Device,
}

/// Whose the files of an [`Entry`] are inside the jail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ids {
    /// As on the host: what others may do is all that the VMM may do.
    Host,
    /// Mapped, if the file system can: id N on the disk is id N of the guest's.
    Mapped,
    /// Mapped, unless the file belongs to the sandbox's range already.
    Owned,
}

/// One thing of the host that appears inside the jail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it is on the host.
    pub source: PathBuf,
    /// Where it is in the jail, relative to the jail's root.
    pub inside: PathBuf,
    /// What it has to be.
    pub kind: Kind,
    /// Mounted read-only.
    pub read_only: bool,
    /// Whose it is.
    pub ids: Ids,
}

/// A share of the machine's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// virtiofs tag.
    pub tag: String,
    /// Path inside the jail, relative to [`WORKING_DIRECTORY`].
    pub path: String,
    /// Every change is refused by libkrun, too.
    pub read_only: bool,
}

/// A disk of the machine's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Serial number.
    pub serial: String,
    /// Path inside the jail.
    pub path: String,
    /// Offered read-only.
    pub read_only: bool,
    /// It dies with the sandbox, so a flush by the guest has nothing to protect.
    pub ephemeral: bool,
    /// How the image holds its blocks.
    pub format: DiskFormat,
}

/// The machine, by names that are good inside the jail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// RAM in MiB.
    pub memory_mib: u32,
    /// Path of the kernel.
    pub kernel: String,
    /// The image that is the guest's root.
    pub root: Disk,
    /// The kernel's command line.
    pub command_line: String,
    /// virtiofs devices.
    pub shares: Vec<Share>,
    /// virtio-blk devices after the root's.
    pub disks: Vec<Disk>,
    /// Ports that the guest may dial, and the sockets behind them, relative to [`WORKING_DIRECTORY`].
    pub sockets: Vec<(u32, String)>,
    /// virtio-net devices.
    pub nics: Vec<Nic>,
    /// The VMM makes the sockets that the guest asks for.
    pub host_network: bool,
}

/// A checked [`VmConfig`].
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Name of the sandbox.
    pub sandbox: String,
    /// Limits, ids and namespaces.
    pub jail: Jail,
    /// What goes into the jail.
    pub entries: Vec<Entry>,
    /// The machine.
    pub machine: Machine,
    /// The guest may own files of the host's: a share with mapped ids is there.
    pub owns_files: bool,
    /// Network devices are to come, see [`Plan::connect`].
    pub awaits_nics: bool,
}

impl Plan {
    /// Checks a configuration.
    ///
    /// # Errors
    /// [`PlanError`] names the first thing that is wrong.
    pub fn new(config: &VmConfig) -> Result<Self, PlanError> {
        if config.generation != GENERATION {
            return Err(PlanError::Generation(config.generation));
        }
        if config.vcpus == 0 {
            return Err(PlanError::Machine("it has no virtual CPU".into()));
        }
        if config.memory_mib < MIN_MEMORY_MIB {
            return Err(PlanError::Machine(format!(
                "{} MiB of memory are less than {MIN_MEMORY_MIB}",
                config.memory_mib
            )));
        }
        let (shares, disks) = (config.shares.len(), config.disks.len());
        if shares + disks + FIXED_DEVICES > MAX_DEVICES {
            return Err(PlanError::Devices { shares, disks, nics: 0 });
        }
        check_jail(&config.jail)?;

        // Those that are to come need room, too.
        let devices = if config.awaits_nics { MAX_DEVICES } else { FIXED_DEVICES + shares + disks };
        let mut entries = vec![
            entry("kernel", &config.kernel, "kernel".into(), Kind::File, true, Ids::Host)?,
            entry("agent", &config.agent, "root".into(), Kind::File, true, Ids::Host)?,
        ];
        let mut machine = Machine {
            vcpus: config.vcpus,
            memory_mib: config.memory_mib,
            kernel: "/kernel".into(),
            root: Disk {
                serial: ROOT_SERIAL.into(),
                path: "/root".into(),
                read_only: true,
                ephemeral: false,
                format: DiskFormat::Raw,
            },
            command_line: command_line(&config.kernel_args, devices)?,
            shares: Vec::with_capacity(shares),
            disks: Vec::with_capacity(disks),
            sockets: Vec::with_capacity(config.sockets.len()),
            nics: Vec::new(),
            host_network: config.jail.network == Network::Host,
        };
        let mut names = BTreeSet::from([("disk", ROOT_SERIAL.to_owned())]);
        for share in &config.shares {
            // The tag's field in the device's configuration; libkrun copies without looking.
            check_name("share", &share.tag, 36)?;
            once(&mut names, "share", &share.tag)?;
            let inside = format!("share/{}", share.tag);
            let ids = if share.idmap { Ids::Mapped } else { Ids::Host };
            machine.shares.push(Share {
                tag: share.tag.clone(),
                path: format!("../{inside}"),
                read_only: share.read_only,
            });
            entries.push(entry("share", &share.source, inside, Kind::Directory, share.read_only, ids)?);
        }
        for disk in &config.disks {
            // VIRTIO_BLK_ID_BYTES; libkrun cuts what is longer.
            check_name("disk", &disk.serial, 20)?;
            once(&mut names, "disk", &disk.serial)?;
            if disk.device && JAIL_DEVICES.contains(&disk.serial.as_str()) {
                return Err(PlanError::Twice { kind: "disk", name: disk.serial.clone() });
            }
            let found = disk_entries(disk)?;
            let image = found.first().map(|image| image.inside.display().to_string()).unwrap_or_default();
            machine.disks.push(Disk {
                serial: disk.serial.clone(),
                path: format!("/{image}"),
                read_only: disk.read_only,
                ephemeral: disk.serial == UPPER_SERIAL,
                format: disk.format,
            });
            for part in found {
                // Two disks may share what they are based on.
                match entries.iter_mut().find(|known| known.inside == part.inside) {
                    Some(known) if known.source == part.source => known.read_only &= part.read_only,
                    Some(_) => return Err(PlanError::Part { path: part.source, named: part.inside }),
                    None => entries.push(part),
                }
            }
        }
        for socket in &config.sockets {
            once(&mut names, "socket", &socket.port)?;
            let inside = format!("{WORKING_DIRECTORY}/{}", socket.port);
            machine.sockets.push((socket.port, socket.port.to_string()));
            entries.push(entry("socket", &socket.source, inside, Kind::Socket, false, Ids::Owned)?);
        }
        Ok(Self {
            sandbox: config.sandbox.as_str().to_owned(),
            jail: config.jail.clone(),
            entries,
            machine,
            owns_files: config.shares.iter().any(|share| share.idmap),
            awaits_nics: config.awaits_nics,
        })
    }

    /// Adds the network devices.
    ///
    /// # Errors
    /// [`PlanError`] names the first thing that is wrong.
    pub fn connect(&mut self, nics: Nics) -> Result<(), PlanError> {
        let machine = &mut self.machine;
        let (shares, disks, nics) = (machine.shares.len(), machine.disks.len(), nics.nics);
        if FIXED_DEVICES + shares + disks + nics.len() > MAX_DEVICES {
            return Err(PlanError::Devices { shares, disks, nics: nics.len() });
        }
        let mut names = BTreeSet::new();
        for nic in &nics {
            // IFNAMSIZ with the zero behind; libkrun copies without looking.
            check_name("tap", &nic.tap, 15)?;
            once(&mut names, "tap", &nic.tap)?;
        }
        machine.nics = nics;
        Ok(())
    }
}

fn check_jail(jail: &Jail) -> Result<(), PlanError> {
    absolute("jail root", &jail.root)?;
    if let Network::Join(path) = &jail.network {
        absolute("network namespace", path)?;
    }
    jail.cgroups.iter().try_for_each(|path| absolute("cgroup", path))?;
    // 4294967295 is "no id" to the kernel, so no range may reach it.
    let (base, count) = (jail.uid_base, jail.uid_count);
    let fits = base.checked_add(count).is_some();
    if base == 0 || count == 0 || !fits {
        return Err(PlanError::Ids { base, count });
    }
    match jail.pod_root {
        Some(root) if root == 0 || count < 2 || root.checked_add(count - 1).is_none() => Err(PlanError::PodRoot(root)),
        _ => Ok(()),
    }
}

/// Where a disk's files go: the image, then its parts.
fn disk_entries(disk: &DiskConfig) -> Result<Vec<Entry>, PlanError> {
    let place = |source: &Path, inside, read_only| entry("disk", source, inside, Kind::File, read_only, Ids::Owned);
    if disk.device {
        let node = format!("dev/{}", disk.serial);
        return Ok(vec![entry("disk", &disk.source, node, Kind::Device, disk.read_only, Ids::Owned)?]);
    }
    let own = format!("disk/{}", disk.serial);
    if disk.parts.is_empty() {
        return Ok(vec![place(&disk.source, own, disk.read_only)?]);
    }
    let below = |path: &Path| clean(path).map(|path| path.display().to_string());
    let wrong = |path: &Path, named: &Path| PlanError::Part { path: path.to_owned(), named: named.to_owned() };
    let own_path = below(&disk.source).ok_or_else(|| wrong(&disk.source, &disk.source))?;
    let mut entries = vec![place(&disk.source, format!("{own}/{own_path}"), disk.read_only)?];
    for part in &disk.parts {
        let inside = below(&part.named).ok_or_else(|| wrong(&part.source, &part.named))?;
        let first = inside.split('/').next().unwrap_or_default();
        let inside = match part.absolute {
            true if RESERVED.contains(&first) => return Err(wrong(&part.source, &part.named)),
            true => inside,
            false => format!("{own}/{inside}"),
        };
        entries.push(place(&part.source, inside, part.read_only)?);
    }
    Ok(entries)
}

/// An absolute path relative to the root, with every `..` followed by its text: in the jail no link is on the way.
fn clean(path: &Path) -> Option<PathBuf> {
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::RootDir => {}
            Component::Normal(name) => clean.push(name.to_str()?),
            Component::ParentDir => drop(clean.pop()),
            Component::CurDir | Component::Prefix(_) => return None,
        }
    }
    (path.is_absolute() && !clean.as_os_str().is_empty()).then_some(clean)
}

fn entry(
    kind_name: &'static str,
    source: &Path,
    inside: String,
    kind: Kind,
    read_only: bool,
    ids: Ids,
) -> Result<Entry, PlanError> {
    absolute(kind_name, source)?;
    Ok(Entry { source: source.to_owned(), inside: inside.into(), kind, read_only, ids })
}

fn absolute(kind: &'static str, path: &Path) -> Result<(), PlanError> {
    if path.is_absolute() { Ok(()) } else { Err(PlanError::Relative { kind, path: path.to_owned() }) }
}

fn check_name(kind: &'static str, name: &str, max: usize) -> Result<(), PlanError> {
    let ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if (1..=max).contains(&name.len()) && name.bytes().all(ok) {
        Ok(())
    } else {
        Err(PlanError::Name { kind, name: name.chars().take(80).collect(), max })
    }
}

fn once(seen: &mut BTreeSet<(&'static str, String)>, kind: &'static str, name: &impl Display) -> Result<(), PlanError> {
    let name = name.to_string();
    if seen.insert((kind, name.clone())) { Ok(()) } else { Err(PlanError::Twice { kind, name }) }
}

fn command_line(words: &[String], devices: usize) -> Result<String, PlanError> {
    let mut line = String::from(COMMAND_LINE);
    for word in words {
        // A quote would join words, and what follows `--` goes to init instead of the kernel.
        let ok = |b: u8| b.is_ascii_graphic() && b != b'"';
        if word.is_empty() || word == "--" || !word.bytes().all(ok) {
            return Err(PlanError::KernelArgument(word.chars().take(80).collect()));
        }
        line.push(' ');
        line.push_str(word);
    }
    let whole = line.len() + COMMAND_LINE_FRAME + devices * DEVICE_WORD + 1;
    match whole.checked_sub(COMMAND_LINE_SIZE) {
        None | Some(0) => Ok(line),
        Some(excess) => Err(PlanError::CommandLine(excess)),
    }
}

#[cfg(test)]
mod tests {
    use nacelle_protocol::ids::SandboxId;
    use nacelle_protocol::vm;

    use super::*;

    fn config() -> VmConfig {
        VmConfig {
            generation: GENERATION,
            sandbox: SandboxId::new("pod-1").expect("id"),
            vcpus: 1,
            memory_mib: 128,
            kernel: "/k".into(),
            agent: "/a".into(),
            kernel_args: vec!["loglevel=7".into()],
            shares: vec![share("layers")],
            disks: vec![disk("upper")],
            sockets: vec![vm::Socket { port: 1024, source: "/s".into() }],
            awaits_nics: false,
            jail: Jail {
                root: "/run/j".into(),
                uid_base: 100_000,
                uid_count: 65_536,
                pod_root: None,
                network: Network::New,
                cgroups: Vec::new(),
                max_files: 1024,
                landlock: vm::Landlock::default(),
                seccomp: vm::Seccomp::default(),
            },
        }
    }

    fn share(tag: &str) -> vm::Share {
        vm::Share { tag: tag.into(), source: "/l".into(), read_only: true, idmap: false }
    }

    fn disk(serial: &str) -> vm::Disk {
        vm::Disk::raw(serial, "/d", false)
    }

    #[test]
    fn disks_find_their_parts_where_their_images_say() {
        let part = |source: &str, named: &str, absolute| vm::DiskPart {
            source: source.into(),
            named: named.into(),
            absolute,
            read_only: true,
        };
        let disk = |serial: &str, parts| vm::Disk {
            format: DiskFormat::Qcow2,
            parts,
            ..vm::Disk::raw(serial, format!("/img/{serial}.qcow2"), false)
        };
        let plan = |disks| Plan::new(&VmConfig { disks, ..config() });
        // The first is based on a file beside it and on what that is based on, with an absolute name; the second on the same.
        let base = || part("/real/base.raw", "/base/b.raw", true);
        let made = plan(vec![
            disk("a", vec![part("/img/mid.qcow2", "/img/x/../mid.qcow2", false), base()]),
            disk("b", vec![base()]),
        ]);
        let made = made.expect("plan");
        let inside: Vec<_> = made.entries.iter().map(|e| (e.inside.to_str().expect("text"), e.read_only)).collect();
        let disks = [("disk/a/img/a.qcow2", false), ("disk/a/img/mid.qcow2", true), ("base/b.raw", true)];
        assert_eq!(inside[3..7], [&disks[..], &[("disk/b/img/b.qcow2", false)]].concat());
        assert_eq!(made.machine.disks[0].path, "/disk/a/img/a.qcow2");
        for bad in ["/proc/self/mem", "/root/b.raw", "/disk/a/x", "/../kernel", "/", "relative"] {
            let refused = plan(vec![disk("a", vec![part("/x", bad, true)])]);
            assert!(matches!(refused, Err(PlanError::Part { .. })), "{bad}");
        }
        let two = plan(vec![disk("a", vec![base(), part("/other", "/base/b.raw", true)])]);
        assert!(matches!(two, Err(PlanError::Part { .. })), "two files of one name");
        let device = |serial: &str| vm::Disk { device: true, ..vm::Disk::raw(serial, "/dev/sdb", true) };
        let made = plan(vec![device("disk-0")]).expect("plan");
        assert_eq!((made.entries[3].kind, made.machine.disks[0].path.as_str()), (Kind::Device, "/dev/disk-0"));
        assert!(matches!(plan(vec![device("kvm")]), Err(PlanError::Twice { .. })));
    }

    #[test]
    fn names_inside_the_jail() {
        let plan = Plan::new(&config()).expect("plan");
        let inside: Vec<_> = plan.entries.iter().map(|e| e.inside.to_str().expect("text")).collect();
        assert_eq!(inside, ["kernel", "root", "share/layers", "disk/upper", "socket/1024"]);
        assert_eq!(plan.machine.disks[0].path, "/disk/upper");
        // From the working directory.
        assert_eq!(plan.machine.shares[0].path, "../share/layers");
        assert_eq!(plan.machine.sockets[0].1, "1024");
        assert!(plan.machine.disks[0].ephemeral);
        let init = format!("init=/{} loglevel=7", vm::AGENT_NAME);
        assert!(plan.machine.command_line.ends_with(&init), "{}", plan.machine.command_line);
        assert!(!plan.owns_files);
    }

    #[test]
    fn eleven_devices_fit_and_twelve_do_not() {
        let mut c = config();
        c.shares = vec![share("a"), share("b"), share("c")];
        c.disks = vec![disk("a"), disk("b"), disk("c")];
        assert!(Plan::new(&c).is_ok());
        c.disks.push(disk("d"));
        assert_eq!(Plan::new(&c), Err(PlanError::Devices { shares: 3, disks: 4, nics: 0 }));
    }

    #[test]
    fn network_devices_come_later_and_count() {
        let nic = |tap: &str| Nic { tap: tap.into(), mac: [2, 0, 0, 0, 0, 1] };
        let mut c = config();
        c.awaits_nics = true;
        c.shares = vec![share("a"), share("b")];
        let plan = Plan::new(&c).expect("plan");
        let connect = |taps: &[&str]| {
            let mut plan = plan.clone();
            plan.connect(Nics { nics: taps.iter().map(|tap| nic(tap)).collect() }).map(|()| plan.machine.nics.len())
        };
        assert_eq!(connect(&[]), Ok(0));
        assert_eq!(connect(&["a", "b", "c"]), Ok(3));
        let error = connect(&["a", "b", "c", "d"]).expect_err("too many");
        assert_eq!(
            error.to_string(),
            "plan devices: 2 shares, 1 disks and 4 network devices need 12 devices, and there are 11"
        );
        for bad in ["", "sixteen-letters-", "A", "a/b"] {
            assert!(matches!(connect(&[bad]), Err(PlanError::Name { kind: "tap", .. })), "{bad}");
        }
        assert!(matches!(connect(&["a", "a"]), Err(PlanError::Twice { kind: "tap", .. })));
    }

    #[test]
    fn what_libkrun_would_cut_or_panic_on_is_refused() {
        for bad in ["", "Upper", "a/b", "..", &"x".repeat(21)] {
            let mut c = config();
            c.disks = vec![disk(bad)];
            assert!(matches!(Plan::new(&c), Err(PlanError::Name { kind: "disk", .. })), "{bad}");
        }
        let mut c = config();
        c.shares = vec![share(&"x".repeat(37))];
        assert!(matches!(Plan::new(&c), Err(PlanError::Name { kind: "share", .. })));
        for bad in ["", "--", "a b", "a\"b", "ä", "a\n"] {
            let mut c = config();
            c.kernel_args = vec![bad.into()];
            assert!(matches!(Plan::new(&c), Err(PlanError::KernelArgument(_))), "{bad}");
        }
    }

    #[test]
    fn the_command_line_leaves_room_for_the_devices() {
        let mut c = config();
        let room = COMMAND_LINE_SIZE - 1 - COMMAND_LINE.len() - COMMAND_LINE_FRAME - 7 * DEVICE_WORD;
        c.kernel_args = vec!["x".repeat(room - 1)];
        assert!(Plan::new(&c).is_ok());
        c.kernel_args = vec!["x".repeat(room)];
        assert_eq!(Plan::new(&c), Err(PlanError::CommandLine(1)));
    }

    #[test]
    fn names_are_used_once() {
        for taken in ["upper", ROOT_SERIAL] {
            let mut c = config();
            c.disks.push(disk(taken));
            assert!(matches!(Plan::new(&c), Err(PlanError::Twice { kind: "disk", .. })), "{taken}");
        }
        let mut c = config();
        c.sockets.push(c.sockets[0].clone());
        assert!(matches!(Plan::new(&c), Err(PlanError::Twice { kind: "socket", .. })));
    }

    #[test]
    fn root_of_the_host_is_no_sandbox() {
        for (base, count) in [(0, 65_536), (100_000, 0), (u32::MAX - 1, 2)] {
            let mut c = config();
            (c.jail.uid_base, c.jail.uid_count) = (base, count);
            assert_eq!(Plan::new(&c), Err(PlanError::Ids { base, count }));
        }
        for (root, good) in [(0, false), (1, true), (u32::MAX - 65_535, true), (u32::MAX - 65_534, false)] {
            let mut c = config();
            c.jail.pod_root = Some(root);
            assert_eq!(Plan::new(&c).is_ok(), good, "{root}");
        }
    }

    #[test]
    fn paths_are_absolute() {
        let mut c = config();
        c.shares[0].source = "etc".into();
        assert!(matches!(Plan::new(&c), Err(PlanError::Relative { kind: "share", .. })));
    }

    #[test]
    fn another_generation_is_refused() {
        let mut c = config();
        c.generation += 1;
        assert_eq!(Plan::new(&c), Err(PlanError::Generation(GENERATION + 1)));
    }
}
