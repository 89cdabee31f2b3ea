//! What the host mounts below a volume while its container runs (mount propagation `rslave`, Kubernetes' HostToContainer).
//!
//! Such a mount arrives with the ids of its file system, which the VMM has no right to use. So it is covered by a copy with
//! the pod's ids. The copy goes when the mount goes, or a file system that the host has unmounted would stay busy.
//!
//! ```text
//!  the host mounts X    ──propagates──►  <run>/volumes/c1-0/x   X, with the host's ids
//!                                          └─ covered by        a copy of X, with the pod's ids
//!  the host unmounts X  ──propagates──►  <run>/volumes/c1-0/x   the copy alone: unmounted
//! ```

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, PipeReader};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::config::Idmap;
use crate::volumes;

/// The mounts of this process; poll(2) reports a change (proc_pid_mountinfo(5)).
const MOUNTINFO: &str = "/proc/self/mountinfo";

/// Between two looks, as mounts come in swarms when a pod starts or ends anywhere on the node.
const PAUSE: Duration = Duration::from_millis(100);

/// A mount, as a line of mountinfo has it.
#[derive(Clone, Debug)]
struct Mount {
    id: u32,
    parent: u32,
    /// Major and minor number of its file system.
    device: String,
    point: PathBuf,
    idmapped: bool,
}

impl Mount {
    /// `36 35 98:0 /root /mount\040point rw,idmapped shared:1 - ext4 /dev/root rw`
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let mut text = || std::str::from_utf8(fields.next()?).ok();
        let (id, parent, device) = (text()?.parse().ok()?, text()?.parse().ok()?, text()?.to_owned());
        let point = unescape(fields.nth(1)?);
        let idmapped = fields.next()?.split(|byte| *byte == b',').any(|option| option == b"idmapped");
        Some(Self { id, parent, device, point, idmapped })
    }

    fn same(&self, other: &Self) -> bool {
        (self.id, &self.device, &self.point) == (other.id, &other.device, &other.point)
    }
}

/// Space, tab, newline and backslash are written as three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|_| first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        let code = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        out.push(code.unwrap_or(first));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(OsString::from_vec(out))
}

/// What is to be done about mount points, relative to the share.
#[derive(Debug, Default)]
struct Changes {
    cover: BTreeSet<PathBuf>,
    uncover: Vec<PathBuf>,
}

/// The mounts that arrived and were covered, or could not be.
#[derive(Debug, Default)]
struct Arrivals(Vec<Mount>);

impl Arrivals {
    /// Compares what is mounted below `share` with what is known.
    fn look(&mut self, mountinfo: &[u8], share: &Path) -> Changes {
        let all = mountinfo.split(|byte| *byte == b'\n').filter_map(Mount::parse);
        let table: Vec<Mount> = all.filter(|mount| mount.point.starts_with(share)).collect();
        let below = |mount: &Mount| mount.point.strip_prefix(share).map(Path::to_owned).unwrap_or_default();
        let mut changes = Changes::default();
        self.0.retain(|known| {
            let here = table.iter().any(|mount| mount.same(known));
            let copy = |mount: &Mount| mount.idmapped && mount.point == known.point && mount.device == known.device;
            if !here && table.iter().any(copy) {
                changes.uncover.push(below(known));
            }
            here
        });
        let by_id: HashMap<u32, &Mount> = table.iter().map(|mount| (mount.id, mount)).collect();
        for mount in &table {
            // An entry of the share itself is the shim's own work.
            let arrived = below(mount).components().count() > 1 && !mount.idmapped;
            if arrived && is_visible(mount, &table, &by_id) && !self.0.iter().any(|known| known.same(mount)) {
                changes.cover.insert(below(mount));
                self.0.push(mount.clone());
            }
        }
        changes
    }
}

/// Whether nothing is mounted over it, nor over any mount that it is below.
fn is_visible(mount: &Mount, table: &[Mount], by_id: &HashMap<u32, &Mount>) -> bool {
    let covers = |below: &Mount| table.iter().find(|top| top.parent == below.id && top.point == below.point);
    let (mut at, mut through) = (mount, None);
    // No chain of mounts is longer than their number.
    for _ in 0..table.len() {
        if covers(at).is_some_and(|top| Some(top.id) != through) {
            return false;
        }
        let Some(parent) = by_id.get(&at.parent) else { return true };
        (at, through) = (parent, Some(at.id));
    }
    true
}

/// Covers what arrives below `share`, in a thread that ends with the other end of `life`. `program` is the VMM's, which maps
/// ids; `vmm` its process.
///
/// # Errors
/// There can be no more threads, or no more files.
pub fn follow(life: PipeReader, program: PathBuf, vmm: u32, share: PathBuf, idmap: Idmap) -> io::Result<()> {
    let table = File::open(MOUNTINFO)?;
    let watch = move || {
        if let Err(e) = watch(&table, &life, &program, vmm, &share, idmap) {
            tracing::warn!("follow what the host mounts below {}: {e}", share.display());
        }
    };
    thread::Builder::new().name("arrivals".into()).spawn(watch).map(drop)
}

fn watch(table: &File, life: &PipeReader, program: &Path, vmm: u32, share: &Path, idmap: Idmap) -> io::Result<()> {
    let mut arrivals = Arrivals::default();
    loop {
        let changes = arrivals.look(&fs::read(MOUNTINFO)?, share);
        for point in &changes.uncover {
            if let Err(e) = volumes::uncover(share, point) {
                tracing::warn!("{}", crate::chain(&e));
            }
        }
        for point in &changes.cover {
            match volumes::cover(program, vmm, share, point, idmap) {
                Ok(()) => tracing::debug!("{} has arrived", point.display()),
                Err(e) => tracing::warn!("the guest cannot use {}: {}", point.display(), crate::chain(&e)),
            }
        }
        // A change since the table was opened, or since the last time, is reported at once.
        let mut wait = [PollFd::new(table, PollFlags::PRI), PollFd::new(life, PollFlags::empty())];
        match poll(&mut wait, None) {
            Err(Errno::INTR) => {}
            result => drop(result?),
        }
        if wait[1].revents().contains(PollFlags::HUP) {
            return Ok(());
        }
        thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARE: &str = "/run/volumes";
    /// A root, the share, and a volume in it.
    const QUIET: &str = "1 0 8:1 / / rw - ext4 d rw\n2 1 0:9 / /run/volumes rw shared:1 - tmpfs t rw\n\
        3 2 8:1 /v /run/volumes/c1-0 rw,idmapped shared:2 - ext4 d rw\n";

    fn look(arrivals: &mut Arrivals, lines: &str) -> (Vec<String>, Vec<String>) {
        let changes = arrivals.look(format!("{QUIET}{lines}").as_bytes(), Path::new(SHARE));
        let text = |path: &PathBuf| path.display().to_string();
        (changes.cover.iter().map(text).collect(), changes.uncover.iter().map(text).collect())
    }

    fn list(words: &[&str]) -> Vec<String> {
        words.iter().map(|&word| word.to_owned()).collect()
    }

    #[test]
    fn covers_once_and_uncovers_when_it_is_gone() {
        let mut arrivals = Arrivals::default();
        assert_eq!(look(&mut arrivals, ""), (list(&[]), list(&[])));
        let x = "4 3 0:30 / /run/volumes/c1-0/a\\040b rw shared:3 - tmpfs x rw\n";
        assert_eq!(look(&mut arrivals, x), (list(&["c1-0/a b"]), list(&[])));
        assert_eq!(look(&mut arrivals, x), (list(&[]), list(&[])));
        let copy = "5 4 0:30 / /run/volumes/c1-0/a\\040b rw,idmapped - tmpfs x rw\n";
        assert_eq!(look(&mut arrivals, &format!("{x}{copy}")), (list(&[]), list(&[])));
        assert_eq!(look(&mut arrivals, &copy.replace("5 4", "5 3")), (list(&[]), list(&["c1-0/a b"])));
        // The number is given to the next one.
        assert_eq!(look(&mut arrivals, &x.replace("0:30", "0:31")), (list(&["c1-0/a b"]), list(&[])));
    }

    #[test]
    fn what_is_hidden_is_left_alone() {
        let mut arrivals = Arrivals::default();
        let x = "4 3 0:30 / /run/volumes/c1-0/x rw - tmpfs x rw\n6 4 0:31 / /run/volumes/c1-0/x/y rw - tmpfs y rw\n";
        assert_eq!(look(&mut arrivals, x), (list(&["c1-0/x", "c1-0/x/y"]), list(&[])));
        let mut arrivals = Arrivals::default();
        let copies = "5 4 0:30 / /run/volumes/c1-0/x rw,idmapped - tmpfs x rw\n\
            7 5 0:31 / /run/volumes/c1-0/x/y rw,idmapped - tmpfs y rw\n";
        assert_eq!(look(&mut arrivals, &format!("{x}{copies}")), (list(&[]), list(&[])));
        // Another one arrives in the copy, too, and only there it is seen.
        let later =
            "8 4 0:32 / /run/volumes/c1-0/x/z rw - tmpfs z rw\n9 5 0:32 / /run/volumes/c1-0/x/z rw - tmpfs z rw\n";
        assert_eq!(look(&mut arrivals, &format!("{x}{copies}{later}")), (list(&["c1-0/x/z"]), list(&[])));
    }

    #[test]
    fn what_is_no_arrival() {
        let mut arrivals = Arrivals::default();
        let lines =
            "4 2 0:30 / /run/volumes/c2-0 rw - tmpfs x rw\n5 1 0:31 / /run/elsewhere/a/b rw - tmpfs y rw\nnonsense\n";
        assert_eq!(look(&mut arrivals, lines), (list(&[]), list(&[])));
        // A table that makes no sense ends the search.
        let ring =
            "4 5 0:30 / /run/volumes/c1-0/x rw - tmpfs x rw\n5 4 0:30 / /run/volumes/c1-0/x rw,idmapped - tmpfs x rw\n";
        assert_eq!(look(&mut arrivals, ring), (list(&[]), list(&[])));
    }
}
