//! OCI hooks. They are programs of the host, so they run on the host, and the guest never hears of them.
//!
//! A hook gets the container's state as JSON on stdin. Its `pid` is the VMM's: that process lives in the container's
//! network namespace, which is what hooks want a pid for.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use oci_spec::runtime::{Hook, Hooks};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

/// How long a hook without a time limit of its own may take.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
/// How much of what a hook says on stderr is kept, in bytes.
const MAX_STDERR: u64 = 4096;

/// Why a hook failed.
#[derive(Debug, Error)]
pub enum HookError {
    /// It cannot be started or waited for.
    #[error("run {stage} hook {path}")]
    Run {
        /// Which kind of hook.
        stage: &'static str,
        /// The program.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// It took too long, and was killed.
    #[error("run {stage} hook {path}: not done after {seconds} s")]
    Timeout {
        /// Which kind of hook.
        stage: &'static str,
        /// The program.
        path: PathBuf,
        /// Its limit.
        seconds: u64,
    },
    /// It said no.
    #[error("run {stage} hook {path}: {status}: {stderr}")]
    Status {
        /// Which kind of hook.
        stage: &'static str,
        /// The program.
        path: PathBuf,
        /// How it ended.
        status: std::process::ExitStatus,
        /// The beginning of what it said.
        stderr: String,
    },
}

/// A container's state: OCI runtime specification, `runtime.md`, "State".
#[derive(Clone, Debug)]
pub struct State {
    /// Version of the specification that the bundle follows.
    pub version: String,
    /// The container.
    pub id: String,
    /// `creating`, `created`, `running` or `stopped`.
    pub status: &'static str,
    /// A process in the container's network namespace; 0 for none.
    pub pid: u32,
    /// containerd's directory.
    pub bundle: PathBuf,
    /// Those of the bundle.
    pub annotations: HashMap<String, String>,
}

impl State {
    fn json(&self) -> Vec<u8> {
        let Self { version, id, status, pid, bundle, annotations } = self;
        let mut json = serde_json::json!({
            "ociVersion": version, "id": id, "status": status, "bundle": bundle, "annotations": annotations,
        });
        if *pid != 0 {
            json["pid"] = (*pid).into();
        }
        json.to_string().into_bytes()
    }
}

/// Runs hooks one after the other, until one fails.
///
/// # Errors
/// [`HookError`] of the one that failed.
pub async fn run(stage: &'static str, hooks: Option<&Vec<Hook>>, state: &State) -> Result<(), HookError> {
    for hook in hooks.into_iter().flatten() {
        run_one(stage, hook, state).await?;
    }
    Ok(())
}

/// Runs the hooks of a container's creation.
///
/// # Errors
/// [`HookError`] of the one that failed.
pub async fn created(hooks: &Hooks, state: &State) -> Result<(), HookError> {
    // Deprecated, but first: OCI runtime specification, `config.md`, "POSIX-platform Hooks".
    run("prestart", hooks.prestart().as_ref(), state).await?;
    run("createRuntime", hooks.create_runtime().as_ref(), state).await
}

async fn run_one(stage: &'static str, hook: &Hook, state: &State) -> Result<(), HookError> {
    let path: &Path = hook.path();
    let failed = |source| HookError::Run { stage, path: path.to_owned(), source };
    let args = hook.args().as_deref().unwrap_or_default();
    let env = hook.env().iter().flatten().filter_map(|pair| pair.split_once('='));
    let mut command = tokio::process::Command::new(path);
    if let Some(name) = args.first() {
        command.arg0(name);
    }
    command
        .args(args.iter().skip(1))
        .env_clear()
        .envs(env)
        .current_dir(&state.bundle)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let seconds = hook.timeout().and_then(|s| u64::try_from(s).ok()).filter(|s| *s > 0);
    let patience = seconds.map_or(DEFAULT_TIMEOUT, Duration::from_secs);
    let mut child = command.spawn().map_err(failed)?;
    let run = async {
        if let Some(mut stdin) = child.stdin.take() {
            // A hook need not read its stdin.
            let _ = stdin.write_all(&state.json()).await;
        }
        let mut said = Vec::new();
        if let Some(mut stderr) = child.stderr.take() {
            (&mut stderr).take(MAX_STDERR).read_to_end(&mut said).await?;
            tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await?;
        }
        Ok((child.wait().await?, said))
    };
    match timeout(patience, run).await {
        Err(_) => Err(HookError::Timeout { stage, path: path.to_owned(), seconds: patience.as_secs() }),
        Ok(Err(source)) => Err(failed(source)),
        Ok(Ok((status, _))) if status.success() => Ok(()),
        Ok(Ok((status, said))) => {
            let stderr = String::from_utf8_lossy(&said).trim().replace('\n', "; ");
            Err(HookError::Status { stage, path: path.to_owned(), status, stderr })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(json: serde_json::Value) -> Vec<Hook> {
        vec![serde_json::from_value(json).expect("hook")]
    }

    fn state(bundle: &Path) -> State {
        let (version, id, annotations) = ("1.1.0".into(), "c1".into(), HashMap::new());
        State { version, id, status: "creating", pid: 7, bundle: bundle.into(), annotations }
    }

    #[tokio::test]
    async fn a_hook_gets_state_args_and_environment() {
        let dir = tempfile::tempdir().expect("tempdir");
        let script = "cat >state; echo \"$0 $1 $FOO\" >args";
        let hooks = hook(serde_json::json!({
            "path": "/bin/sh", "args": ["sh", "-c", script, "zero", "one"], "env": ["FOO=bar"],
        }));
        run("createRuntime", Some(&hooks), &state(dir.path())).await.expect("run");
        let text = std::fs::read_to_string(dir.path().join("state")).expect("read");
        let json: serde_json::Value = serde_json::from_str(&text).expect("json");
        assert_eq!((json["pid"].as_u64(), json["id"].as_str()), (Some(7), Some("c1")));
        assert_eq!(std::fs::read_to_string(dir.path().join("args")).expect("read"), "zero one bar\n");
    }

    #[tokio::test]
    async fn failures_and_time_limits() {
        let dir = tempfile::tempdir().expect("tempdir");
        let failing = hook(serde_json::json!({ "path": "/bin/sh", "args": ["sh", "-c", "echo why >&2; exit 3"] }));
        let error = run("prestart", Some(&failing), &state(dir.path())).await.expect_err("fails").to_string();
        assert_eq!(error, "run prestart hook /bin/sh: exit status: 3: why");
        let slow = hook(serde_json::json!({ "path": "/bin/sleep", "args": ["sleep", "60"], "timeout": 1 }));
        let error = run("poststop", Some(&slow), &state(dir.path())).await.expect_err("fails");
        assert!(matches!(error, HookError::Timeout { seconds: 1, .. }));
        let missing = hook(serde_json::json!({ "path": "/nonexistent" }));
        assert!(matches!(run("x", Some(&missing), &state(dir.path())).await, Err(HookError::Run { .. })));
    }
}
