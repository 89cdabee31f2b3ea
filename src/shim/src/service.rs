//! containerd's Task service ↔ calls. No decisions are made here; ttrpc's types end here, and so do nacelle's errors:
//! this is the only place that knows their codes.
//!
//! The messages of `containerd.task.v2.Task` and `containerd.task.v3.Task` are the same byte for byte, so one service
//! stands under both names: 1.7 knows the first alone, and later versions use what the shim has announced.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::shim_async::{Task, create_task};
use containerd_shim_protos::types::empty::Empty;
use containerd_shim_protos::types::task::{ProcessInfo, Status};
use nacelle_protocol::ids::{ContainerId, ExecId};
use nacelle_rootfs::cache::CacheError;
use nacelle_rootfs::plan::Mount;
use nacelle_rootfs::volume::store::StoreError;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{EnumOrUnknown, MessageField};
use ttrpc::r#async::{Service, TtrpcContext};
use ttrpc::{Code, get_status};

use crate::bootstrap;
use crate::disks::DiskError;
use crate::driver::Handle;
use crate::guest::{GuestError, STATS_TYPE};
use crate::pod::PodError;
use crate::publisher::timestamp;
use crate::sandbox::{Exit, Phase, ProcessKey, Refusal};
use crate::sandbox_api;
use crate::sources::SourcesError;
use crate::stdio::Wanted;
use crate::task::{Call, Create, Exec, Reply, TaskError};

/// Names of the service: the one that is generated, and the one of containerd 1.7.
const TASK_V3: &str = "containerd.task.v3.Task";
const TASK_V2: &str = "containerd.task.v2.Task";

/// The Task service of one sandbox.
#[derive(Debug)]
pub struct TaskService {
    driver: Handle,
    /// Process id of the shim.
    pid: u32,
}

/// The services that the shim offers, by name.
pub fn services(driver: &Handle) -> HashMap<String, Service> {
    let service = Arc::new(TaskService { driver: driver.clone(), pid: std::process::id() });
    let mut all = create_task(service.clone());
    if let Some(v2) = create_task(service).remove(TASK_V3) {
        all.insert(TASK_V2.to_owned(), v2);
    }
    all.extend(sandbox_api::service(driver));
    all
}

/// The code and the whole chain of causes, once.
pub fn status(error: &TaskError) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code_of(error), crate::chain(error)))
}

/// What containerd goes by.
pub fn code_of(error: &TaskError) -> Code {
    match error {
        TaskError::Refused(refusal, _) => match refusal {
            Refusal::NotFound | Refusal::Finished => Code::NOT_FOUND,
            Refusal::Exists => Code::ALREADY_EXISTS,
            Refusal::WrongPhase(_) => Code::FAILED_PRECONDITION,
            Refusal::Booting | Refusal::VmGone => Code::UNAVAILABLE,
        },
        TaskError::Bundle(_)
        | TaskError::Annotation(_)
        | TaskError::Spec(_)
        | TaskError::Plan(_)
        | TaskError::Patches(_)
        | TaskError::Sources(SourcesError::Annotation(_) | SourcesError::Mount(_) | SourcesError::Plan(_))
        // A patch that cannot be applied is the request's fault as well.
        | TaskError::Pod(PodError::Layers(CacheError::Patch(_)))
        | TaskError::Stdio(_)
        | TaskError::Config(_)
        | TaskError::Decode { .. } => Code::INVALID_ARGUMENT,
        TaskError::Sources(SourcesError::Store(StoreError::NotFound(_))) => Code::NOT_FOUND,
        TaskError::Sources(SourcesError::Disk(error)) | TaskError::Pod(PodError::Disk(error)) => match error {
            DiskError::Busy { .. } | DiskError::Late(_) => Code::FAILED_PRECONDITION,
            DiskError::Lock { .. } => Code::UNKNOWN,
            DiskError::Chain(_)
            | DiskError::Kind(_)
            | DiskError::ReadOnlyFormat(_)
            | DiskError::DataFile { .. }
            | DiskError::Twice(_) => Code::INVALID_ARGUMENT,
        },
        TaskError::NoProcess(..) => Code::FAILED_PRECONDITION,
        TaskError::Guest(GuestError::Refused { code, .. }) => match code {
            // Not Unimplemented: containerd would take it for a shim of an older version, and ask again.
            Code::NOT_FOUND | Code::ALREADY_EXISTS | Code::FAILED_PRECONDITION | Code::INVALID_ARGUMENT => *code,
            _ => Code::UNKNOWN,
        },
        TaskError::Guest(GuestError::Timeout(_) | GuestError::Gone { .. })
        | TaskError::Ended(..)
        | TaskError::Pod(PodError::Condemned(_))
        | TaskError::Leaving => Code::UNAVAILABLE,
        TaskError::Guest(_)
        | TaskError::Pod(_)
        | TaskError::Sources(_)
        | TaskError::Export(_)
        | TaskError::Volume(_)
        | TaskError::Hook(_) => Code::UNKNOWN,
    }
}

/// A part of a request that cannot be read.
pub fn invalid(what: &str, error: &dyn std::error::Error) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(Code::INVALID_ARGUMENT, format!("{what}: {}", crate::chain(error))))
}

/// Names a process.
///
/// # Errors
/// InvalidArgument for ids that could not be file names.
pub fn key(id: &str, exec_id: &str) -> ttrpc::Result<ProcessKey> {
    let container = ContainerId::new(id).map_err(|e| invalid("container id", &e))?;
    let exec = (!exec_id.is_empty()).then(|| ExecId::new(exec_id)).transpose();
    Ok(ProcessKey { container, exec: exec.map_err(|e| invalid("exec id", &e))? })
}

/// When it ended, if it has.
pub fn exited_at(exit: Option<Exit>) -> MessageField<Timestamp> {
    exit.map(|exit| timestamp(exit.at_ns)).into()
}

impl TaskService {
    async fn call(&self, id: &str, exec_id: &str, call: Call) -> ttrpc::Result<Reply> {
        self.driver.call(key(id, exec_id)?, call).await.map_err(|error| status(&error))
    }

    async fn done(&self, id: &str, exec_id: &str, call: Call) -> ttrpc::Result<Empty> {
        self.call(id, exec_id, call).await.map(|_| Empty::new())
    }
}

/// The driver answers each call with its own kind of reply.
pub fn odd(reply: &Reply) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(Code::INTERNAL, format!("answer call: unexpected reply {reply:?}")))
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        tracing::info!("create {}", request.id);
        if !request.checkpoint.is_empty() || !request.parent_checkpoint.is_empty() {
            let status = get_status(Code::INVALID_ARGUMENT, "create from a checkpoint: not supported");
            return Err(ttrpc::Error::RpcStatus(status));
        }
        let origin = request.options.as_ref().map(bootstrap::origin).transpose();
        let origin = origin.map_err(|e| invalid("runtime options", &e))?.flatten();
        let rootfs = request.rootfs.into_iter().map(|mount| Mount {
            kind: mount.type_,
            source: mount.source,
            target: mount.target,
            options: mount.options,
        });
        let create = Create {
            bundle: PathBuf::from(request.bundle),
            rootfs: rootfs.collect(),
            io: Wanted {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
            origin,
            sandbox: None,
        };
        match self.call(&request.id, "", Call::Create(create)).await? {
            Reply::Pid(pid) => Ok(api::CreateTaskResponse { pid, ..Default::default() }),
            other => Err(odd(&other)),
        }
    }

    async fn start(&self, _: &TtrpcContext, request: api::StartRequest) -> ttrpc::Result<api::StartResponse> {
        match self.call(&request.id, &request.exec_id, Call::Start).await? {
            Reply::Pid(pid) => Ok(api::StartResponse { pid, ..Default::default() }),
            other => Err(odd(&other)),
        }
    }

    async fn delete(&self, _: &TtrpcContext, request: api::DeleteRequest) -> ttrpc::Result<api::DeleteResponse> {
        match self.call(&request.id, &request.exec_id, Call::Delete).await? {
            Reply::Exit(pid, exit) => Ok(api::DeleteResponse {
                pid,
                exit_status: exit.map_or(0, |exit| exit.status),
                exited_at: exited_at(exit),
                ..Default::default()
            }),
            other => Err(odd(&other)),
        }
    }

    async fn exec(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> ttrpc::Result<Empty> {
        if request.exec_id.is_empty() {
            return Err(ttrpc::Error::RpcStatus(get_status(Code::INVALID_ARGUMENT, "add exec: it has no id")));
        }
        let exec = Exec {
            process: request.spec.into_option().unwrap_or_default().value,
            io: Wanted {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
        };
        self.done(&request.id, &request.exec_id, Call::Exec(exec)).await
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> ttrpc::Result<Empty> {
        let call = Call::Kill { signal: request.signal, all: request.all };
        self.done(&request.id, &request.exec_id, call).await
    }

    async fn wait(&self, _: &TtrpcContext, request: api::WaitRequest) -> ttrpc::Result<api::WaitResponse> {
        match self.call(&request.id, &request.exec_id, Call::Wait).await? {
            Reply::Exit(_, exit) => Ok(api::WaitResponse {
                exit_status: exit.map_or(0, |exit| exit.status),
                exited_at: exited_at(exit),
                ..Default::default()
            }),
            other => Err(odd(&other)),
        }
    }

    async fn state(&self, _: &TtrpcContext, request: api::StateRequest) -> ttrpc::Result<api::StateResponse> {
        let state = match self.call(&request.id, &request.exec_id, Call::State).await? {
            Reply::State(state) => state,
            other => return Err(odd(&other)),
        };
        let status = match state.phase {
            Phase::Creating | Phase::Created | Phase::Starting => Status::CREATED,
            Phase::Running if state.paused => Status::PAUSED,
            Phase::Running => Status::RUNNING,
            Phase::Stopped | Phase::Deleting => Status::STOPPED,
        };
        Ok(api::StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: state.bundle.display().to_string(),
            pid: state.pid,
            status: EnumOrUnknown::new(status),
            stdin: state.io.stdin,
            stdout: state.io.stdout,
            stderr: state.io.stderr,
            terminal: state.io.terminal,
            exit_status: state.exit.map_or(0, |exit| exit.status),
            exited_at: exited_at(state.exit),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: api::PidsRequest) -> ttrpc::Result<api::PidsResponse> {
        match self.call(&request.id, "", Call::Pids).await? {
            Reply::Pids(pids) => Ok(api::PidsResponse {
                processes: pids.into_iter().map(|pid| ProcessInfo { pid, ..Default::default() }).collect(),
                ..Default::default()
            }),
            other => Err(odd(&other)),
        }
    }

    async fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> ttrpc::Result<Empty> {
        self.done(&request.id, "", Call::Pause).await
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> ttrpc::Result<Empty> {
        self.done(&request.id, "", Call::Resume).await
    }

    async fn stats(&self, _: &TtrpcContext, request: api::StatsRequest) -> ttrpc::Result<api::StatsResponse> {
        match self.call(&request.id, "", Call::Stats).await? {
            Reply::Stats(value) => {
                let stats = Any { type_url: STATS_TYPE.to_owned(), value, ..Any::default() };
                Ok(api::StatsResponse { stats: MessageField::some(stats), ..Default::default() })
            }
            other => Err(odd(&other)),
        }
    }

    async fn update(&self, _: &TtrpcContext, request: api::UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let resources = request.resources.into_option().unwrap_or_default().value;
        self.done(&request.id, "", Call::Update(resources)).await
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: api::ResizePtyRequest) -> ttrpc::Result<Empty> {
        let call = Call::Resize { width: request.width, height: request.height };
        self.done(&request.id, &request.exec_id, call).await
    }

    async fn close_io(&self, _: &TtrpcContext, request: api::CloseIORequest) -> ttrpc::Result<Empty> {
        // There is nothing else to close.
        if !request.stdin {
            return Ok(Empty::new());
        }
        self.done(&request.id, &request.exec_id, Call::CloseIo).await
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: api::CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let status = get_status(Code::UNIMPLEMENTED, "checkpoint container: not supported in a VM");
        Err(ttrpc::Error::RpcStatus(status))
    }

    async fn connect(&self, _: &TtrpcContext, request: api::ConnectRequest) -> ttrpc::Result<api::ConnectResponse> {
        // Asked by a containerd that restarts, about whatever it finds: it always gets an answer.
        let task_pid = match self.call(&request.id, "", Call::State).await {
            Ok(Reply::State(state)) => state.pid,
            _ => 0,
        };
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(api::ConnectResponse { shim_pid: self.pid, task_pid, version, ..Default::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: api::ShutdownRequest) -> ttrpc::Result<Empty> {
        self.done(&request.id, "", Call::Shutdown).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_chains() {
        let told = |error: &TaskError| match status(error) {
            ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
            other => panic!("{other}"),
        };
        let key = key("c1", "e1").expect("key");
        let (code, text) = told(&TaskError::Refused(Refusal::Finished, key.clone()));
        assert_eq!((code, text.as_str()), (Code::NOT_FOUND, "exec e1 of container c1: process already finished"));
        assert_eq!(told(&TaskError::Refused(Refusal::Exists, key.clone())).0, Code::ALREADY_EXISTS);
        assert_eq!(told(&TaskError::Refused(Refusal::WrongPhase("x"), key)).0, Code::FAILED_PRECONDITION);
        let io = std::io::Error::from_raw_os_error(28);
        let error = PodError::Io { what: "write", path: "/x".into(), source: io };
        let (code, text) = told(&TaskError::Pod(error));
        assert_eq!((code, text.as_str()), (Code::UNKNOWN, "write /x: No space left on device (os error 28)"));
        let refused = |code| TaskError::Guest(GuestError::Refused { what: "start", code, message: "m".into() });
        assert_eq!(told(&refused(Code::NOT_FOUND)).0, Code::NOT_FOUND);
        assert_eq!(told(&refused(Code::UNIMPLEMENTED)).0, Code::UNKNOWN);
    }

    #[test]
    fn ids_are_checked_at_the_door() {
        assert!(key("../c1", "").is_err() && key("c1", "a/b").is_err());
        assert_eq!(key("c1", "").expect("key").exec, None);
    }
}
