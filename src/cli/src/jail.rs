//! `nacelle jail print`: what the VMM of a running sandbox may reach, as the kernel has it and not as anybody planned it.
//!
//! Everything comes from `/proc/<vmm>`: the mounts of its root, which are all the files that there are for it, its ids,
//! capabilities, filters, limits, namespaces and cgroup.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Subcommand;
use nacelle_protocol::status::Status;
use serde::Serialize;

use crate::ps;

/// Namespaces, by their names in `/proc/<pid>/ns`.
const NAMESPACES: [&str; 7] = ["mnt", "pid", "ipc", "uts", "cgroup", "user", "net"];
/// Lines of `/proc/<pid>/status` that say what a process may do.
const RIGHTS: [&str; 11] = [
    "Uid",
    "Gid",
    "Groups",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
];
/// Lines of `/proc/<pid>/limits` that the jail sets.
const LIMITS: [&str; 3] = ["Max core file size", "Max processes", "Max open files"];

/// What can be asked about the jail.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print what the VMMs of running sandboxes may reach, in the kernel's own words
    Print {
        /// The sandbox; all of them when it is not given
        sandbox: Option<String>,
        /// Print one JSON array instead of text
        #[arg(long)]
        json: bool,
        /// Where the shims keep their run directories
        #[arg(long, default_value = "/run/nacelle")]
        run_dir: PathBuf,
    },
}

/// One VMM.
#[derive(Debug, Serialize)]
struct Confined {
    namespace: String,
    sandbox: String,
    vmm_pid: u32,
    /// By name, as /proc writes them.
    rights: BTreeMap<String, String>,
    /// First id inside, first id of the host, count; one line each.
    uid_map: Vec<String>,
    limits: BTreeMap<String, String>,
    /// Name → whether it is one of its own.
    own_namespaces: BTreeMap<&'static str, bool>,
    cgroup: String,
    mounts: Vec<Mount>,
    degraded: Vec<String>,
}

/// A mount that the VMM sees.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Mount {
    /// Where, inside.
    inside: String,
    /// Options of the mount, such as `ro,nosuid,nodev,noexec,idmapped`.
    options: String,
    /// Type of the file system.
    kind: String,
    /// What of the file system it is, as a path from its root.
    root: String,
}

/// Prints what is asked for; `false` when there is no such sandbox.
pub fn run(command: &Command, out: &mut impl io::Write) -> anyhow::Result<bool> {
    let Command::Print { sandbox, json, run_dir } = command;
    let wanted = |status: &Status| sandbox.as_ref().is_none_or(|name| *name == status.sandbox);
    let mut found = Vec::new();
    for status in ps::read_all(run_dir)?.into_iter().filter(wanted) {
        found.push(look(Path::new("/proc"), status)?);
    }
    if let (Some(name), []) = (sandbox, found.as_slice()) {
        bail!("find sandbox {name}: no such sandbox runs here");
    }
    if *json {
        serde_json::to_writer_pretty(&mut *out, &found)?;
        writeln!(out)?;
    } else {
        found.iter().try_for_each(|confined| print(confined, out))?;
    }
    Ok(true)
}

fn look(proc: &Path, status: Status) -> anyhow::Result<Confined> {
    let dir = proc.join(status.vmm_pid.to_string());
    let read = |name: &str| {
        let path = dir.join(name);
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    };
    let namespace = |of: &Path, name: &str| fs::read_link(of.join("ns").join(name)).ok();
    let own = |name| (name, namespace(&dir, name) != namespace(&proc.join("self"), name));
    Ok(Confined {
        rights: lines(&read("status")?, &RIGHTS, ":"),
        uid_map: read("uid_map")?.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect(),
        limits: lines(&read("limits")?, &LIMITS, "  "),
        own_namespaces: NAMESPACES.into_iter().map(own).collect(),
        cgroup: read("cgroup")?.trim().to_owned(),
        mounts: mounts(&read("mountinfo")?),
        namespace: status.namespace,
        sandbox: status.sandbox,
        vmm_pid: status.vmm_pid,
        degraded: status.degraded,
    })
}

/// The lines that begin with one of `names`, without runs of spaces.
fn lines(text: &str, names: &[&str], separator: &str) -> BTreeMap<String, String> {
    let split = |line: &str| {
        let (name, value) = line.split_once(separator)?;
        let value = value.split_whitespace().collect::<Vec<_>>().join(" ");
        names.contains(&name).then(|| (name.to_owned(), value))
    };
    text.lines().filter_map(split).collect()
}

/// proc_pid_mountinfo(5): id, parent, device, root, mount point, options, optional fields, `-`, type, source, options.
fn mounts(mountinfo: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let (head, tail) = line.split_once(" - ")?;
        let mut head = head.split(' ').skip(3).map(str::to_owned);
        let (root, inside, options) = (head.next()?, head.next()?, head.next()?);
        Some(Mount { inside, options, kind: tail.split(' ').next()?.to_owned(), root })
    };
    mountinfo.lines().filter_map(mount).collect()
}

fn print(confined: &Confined, out: &mut impl io::Write) -> anyhow::Result<()> {
    let Confined { namespace, sandbox, vmm_pid, .. } = confined;
    writeln!(out, "{namespace}/{sandbox}, VMM {vmm_pid}")?;
    for line in &confined.uid_map {
        writeln!(out, "  ids         {line}")?;
    }
    for (name, value) in &confined.rights {
        writeln!(out, "  {name:<11} {value}")?;
    }
    for (name, value) in &confined.limits {
        writeln!(out, "  limit       {} {value}", name.trim_start_matches("Max "))?;
    }
    for (name, own) in &confined.own_namespaces {
        writeln!(out, "  namespace   {name} {}", if *own { "of its own" } else { "of the host" })?;
    }
    writeln!(out, "  cgroup      {}", confined.cgroup)?;
    for Mount { inside, options, kind, root } in &confined.mounts {
        writeln!(out, "  mount       {inside}  {kind} {root}  {options}")?;
    }
    for reason in &confined.degraded {
        writeln!(out, "  degraded    {reason}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_proc_says() {
        let dir = tempfile::tempdir().unwrap();
        let vmm = dir.path().join("7");
        fs::create_dir(&vmm).unwrap();
        let write = |name: &str, text: &str| fs::write(vmm.join(name), text).unwrap();
        write("status", "Name:\tVM:c1\nUid:\t700000\t700000\t700000\t700000\nCapEff:\t00000000000000db\nSeccomp:\t2\n");
        write("uid_map", "         0     700000      65536\n");
        write("limits", "Limit     Soft\nMax open files            65536                65536                files\n");
        write("cgroup", "0::/\n");
        let line = "40 39 8:1 /usr/share/vmlinux /kernel ro,nosuid shared:1 master:2 - ext4 /dev/sda rw\nnonsense\n";
        write("mountinfo", line);
        let status = Status { sandbox: "c1".into(), vmm_pid: 7, ..Status::default() };
        let confined = look(dir.path(), status).unwrap();
        assert_eq!(confined.rights["Seccomp"], "2");
        assert_eq!(confined.limits["Max open files"], "65536 65536 files");
        let kernel = Mount {
            inside: "/kernel".into(),
            options: "ro,nosuid".into(),
            kind: "ext4".into(),
            root: "/usr/share/vmlinux".into(),
        };
        assert_eq!(confined.mounts, [kernel]);
        let mut out = Vec::new();
        print(&confined, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(
            text.contains("ids         0 700000 65536") && text.contains("/kernel  ext4 /usr/share/vmlinux"),
            "{text}"
        );
    }

    #[test]
    fn a_sandbox_that_is_not_there_is_said_to_be_missing() {
        let dir = tempfile::tempdir().unwrap();
        let command = Command::Print { sandbox: Some("c1".into()), json: false, run_dir: dir.path().into() };
        let error = run(&command, &mut Vec::new()).unwrap_err();
        assert_eq!(error.to_string(), "find sandbox c1: no such sandbox runs here");
    }
}
