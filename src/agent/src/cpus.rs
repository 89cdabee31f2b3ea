//! The virtual CPUs beside the first. The guest boots on one, because each of the others costs a good part of a boot; they
//! come up when the host has been called, while it decides what to run here.
//!
//! ```text
//!  kernel (maxcpus=1) ─► agent ─► dial ─┬─► requests …            ─┬─► execve of the first container
//!                                       └─► cpu1, cpu2, … online ──┘
//! ```
//!
//! No program of a container starts before all of them are there: runtimes size their pools once, by what they find.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tokio::sync::watch;

/// Where the kernel has a directory for each CPU.
const CPUS: &str = "/sys/devices/system/cpu";

/// Whether all CPUs are up.
#[derive(Debug)]
pub struct Cpus(watch::Sender<bool>);

impl Default for Cpus {
    fn default() -> Self {
        Self(watch::Sender::new(false))
    }
}

impl Cpus {
    /// Brings up all that are not. Blocks; a CPU that does not come is told on the console and done without.
    pub fn bring_up(&self) {
        for control in offline(Path::new(CPUS)) {
            if let Err(error) = fs::write(&control, "1") {
                crate::say!("bring up {}: {error}", control.display());
            }
        }
        self.0.send_replace(true);
    }

    /// Waits until [`Cpus::bring_up`] is through.
    pub async fn up(&self) {
        // The sender lives as long as `self`.
        let _ = self.0.subscribe().wait_for(|up| *up).await;
    }
}

/// The control files of the CPUs that are down, in the order of their numbers. The first CPU often has none.
fn offline(cpus: &Path) -> Vec<PathBuf> {
    let down = |path: &Path| -> io::Result<bool> { Ok(fs::read_to_string(path.join("online"))?.trim() == "0") };
    let number = |entry: fs::DirEntry| -> Option<(u32, PathBuf)> {
        let number = entry.file_name().to_str()?.strip_prefix("cpu")?.parse().ok()?;
        Some((number, entry.path()))
    };
    let mut found: Vec<_> = fs::read_dir(cpus).into_iter().flatten().flatten().filter_map(number).collect();
    found.sort();
    found.into_iter().filter(|(_, path)| down(path).unwrap_or(false)).map(|(_, path)| path.join("online")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_are_down_in_order() {
        let dir = tempfile::tempdir().expect("directory");
        for (name, online) in [("cpu0", None), ("cpu10", Some("0\n")), ("cpu2", Some("0\n")), ("cpu1", Some("1\n"))] {
            fs::create_dir(dir.path().join(name)).expect("cpu");
            if let Some(online) = online {
                fs::write(dir.path().join(name).join("online"), online).expect("control file");
            }
        }
        fs::create_dir(dir.path().join("cpuidle")).expect("something else");
        let found: Vec<_> = offline(dir.path());
        assert_eq!(found, [dir.path().join("cpu2/online"), dir.path().join("cpu10/online")]);
        assert_eq!(offline(Path::new("/nonexistent")), Vec::<PathBuf>::new());
    }
}
