//! The `delete` action: clean up after a shim that cannot do it itself any more. Repeatable, quick, and without a server.
//!
//! containerd gives it five seconds, runs it when a shim died, when `start` failed and when in doubt, and does not mind
//! how often.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_shim_protos::api::DeleteResponse;
use nacelle_protocol::ids::SandboxId;
use protobuf::{Message, MessageField};
use rustix::mount::{UnmountFlags, unmount};

use crate::args::Args;
use crate::bundle::{self, Role};
use crate::cgroup;
use crate::config::Origin;
use crate::network::{self, Netns};
use crate::publisher::{now_ns, timestamp};
use crate::sandbox::KILLED;
use crate::state::{Dirs, RUN_ROOT, State, UidSlot};

/// How long a process may take to end.
const PATIENCE: Duration = Duration::from_secs(1);

/// Runs the action; returns the reply.
///
/// # Errors
/// What could not be cleaned up; it may be tried again.
pub fn run(args: &Args) -> anyhow::Result<Vec<u8>> {
    let (namespace, id) = args.ids()?;
    let dir = args.bundle.clone().unwrap_or_else(|| PathBuf::from("."));
    // A container of a pod has nothing of its own on the host: the pod goes on without it. A bundle that is half gone
    // tells nothing, and then the id does: only a sandbox's leads to a state.
    let pid = match bundle::role(&dir) {
        Ok(Role::Container(_)) => 0,
        _ => remove_sandbox(Path::new(RUN_ROOT), &namespace, &id)?,
    };
    // Nothing of nacelle's is mounted there; containerd expects it to be unmounted all the same.
    let _ = unmount(dir.join("rootfs"), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
    let response = DeleteResponse {
        pid,
        exit_status: KILLED,
        exited_at: MessageField::some(timestamp(now_ns())),
        ..DeleteResponse::default()
    };
    Ok(response.write_to_bytes()?)
}

/// Ends a sandbox by what it has written down; returns the VMM's process id, or 0.
fn remove_sandbox(run_root: &Path, namespace: &SandboxId, sandbox: &SandboxId) -> anyhow::Result<u32> {
    let default =
        || Origin::default().load().map(|config| config.data_dir).unwrap_or_else(|_| "/var/lib/nacelle".into());
    let dirs = |data: &Path| Dirs::new(run_root, data, namespace, sandbox);
    // Damage is no reason to leave the rest: the lifeline has ended the VMM when its shim died.
    let state = State::read(&dirs(Path::new("/"))).unwrap_or_default().unwrap_or_default();
    let data = if state.data_dir.as_os_str().is_empty() { default() } else { state.data_dir };
    // It lives where containerd has given up on it, such as in the middle of a Create: nobody else would end it.
    if let Some(shim) = state.shim {
        shim.end(PATIENCE)?;
    }
    if let Some(vmm) = state.vmm {
        vmm.kill(PATIENCE)?;
    }
    // A namespace that is gone has taken everything with it.
    if let Some(netns) = state.netns.and_then(|path| Netns::open(&path).ok()) {
        network::detach(&netns, &network::label(namespace, sandbox))?;
    }
    cgroup::remove(&state.cgroups);
    dirs(&data).remove()?;
    UidSlot::forget(run_root, &dirs(&data));
    if !state.socket.as_os_str().is_empty() && UnixStream::connect(&state.socket).is_err() {
        let _ = fs::remove_file(&state.socket);
    }
    Ok(state.vmm.map_or(0, |vmm| vmm.pid))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Process;

    #[test]
    fn a_crashed_sandbox_is_cleaned_up_twice() {
        let root = tempfile::tempdir().expect("tempdir");
        let (run, data) = (root.path().join("run"), root.path().join("data"));
        let id = |text| SandboxId::new(text).expect("id");
        let (namespace, sandbox) = (id("default"), id("s1"));
        let dirs = Dirs::new(&run, &data, &namespace, &sandbox);
        dirs.create().expect("create");
        let sleep = || std::process::Command::new("sleep").arg("60").spawn().expect("spawn");
        let (mut shim, mut vmm) = (sleep(), sleep());
        let socket = root.path().join("socket");
        fs::write(&socket, b"").expect("write");
        let state = State {
            shim: Process::find(shim.id()),
            vmm: Process::find(vmm.id()),
            cgroups: Vec::new(),
            netns: None,
            data_dir: data.clone(),
            socket: socket.clone(),
        };
        state.write(&dirs).expect("write");
        assert_eq!(remove_sandbox(&run, &namespace, &sandbox).expect("remove"), vmm.id());
        assert!(!shim.wait().expect("wait").success() && !vmm.wait().expect("wait").success());
        assert!(!socket.exists() && State::read(&dirs).expect("read").is_none());
        assert_eq!(remove_sandbox(&run, &namespace, &sandbox).expect("again"), 0);
    }
}
